"""What the names in an object's pickle mean: the closed lists, and what the caller allows."""

from __future__ import annotations

import argparse
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from shardpoint.dtypes import BY_NAME
from shardpoint.errors import (
    ForbiddenContentError,
    FormatError,
    NotSupportedError,
    ShardpointError,
)
from shardpoint.formats._numpy_pickles import (
    NDARRAY,
    NUMPY_FUNCTIONS,
    RECONSTRUCT,
    PendingDType,
    build_array,
)
from shardpoint.formats._object_globals import CALLS, Call, canonical_module
from shardpoint.formats._object_values import ObjectFactory, TensorDescription
from shardpoint.formats._pickle_guards import DEFAULT_LIMITS, WorkBudget, describe, measure
from shardpoint.formats._tensor_pickles import (
    REBUILD_FUNCTIONS,
    STORAGE_TYPES,
    DTypeName,
    StorageReference,
    StorageType,
    TensorClass,
    check_hooks,
    read_persistent_id,
    rebuild,
)

__all__ = ["ObjectResolver", "TensorMaker", "is_listed"]

TensorMaker: TypeAlias = Callable[[TensorDescription, StorageReference], Any]


class _TorchCall:
    """A torch function or class that REDUCE may call."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Allowed:
    """A class or function of the caller's."""

    __slots__ = ("name", "target")

    def __init__(self, name: str, target: Callable[..., Any]) -> None:
        self.name = name
        self.target = target


