"""The parts of chunks that lie in one piece in their file and in the memory they go to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import BY_CODE
from shardpoint.engine._readplan import Pairs, Wanted
from shardpoint.index import UNKNOWN, CheckpointIndex, Container

__all__ = ["Segments", "find_segments"]

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_ITEMSIZES = np.array([dtype.itemsize for dtype in BY_CODE], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """One row a segment, in the order of files and offsets.

    Attributes
    ----------
    number, chunk
        ``int64[k]``: the region, the chunk.
    file
        ``int64[k]``: position in `CheckpointIndex.files`.
    start, length
        ``int64[k]``: the bytes in the file.
    at
        ``int64[k]``: where they go in the region's memory, in bytes.
    origin
        ``int64[k]``: where the chunk's payload begins in the file.
    payload_length, checksum
        ``int64[k]``: of the whole payload; the checksum may be `UNKNOWN`.
    fills
        ``bool[k]``: whether the segment is all of its region's memory.
    """

    number: Int64Array
    chunk: Int64Array
    file: Int64Array
    start: Int64Array
    length: Int64Array
    at: Int64Array
    origin: Int64Array
    payload_length: Int64Array
    checksum: Int64Array
    fills: BoolArray

    def __len__(self) -> int:
        return len(self.number)

    @property
    def is_whole(self) -> BoolArray:
        """Whether a segment is all of its payload."""
        result: BoolArray = self.length == self.payload_length
        return result

    def groups(self, *, most_bytes: int, gap_ratio: float, free_gap: int) -> Iterator[range]:
        """Yield ranges of rows to be read together; together they are all rows.

        A range has more than `most_bytes` only if it is a single row. What lies between two
        rows of a range is at most `free_gap` bytes, or `gap_ratio` of the two.
        """
        count = len(self)
        if not count:
            return
        stop = self.start + self.length
        gap = self.start[1:] - stop[:-1]
        bridged = np.maximum(free_gap, gap_ratio * np.minimum(self.length[1:], self.length[:-1]))
        apart = (gap < 0) | (gap > bridged) | (self.file[1:] != self.file[:-1])
        total = np.cumsum(self.length)
        first = 0
        for last in [*(np.flatnonzero(apart) + 1).tolist(), count]:
            while first < last:
                before = int(total[first - 1]) if first else 0
                end = int(np.searchsorted(total, before + most_bytes, "right"))
                end = min(max(end, first + 1), last)
                yield range(first, end)
                first = end


def find_segments(
    index: CheckpointIndex, wanted: Wanted, pairs: Pairs, dense: BoolArray
) -> tuple[Segments, BoolArray]:
    """Pick out the pairs that are segments.

    Those are of chunks without a transform whose payload's place is known, is row-major and
    inside its record, and holds values as they are.

    Parameters
    ----------
    dense
        ``bool[n]``: which regions have row-major memory.

    Returns
    -------
    segments
        In the order of files and offsets.
    taken
        ``bool[k]``: which pairs they are.
    """
    chunks = index.chunks
    own, outer = chunks.sizes[pairs.chunk], wanted.sizes[pairs.number]
    itemsize = _ITEMSIZES[index.tensors.dtype[wanted.tensor[pairs.number]]]
    steps = _row_major(own)
    known, origin, payload_length, checksum = _payloads(index, pairs.chunk, own, steps)
    needed = own.prod(axis=1) * itemsize
    taken = (
        known
        & dense[pairs.number]
        & (chunks.transform[pairs.chunk] == 0)
        & (needed <= payload_length)
        & _is_contiguous(pairs.sizes, own)
        & _is_contiguous(pairs.sizes, outer)
    )
    rows = np.flatnonzero(taken)
    start = origin + itemsize * ((pairs.offsets - chunks.offsets[pairs.chunk]) * steps).sum(axis=1)
    file = chunks.file[pairs.chunk].astype(np.int64)
    rows = rows[np.lexsort((start[rows], file[rows]))]
    number = pairs.number[rows]
    inside = (pairs.offsets[rows] - wanted.offsets[number]) * _row_major(outer[rows])
    length = pairs.sizes[rows].prod(axis=1) * itemsize[rows]
    segments = Segments(
        number=number,
        chunk=pairs.chunk[rows],
        file=file[rows],
        start=start[rows],
        length=length,
        at=inside.sum(axis=1) * itemsize[rows],
        origin=origin[rows],
        payload_length=payload_length[rows],
        checksum=checksum[rows],
        fills=length == outer[rows].prod(axis=1) * itemsize[rows],
    )
    return segments, taken


def _payloads(
    index: CheckpointIndex, rows: Int64Array, sizes: Int64Array, steps: Int64Array
) -> tuple[BoolArray, Int64Array, Int64Array, Int64Array]:
    """Return which chunks have a plain payload; then offset, length, checksum of all."""
    chunks, payloads = index.chunks, index.chunks.payloads
    start, length = chunks.record_offset[rows], chunks.record_length[rows]
    raw = chunks.container[rows] == Container.RAW
    none = np.full(len(rows), UNKNOWN, np.int64)
    if payloads is None:
        return raw, start, length, none
    given = payloads.offset[rows] != UNKNOWN
    origin = np.where(given, payloads.offset[rows], start)
    span = np.where(given, payloads.length[rows], length)
    is_plain = (
        (payloads.flags[rows] == 0)
        & ((payloads.strides[rows] == steps) | (sizes == 1)).all(axis=1)
        & (span >= 0)
        & (origin >= start)
        & (origin - start <= length - span)
        & (chunks.container[rows] != Container.SAFETENSORS_IMAGE)
    )
    return (
        np.where(given, is_plain, raw),
        origin,
        span,
        np.where(given, payloads.checksum[rows], none),
    )


def _row_major(sizes: Int64Array) -> Int64Array:
    """Return the strides in elements of row-major boxes; padding needs none of its own."""
    steps = np.ones_like(sizes)
    if sizes.shape[1] > 1:
        steps[:, :-1] = np.cumprod(sizes[:, :0:-1], axis=1)[:, ::-1]
    return steps


def _is_contiguous(box: Int64Array, outer: Int64Array) -> BoolArray:
    """Whether boxes lie in one piece in the row-major boxes that hold them."""
    begun = np.zeros(len(box), np.bool_)
    result = np.ones(len(box), np.bool_)
    for axis in range(box.shape[1]):
        result &= ~begun | (box[:, axis] == outer[:, axis])
        begun |= box[:, axis] > 1
    return result
