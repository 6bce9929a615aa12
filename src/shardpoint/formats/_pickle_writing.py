"""The pickle opcodes of single values, of protocol 4, without memo."""

from __future__ import annotations

import struct

__all__ = ["binary", "floating", "integer", "text"]


_BYTES = [bytes((value,)) for value in range(1 << 8)]


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
        return b"\x8c" + _BYTES[len(data)] + data
    return _sized(data, b"\x8c", b"X", b"\x8d")


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
