"""Tensors in a pickle: the calls that torch.save writes, as descriptions. Nothing is loaded.

Source: records that torch 2.3 to 2.15 wrote. `_rebuild_tensor_v2` takes a typed storage whose
size is in elements; `_rebuild_tensor_v3` an untyped one, in bytes, and the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardpoint.dtypes import BY_STORAGE_NAME, DType, dtype_named
from shardpoint.errors import FormatError, NotSupportedError
from shardpoint.formats._object_values import TensorDescription
from shardpoint.formats._pickle_guards import DEFAULT_LIMITS, describe

__all__ = [
    "REBUILD_FUNCTIONS",
    "STORAGE_TYPES",
    "DTypeName",
    "StorageReference",
    "StorageType",
    "TensorClass",
    "check_hooks",
    "read_persistent_id",
    "rebuild",
]

_HIGHEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class StorageType:
    """A storage class; its dtype is None for untyped storage."""

    dtype: DType | None


@dataclass(frozen=True, slots=True)
class StorageReference:
    """A storage that a persistent id names."""

    dtype: DType | None
    key: str
    location: str
    count: int  # elements; bytes where the dtype is None

    @property
    def nbytes(self) -> int:
        return self.count * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class DTypeName:
    """A ``torch.dtype``, by its name without ``torch.``."""

    name: str


@dataclass(frozen=True, slots=True)
class TensorClass:
    """``torch.Tensor`` or ``Parameter``, as an argument."""

    name: str


STORAGE_TYPES: Mapping[str, StorageType] = {
    **{f"torch.{name}": StorageType(dtype) for name, dtype in BY_STORAGE_NAME.items()},
    "torch.storage.UntypedStorage": StorageType(None),
    "torch.UntypedStorage": StorageType(None),
}


def read_persistent_id(identifier: Any) -> StorageReference:
    """Read ``('storage', class, key, location, size[, None])``.

    Raises
    ------
    FormatError
        If it is anything else.
    """
    if type(identifier) is tuple and len(identifier) == 6 and identifier[5] is None:
        identifier = identifier[:5]  # what files before the zip format add for views
    match identifier:
        case (str("storage"), StorageType(dtype), str() as key, str() as location, count):
            return StorageReference(dtype, key, location, _count(count, "storage size"))
    raise FormatError("a persistent id that is no storage")


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value <= _HIGHEST:
        raise FormatError(f"{what} of a tensor is {describe(value)}")
    return value


def _counts(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > DEFAULT_LIMITS.max_axes:
        raise FormatError(f"{what} of a tensor is {describe(value)}")
    return tuple([_count(number, what) for number in value])


def _describe_view(
    storage: Any, dtype: DType, offset: Any, shape: Any, strides: Any
) -> TensorDescription:
    offset = _count(offset, "storage offset")
    shape, strides = _counts(shape, "shape"), _counts(strides, "strides")
    if len(shape) != len(strides):
        raise FormatError(f"a tensor has shape {shape} and strides {strides}")
    empty = 0 in shape
    extent = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    needed = 0 if empty else (offset + extent + 1) * dtype.itemsize
    if needed > storage.nbytes:
        raise FormatError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} needs {needed} "
            f"bytes of its storage, which has {storage.nbytes}"
        )
    return TensorDescription(dtype, storage.key, storage.nbytes, offset, shape, strides)


def check_hooks(hooks: Any) -> None:
    """Accept no backward hooks: they are functions."""
    if hooks is None or (isinstance(hooks, dict) and not hooks):
        return
    if isinstance(hooks, dict):
        raise NotSupportedError("a tensor with backward hooks")
    raise FormatError(f"backward hooks are {describe(hooks)}, not a dict")


def _finish(
    tensor: TensorDescription, requires_grad: Any, hooks: Any, extra: tuple[Any, ...]
) -> TensorDescription:
    if type(requires_grad) is not bool:
        raise FormatError(f"requires_grad is {describe(requires_grad)}, not a bool")
    check_hooks(hooks)
    conjugate = negative = False
    for metadata in extra:
        if metadata is None:
            continue
        if type(metadata) is not dict:
            raise FormatError(f"a tensor's metadata is {describe(metadata)}, not a dict")
        for name, value in metadata.items():
            if type(value) is not bool:
                raise NotSupportedError(f"a tensor with metadata {describe(name)}")
            if name == "conj":
                conjugate = value
            elif name == "neg":
                negative = value
            elif value:
                raise NotSupportedError(f"a tensor with metadata {describe(name)}")
    return replace(tensor, requires_grad=requires_grad, conjugate=conjugate, negative=negative)


def _typed(storage: Any) -> DType:
    if type(storage) is not StorageReference or storage.dtype is None:
        raise FormatError(f"a tensor on {describe(storage)}, not on a typed storage")
    return storage.dtype


def _rebuild_tensor(arguments: tuple[Any, ...]) -> TensorDescription:
    storage, offset, shape, strides = arguments
    return _describe_view(storage, _typed(storage), offset, shape, strides)


def _rebuild_tensor_v2(arguments: tuple[Any, ...]) -> TensorDescription:
    storage, offset, shape, strides, requires_grad, hooks, *extra = arguments
    tensor = _describe_view(storage, _typed(storage), offset, shape, strides)
    return _finish(tensor, requires_grad, hooks, tuple(extra[:1]))


def _rebuild_tensor_v3(arguments: tuple[Any, ...]) -> TensorDescription:
    storage, offset, shape, strides, requires_grad, hooks, dtype, *extra = arguments
    if type(storage) is not StorageReference:
        raise FormatError(f"a tensor on {describe(storage)}, not on a storage")
    if type(dtype) is not DTypeName:
        raise FormatError(f"a tensor's dtype is {describe(dtype)}")
    tensor = _describe_view(storage, dtype_named(dtype.name), offset, shape, strides)
    return _finish(tensor, requires_grad, hooks, tuple(extra[:1]))


REBUILD_FUNCTIONS: Mapping[str, Callable[[tuple[Any, ...]], TensorDescription]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
}


def rebuild(name: str, arguments: tuple[Any, ...]) -> TensorDescription:
    """Describe the tensor that one of `REBUILD_FUNCTIONS` is called for.

    Raises
    ------
    FormatError
        If the arguments are not that function's, or an element lies outside the storage.
    NotSupportedError
        If the dtype is not known, or the tensor has hooks or metadata of its own.
    """
    fewest, most = {
        "torch._utils._rebuild_tensor": (4, 4),
        "torch._utils._rebuild_tensor_v2": (6, 7),
        "torch._utils._rebuild_tensor_v3": (7, 8),
    }[name]
    if not fewest <= len(arguments) <= most:
        raise FormatError(f"{name} is called with {len(arguments)} arguments")
    return REBUILD_FUNCTIONS[name](arguments)
