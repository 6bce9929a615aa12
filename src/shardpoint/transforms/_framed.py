"""Streams of independent frames: encoded frame by frame, decoded only where they are read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from zlib_ng import zlib_ng

from shardpoint.transforms._frame_format import (
    START,
    FrameCutter,
    FrameTable,
    TableRow,
    encode_end,
)
from shardpoint.transforms._records import Buffer, Origin, RecordBytes, Tally, read_at

__all__ = [
    "DamagedFrameError",
    "Encoded",
    "FrameDecoder",
    "FrameEncoder",
    "FrameMap",
    "FramedRecord",
    "FramedStream",
    "NumberedFrame",
]

_BATCH = 1 << 20  # encoded bytes read at once
_KEPT = 4  # decoded frames kept for the next read of a strided slice, however many threads

Encoded: TypeAlias = tuple[TableRow, bytes]
"""A frame's row in the table, and its encoded bytes."""

NumberedFrame: TypeAlias = tuple[int, bytearray]

FrameMap: TypeAlias = Callable[
    [Callable[[NumberedFrame], Encoded], Iterable[NumberedFrame]], Iterator[Encoded]
]
"""As `map`: results in order. It may call the function for several items side by side."""


class DamagedFrameError(Exception):
    """A frame does not decode; `FramedRecord` says which one."""


class FrameEncoder(Protocol):
    """Encodes the frames of one record."""

    @property
    def header(self) -> bytes:
        """What the decoder will have to know."""
        ...

    def encode(self, number: int, data: bytearray) -> bytes:
        """Encode one frame; several threads may, side by side, each number once."""
        ...

    def seal(self, sealed: bytes) -> bytes:
        """Protect table and header, when all frames are encoded."""
        ...


class FrameDecoder(Protocol):
    """Decodes the frames of one record."""

    def decode(self, number: int, data: memoryview, into: memoryview) -> None:
        """Decode one frame, which has exactly the length of `into`; any threads side by side.

        Raises
        ------
        DamagedFrameError
        """
        ...


