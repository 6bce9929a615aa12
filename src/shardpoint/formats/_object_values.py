"""Torch-free stand-ins for torch's values, and the factory that makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from shardpoint.dtypes import DType

__all__ = [
    "DTypeValue",
    "DeviceValue",
    "LayoutValue",
    "MemoryFormatValue",
    "NumpyFactory",
    "ObjectFactory",
    "TensorDescription",
    "TensorSize",
]


@dataclass(frozen=True, slots=True)
class TensorDescription:
    """A tensor as a pickle describes it: where in which storage its elements lie.

    Attributes
    ----------
    dtype
        Element type.
    storage_key
        Name of the storage in its container.
    storage_nbytes
        The storage's size, as the pickle claims.
    storage_offset
        Of element 0, in elements.
    shape, strides
        Strides are in elements. Every element lies inside the claimed storage.
    conjugate, negative
        The value is the conjugate, or the negative, of what is stored.
    requires_grad
        As torch stored it.
    parameter
        Whether it is an ``nn.Parameter``.
    """

    dtype: DType
    storage_key: str
    storage_nbytes: int
    storage_offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugate: bool = False
    negative: bool = False
    requires_grad: bool = False
    parameter: bool = False


class TensorSize(tuple[int, ...]):
    """A ``torch.Size``."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"TensorSize({list(self)})"


@dataclass(frozen=True, slots=True)
class DTypeValue:
    """A ``torch.dtype``, by its name without ``torch.``."""

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"


@dataclass(frozen=True, slots=True)
class DeviceValue:
    """A ``torch.device``."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


@dataclass(frozen=True, slots=True)
class LayoutValue:
    """A ``torch.layout``, by its name without ``torch.``."""

    name: str


@dataclass(frozen=True, slots=True)
class MemoryFormatValue:
    """A ``torch.memory_format``, by its name without ``torch.``."""

    name: str


class ObjectFactory(Protocol):
    """Makes the values that plain Python has no type for.

    Arguments are checked before. `tensor` gets a view of the storage: it may be read-only, may
    have any strides (0 among them: an expanded tensor may have far more elements than bytes),
    and several views may share memory, as their tensors did.
    """

    def tensor(self, array: npt.NDArray[Any], dtype: DType, requires_grad: bool) -> Any:
        """Give a tensor of these elements."""

    def parameter(self, tensor: Any, requires_grad: bool) -> Any:
        """Give a parameter around a tensor that this factory made."""

    def size(self, sizes: tuple[int, ...]) -> Any:
        """Give a ``torch.Size``."""

    def dtype(self, name: str) -> Any:
        """Give a ``torch.dtype``, by its name without ``torch.``."""

    def device(self, type: str, index: int | None) -> Any:
        """Give a ``torch.device``."""

    def layout(self, name: str) -> Any:
        """Give a ``torch.layout``, by its name without ``torch.``."""

    def memory_format(self, name: str) -> Any:
        """Give a ``torch.memory_format``, by its name without ``torch.``."""


class NumpyFactory:
    """Values without torch: arrays for tensors and parameters, small frozen classes else."""

    def tensor(self, array: npt.NDArray[Any], dtype: DType, requires_grad: bool) -> Any:
        return array

    def parameter(self, tensor: Any, requires_grad: bool) -> Any:
        return tensor

    def size(self, sizes: tuple[int, ...]) -> TensorSize:
        return TensorSize(sizes)

    def dtype(self, name: str) -> DTypeValue:
        return DTypeValue(name)

    def device(self, type: str, index: int | None) -> DeviceValue:
        return DeviceValue(type, index)

    def layout(self, name: str) -> LayoutValue:
        return LayoutValue(name)

    def memory_format(self, name: str) -> MemoryFormatValue:
        return MemoryFormatValue(name)
