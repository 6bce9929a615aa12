"""The CRC-32 of bytes that several threads read or write piece by piece."""

from __future__ import annotations

import threading

from shardpoint.formats.checksum import crc32_combine

__all__ = ["PiecewiseChecksum"]


class PiecewiseChecksum:
    """Collects the checksums of the pieces of one payload, in any order.

    Parameters
    ----------
    lengths
        Bytes of each piece, in the payload's order.
    """

    __slots__ = ("_checksums", "_lengths", "_lock", "_missing")

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths
        self._checksums = [0] * len(lengths)
        self._missing = len(lengths)
        self._lock = threading.Lock()

    def put(self, piece: int, checksum: int) -> bool:
        """Note a piece's checksum; return True to the one caller whose piece was the last."""
        with self._lock:
            self._checksums[piece] = checksum
            self._missing -= 1
            return self._missing == 0

    def combined(self) -> int:
        """Return the CRC-32 of all pieces one after the other; all must have been put."""
        total = 0
        for checksum, length in zip(self._checksums, self._lengths, strict=True):
            total = crc32_combine(total, checksum, length)
        return total
