"""Independent frames with a table: how transforms keep reads of parts possible.

A framed stream is::

    "SPFRAME1"                                8 bytes
    frames                                    each decodes without the others
    table       count x (decoded length, encoded length, CRC-32 of the encoded bytes), uint32
    header      what the codec needs to know, first its name
    seal        what the codec adds to protect table and header
    trailer     total decoded length (uint64), count (uint32), lengths of header and seal
                (uint16 each), CRC-32 of all from the table on but itself (uint32), "SPFRAMES"

All numbers are little-endian. The table is at the end, so that a stream is written in one
pass, and a reader finds everything but the frames by reading the end.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from zlib_ng import zlib_ng

from shardpoint.errors import PlanError
from shardpoint.transforms._records import Origin, RecordBytes, read_at

__all__ = [
    "LARGEST_FRAME",
    "START",
    "FrameCutter",
    "FrameTable",
    "TableRow",
    "check_frame_size",
    "encode_end",
    "read_table",
]

START = b"SPFRAME1"
LARGEST_FRAME = 1 << 20
"""Decoded bytes of a frame, at most."""

_END = b"SPFRAMES"
_TRAILER = struct.Struct("<QLHHL8s")
_COUNTS = struct.Struct("<QL")
_UNCHECKED = struct.Struct("<L8s")  # the part of the trailer that its checksum leaves out
_ROW = np.dtype([("decoded", "<u4"), ("encoded", "<u4"), ("checksum", "<u4")])
_SMALLEST = 4 << 10
_ALIGNMENT = 64
_PER_FRAME = 16  # frames at a position p of the stream have at most p / 16 bytes
_TAIL_GUESS = 4 << 10

Int64Array: TypeAlias = npt.NDArray[np.int64]
TableRow: TypeAlias = tuple[int, int, int]
"""Decoded length, encoded length, CRC-32 of the encoded bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class FrameTable:
    """Where frames lie.

    Attributes
    ----------
    decoded, encoded
        ``int64[n + 1]``: frame ``i`` has the decoded bytes ``decoded[i]:decoded[i + 1]`` and
        lies at the stored bytes ``encoded[i]:encoded[i + 1]``.
    checksums
        ``uint32[n]``: CRC-32 of the stored bytes.
    header, seal
        What the codec wrote.
    sealed
        The bytes that the seal protects: table, header, total and count.
    """

    decoded: Int64Array
    encoded: Int64Array
    checksums: npt.NDArray[np.uint32]
    header: bytes
    seal: bytes
    sealed: bytes


def check_frame_size(frame_size: int) -> None:
    """Raise unless the largest frames may have this size.

    Raises
    ------
    PlanError
    """
    if not _SMALLEST <= frame_size <= LARGEST_FRAME or frame_size % _ALIGNMENT:
        raise PlanError(f"a frame size must be a multiple of 64, 4 KiB to 1 MiB, not {frame_size}")