class FramedStream:
    """Encodes a record that comes in pieces.

    Parameters
    ----------
    encoder
        Of this one record.
    largest
        Decoded bytes of a frame, at most.
    """

    def __init__(self, encoder: FrameEncoder, *, largest: int) -> None:
        self._encoder = encoder
        self._cutter = FrameCutter(largest)
        self._rows: list[TableRow] = []
        self._has_begun = False

    def encode(
        self, blocks: Iterable[bytes | bytearray | memoryview], *, frame_map: FrameMap
    ) -> Iterator[bytes]:
        """Yield the whole stream of a record.

        Parameters
        ----------
        blocks
            The record's bytes. One is used only until the next is taken.
        frame_map
            What encodes the frames: `map`, or something that uses several threads.
        """

        def frames() -> Iterator[bytearray]:
            for block in blocks:
                yield from self._cutter.feed(block)
            yield from self._cutter.finish()

        yield from self._begin()
        for row, encoded in frame_map(self._encode, enumerate(frames())):
            self._rows.append(row)
            yield encoded
        yield encode_end(self._rows, self._encoder.header, self._encoder.seal)

    def feed(self, block: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Yield what a block adds to the stream; iterate to the end before the next call."""
        yield from self._begin()
        yield from self._frames(self._cutter.feed(block))

    def finish(self) -> Iterator[bytes]:
        """Yield the end of a stream that was fed."""
        yield from self._begin()
        yield from self._frames(self._cutter.finish())
        yield encode_end(self._rows, self._encoder.header, self._encoder.seal)

    def _begin(self) -> Iterator[bytes]:
        if not self._has_begun:
            self._has_begun = True
            yield START

    def _frames(self, frames: Iterator[bytearray]) -> Iterator[bytes]:
        for frame in frames:
            row, encoded = self._encode((len(self._rows), frame))
            self._rows.append(row)
            yield encoded

    def _encode(self, frame: NumberedFrame) -> Encoded:
        number, data = frame
        encoded = self._encoder.encode(number, data)
        return (len(data), len(encoded), zlib_ng.crc32(encoded)), encoded


class FramedRecord:
    """What a framed stream decodes to; a `RecordBytes`.

    Parameters
    ----------
    stored, table, decoder
        The stream.
    origin
        For messages.
    tally
        Counts decoded bytes, or None.
    """

    def __init__(
        self,
        stored: RecordBytes,
        table: FrameTable,
        decoder: FrameDecoder,
        *,
        origin: Origin,
        tally: Tally | None,
    ) -> None:
        self._stored = stored
        self._table = table
        self._decoder = decoder
        self._origin = origin
        self._tally = tally
        self._kept: OrderedDict[int, bytearray] = OrderedDict()
        self._lock = threading.Lock()
        self.size = int(table.decoded[-1])

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `RecordBytes`; reads and decodes the frames that have these bytes."""
        end = offset + sum(map(len, buffers))
        if end == offset:
            return
        starts = self._table.decoded
        first = int(np.searchsorted(starts, offset, "right")) - 1
        last = int(np.searchsorted(starts, end, "left"))
        target = _Target(offset, buffers)
        for number, stored in self._encoded(first, last):
            start, stop = int(starts[number]), int(starts[number + 1])
            place = None if stored is None else target.place(start, stop)
            if stored is not None and place is not None:
                self._decode(number, stored, place)
            else:
                target.copy(start, memoryview(self._frame(number, stored)))

    def _encoded(self, first: int, last: int) -> Iterator[tuple[int, memoryview | None]]:
        """Yield the frames' stored bytes, read many at once; None for one that is decoded."""
        ends = self._table.encoded
        number = first
        while number < last:
            if number in self._kept:  # atomic
                yield number, None
                number += 1
                continue
            start = int(ends[number])
            stop = int(np.searchsorted(ends, start + _BATCH, "right")) - 1
            stop = min(max(stop, number + 1), last)
            data = memoryview(read_at(self._stored, start, int(ends[stop]) - start))
            for n in range(number, stop):
                yield n, data[int(ends[n]) - start : int(ends[n + 1]) - start]
            number = stop

    def _frame(self, number: int, stored: memoryview | None) -> bytearray:
        """Return a decoded frame of which only a part is wanted now."""
        with self._lock:
            frame = self._kept.get(number)
        if frame is not None:
            return frame
        if stored is None:  # another thread has just pushed it out
            start, stop = self._table.encoded[number : number + 2].tolist()
            stored = memoryview(read_at(self._stored, start, stop - start))
        frame = bytearray(int(self._table.decoded[number + 1] - self._table.decoded[number]))
        self._decode(number, stored, memoryview(frame))
        with self._lock:
            self._kept[number] = frame
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return frame

    def _decode(self, number: int, stored: memoryview, into: memoryview) -> None:
        try:
            wanted, found = int(self._table.checksums[number]), zlib_ng.crc32(stored)
            if found != wanted:
                raise DamagedFrameError(f"wanted CRC-32 {wanted:#010x}, found {found:#010x}")
            self._decoder.decode(number, stored, into)
        except DamagedFrameError as error:
            start, end = self._table.encoded[number : number + 2].tolist()
            raise self._origin.corrupt(
                f"frame {number}, bytes {start} to {end} of what is stored, is damaged: {error}"
            ) from error
        if self._tally is not None:
            self._tally.add(len(into))


class _Target:
    """Buffers to fill, one after the other, with the bytes from an offset on."""

    def __init__(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._buffers: list[tuple[int, memoryview]] = []
        for buffer in buffers:
            self._buffers.append((offset, memoryview(buffer)))
            offset += len(buffer)
        self._next = 0

    def place(self, start: int, stop: int) -> memoryview | None:
        """Return where a whole frame goes, if that is in one buffer."""
        self._skip(start)
        at, buffer = self._buffers[self._next]
        if at <= start and stop <= at + len(buffer):
            return buffer[start - at : stop - at]
        return None

    def copy(self, start: int, frame: memoryview) -> None:
        """Copy what is wanted of a frame."""
        stop = start + len(frame)
        for at, buffer in self._buffers[self._next :]:
            if at >= stop:
                break
            begin, end = max(start, at), min(stop, at + len(buffer))
            if begin < end:
                buffer[begin - at : end - at] = frame[begin - start : end - start]

    def _skip(self, position: int) -> None:
        """Leave the buffers behind that end before a position."""
        while self._next < len(self._buffers) - 1:
            at, buffer = self._buffers[self._next]
            if at + len(buffer) > position:
                break
            self._next += 1
