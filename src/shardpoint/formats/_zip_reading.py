"""Finds the members of a zip of stored (not compressed) members, reading as little as it can.

Source of the format: PKWARE's APPNOTE.TXT 6.3 (sections 4.3 and 4.5.3), and the files that
torch 2.3 to 2.15 write. Every number is checked against the span of the zip before use.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from shardpoint.errors import (
    CorruptionError,
    FormatError,
    LimitExceededError,
    NotSupportedError,
    Problem,
    ShardpointError,
)

__all__ = ["DirectoryEntry", "ReadAt", "Window", "locate_member", "read_directory"]

ReadAt: TypeAlias = Callable[[int, int], bytes]
"""``read_at(absolute offset, length)`` returns exactly that many bytes, or raises."""

MAX_DIRECTORY_BYTES = 256 << 20

_END = struct.Struct("<4s4H2LH")  # end of central directory
_LOCATOR = struct.Struct("<4sLQL")  # zip64 end of central directory locator
_END64 = struct.Struct("<4sQ2H2L4Q")  # zip64 end of central directory
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_PAIR = struct.Struct("<HH")
_QUAD = struct.Struct("<Q")

_ENCRYPTED = 0x1 | 0x40 | 0x2000
_HAS_DESCRIPTOR = 0x8
_FULL32 = 0xFFFFFFFF
_FULL16 = 0xFFFF
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Window:
    """One record's span of a file, with the pieces that were read so far.

    Positions are relative to the record; messages give them relative to the file.
    """

    def __init__(
        self, read_at: ReadAt, offset: int, length: int, *, file: str, key: str | None
    ) -> None:
        self.offset = offset
        self.length = length
        self._read_at = read_at
        self._file = file
        self._key = key
        self._pieces: list[tuple[int, bytes]] = []
        if offset < 0 or length < 0:
            self.fail(f"the record has the span offset {offset}, length {length}")

    def fail(
        self, message: str, position: int = 0, *, kind: type[ShardpointError] = FormatError
    ) -> NoReturn:
        """Raise `kind` with the record's key, file and offset."""
        raise kind(
            str(Problem(message, key=self._key, file=self._file, offset=self.offset + position))
        )

    @property
    def source(self) -> str:
        """The record's place, for messages of others."""
        return str(Problem("its pickle", key=self._key, file=self._file, offset=self.offset))

    def fetch(self, position: int, length: int) -> None:
        """Read a piece now, cut to the record, so that later reads inside it cost nothing."""
        start = max(position, 0)
        stop = min(position + length, self.length)
        if start < stop:
            self._pieces.append((start, self._load(start, stop - start)))

    def read(self, position: int, length: int, what: str) -> bytes:
        """Return bytes of the record.

        Raises
        ------
        FormatError
            If they are not inside the record.
        CorruptionError
            If the file ends before.
        """
        if position < 0 or position + length > self.length:
            self.fail(
                f"{what} would lie at {position} to {position + length} of a record "
                f"of {self.length} bytes",
            )
        for start, piece in self._pieces:
            first = position - start
            if first >= 0 and first + length <= len(piece):
                return piece[first : first + length]
        return self._load(position, length)

    def piece(self, position: int, length: int) -> bytes:
        """Return bytes that are known to be inside the record."""
        return self.read(position, length, "a piece")

    def _load(self, position: int, length: int) -> bytes:
        data = self._read_at(self.offset + position, length)
        if len(data) != length:
            self.fail(f"wanted {length} bytes, found {len(data)}", position, kind=CorruptionError)
        return data


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One member as the central directory has it; `header` is relative to the zip."""

    name: str
    header: int
    size: int
    crc: int
    flags: int


def read_directory(window: Window, *, max_members: int) -> list[DirectoryEntry]:
    """Return the members in the order of the central directory.

    Raises
    ------
    FormatError
        If the bytes are no zip, a member is compressed or encrypted, a name occurs twice,
        or a number points outside.
    CorruptionError
        If the end is missing, or the two end records contradict each other.
    LimitExceededError
        If there are more than `max_members` members.
    """
    position, size, count, stop = _find_directory(window)
    if count > max_members:
        window.fail(
            f"{count} members in a zip that may have {max_members}",
            position,
            kind=LimitExceededError,
        )
    if position + size > stop:
        window.fail(f"the zip's directory of {size} bytes runs past {stop}", position)
    if size < count * _CENTRAL.size or size > MAX_DIRECTORY_BYTES:
        window.fail(f"the zip's directory has {size} bytes for {count} members", position)
    data = window.read(position, size, "the zip's directory")
    entries: dict[str, DirectoryEntry] = {}
    at = 0
    for _ in range(count):
        entry, at = _read_entry(window, data, at, position)
        if entry.name in entries:
            window.fail(f"two members are named {entry.name!r}", position + at)
        if entry.header + _LOCAL.size + len(entry.name) + entry.size > position:
            window.fail(
                f"the zip's directory places {entry.name!r} ({entry.size} bytes) at "
                f"{entry.header}, but the members end at {position}",
                position,
            )
        entries[entry.name] = entry
    if at != size:
        window.fail(f"{size - at} bytes are left after the directory's {count} members", position)
    return list(entries.values())


def _find_directory(window: Window) -> tuple[int, int, int, int]:
    """Return position, size and member count of the directory, and where it must end."""
    end_at = window.length - _END.size
    if end_at < 0:
        window.fail(f"{window.length} bytes are too few for a zip record", kind=CorruptionError)
    end = _END.unpack(window.read(end_at, _END.size, "the zip's end record"))
    if end[0] != b"PK\x05\x06" or end[7] != 0:
        _fail_without_end(window, end_at)
    if end[1] or end[2]:
        window.fail("a zip over several disks", end_at, kind=NotSupportedError)
    in_end = (end[6], end[5], end[4])
    if end[3] != end[4]:
        window.fail(
            f"the end record counts {end[3]} and {end[4]} members", end_at, kind=CorruptionError
        )
    locator_at = end_at - _LOCATOR.size
    if locator_at < 0:
        return *in_end, end_at
    locator = _LOCATOR.unpack(window.read(locator_at, _LOCATOR.size, "the zip64 locator"))
    if locator[0] != b"PK\x06\x07":
        return *in_end, end_at
    end64_at = locator[2]
    if end64_at + _END64.size > locator_at:
        window.fail(f"the zip64 locator points to {end64_at}", locator_at, kind=CorruptionError)
    end64 = _END64.unpack(window.read(end64_at, _END64.size, "the zip64 end record"))
    if end64[0] != b"PK\x06\x06" or end64[4] or end64[5] or end64[6] != end64[7]:
        window.fail("the zip64 end record is damaged", end64_at, kind=CorruptionError)
    in_end64 = (end64[9], end64[8], end64[7])
    for small, large, full in zip(in_end, in_end64, (_FULL32, _FULL32, _FULL16), strict=True):
        if small not in (large, full):
            window.fail(
                f"the zip's end record has {small} where the zip64 end record has {large}",
                end_at,
                kind=CorruptionError,
            )
    return *in_end64, end64_at


def _fail_without_end(window: Window, end_at: int) -> NoReturn:
    begin = window.read(0, 4, "the record's start")
    if begin == b"PK\x03\x04":
        window.fail("the record's zip has no end: cut off?", end_at, kind=CorruptionError)
    if begin == _ZSTD_MAGIC:
        window.fail("the record is a zstd frame, which the metadata does not say; wanted a zip")
    window.fail(f"not a torch.save record: wanted a zip, found bytes {begin!r}")


def _read_entry(window: Window, data: bytes, at: int, position: int) -> tuple[DirectoryEntry, int]:
    if at + _CENTRAL.size > len(data):
        window.fail("the zip's directory ends inside a member", position + at)
    (
        signature,
        _made_by,
        _needs,
        flags,
        method,
        _time,
        _date,
        crc,
        packed,
        size,
        name_length,
        extra_length,
        comment_length,
        disk,
        _internal,
        _external,
        header,
    ) = _CENTRAL.unpack_from(data, at)
    name_at = at + _CENTRAL.size
    extra_at = name_at + name_length
    stop = extra_at + extra_length + comment_length
    if signature != b"PK\x01\x02" or stop > len(data):
        window.fail("the zip's directory is damaged", position + at, kind=CorruptionError)
    try:
        name = data[name_at:extra_at].decode()
    except UnicodeDecodeError:
        window.fail("a member's name is not UTF-8", position + at)
    if _FULL32 in (packed, size, header):
        extra = data[extra_at : extra_at + extra_length]
        size, packed, header = _widen(window, extra, size, packed, header, position + at)
    if method != 0 or packed != size:
        window.fail(
            f"member {name!r} is compressed (method {method}, {packed} bytes for {size}); "
            "torch.save stores members as they are",
            position + at,
        )
    if flags & _ENCRYPTED or disk:
        window.fail(f"member {name!r} is encrypted or on another disk", position + at)
    return DirectoryEntry(name, header, size, crc, flags), stop


def _widen(
    window: Window, extra: bytes, size: int, packed: int, header: int, position: int
) -> tuple[int, int, int]:
    """Replace the fields that are full by those of the zip64 extra field, in its order."""
    at = 0
    while at + _PAIR.size <= len(extra):
        tag, length = _PAIR.unpack_from(extra, at)
        at += _PAIR.size
        if tag == 1:
            wide = []
            stop = min(at + length, len(extra))
            for value in (size, packed, header):
                if value != _FULL32:
                    wide.append(value)
                elif at + _QUAD.size <= stop:
                    wide.append(_QUAD.unpack_from(extra, at)[0])
                    at += _QUAD.size
                else:
                    window.fail("a zip64 field is too short", position, kind=CorruptionError)
            return wide[0], wide[1], wide[2]
        at += length
    return window.fail("a member lacks its zip64 field", position, kind=CorruptionError)


def locate_member(window: Window, entry: DirectoryEntry) -> int:
    """Return where a member's bytes begin, relative to the zip, by its local header.

    Raises
    ------
    FormatError, CorruptionError
        If the local header is another member's, or contradicts the directory.
    """
    name = entry.name.encode()
    raw = window.read(entry.header, _LOCAL.size + len(name), f"the header of {entry.name!r}")
    (
        signature,
        _needs,
        flags,
        method,
        _time,
        _date,
        crc,
        _packed,
        size,
        name_length,
        extra_length,
    ) = _LOCAL.unpack_from(raw)
    found = raw[_LOCAL.size :]
    if signature != b"PK\x03\x04" or name_length != len(name) or found != name:
        window.fail(f"no member header for {entry.name!r} here", entry.header, kind=CorruptionError)
    if method != 0 or flags != entry.flags:
        window.fail(
            f"the header of {entry.name!r} has method {method} and flags {flags:#x}, the "
            f"directory has method 0 and flags {entry.flags:#x}",
            entry.header,
        )
    if not flags & _HAS_DESCRIPTOR and (crc != entry.crc or size not in (entry.size, _FULL32)):
        window.fail(
            f"the header of {entry.name!r} contradicts the directory",
            entry.header,
            kind=CorruptionError,
        )
    begin: int = entry.header + len(raw) + extra_length
    if begin + entry.size > window.length:
        window.fail(f"member {entry.name!r} runs past the record's end", entry.header)
    return begin
