"""Zstandard, as torch's ``stream.zstd/1`` extension writes it: one frame, size not stated.

Source of the format: RFC 8878, section 3.1.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from shardpoint.errors import (
    CorruptionError,
    LimitExceededError,
    NotSupportedError,
    Problem,
    ShardpointError,
)
from shardpoint.transforms._records import MemoryRecord, Origin, RecordBytes, Tally, read_at

__all__ = ["Zstd", "decompress"]

_NAME = "stream.zstd"

_MAGIC = b"\x28\xb5\x2f\xfd"
_LARGEST_WINDOW = 128 << 20  # what zstd's own level 19 and below never exceed
_LARGEST_BLOCK = 128 << 10
_STEP = 4 << 20
_RLE, _RESERVED = 1, 3


class Zstd:
    """torch's own ``stream.zstd/1``, undone: one frame, so all of a record at once."""

    name = _NAME

    def undo(
        self, stored: RecordBytes, version: str, *, most: int, origin: Origin, tally: Tally | None
    ) -> RecordBytes:
        """See `Transform`."""
        if version.partition(".")[0] != "1":
            known = f"{_NAME}/1"
            raise origin.not_supported(f"unknown transform '{_NAME}/{version}'; known: {known!r}")
        data = memoryview(read_at(stored, 0, stored.size))
        content = decompress(data, most, origin.key, origin.file)
        if tally is not None:
            tally.add(len(content))
        return MemoryRecord(content)


def decompress(data: memoryview, max_size: int, key: str, file: str) -> memoryview:
    """Return the content of the one frame that `data` is.

    Raises
    ------
    CorruptionError, LimitExceededError, NotSupportedError
        As `Transform.undo` does.
    """
    try:
        import zstandard
    except ImportError as error:
        message = "compressed with zstd: install shardpoint[zstd] to read it"
        raise NotSupportedError(str(Problem(message, key, file))) from error
    most = min(_check_frame(data, key, file), max_size)
    # Memory that is not written is not there: decoding goes straight to where it stays.
    content = np.empty(most + 1, np.uint8).data
    filled = 0
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        with decompressor.stream_reader(data) as reader:
            while count := reader.readinto(content[filled : filled + _STEP]):
                filled += count
                if filled > max_size:
                    message = f"the zstd frame holds more than the {max_size} bytes it may"
                    _fail(message, key, file, LimitExceededError)
        return content[:filled]
    except zstandard.ZstdError as error:
        raise CorruptionError(
            str(Problem(f"the zstd frame is damaged: {error}", key, file))
        ) from error


def _check_frame(data: memoryview, key: str, file: str) -> int:
    """Check that `data` is one whole frame, without decoding; return the most it can hold.

    The decoder itself returns what it has at the end of a frame that was cut off.
    """
    if data[:4] != _MAGIC:
        _fail("wanted a zstd frame, found other bytes", key, file)
    position = _header_length(data, key, file)
    blocks = 0
    last = False
    while not last:
        if position + 3 > len(data):
            _fail(f"the zstd frame is cut off at byte {position}", key, file)
        header = int.from_bytes(data[position : position + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == _RESERVED:
            _fail(f"the zstd frame has a block of an unknown kind at byte {position}", key, file)
        position += 3 + (1 if kind == _RLE else size)
        blocks += 1
    position += 4 if data[4] & 0x04 else 0  # content checksum
    if position != len(data):
        _fail(f"the zstd frame has {position} bytes, the record {len(data)}", key, file)
    return blocks * _LARGEST_BLOCK


def _header_length(data: memoryview, key: str, file: str) -> int:
    """Return where the frame's first block begins."""
    if len(data) < 6:
        _fail(f"a zstd frame of {len(data)} bytes is cut off", key, file)
    descriptor = data[4]
    single_segment = bool(descriptor & 0x20)
    size_bytes = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    dictionary_bytes = (0, 1, 2, 4)[descriptor & 3]
    return 5 + (0 if single_segment else 1) + dictionary_bytes + size_bytes


def _fail(
    message: str, key: str, file: str, kind: type[ShardpointError] = CorruptionError
) -> NoReturn:
    raise kind(str(Problem(message, key, file)))