_TORCH_CALLS: Mapping[str, _TorchCall] = {
    name: _TorchCall(name)
    for name in (
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type_v2",
        *REBUILD_FUNCTIONS,
    )
}
_NUMPY_CALLS: Mapping[str, Call] = {
    name: Call(name, function) for name, function in NUMPY_FUNCTIONS.items()
}
_CLASSES: Mapping[str, Any] = {
    "torch.Tensor": TensorClass("torch.Tensor"),
    "torch.nn.parameter.Parameter": TensorClass("torch.nn.parameter.Parameter"),
    "numpy.ndarray": NDARRAY,
}
# Bags of attributes and nothing more, whatever they are called with: training arguments above all.
_NAMESPACES: Mapping[str, Any] = {
    name: _Allowed(name, kind)
    for name, kind in [
        ("argparse.Namespace", argparse.Namespace),
        ("types.SimpleNamespace", types.SimpleNamespace),
    ]
}
_CLOSED: Mapping[str, Any] = {
    **CALLS,
    **_NUMPY_CALLS,
    **STORAGE_TYPES,
    **_TORCH_CALLS,
    **_CLASSES,
    **_NAMESPACES,
}
_DTYPE_NAMES = frozenset(
    {
        *BY_NAME,
        *("qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
        *("bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"),
        *(f"{sign}int{width}" for sign in ("", "u") for width in range(1, 8)),
    }
)
_MEMORY_FORMATS = frozenset(
    {"contiguous_format", "channels_last", "channels_last_3d", "preserve_format"}
)
_DEVICE = re.compile("[A-Za-z0-9_]+(?::[0-9]{1,3})?")
# Known functions of torch's list that make kinds of tensors which are not decoded.
_KNOWN_PREFIX = "torch._utils._rebuild_"
_TOKENS = (Call, _TorchCall, _Allowed, StorageType, StorageReference, TensorClass, type(NDARRAY))


def is_listed(qualified: str) -> bool:
    """Whether a dotted name is on the closed lists; such a one need not be allowed."""
    module, _, name = qualified.rpartition(".")
    return f"{canonical_module(module)}.{name}" in _CLOSED or (
        module == "torch" and (name in _DTYPE_NAMES or name in _MEMORY_FORMATS)
    )


class ObjectResolver:
    """The closed lists for objects; `allowed` adds the caller's own names."""

    def __init__(
        self,
        *,
        source: str,
        factory: ObjectFactory,
        allowed: Mapping[str, Callable[..., Any]],
        make_tensor: TensorMaker,
        budget: WorkBudget,
    ) -> None:
        self.source = source
        self.factory = factory
        self.allowed = allowed
        self.make_tensor = make_tensor
        self.budget = budget
        # By id, and kept alive: tensors with their descriptions, arrays without contents,
        # instances of the caller's classes, dtypes.
        self.tensors: dict[int, tuple[Any, TensorDescription]] = {}
        self.empty_arrays: dict[int, Any] = {}
        self.instances: dict[int, Any] = {}
        self.dtypes: dict[int, tuple[Any, DTypeName]] = {}
        self.storages: dict[str, StorageReference] = {}

    def find_global(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        target = self.allowed.get(qualified)
        if target is not None:
            return _Allowed(qualified, target)
        known = _CLOSED.get(f"{canonical_module(module)}.{name}")
        if known is not None:
            return known
        if module == "torch":
            if name in _DTYPE_NAMES:
                value = self.factory.dtype(name)
                self.dtypes[id(value)] = (value, DTypeName(name))
                return value
            if name in _MEMORY_FORMATS:
                return self.factory.memory_format(name)
        if qualified.startswith(_KNOWN_PREFIX) and "." not in name:
            raise NotSupportedError(f"{self.source}: {describe(qualified)} is not supported")
        raise self._forbidden(qualified)

    def _forbidden(self, qualified: str) -> ForbiddenContentError:
        shown = qualified if len(qualified) <= 200 else qualified[:200] + "..."
        return ForbiddenContentError(
            f"{self.source}: needs {shown!r}, which is not on the list of harmless names; it has "
            f"been neither imported nor run. If you trust the checkpoint, pass "
            f"allowed={{{shown!r}: ...}} with the class to open() or load()",
            qualified_name=qualified,
        )

    def reduce(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        kind = type(function)
        try:
            if kind is Call:
                result = function.function(arguments, self.budget)
                if function.function is RECONSTRUCT:
                    self.empty_arrays[id(result)] = result
                return result
            if kind is _TorchCall:
                return self._torch(function.name, arguments)
        except ShardpointError as error:
            raise type(error)(f"{self.source}: {error}") from error
        if kind is _Allowed:
            return self._allowed(function, arguments, {})
        raise ForbiddenContentError(f"{self.source}: a call of {describe(function)} is refused")

    def _torch(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in REBUILD_FUNCTIONS:
            # A dtype is the factory's own value everywhere else.
            named = (self.dtypes.get(id(argument), (None, argument))[1] for argument in arguments)
            return self._tensor(rebuild(name, tuple(named)))
        match name, arguments:
            case "torch.Size", ():
                return self.factory.size(())
            case "torch.Size", (tuple() as sizes,) if len(sizes) <= DEFAULT_LIMITS.max_axes and all(
                type(n) is int and n.bit_length() < 64 for n in sizes
            ):
                return self.factory.size(sizes)
            case "torch.device", (str(kind),):
                return self._device(kind, None)
            case "torch.device", (str(kind), int() | None as index):
                return self._device(kind, index)
            case "torch.serialization._get_layout", (str(layout),) if layout.startswith("torch."):
                return self.factory.layout(layout.removeprefix("torch."))
            case "torch._utils._rebuild_parameter", (tensor, bool() as requires_grad, hooks):
                return self._parameter(tensor, requires_grad, hooks)
            case (
                "torch._utils._rebuild_parameter_with_state",
                (tensor, bool() as requires_grad, hooks, _),
            ):
                return self._parameter(tensor, requires_grad, hooks)
            case (
                "torch._tensor._rebuild_from_type_v2",
                (_TorchCall() as inner, TensorClass(), tuple() as inner_arguments, _),
            ) if inner.name != name:
                # The last argument has Python attributes, which arrays cannot carry.
                return self._torch(inner.name, inner_arguments)
        shown = ", ".join(map(describe, arguments[:6])) or "nothing"
        raise FormatError(f"{name} is called with {shown}")

    def _device(self, kind: str, index: Any) -> Any:
        if len(kind) > 40 or _DEVICE.fullmatch(kind) is None or (":" in kind and index is not None):
            raise FormatError(f"a device is named {describe(kind)}")
        number = index if index is not None or ":" not in kind else int(kind.partition(":")[2])
        # torch keeps it in one byte, and takes what does not fit for another.
        if number is not None and (type(number) is not int or not -1 <= number < 128):
            raise FormatError(f"a device has the index {describe(number)}")
        return self.factory.device(kind, index)

    def _tensor(self, description: TensorDescription) -> Any:
        tensor = self.make_tensor(description, self.storages[description.storage_key])
        self.tensors[id(tensor)] = (tensor, description)
        return tensor

    def _parameter(self, tensor: Any, requires_grad: bool, hooks: Any) -> Any:
        known = self.tensors.get(id(tensor))
        if known is None:
            raise FormatError(f"a parameter of {describe(tensor)}, not of a tensor")
        check_hooks(hooks)
        if isinstance(tensor, TensorDescription):
            parameter: Any = replace(known[1], requires_grad=requires_grad, parameter=True)
        else:
            parameter = self.factory.parameter(tensor, requires_grad)
        self.tensors[id(parameter)] = (parameter, known[1])
        return parameter

    def new_object(self, cls: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if type(cls) is not _Allowed:
            raise ForbiddenContentError(f"{self.source}: an instance of {describe(cls)} is refused")
        if not isinstance(cls.target, type):
            raise FormatError(f"{self.source}: {cls.name!r} is allowed as a function, not a class")
        return self._allowed(cls, arguments, keywords, new=True)

    def _allowed(
        self,
        function: _Allowed,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        *,
        new: bool = False,
    ) -> Any:
        self._check(arguments)
        self._check(keywords)
        target: Any = function.target
        call = (lambda *a, **k: target.__new__(target, *a, **k)) if new else target
        result = self._call(function.name, call, *arguments, **keywords)
        if type(result) is target:  # a function may give something that is not its own
            self.instances[id(result)] = result
        return result

    def _check(self, value: Any) -> None:
        measure(
            [value],
            source=self.source,
            limits=DEFAULT_LIMITS,
            on_leaf=self.check_leaf,
            budget=self.budget,
        )

    def _call(self, name: str, function: Callable[..., Any], /, *a: Any, **k: Any) -> Any:
        try:
            return function(*a, **k)
        except Exception as error:
            raise FormatError(
                f"{self.source}: {name!r}, which was allowed, failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    def build(self, instance: Any, state: Any) -> Any:
        if type(instance) is PendingDType or id(instance) in self.empty_arrays:
            try:
                if type(instance) is PendingDType:
                    instance.build(state)
                else:
                    build_array(instance, state, self.budget)
            except ShardpointError as error:
                raise type(error)(f"{self.source}: {error}") from error
            return instance
        if id(instance) in self.instances:
            self._check(state)
            self._set_state(instance, state)
            return instance
        if type(instance) is OrderedDict and type(state) is dict:
            # Where torch keeps the versions of a module's state dict.
            if any(type(name) is not str or hasattr(OrderedDict, name) for name in state):
                raise FormatError(f"{self.source}: an OrderedDict with unknown attributes")
            vars(instance).update(state)
            return instance
        raise ForbiddenContentError(f"{self.source}: a state for {describe(instance)} is refused")

    def _set_state(self, instance: Any, state: Any) -> None:
        name = type(instance).__qualname__
        setter = getattr(instance, "__setstate__", None)
        if setter is not None:
            self._call(name, setter, state)
            return
        slots: Any = None
        if type(state) is tuple and len(state) == 2:
            state, slots = state
        for part in (state, slots):
            if part is None:
                continue
            if type(part) is not dict or not all(type(key) is str for key in part):
                raise FormatError(f"{self.source}: the state of a {name} is {describe(part)}")
            for key, value in part.items():
                self._call(name, object.__setattr__, instance, key, value)

    def persistent_load(self, identifier: Any) -> StorageReference:
        try:
            storage = read_persistent_id(identifier)
        except ShardpointError as error:
            raise type(error)(f"{self.source}: {error}") from error
        known = self.storages.setdefault(storage.key, storage)
        if known != storage:
            raise FormatError(f"{self.source}: storage {describe(storage.key)} is said to be two")
        return storage

    def check_leaf(self, value: Any) -> None:
        """Refuse what has only a meaning inside a pickle: classes, storages, half-made values."""
        if isinstance(value, PendingDType):
            raise NotSupportedError(f"{self.source}: a numpy dtype as a value is not supported")
        if isinstance(value, StorageReference):
            raise NotSupportedError(f"{self.source}: a bare storage as a value is not supported")
        if isinstance(value, _TOKENS):
            name = getattr(value, "name", type(value).__name__)
            raise ForbiddenContentError(
                f"{self.source}: holds {describe(str(name))} itself, a class or function, "
                "as a value"
            )
