"""Where the bytes of a load go: memory with strides, never torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from shardpoint.errors import PlanError
from shardpoint.index import CheckpointIndex
from shardpoint.storage import Buffer

__all__ = [
    "ArraySink",
    "PieceSink",
    "Progress",
    "ReadRequest",
    "RequestTargets",
    "Targets",
    "TensorSink",
]

AnyArray: TypeAlias = npt.NDArray[Any]
Int64Array: TypeAlias = npt.NDArray[np.int64]


class TensorSink(Protocol):
    """Takes the elements of one region of a tensor. Both calls may come in any thread.

    A sink whose memory is row-major in any case may say so by an attribute ``is_dense``: then
    large regions are read into it in pieces side by side and small ones with their neighbours.
    """

    def memory(self) -> AnyArray | None:
        """Return writable memory of the region's sizes, in the stored dtype's `DType.raw`.

        Any strides will do; row-major is fastest. Called at most once, when the first bytes
        are about to be put in, and never for an empty region. A `PieceSink` may return None.
        """
        ...

    def commit(self) -> None:
        """Called once, when all elements are in the memory and have been checked."""
        ...


@runtime_checkable
class PieceSink(TensorSink, Protocol):
    """A sink whose memory cannot take the stored elements as they are."""

    def put(self, start: tuple[int, ...], values: AnyArray) -> None:
        """Take some of the region's elements, if `memory` gave None.

        Parameters
        ----------
        start
            Where in the region they begin.
        values
            In the stored dtype's `DType.raw`, with any strides; not to be kept.
        """
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

    @property
    def is_dense(self) -> bool:
        """Whether the array is row-major."""
        return self._array.flags.c_contiguous

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


class Targets(Protocol):
    """Where many regions go, each known by its number. Calls may come in any thread.

    All memory stays the caller's, and stays where it is until its region is committed.
    """

    def dense(self) -> npt.NDArray[np.bool_]:
        """Return ``bool[n]``: whether `buffers` gives a region's memory."""
        ...

    def buffers(self, numbers: Sequence[int]) -> list[Buffer]:
        """Return the memory of dense regions as bytes, row-major; each time the same memory.

        Never called for an empty region.
        """
        ...

    def memory(self, number: int) -> AnyArray | None:
        """Return the memory of any region as `TensorSink` does; each time the same memory.

        None where its elements are to be given to `put`.
        """
        ...

    def put(self, number: int, start: tuple[int, ...], values: AnyArray) -> None:
        """Take some elements of a region that has no memory for them; as `PieceSink` does."""
        ...

    def commit(self, numbers: Sequence[int]) -> None:
        """Called once for each region, when its elements are all in and have been checked."""
        ...


class RequestTargets:
    """The sinks of requests as `Targets`."""

    def __init__(self, index: CheckpointIndex, requests: Sequence[ReadRequest]) -> None:
        self._index = index
        self._requests = requests
        self._lock = threading.Lock()
        self._memory: dict[int, AnyArray | None] = {}

    def dense(self) -> npt.NDArray[np.bool_]:
        """Return what the sinks say of themselves."""
        return np.array(
            [getattr(request.sink, "is_dense", False) for request in self._requests], np.bool_
        )

    def buffers(self, numbers: Sequence[int]) -> list[Buffer]:
        """Return the sinks' memory as bytes."""
        buffers = []
        for number in numbers:
            memory = self.memory(number)
            if memory is None:
                raise PlanError(f"key {self._key(number)!r}: a dense sink gave no memory")
            buffers.append(memory.reshape(-1).view(np.uint8).data)
        return buffers

    def memory(self, number: int) -> AnyArray | None:
        """Return the memory that a sink gave.

        Raises
        ------
        PlanError
            If it is not what was asked for.
        """
        with self._lock:
            if number not in self._memory:
                self._memory[number] = self._memory_of(number)
            return self._memory[number]

    def _memory_of(self, number: int) -> AnyArray | None:
        request = self._requests[number]
        memory = request.sink.memory()
        if memory is None and isinstance(request.sink, PieceSink):
            return None
        raw = self._index.tensors.dtype_of(request.tensor).raw
        if memory is None or memory.shape != request.sizes or memory.dtype != raw:
            found = (
                "no memory"
                if memory is None
                else f"memory of shape {memory.shape} and dtype {memory.dtype}"
            )
            raise PlanError(
                f"key {self._key(number)!r}: the sink gave {found}, wanted {request.sizes} "
                f"and {raw}"
            )
        return memory

    def _key(self, number: int) -> str:
        return self._index.tensors.keys[self._requests[number].tensor]

    def put(self, number: int, start: tuple[int, ...], values: AnyArray) -> None:
        """Pass elements on to a sink that takes them in pieces."""
        sink = self._requests[number].sink
        assert isinstance(sink, PieceSink)  # or there is memory
        sink.put(start, values)

    def commit(self, numbers: Sequence[int]) -> None:
        """Commit the sinks, and let go of their memory."""
        for number in numbers:
            self._memory.pop(number, None)
            self._requests[number].sink.commit()


class Progress:
    """Counts the parts that are still to come of each region; commits with the last one.

    Parameters
    ----------
    parts
        ``int64[n]``: how many parts each region has.
    """

    def __init__(self, parts: Int64Array, targets: Targets) -> None:
        self._missing: list[int] = parts.tolist()
        self._empty: list[int] = np.flatnonzero(parts == 0).tolist()
        self._targets = targets
        self._lock = threading.Lock()

    def commit_empty(self) -> None:
        """Commit the regions that have no parts."""
        if self._empty:
            self._targets.commit(self._empty)

    def finish(self, numbers: Sequence[int]) -> None:
        """Note that one part of each of these regions is in and checked."""
        missing = self._missing
        done = []
        with self._lock:
            for number in numbers:
                left = missing[number] - 1
                missing[number] = left
                if not left:
                    done.append(number)
        if done:
            self._targets.commit(done)


def _raw_of(itemsize: int) -> np.dtype[np.generic]:
    return np.dtype("<c16") if itemsize == 16 else np.dtype(f"<u{itemsize}")
