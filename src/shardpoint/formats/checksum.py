"""CRC-32, the checksum of zip records, in one place.

The polynomial is the one of zip and zlib. zlib-ng computes it with vector instructions
and lets other threads run meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from zlib_ng import zlib_ng

__all__ = ["BytesLike", "crc32", "crc32_combine", "crc32_of_each"]

BytesLike: TypeAlias = "bytes | bytearray | memoryview"
"""Bytes in one piece."""


def crc32(data: BytesLike, value: int = 0) -> int:
    """Return the CRC-32 of `data`, continuing from the CRC-32 `value` of what precedes it.

    Examples
    --------
    >>> crc32(b"56789", crc32(b"1234")) == crc32(b"123456789") == 0xCBF43926
    True
    """
    return zlib_ng.crc32(data, value)


def crc32_of_each(pieces: Iterable[BytesLike]) -> list[int]:
    """Return the CRC-32 of each of many pieces."""
    return list(map(zlib_ng.crc32, pieces))


def crc32_combine(first: int, second: int, second_length: int) -> int:
    """Return the CRC-32 of two pieces one after the other from those of each.

    Examples
    --------
    >>> crc32_combine(crc32(b"1234"), crc32(b"56789"), 5) == 0xCBF43926
    True
    """
    return zlib_ng.crc32_combine(first, second, second_length)
