"""The pieces of a zip of stored members, as torch.save lays them out since torch 2.7.

Facts (from files that torch 2.13 wrote, the large ones by hand with sparse files):

- version numbers, times and attributes are 0; flags are 0x808, or 0x800 for an empty member;
- local headers have CRC and sizes 0; a descriptor follows the data, unless it is empty;
- an extra field ``FB`` filled with ``Z`` brings the data to a multiple of the alignment;
- a member of 4 GiB or more has a zip64 field in its local header with its size and 0; one
  that *begins* at 4 GiB or later has one with its own position; either has a descriptor of
  24 bytes in place of 16, and the fields of the directory that are full are widened;
- the zip64 end record and locator are always there.
"""

from __future__ import annotations

import struct

__all__ = [
    "ALIGNMENT",
    "CENTRAL_CRC_AT",
    "CENTRAL_POSITION_AT",
    "CENTRAL_SIZES_AT",
    "DESCRIPTOR_CRC_AT",
    "DESCRIPTOR_SIZES_AT",
    "END_POSITION_AT",
    "END_WIDE_POSITIONS_AT",
    "central_entry",
    "descriptor",
    "descriptor_length",
    "end",
    "local_header",
]

ALIGNMENT = 64
"""Data of members begin at multiples of this, counted from the start of the zip."""

# Places of fields, for those who fill them in later. Those of sizes and positions hold for
# members that neither have 4 GiB nor begin past them.
DESCRIPTOR_CRC_AT = 4
DESCRIPTOR_SIZES_AT = (8, 12)
CENTRAL_CRC_AT = 16
CENTRAL_SIZES_AT = (20, 24)
CENTRAL_POSITION_AT = 42
END_WIDE_POSITIONS_AT = (48, 64)
"""In `end`: 64-bit positions of the directory and of the zip64 end record."""
END_POSITION_AT = 92
"""In `end`: the 32-bit position of the directory."""

_FULL32 = 0xFFFFFFFF
_FULL16 = 0xFFFF
_HAS_DESCRIPTOR = 0x8
_UTF8 = 0x800

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_DESCRIPTOR = struct.Struct("<4s3L")
_DESCRIPTOR64 = struct.Struct("<4sL2Q")
_END = struct.Struct("<4sQ2H2L4Q4sLQL4s4H2LH")


def _flags(size: int) -> int:
    return _UTF8 | (_HAS_DESCRIPTOR if size else 0)


def local_header(name: bytes, position: int, size: int) -> bytes:
    """Return the header of a member at `position`, with padding up to its data."""
    wide = b""
    if size >= _FULL32:
        wide += struct.pack("<QQ", size, 0)
    if position >= _FULL32:
        wide += struct.pack("<Q", position)
    if wide:
        wide = struct.pack("<HH", 1, len(wide)) + wide
    padding = -(position + _LOCAL.size + len(name) + len(wide) + 4) % ALIGNMENT
    extra = wide + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    fixed = _LOCAL.pack(b"PK\3\4", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(name), len(extra))
    return fixed + name + extra


def descriptor_length(position: int, size: int) -> int:
    """Return how many bytes `descriptor` gives."""
    if size == 0:
        return 0
    return _DESCRIPTOR64.size if max(position, size) >= _FULL32 else _DESCRIPTOR.size


def descriptor(position: int, size: int, crc: int) -> bytes:
    """Return what follows the data of a member whose header is at `position`."""
    if size == 0:
        return b""
    form = _DESCRIPTOR64 if max(position, size) >= _FULL32 else _DESCRIPTOR
    return form.pack(b"PK\7\x08", crc, size, size)


def central_entry(name: bytes, position: int, size: int, crc: int) -> bytes:
    """Return a member's entry in the central directory."""
    wide = b""
    if size >= _FULL32:
        wide += struct.pack("<QQ", size, size)
    if position >= _FULL32:
        wide += struct.pack("<Q", position)
    if wide:
        wide = struct.pack("<HH", 1, len(wide)) + wide
    short_size = min(size, _FULL32)
    fixed = _CENTRAL.pack(
        b"PK\1\2",
        0,
        0,
        _flags(size),
        0,
        0,
        0,
        crc,
        short_size,
        short_size,
        len(name),
        len(wide),
        0,
        0,
        0,
        0,
        min(position, _FULL32),
    )
    return fixed + name + wide


def end(count: int, position: int, size: int) -> bytes:
    """Return what follows a directory of `size` bytes at `position`."""
    short_count = min(count, _FULL16)
    return _END.pack(
        b"PK\6\6",
        44,  # bytes of this end record after this field
        0x031E,  # as torch writes it: made on Unix by version 3.0 ...
        45,  # ... and needing version 4.5, which knows zip64
        0,
        0,
        count,
        count,
        size,
        position,
        b"PK\6\7",
        0,
        position + size,
        1,
        b"PK\5\6",
        0,
        0,
        short_count,
        short_count,
        min(size, _FULL32),
        min(position, _FULL32),
        0,
    )
