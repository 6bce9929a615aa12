"""Moves boxes of elements from files into memory with strides."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import add
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import DType
from shardpoint.engine._blocks import Blocks
from shardpoint.engine._files import BufferPool, CountedFile
from shardpoint.engine._geometry import Numbers, extent, split_box
from shardpoint.engine._payload import Payload, Place
from shardpoint.errors import NotSupportedError, Problem
from shardpoint.formats.checksum import crc32
from shardpoint.index import CONJUGATE, NEGATIVE
from shardpoint.planning.runs import Runs, byte_runs, coalesce
from shardpoint.storage import Buffer

__all__ = ["BUFFER", "Readable", "apply_flags", "copy_from_memory", "read_box", "read_extent"]

AnyArray: TypeAlias = npt.NDArray[Any]


class Readable(Protocol):
    """A file, or the record that a transform gives back."""

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill the buffers, one after the other, with the bytes from `offset` on."""
        ...


_BLOCK = 1 << 20  # read at once where a checksum is taken: it is still in cache then
BUFFER = 4 << 20
"""Bytes of the buffer that elements on their way to strided memory go through."""

_VECTOR = 512  # runs in one call
_CHECKED_RATIO = 0.5  # what may be read beside strided parts to check them, for each byte
_NOT_NEGATED = frozenset(
    {"bool", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"}
)


def read_box(
    file: Readable,
    payload: Payload,
    offsets: Numbers,
    into: AnyArray,
    *,
    buffers: BufferPool,
    gap_ratio: float,
    checksum: bool,
    blocks: Blocks | None,
) -> int:
    """Read a box whose elements the payload holds in row-major order, perhaps with gaps.

    Parameters
    ----------
    payload
        With axes, as `offsets` and `into` have them, from the outermost to the innermost.
    offsets
        The box's place in the chunk.
    into
        Memory of the box's sizes. Where it is row-major the bytes go there at once.
    gap_ratio
        How many bytes nobody asked for may be read between rows, for each one asked for.
    checksum
        Whether to return the CRC-32 of the bytes, in the payload's order.
    blocks
        What to check instead: all that is read, where reading whole blocks is affordable.
    """
    itemsize = into.dtype.itemsize
    if into.flags.c_contiguous:
        runs = byte_runs(payload.strides, itemsize, offsets, into.shape)
        dense = into.reshape(-1).view(np.uint8).data
        return _read_dense(file, payload.offset, runs, dense, gap_ratio, 0, checksum, blocks)
    found = 0
    with buffers.take() as buffer:
        for start, sizes in split_box(into.shape, BUFFER // itemsize):
            at = tuple(map(add, offsets, start))
            runs = byte_runs(payload.strides, itemsize, at, sizes)
            dense = buffer[: prod(sizes) * itemsize]
            found = _read_dense(
                file, payload.offset, runs, dense, gap_ratio, found, checksum, blocks
            )
            box = tuple(slice(o, o + n) for o, n in zip(start, sizes, strict=True))
            np.copyto(into[box], np.frombuffer(dense, into.dtype).reshape(sizes))
    return found


def _read_dense(
    file: Readable,
    base: int,
    runs: Runs,
    dense: memoryview,
    gap_ratio: float,
    before: int,
    checksum: bool,
    blocks: Blocks | None,
) -> int:
    """Fill `dense` with runs; return the CRC-32 that continues `before`."""
    if blocks is not None and _read_checked(file, runs, dense, blocks):
        return 0
    if len(runs.starts) != 1:
        _read_runs(file, base, runs, dense, int(gap_ratio * len(dense)))
        if blocks is not None:
            _check_inside(runs, dense, blocks)
        return crc32(dense, before) if checksum else 0
    offset = base + int(runs.starts[0])
    if not checksum:
        file.read_into(offset, [dense])
        if blocks is not None:
            blocks.check(dense, int(runs.starts[0]))
        return 0
    found = before
    for start in range(0, len(dense), _BLOCK):
        block = dense[start : start + _BLOCK]
        file.read_into(offset + start, [block])
        found = crc32(block, found)
    return found


def _read_checked(file: Readable, runs: Runs, dense: memoryview, blocks: Blocks) -> bool:
    """Read all blocks that the runs touch, check them, and copy the runs out of them.

    Returns False, having read nothing, where that is not affordable.
    """
    size = blocks.size
    spans = _touched(runs, size, blocks.end)
    surplus = int(spans.lengths.sum()) - len(dense)
    if not blocks.affordable(len(dense), surplus, _CHECKED_RATIO):
        return False
    step = max(BUFFER - BUFFER % size, size)
    starts, stops = runs.starts.tolist(), (runs.starts + runs.lengths).tolist()
    run = position = 0
    for begin, length in zip(spans.starts.tolist(), spans.lengths.tolist(), strict=True):
        for at in range(begin, begin + length, step):
            end = min(at + step, begin + length)
            data = memoryview(bytearray(end - at))
            file.read_into(blocks.origin + at, [data])
            blocks.check(data, at)
            while run < len(starts) and starts[run] < end:
                start, stop = max(starts[run], at), min(stops[run], end)
                dense[position : position + stop - start] = data[start - at : stop - at]
                position += stop - start
                if stops[run] > end:
                    break
                run += 1
    return True


def _touched(runs: Runs, size: int, end: int) -> Runs:
    """Return the spans of the blocks that runs lie in."""
    stops = runs.starts + runs.lengths
    if _widest_gap(runs) < size:  # no block is left out; most strided parts are like this
        first, last = int(runs.starts[0]) // size * size, -(-int(stops[-1]) // size) * size
        return Runs(np.array([first]), np.array([min(last, end) - first]))
    firsts = runs.starts - runs.starts % size
    lasts = np.minimum(-(-stops // size) * size, end)
    return coalesce(firsts, lasts - firsts, gap_budget_bytes=0)


def _check_inside(runs: Runs, dense: memoryview, blocks: Blocks) -> None:
    """Compare the blocks that lie whole in single runs."""
    positions = np.cumsum(runs.lengths) - runs.lengths
    for run in np.flatnonzero(runs.lengths >= min(blocks.size, blocks.end)).tolist():
        position, length = int(positions[run]), int(runs.lengths[run])
        blocks.check(dense[position : position + length], int(runs.starts[run]))


def _read_runs(file: Readable, base: int, runs: Runs, dense: memoryview, gap_budget: int) -> None:
    """Read runs one after the other into `dense`; what lies between goes nowhere."""
    reads = runs  # to bridge a few gaps of many saves next to nothing
    if 2 * _bridged_at_most(runs, gap_budget) >= len(runs.starts):
        reads = coalesce(runs.starts, runs.lengths, gap_budget_bytes=gap_budget)
        if 2 * len(reads.starts) > len(runs.starts):
            reads = runs
    length = int(runs.lengths[0])
    if (
        isinstance(file, CountedFile)
        and len(reads.starts) == len(runs.starts)
        and (runs.lengths == length).all()
    ):
        file.read_spans(base + runs.starts, length, dense)
        return
    starts, lengths = runs.starts.tolist(), runs.lengths.tolist()
    ends = (reads.starts + reads.lengths).tolist()
    scratch = memoryview(bytearray(_largest_gap(runs, gap_budget)))
    position = first = 0
    for end in ends:
        vector: list[memoryview] = []
        at = offset = starts[first]
        while first < len(starts) and starts[first] < end:
            if starts[first] > at:
                vector.append(scratch[: starts[first] - at])
            vector.append(dense[position : position + lengths[first]])
            position += lengths[first]
            at = starts[first] + lengths[first]
            first += 1
            if len(vector) >= _VECTOR:
                file.read_into(base + offset, vector)
                vector, offset = [], at
        if vector:
            file.read_into(base + offset, vector)


def _gaps(runs: Runs) -> npt.NDArray[np.int64]:
    return runs.starts[1:] - runs.starts[:-1] - runs.lengths[:-1]


def _widest_gap(runs: Runs) -> int:
    return int(_gaps(runs).max(initial=0))


def _bridged_at_most(runs: Runs, budget: int) -> int:
    """Return a number of gaps that those within a budget do not exceed."""
    gaps = _gaps(runs)
    return budget // max(int(gaps.min()), 1) if len(gaps) else 0


def _largest_gap(runs: Runs, budget: int) -> int:
    gaps = _gaps(runs)
    return int(gaps[gaps <= budget].max(initial=0))


def read_extent(
    file: Readable, payload: Payload, offsets: Numbers, into: AnyArray, blocks: Blocks | None
) -> None:
    """Read a box of a payload with any strides: all bytes from its first element to its last.

    With `blocks`, up to the borders of these, or as far as that is affordable.
    """
    itemsize = into.dtype.itemsize
    start = first = itemsize * _position(offsets, payload.strides)
    stop = start + extent(into.shape, payload.strides) * itemsize
    if blocks is not None:
        first, stop = blocks.widen(start, stop, _CHECKED_RATIO)
    data = memoryview(bytearray(stop - first))
    file.read_into(payload.offset + first, [data])
    if blocks is not None:
        blocks.check(data, first)
    np.copyto(into, _view(data, start - first, into.shape, payload.strides, into.dtype))


def copy_from_memory(
    data: memoryview, base: int, place: Place, payload: Payload, offsets: Numbers, into: AnyArray
) -> None:
    """Copy a box out of a record that was read whole; its byte 0 is byte `base` of the file."""
    itemsize = place.dtype.itemsize
    start = payload.offset - base + itemsize * _position(offsets, payload.strides)
    np.copyto(into, _view(data, start, into.shape, payload.strides, into.dtype))
    apply_flags(into, place, payload.flags)


def _position(offsets: Sequence[int], strides: Sequence[int]) -> int:
    return sum(o * s for o, s in zip(offsets, strides, strict=True))


def _view(
    data: memoryview, start: int, sizes: Numbers, strides: Numbers, dtype: np.dtype[Any]
) -> AnyArray:
    """View bytes as an array; numpy checks that it stays inside them."""
    steps = tuple(stride * dtype.itemsize for stride in strides)
    return np.ndarray(sizes, dtype, buffer=data, offset=start, strides=steps)


def apply_flags(values: AnyArray, place: Place, flags: int) -> None:
    """Turn stored elements into values, in place: torch's lazy conjugate and negative.

    Raises
    ------
    NotSupportedError
        If the dtype has no conjugate or no negative that torch could have meant.
    """
    if flags & CONJUGATE:
        _conjugate(values, place)
    if flags & NEGATIVE:
        _negate(values, place)


def _conjugate(values: AnyArray, place: Place) -> None:
    if not place.dtype.name.startswith("complex"):
        raise _no_such(place, "conjugate")
    if place.dtype.itemsize == 16:
        np.conjugate(values, out=values)
        return
    # The imaginary part is the upper half of the little-endian bytes, its sign the upper bit.
    sign = values.dtype.type(1 << (8 * place.dtype.itemsize - 1))
    np.bitwise_xor(values, sign, out=values)


def _negate(values: AnyArray, place: Place) -> None:
    dtype: DType = place.dtype
    if dtype.name in _NOT_NEGATED:
        raise _no_such(place, "negative")
    if dtype.name.startswith(("int", "uint")) or dtype.itemsize == 16:
        np.negative(values, out=values)
        return
    half = 8 * dtype.itemsize // 2
    sign = 1 << (8 * dtype.itemsize - 1)
    if dtype.name.startswith("complex"):
        sign |= 1 << (half - 1)
    np.bitwise_xor(values, values.dtype.type(sign), out=values)


def _no_such(place: Place, what: str) -> NotSupportedError:
    message = f"the record asks for the {what} of {place.dtype.name} elements"
    return NotSupportedError(str(Problem(message, place.key, place.file, place.record_offset)))
