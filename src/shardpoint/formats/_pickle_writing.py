"""The pickle opcodes of single values, of protocol 4, without memo."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain, repeat

__all__ = ["binary", "floating", "integer", "joined_texts", "text"]


_BYTES = [bytes((value,)) for value in range(1 << 8)]
_SHORT_TEXT = [b"\x8c" + value for value in _BYTES]


def integer(value: int) -> bytes:
    """Return an int as BININT1, BININT2, BININT, LONG1 or LONG4."""
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    length = value.bit_length() // 8 + 1
    data = value.to_bytes(length, "little", signed=True)
    if length < 1 << 8:
        return b"\x8a" + bytes((length,)) + data
    return b"\x8b" + struct.pack("<i", length) + data


def floating(value: float) -> bytes:
    """Return a float as BINFLOAT."""
    return b"G" + struct.pack(">d", value)


def text(value: str) -> bytes:
    """Return a str as SHORT_BINUNICODE, BINUNICODE or BINUNICODE8."""
    data = value.encode("utf-8", "surrogatepass")
    if len(data) < 1 << 8:  # nearly all, by the thousands
        return _SHORT_TEXT[len(data)] + data
    return _sized(data, b"\x8c", b"X", b"\x8d")


def joined_texts(values: Sequence[str], after: bytes) -> bytes:
    """Return many texts, each followed by the same opcodes: `text` for thousands of keys."""
    encoded = list(map(str.encode, values, repeat("utf-8"), repeat("surrogatepass")))
    if max(map(len, encoded), default=0) >= 1 << 8:
        return b"".join([text(value) + after for value in values])
    starts = map(_SHORT_TEXT.__getitem__, map(len, encoded))
    return b"".join(chain.from_iterable(zip(starts, encoded, repeat(after), strict=False)))


def binary(value: bytes) -> bytes:
    """Return bytes as SHORT_BINBYTES, BINBYTES or BINBYTES8."""
    return _sized(value, b"C", b"B", b"\x8e")


def _sized(data: bytes, short: bytes, medium: bytes, long: bytes) -> bytes:
    length = len(data)
    if length < 1 << 8:
        return short + _BYTES[length] + data
    if length < 1 << 32:
        return medium + struct.pack("<I", length) + data
    return long + struct.pack("<Q", length) + data
