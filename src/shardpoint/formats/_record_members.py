"""A record's members, looked up by name, and where in them a tensor's elements lie."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from shardpoint.dtypes import DType
from shardpoint.errors import CorruptionError, LimitExceededError, NotSupportedError
from shardpoint.formats._zip_reading import (
    DirectoryEntry,
    Window,
    locate_member,
    read_directory,
)
from shardpoint.formats.checksum import BytesLike, crc32
from shardpoint.formats.object_decoder import TensorDescription
from shardpoint.index import CONJUGATE, NEGATIVE

__all__ = ["MAX_MEMBERS", "Members", "RecordMember", "TensorPayload", "check_crc", "find_payload"]

MAX_MEMBERS = 4_000_000
_MAX_SMALL_MEMBER = 64


@dataclass(frozen=True, slots=True)
class RecordMember:
    """A member of a record.

    Attributes
    ----------
    name
        Without the folder that all members share.
    offset
        Where its bytes begin, in the file.
    size
        In bytes.
    crc
        CRC-32, or None where torch was told not to compute any
        (``torch.serialization.set_crc32_options(False)``: then all are 0).
    """

    name: str
    offset: int
    size: int
    crc: int | None


@dataclass(frozen=True, slots=True)
class TensorPayload:
    """Where the elements of a record's tensor are, and what they are.

    Attributes
    ----------
    dtype, shape, strides, requires_grad
        Of the tensor; strides in elements, none of them negative.
    payload_offset
        Where element 0 lies in the file.
    payload_length
        Bytes from there to the end of the last element.
    checksum
        CRC-32 of those bytes, or None where there is none (or the tensor is only a part of
        its storage).
    flags
        `CONJUGATE`, `NEGATIVE` or both, where the value is that of what is stored.
    """

    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    payload_offset: int
    payload_length: int
    checksum: int | None
    flags: int
    requires_grad: bool


class Members:
    """The directory of a record; a member is located when it is asked for."""

    def __init__(self, window: Window, *, max_members: int) -> None:
        entries = read_directory(window, max_members=max_members)
        if not entries:
            window.fail("not a torch.save record: the zip is empty")
        folder, slash, _ = entries[0].name.partition("/")
        prefix = folder + slash
        self._window = window
        self._entries: dict[str, DirectoryEntry] = {}
        for entry in entries:
            if not slash or not entry.name.startswith(prefix):
                window.fail(
                    f"not a torch.save record: member {entry.name!r} is not in the folder "
                    f"of {entries[0].name!r}"
                )
            self._entries[entry.name[len(prefix) :]] = entry
        # An empty member's CRC-32 is 0, and that of others practically never.
        self._has_checksums = any(entry.crc for entry in entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def member(self, name: str) -> RecordMember:
        entry = self._entries.get(name)
        if entry is None:
            self._window.fail(f"the record has no member {name!r}")
        position = locate_member(self._window, entry)
        crc = entry.crc if self._has_checksums else None
        return RecordMember(name, self._window.offset + position, entry.size, crc)

    def content(self, name: str, *, limit: int) -> bytes:
        """Return a member's bytes, checked."""
        member = self.member(name)
        position = member.offset - self._window.offset
        if member.size > limit:
            self._window.fail(
                f"member {name!r} has {member.size} bytes, more than {limit}",
                position,
                kind=LimitExceededError,
            )
        data = self._window.read(position, member.size, f"member {name!r}")
        check_crc(self._window, member, data)
        return data

    def byteorder(self) -> str:
        """Return the byte order; releases before 2.1 do not give any, and are little-endian."""
        if "byteorder" not in self:
            return "little"
        found = self.content("byteorder", limit=_MAX_SMALL_MEMBER)
        if found not in (b"little", b"big"):
            self._window.fail(f"the record's byte order is {found!r}")
        return found.decode()

    def check_little_endian(self) -> None:
        if self.byteorder() != "little":
            self._window.fail(
                "the record was written on a big-endian machine", kind=NotSupportedError
            )


def check_crc(window: Window, member: RecordMember, data: BytesLike) -> None:
    if member.crc is None:
        return
    found = crc32(data)
    if found != member.crc:
        window.fail(
            f"member {member.name!r} is damaged: its CRC-32 should be {member.crc:08x}, "
            f"it is {found:08x}",
            member.offset - window.offset,
            kind=CorruptionError,
        )


def find_payload(
    window: Window, description: TensorDescription, storage: RecordMember, *, most_expanded: int
) -> TensorPayload:
    """Place a tensor in its storage.

    Parameters
    ----------
    window
        For messages; `storage` lies in it.
    description
        What the pickle says.
    storage
        What is there.
    most_expanded
        Bytes that a tensor may have that has more elements than its storage (an expanded one).

    Raises
    ------
    CorruptionError
        If the storage has another size than the pickle says.
    FormatError
        If elements lie outside.
    LimitExceededError
        If an expanded tensor is too large.
    """
    dtype, shape, strides = description.dtype, description.shape, description.strides
    position = storage.offset - window.offset
    if storage.size != description.storage_nbytes:
        window.fail(
            f"the tensor's storage should have {description.storage_nbytes} bytes, member "
            f"{storage.name!r} has {storage.size}",
            position,
            kind=CorruptionError,
        )
    count = prod(shape)
    first = description.storage_offset if count else 0
    extent = 0
    if count:
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    length = extent * dtype.itemsize
    start = first * dtype.itemsize
    if start + length > storage.size:
        window.fail(
            f"a tensor of shape {shape}, strides {strides} and storage offset {first} runs "
            f"past its storage of {storage.size} bytes",
            position,
        )
    if count * dtype.itemsize > max(storage.size, most_expanded):
        window.fail(
            f"a tensor of shape {shape} has far more elements than its storage of "
            f"{storage.size} bytes",
            position,
            kind=LimitExceededError,
        )
    return TensorPayload(
        dtype=dtype,
        shape=shape,
        strides=strides,
        payload_offset=storage.offset + start,
        payload_length=length,
        checksum=storage.crc if length == storage.size else None,
        flags=CONJUGATE * description.conjugate | NEGATIVE * description.negative,
        requires_grad=description.requires_grad,
    )