class FrameCutter:
    """Cuts a stream into frames.

    Frames are small where the stream begins, grow in proportion to the bytes before them, up
    to `largest`, and the last one is small again. So a part of a stream never takes many more
    bytes to decode than it has, be the stream short or long; and what records have at their
    two ends (zip headers) is found without decoding much else.

    Frames begin at multiples of 64 bytes, and so do the elements in a torch.save record.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._held = bytearray()
        self._position = 0

    def feed(self, block: bytes | bytearray | memoryview) -> Iterator[bytearray]:
        """Yield the frames that a block completes; iterate to the end before the next call."""
        view = memoryview(block).cast("B")
        while len(view):
            # Enough for the last frame is held back: that the stream ends shows only later.
            wanted = _frame_size(self._position, self._largest)
            missing = wanted + _SMALLEST + _ALIGNMENT - len(self._held)
            self._held += view[:missing]
            view = view[missing:]
            if len(self._held) == wanted + _SMALLEST + _ALIGNMENT:
                frame = self._held[:wanted]
                del self._held[:wanted]
                self._position += wanted
                yield frame

    def finish(self) -> Iterator[bytearray]:
        """Yield the frames of what is left."""
        held = self._held
        if len(held) > 2 * _SMALLEST:
            cut = (len(held) - _SMALLEST) // _ALIGNMENT * _ALIGNMENT
            most = _frame_size(self._position, self._largest)
            for start in range(0, cut, most):
                yield held[start : min(start + most, cut)]
            held = held[cut:]
        if held:
            yield held


def _frame_size(position: int, largest: int) -> int:
    size = _SMALLEST
    while size < largest and size * 2 * _PER_FRAME <= position:
        size *= 2
    return min(size, largest)


def encode_end(rows: Sequence[TableRow], header: bytes, seal: Callable[[bytes], bytes]) -> bytes:
    """Return what follows the frames of a stream.

    Parameters
    ----------
    rows
        One a frame.
    header
        The codec's; below 64 KiB.
    seal
        Gives the seal for the bytes that it is to protect: `FrameTable.sealed`.
    """
    table = np.array(rows, np.uint32).reshape(-1, 3).astype("<u4").tobytes()
    counts = _COUNTS.pack(sum(decoded for decoded, _, _ in rows), len(rows))
    protection = seal(table + header + counts)
    lengths = struct.pack("<HH", len(header), len(protection))
    checked = table + header + protection + counts + lengths
    return checked + _UNCHECKED.pack(zlib_ng.crc32(checked), _END)


def read_table(stored: RecordBytes, *, most: int, origin: Origin) -> FrameTable:
    """Read the end of a stream, and check all of its numbers before anything is made of them.

    Raises
    ------
    CorruptionError
        If it is cut off, damaged, or contradicts itself.
    LimitExceededError
        If it decodes to more than `most` bytes.
    """
    size = stored.size
    if size < len(START) + _TRAILER.size:
        raise origin.corrupt(f"a framed record cannot have {size} bytes")
    tail = read_at(stored, max(0, size - _TAIL_GUESS), min(size, _TAIL_GUESS))
    total, count, header_length, seal_length, checksum, end = _TRAILER.unpack(
        tail[-_TRAILER.size :]
    )
    if end != _END:
        raise origin.corrupt("the record does not end as one of frames does; is it cut off?")
    table_length = count * _ROW.itemsize
    footer_length = table_length + header_length + seal_length + _TRAILER.size
    if footer_length > size - len(START):
        raise origin.corrupt(
            f"a table of {count} frames takes {footer_length} bytes, the record has {size}"
        )
    if footer_length > len(tail):
        missing = footer_length - len(tail)
        tail = read_at(stored, size - footer_length, missing) + tail
    footer = memoryview(tail)[-footer_length:]
    found = zlib_ng.crc32(footer[: -_UNCHECKED.size])
    if found != checksum:
        raise origin.corrupt(
            f"the frame table, bytes {size - footer_length} to {size} of what is stored, is "
            f"damaged: wanted CRC-32 {checksum:#010x}, found {found:#010x}"
        )
    if bytes(read_at(stored, 0, len(START))) != START:
        raise origin.corrupt("the record does not begin as one of frames does")
    header_end = table_length + header_length
    counts = bytes(footer[-_TRAILER.size :][: _COUNTS.size])
    rows = np.frombuffer(bytes(footer[:table_length]), _ROW)
    table = FrameTable(
        decoded=_ends(rows["decoded"], 0),
        encoded=_ends(rows["encoded"], len(START)),
        checksums=rows["checksum"].astype(np.uint32),
        header=bytes(footer[table_length:header_end]),
        seal=bytes(footer[header_end : header_end + seal_length]),
        sealed=bytes(footer[:header_end]) + counts,
    )
    _check_table(table, size - footer_length, total, most, origin)
    return table


def _ends(lengths: npt.NDArray[np.uint32], start: int) -> Int64Array:
    ends = np.empty(len(lengths) + 1, np.int64)
    ends[0] = start
    np.cumsum(lengths, dtype=np.int64, out=ends[1:])
    ends[1:] += start
    return ends


def _check_table(table: FrameTable, frames_end: int, total: int, most: int, origin: Origin) -> None:
    lengths = np.diff(table.decoded)
    if len(lengths) and not (lengths.min() > 0 and lengths.max() <= LARGEST_FRAME):
        raise origin.corrupt(
            f"a frame of {int(lengths.min())} or {int(lengths.max())} bytes: 1 to "
            f"{LARGEST_FRAME} may be"
        )
    if table.decoded[-1] != total:
        raise origin.corrupt(f"the frames have {int(table.decoded[-1])} bytes, not {total}")
    if table.encoded[-1] != frames_end:
        raise origin.corrupt(
            f"the frames should end at byte {frames_end}, by the table they end at "
            f"{int(table.encoded[-1])}"
        )
    if total > most:
        raise origin.too_large(f"the record has {total} bytes, of which {most} may be")
