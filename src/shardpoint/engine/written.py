"""What was written where, in columns, with the checksums that were taken on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.formats.checksum import crc32, crc32_combine
from shardpoint.index import BLOCK_BYTES

__all__ = ["BlockSums", "Write", "WrittenRecords", "combined"]

Int64Array = npt.NDArray[np.int64]

Write: TypeAlias = Callable[[int, Sequence[memoryview]], None]
"""``write(offset, buffers)`` writes to one file; may be called side by side."""


@dataclass(frozen=True, slots=True, eq=False)
class WrittenRecords:
    """The records of one file, row by row.

    Attributes
    ----------
    offset, length
        ``int64[n]``: byte span of each record in the file.
    payload_offset, payload_length
        ``int64[n]``: byte span of its payload in the file.
    payload_checksum, record_checksum
        ``uint32[n]``: CRC-32 of the payload, and of all bytes of the record.
    first_block
        ``int64[n + 1]``: the payload's blocks are ``first_block[i]:first_block[i + 1]``.
    blocks
        ``uint32[k]``: CRC-32 of each `BLOCK_BYTES` of a payload; its last block may be shorter.
    """

    offset: Int64Array
    length: Int64Array
    payload_offset: Int64Array
    payload_length: Int64Array
    payload_checksum: npt.NDArray[np.uint32]
    record_checksum: npt.NDArray[np.uint32]
    first_block: Int64Array
    blocks: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.offset)

    @classmethod
    def planned(cls, head: Int64Array, payload: Int64Array, length: Int64Array) -> WrittenRecords:
        """Return the columns of records of known lengths, checksums not filled in yet.

        Parameters
        ----------
        head, payload, length
            ``int64[n]``: bytes before the payload, of the payload, and of the whole record.
        """
        ends = np.cumsum(length)
        first_block = np.zeros(len(length) + 1, np.int64)
        np.cumsum(-(-payload // BLOCK_BYTES), out=first_block[1:])
        return cls(
            offset=ends - length,
            length=length,
            payload_offset=ends - length + head,
            payload_length=payload,
            payload_checksum=np.zeros(len(length), np.uint32),
            record_checksum=np.zeros(len(length), np.uint32),
            first_block=first_block,
            blocks=np.zeros(int(first_block[-1]), np.uint32),
        )

    def spans(self) -> list[tuple[int, int]]:
        """Return offset and length of each record."""
        return list(zip(self.offset.tolist(), self.length.tolist(), strict=True))


def combined(checksums: Sequence[int], nbytes: int) -> int:
    """Return the CRC-32 of `nbytes` bytes from those of their blocks."""
    total = 0
    for number, checksum in enumerate(checksums):
        length = min(BLOCK_BYTES, nbytes - number * BLOCK_BYTES)
        total = crc32_combine(total, checksum, length)
    return total


class BlockSums:
    """Takes the checksums of the blocks of bytes that come in pieces of any lengths."""

    __slots__ = ("_current", "_room", "checksums", "nbytes")

    def __init__(self) -> None:
        self.checksums: list[int] = []
        self.nbytes = 0
        self._current = 0
        self._room = BLOCK_BYTES

    def add(self, data: memoryview) -> None:
        """Take the bytes that follow; format ``B``, one axis."""
        at, end = 0, len(data)
        while at < end:
            stop = min(end, at + self._room)
            self._current = crc32(data[at:stop], self._current)
            self._room -= stop - at
            at = stop
            if not self._room:
                self._close()
        self.nbytes += end

    def finish(self) -> int:
        """Close the last block; return the CRC-32 of all bytes."""
        if self._room < BLOCK_BYTES:
            self._close()
        return combined(self.checksums, self.nbytes)

    def _close(self) -> None:
        self.checksums.append(self._current)
        self._current = 0
        self._room = BLOCK_BYTES
