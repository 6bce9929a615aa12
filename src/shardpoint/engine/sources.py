"""Where the bytes of a save come from: memory with strides, never torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from shardpoint.formats.record_form import RecordForm

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "AnyRecord",
    "ArraySource",
    "ContiguousSource",
    "FormedRecord",
    "RecordSource",
    "TensorSource",
    "no_tail",
]

AnyArray: TypeAlias = npt.NDArray[Any]


class TensorSource(Protocol):
    """Gives the bytes of one tensor, block by block, in the order they are to be stored."""

    @property
    def nbytes(self) -> int | None:
        """Bytes in all; None where it is known only at the end (a compressed stream)."""
        ...

    def blocks(self, block_size: int) -> Iterator[memoryview]:
        """Yield all bytes once, as C-contiguous views of at most `block_size` bytes.

        A view is used only until the next one is asked for, so one buffer may serve all.
        Called once, in any thread.
        """
        ...


@runtime_checkable
class ContiguousSource(Protocol):
    """A `TensorSource` whose bytes lie in memory already: it may be written in parallel."""

    def memory(self) -> memoryview | None:
        """Return all bytes (format ``B``, one axis), or None if they do not lie so."""
        ...


def no_tail(checksum: int) -> bytes:
    """Return nothing: the tail of a record that ends with its payload."""
    return b""


@dataclass(frozen=True, slots=True, eq=False)
class RecordSource:
    """One record of a file: bytes before the payload, the payload, bytes after it.

    Attributes
    ----------
    length
        Bytes of the whole record; None where a part's size is not known, and then the file
        is written sequentially.
    head
        Bytes before the payload. An object's record is all head.
    payload
        Parts that follow each other without gaps.
    tail
        Gives the bytes after the payload for the payload's CRC-32. Called once, in any
        thread, when the whole payload has been read from its parts.
    """

    length: int | None
    head: bytes = b""
    payload: Sequence[TensorSource] = ()
    tail: Callable[[int], bytes] = no_tail


class FormedRecord(NamedTuple):
    """One record of a form that many share, whose payload lies in memory.

    A tuple, since a save makes one for every tensor and every number of an optimizer.

    Attributes
    ----------
    form
        Everything but the payload.
    payload
        C-contiguous bytes, exactly as many as the form says: anything with the buffer
        protocol. They are used in place and must not move until the write is over.
    owner
        What keeps the payload's memory alive, where `payload` itself does not.
    """

    form: RecordForm
    payload: ReadableBuffer
    owner: object = None


AnyRecord: TypeAlias = RecordSource | FormedRecord
"""What a file is written from."""


class ArraySource:
    """The elements of a numpy array, row-major whatever the array's strides are.

    To keep another order of axes, give the array with its axes in that order
    (``array.transpose(order)``).

    Parameters
    ----------
    array
        Any array of a fixed element size. It is used, not copied: it must stay unchanged
        until the write is over.
    """

    def __init__(self, array: AnyArray) -> None:
        self._array = array

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return int(self._array.nbytes)

    def memory(self) -> memoryview | None:
        """Return the array's own memory, or None if it is not row-major there."""
        if self._array.size == 0:
            return memoryview(b"")
        if not self._array.flags.c_contiguous:
            return None
        return self._array.reshape(-1).view(np.uint8).data

    def blocks(self, block_size: int) -> Iterator[memoryview]:
        """Yield slices of the array's memory, or of one buffer that elements are gathered in."""
        whole = self.memory()
        if whole is not None:
            for start in range(0, len(whole), block_size):
                yield whole[start : start + block_size]
            return
        count = max(1, block_size // self._array.itemsize)
        buffer = np.empty(min(count, self._array.size), self._array.dtype)
        for piece in _row_major_pieces(self._array, count):
            into = buffer[: piece.size]
            np.copyto(into.reshape(piece.shape), piece)
            yield into.view(np.uint8).data


def _row_major_pieces(array: AnyArray, count: int) -> Iterator[AnyArray]:
    """Yield views of at most `count` elements that give the array in row-major order."""
    if array.size <= count:
        yield array
        return
    row = array.size // array.shape[0]
    if row > count:
        for i in range(array.shape[0]):
            yield from _row_major_pieces(array[i], count)
        return
    rows = count // row
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]
