"""Values to the pickles that torch.save makes of them, without torch.

What the closed decoder gives back (see `object_decoder`) is written again: torch's own values
as torch writes them, everything else as Python's pickle does, in protocol 2, which is what
``torch.load(weights_only=True)`` of every release reads.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import DType
from shardpoint.errors import LimitExceededError, NotSupportedError
from shardpoint.formats._object_values import (
    DeviceValue,
    DTypeValue,
    LayoutValue,
    MemoryFormatValue,
    NumpyFactory,
    TensorSize,
)
from shardpoint.index import row_major_strides

__all__ = ["StoredTensor", "TensorKeepingFactory", "pickle_value", "tensor_bytes"]

AnyArray: TypeAlias = npt.NDArray[Any]

_PROTOCOL = 2
_MOST_EXPANDED = 1 << 32


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor in a value that is to be pickled.

    Attributes
    ----------
    dtype, shape
        Of the tensor. It is written row-major.
    array
        Its elements, with any strides; None where they come from somewhere else.
    requires_grad, is_parameter
        As torch has them.
    """

    dtype: DType
    shape: tuple[int, ...]
    array: AnyArray | None = None
    requires_grad: bool = False
    is_parameter: bool = False


class TensorKeepingFactory(NumpyFactory):
    """Keeps apart what was a tensor and what a numpy array, and what torch says of tensors."""

    def tensor(self, array: AnyArray, dtype: DType, requires_grad: bool) -> StoredTensor:
        return StoredTensor(dtype, array.shape, array, requires_grad)

    def parameter(self, tensor: StoredTensor, requires_grad: bool) -> StoredTensor:
        return replace(tensor, requires_grad=requires_grad, is_parameter=True)


def tensor_bytes(tensor: StoredTensor) -> memoryview:
    """Return the elements of a tensor that has an array, row-major.

    Raises
    ------
    LimitExceededError
        If it is expanded (all along an axis is one element) to more than 4 GiB.
    """
    array = tensor.array
    if array is None:
        raise NotSupportedError("the tensor's elements are not at hand")
    if array.nbytes > _MOST_EXPANDED and 0 in array.strides:
        raise LimitExceededError(
            f"a tensor of shape {tensor.shape} is expanded from fewer elements, to "
            f"{array.nbytes} bytes"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def pickle_value(value: Any) -> tuple[bytes, list[StoredTensor]]:
    """Return a value's pickle, and its tensors in the order of their storages.

    The tensor at position ``i`` has the storage with the key ``str(i)``.

    Raises
    ------
    NotSupportedError
        If it holds something that cannot be pickled; says what.
    LimitExceededError
        If it is nested too deeply.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    try:
        pickler.dump(value)
    except RecursionError as error:
        raise LimitExceededError("a value is nested too deeply to be written") from error
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise NotSupportedError(f"a value cannot be written: {error}") from error
    return stream.getvalue(), pickler.tensors


_PythonPickler: Any = pickle._Pickler  # its methods are not in the published types


class _Pickler(_PythonPickler):  # type: ignore[misc]
    """Python's pickler in Python: unlike the one in C it can write names of torch unseen."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, _PROTOCOL)
        self.tensors: list[StoredTensor] = []

    def save_tensor(self, tensor: StoredTensor) -> None:
        key = len(self.tensors)
        self.tensors.append(tensor)
        # A parameter's own flag stands outside; torch writes the tensor inside without one.
        if tensor.is_parameter:
            self.write(b"ctorch._utils\n_rebuild_parameter\n(")
        self._save_plain_tensor(tensor, key)
        if tensor.is_parameter:
            self.write(b"\x88" if tensor.requires_grad else b"\x89")
            self.write(b"ccollections\nOrderedDict\n)RtR")
        self.memoize(tensor)

    def _save_plain_tensor(self, tensor: StoredTensor, key: int) -> None:
        dtype = tensor.dtype
        count = int(np.prod(tensor.shape, dtype=object))
        if dtype.storage_name is not None:
            self.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
            storage = f"ctorch\n{dtype.storage_name}\n"
        else:
            self.write(b"ctorch._utils\n_rebuild_tensor_v3\n((")
            storage = "ctorch.storage\nUntypedStorage\n"
            count *= dtype.itemsize
        self.save("storage")
        self.write(storage.encode())
        self.save(str(key))
        self.save("cpu")
        self.save(count)
        self.write(b"tQK\x00")
        self.save(tensor.shape)
        self.save(row_major_strides(tensor.shape))
        has_grad = tensor.requires_grad and not tensor.is_parameter
        self.write(b"\x88" if has_grad else b"\x89")
        self.write(b"ccollections\nOrderedDict\n)R")
        if dtype.storage_name is None:
            self.write(f"ctorch\n{dtype.name}\n".encode())
        self.write(b"tR")

    def save_size(self, size: TensorSize) -> None:
        self.write(b"ctorch\nSize\n")
        self.save(tuple(size))
        self.write(b"\x85R")

    def save_device(self, device: DeviceValue) -> None:
        self.write(b"ctorch\ndevice\n")
        self.save((device.type,) if device.index is None else (device.type, device.index))
        self.write(b"R")

    def save_layout(self, layout: LayoutValue) -> None:
        self.write(b"ctorch.serialization\n_get_layout\n")
        self.save((f"torch.{layout.name.removeprefix('torch.')}",))
        self.write(b"R")

    def save_name(self, value: DTypeValue | MemoryFormatValue) -> None:
        self.write(f"ctorch\n{value.name.removeprefix('torch.')}\n".encode())

    dispatch: ClassVar[dict[type, Callable[..., None]]] = {
        **_PythonPickler.dispatch,
        StoredTensor: save_tensor,
        TensorSize: save_size,
        DeviceValue: save_device,
        LayoutValue: save_layout,
        DTypeValue: save_name,
        MemoryFormatValue: save_name,
    }
