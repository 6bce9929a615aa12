"""Where the bytes of a load go: memory with strides, never torch."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import DType
from shardpoint.errors import PlanError

__all__ = ["ArraySink", "ReadRequest", "Target", "TensorSink"]

AnyArray: TypeAlias = npt.NDArray[Any]


class TensorSink(Protocol):
    """Takes the elements of one region of a tensor. Both calls may come in any thread."""

    def memory(self) -> AnyArray:
        """Return writable memory of the region's sizes, in the stored dtype's `DType.raw`.

        Any strides will do; row-major is fastest. Called at most once, when the first bytes
        are there to be put in, and never for an empty region.
        """
        ...

    def commit(self) -> None:
        """Called once, when all elements are in the memory and have been checked."""
        ...


class ArraySink:
    """The sink that is a numpy array.

    Parameters
    ----------
    array
        Of the region's sizes and the stored element size.
    """

    def __init__(self, array: AnyArray) -> None:
        self._array = array

    def memory(self) -> AnyArray:
        """Return the array as raw elements."""
        return self._array.view(_raw_of(self._array.dtype.itemsize))

    def commit(self) -> None:
        """Do nothing: the elements are where they belong."""


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """One region of one tensor that is wanted.

    Attributes
    ----------
    tensor
        Row in `Tensors`.
    offsets, sizes
        The region; one number an axis.
    sink
        Where its elements go.
    """

    tensor: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    sink: TensorSink


class Target:
    """A request on its way: its memory, and how many parts are still to come."""

    __slots__ = ("_lock", "_memory", "_missing", "dtype", "key", "request")

    def __init__(self, request: ReadRequest, key: str, dtype: DType, parts: int) -> None:
        self.request = request
        self.key = key
        self.dtype = dtype
        self._lock = threading.Lock()
        self._memory: AnyArray | None = None
        self._missing = parts

    def region(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> AnyArray:
        """Return the memory for a box given in the tensor's coordinates.

        Raises
        ------
        PlanError
            If the sink's memory is not what was asked for.
        """
        memory = self._whole()
        box: tuple[Any, ...] = tuple(
            slice(offset - origin, offset - origin + size)
            for offset, origin, size in zip(offsets, self.request.offsets, sizes, strict=True)
        )
        return memory[(*box, ...)]

    def finish_part(self) -> None:
        """Note that one part is in and checked; commit with the last one."""
        with self._lock:
            self._missing -= 1
            last = self._missing == 0
        if last:
            self.request.sink.commit()

    def _whole(self) -> AnyArray:
        with self._lock:
            if self._memory is None:
                memory = self.request.sink.memory()
                if memory.shape != self.request.sizes or memory.dtype != self.dtype.raw:
                    raise PlanError(
                        f"key {self.key!r}: the sink gave memory of shape {memory.shape} and "
                        f"dtype {memory.dtype}, wanted {self.request.sizes} and {self.dtype.raw}"
                    )
                self._memory = memory
            return self._memory


def _raw_of(itemsize: int) -> np.dtype[np.generic]:
    return np.dtype("<c16") if itemsize == 16 else np.dtype(f"<u{itemsize}")
