"""Python objects out of torch.save's pickles, by a closed list of names. No code is run.

What can be decoded is what training state is made of: numbers, text, bytes, containers,
namespaces of arguments, dates, paths, numpy arrays and scalars, and torch's tensors, parameters,
sizes, dtypes and devices.
Everything else is refused with its name; the caller can allow a class of its own.

Sources: what the standard library's classes give to pickle in protocols 2 to 5; the list that
``torch.load(weights_only=True)`` of torch 2.13 allows; records of torch 2.3 to 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import DType
from shardpoint.errors import FormatError
from shardpoint.formats._object_resolver import ObjectResolver, TensorMaker
from shardpoint.formats._object_values import (
    DeviceValue,
    DTypeValue,
    LayoutValue,
    MemoryFormatValue,
    NumpyFactory,
    ObjectFactory,
    TensorDescription,
    TensorSize,
)
from shardpoint.formats._pickle_guards import DEFAULT_LIMITS, Limits, WorkBudget, describe, measure
from shardpoint.formats._tensor_pickles import StorageReference
from shardpoint.formats.allowing import with_allowed
from shardpoint.formats.pickle_machine import run_pickle

__all__ = [
    "DTypeValue",
    "DeviceValue",
    "LayoutValue",
    "LoadStorage",
    "MemoryFormatValue",
    "NumpyFactory",
    "ObjectFactory",
    "StorageReference",
    "TensorDescription",
    "TensorLoader",
    "TensorMaker",
    "TensorSize",
    "decode_object",
    "read_tensor_description",
]

LoadStorage: TypeAlias = Callable[
    [DType | None, str, str, int], "memoryview | bytes | bytearray | npt.NDArray[np.uint8]"
]
"""From a storage's dtype (None: untyped), key, location and number of elements (bytes where
untyped) to its bytes. The key comes from the pickle: it may be any text."""

_UNMEASURED = Limits(max_depth=None)


def decode_object(
    data: bytes | bytearray | memoryview,
    *,
    load_storage: LoadStorage,
    source: str,
    factory: ObjectFactory,
    allowed: Mapping[str, Callable[..., Any]],
    make_tensor: TensorMaker | None = None,
) -> Any:
    """Decode the pickle of an object.

    Parameters
    ----------
    data
        The pickle; bytes after it are ignored.
    load_storage
        Gives the bytes of a storage that the pickle names; called once a storage.
    source
        Where the pickle comes from; errors begin with it.
    factory
        Makes tensors, sizes, dtypes and the like.
    allowed
        Qualified name to the class or function that stands for it. These are really called,
        with what the pickle says.
    make_tensor
        Called with each tensor's description in place of loading it and asking `factory`.

    Raises
    ------
    ForbiddenContentError
        If the pickle names something that is on no list; it is neither imported nor run.
    FormatError
        If it is no pickle, or calls a known name in a way that nobody writes.
    LimitExceededError
        If it is nested too deeply, or stands for far more than its size can explain.
    NotSupportedError
        If it holds a known thing that shardpoint does not decode (sparse tensors, ...).
    """
    budget = WorkBudget(len(data), source=source, limits=DEFAULT_LIMITS)
    if make_tensor is None:
        make_tensor = TensorLoader(load_storage, factory, source).tensor
    resolver = ObjectResolver(
        source=source,
        factory=factory,
        allowed=with_allowed(allowed),
        make_tensor=make_tensor,
        budget=budget,
    )
    value, _ = run_pickle(data, resolver, source=source, limits=_UNMEASURED)
    measure([value], source=source, limits=DEFAULT_LIMITS, on_leaf=resolver.check_leaf)
    return value


def read_tensor_description(
    data: bytes | bytearray | memoryview, *, source: str
) -> TensorDescription:
    """Read where a tensor's elements lie from the pickle of its record. Nothing is loaded.

    Raises
    ------
    ForbiddenContentError, FormatError, LimitExceededError, NotSupportedError
        As `decode_object`; and `FormatError` where the record holds something else.
    """
    budget = WorkBudget(len(data), source=source, limits=DEFAULT_LIMITS)
    resolver = ObjectResolver(
        source=source,
        factory=_FACTORY,
        allowed={},
        make_tensor=_as_described,
        budget=budget,
    )
    value, _ = run_pickle(data, resolver, source=source, limits=_UNMEASURED)
    if type(value) is not TensorDescription:
        raise FormatError(f"{source}: holds {describe(value)}, not a tensor")
    return value


_FACTORY = NumpyFactory()


def _as_described(description: TensorDescription, storage: StorageReference) -> TensorDescription:
    return description


class TensorLoader:
    """Makes tensors as views of storages, each of which is loaded once.

    Parameters
    ----------
    load_storage
        Gives the bytes of a storage; called once a storage.
    factory
        Makes tensors of arrays.
    source
        Where the pickle comes from; errors begin with it.
    """

    def __init__(self, load_storage: LoadStorage, factory: ObjectFactory, source: str) -> None:
        self._load_storage = load_storage
        self._factory = factory
        self._source = source
        self._storages: dict[str, tuple[StorageReference, npt.NDArray[np.uint8]]] = {}
        # Storages with lazy conjugation or negation undone, shared by the views of them.
        self._resolved: dict[tuple[str, str, bool, bool], npt.NDArray[Any]] = {}

    def tensor(self, description: TensorDescription, storage: StorageReference) -> Any:
        """Return the tensor that lies in a storage as described.

        Raises
        ------
        FormatError
            If the storage has another size than the pickle says, or no array is such a view.
        """
        elements = self._elements(description, storage)
        itemsize = description.dtype.itemsize
        # Bounds are checked in the description; a view costs nothing, whatever its shape.
        try:
            array: npt.NDArray[Any] = np.ndarray(
                description.shape,
                elements.dtype,
                elements,
                description.storage_offset * itemsize if 0 not in description.shape else 0,
                tuple(stride * itemsize for stride in description.strides),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise FormatError(
                f"{self._source}: a tensor of shape {description.shape} and strides "
                f"{description.strides} cannot be made ({error})"
            ) from error
        return self._factory.tensor(array, description.dtype, description.requires_grad)

    def _elements(
        self, description: TensorDescription, storage: StorageReference
    ) -> npt.NDArray[Any]:
        content = self._content(storage)
        count = len(content) // description.dtype.itemsize
        elements: npt.NDArray[Any] = np.ndarray((count,), description.dtype.numpy, content)
        if not (description.conjugate or description.negative):
            return elements
        key = (storage.key, description.dtype.name, description.conjugate, description.negative)
        if key not in self._resolved:
            self._resolved[key] = _resolve(elements, description)
        return self._resolved[key]

    def _content(self, storage: StorageReference) -> npt.NDArray[np.uint8]:
        known = self._storages.get(storage.key)
        if known is not None:
            if known[0] != storage:
                raise FormatError(f"{self._source}: storage {describe(storage.key)} has two sizes")
            return known[1]
        loaded = self._load_storage(storage.dtype, storage.key, storage.location, storage.count)
        content = loaded if isinstance(loaded, np.ndarray) else np.frombuffer(loaded, np.uint8)
        content = content.reshape(-1).view(np.uint8)
        if len(content) != storage.nbytes:
            raise FormatError(
                f"{self._source}: storage {describe(storage.key)} has {len(content)} bytes, "
                f"the pickle says {storage.nbytes}"
            )
        self._storages[storage.key] = (storage, content)
        return content


def _resolve(elements: npt.NDArray[Any], description: TensorDescription) -> npt.NDArray[Any]:
    """Undo lazy conjugation and negation on a whole storage: views may be far larger."""
    parts = elements.dtype.names  # complex32 is a pair of halves
    if parts is None:
        if description.conjugate:
            elements = np.conjugate(elements)
        return np.negative(elements) if description.negative else elements
    elements = elements.copy()
    if description.conjugate:
        elements["imag"] = -elements["imag"]
    if description.negative:
        for part in parts:
            elements[part] = -elements[part]
    return elements
