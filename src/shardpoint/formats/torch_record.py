"""torch.save records (a tensor or an object each): found and written by byte layout.

A record is a zip of stored members under one folder: ``data.pkl`` (a pickle in which storages
are persistent ids), ``byteorder`` (since torch 2.1), ``data/<key>`` (the storages' bytes),
``version`` and, since torch 2.7, some more. Source: files of torch 2.3 to 2.15.

Nothing here copies a record: readers learn where a payload lies from a record's first and
last kilobyte; writers get the bytes before and after a payload.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from shardpoint.dtypes import DType
from shardpoint.errors import CorruptionError
from shardpoint.formats._known_records import (
    find_known_payload,
    known_object_pickle,
    remember_payload,
)
from shardpoint.formats._object_layout import object_form, object_record
from shardpoint.formats._record_layout import TensorRecordLayout
from shardpoint.formats._record_members import (
    MAX_MEMBERS,
    Members,
    RecordMember,
    TensorPayload,
    check_crc,
    find_payload,
)
from shardpoint.formats._zip_reading import ReadAt, Window
from shardpoint.formats.checksum import BytesLike
from shardpoint.formats.object_decoder import TensorDescription, read_tensor_description

__all__ = [
    "HEAD_BYTES",
    "SMALL_RECORD_BYTES",
    "TAIL_BYTES",
    "LoadStorage",
    "ReadAt",
    "RecordMember",
    "TensorPayload",
    "TensorRecordLayout",
    "TorchRecord",
    "object_form",
    "object_record",
    "parse_record",
    "read_object_pickle",
    "read_tensor_payload",
    "tensor_payload_from_bytes",
]

HEAD_BYTES = 1024
"""What `read_tensor_payload` reads from a record's start: enough for all torch writes, unless
the storage alignment is larger than 64."""

TAIL_BYTES = 1024
"""What `read_tensor_payload` reads from a record's end; likewise."""

SMALL_RECORD_BYTES = 4096
"""Records up to this size are read at once."""

MAX_TENSOR_MEMBERS = 64
MAX_TENSOR_PICKLE_BYTES = 1 << 20
_KNOWN_DESCRIPTIONS = 4096

LoadStorage: TypeAlias = Callable[[DType | None, str, str, int], memoryview]
"""``load_storage(dtype or None for untyped, key, location, numel)`` returns the bytes."""


@dataclass(frozen=True, slots=True)
class TorchRecord:
    """All members of a record by name, and the byte order of its storages."""

    members: dict[str, RecordMember]
    byteorder: str


def parse_record(
    read_at: ReadAt, offset: int, length: int, *, file: str, key: str = ""
) -> TorchRecord:
    """Find all members of a record.

    Parameters
    ----------
    read_at
        ``read_at(absolute offset, length)`` returns exactly that many bytes.
    offset, length
        The record's span in the file.
    file, key
        For messages.

    Raises
    ------
    FormatError
        If the bytes are no zip of stored members in one folder, two have the same name, or
        one lies outside the span.
    CorruptionError
        If the end is missing or the zip contradicts itself.
    LimitExceededError, and what `read_at` raises
    """
    window = Window(read_at, offset, length, file=file, key=key)
    window.fetch(length - TAIL_BYTES, TAIL_BYTES)
    members = Members(window, max_members=MAX_MEMBERS)
    return TorchRecord(
        members={name: members.member(name) for name in members.names()},
        byteorder=members.byteorder(),
    )


def read_tensor_payload(
    read_at: ReadAt, offset: int, length: int, *, file: str, key: str
) -> TensorPayload:
    """Learn where a record's tensor lies, from the record's start and end.

    Reads the last `TAIL_BYTES` and the first `HEAD_BYTES` (all of it up to
    `SMALL_RECORD_BYTES`), and more only where those do not hold what torch usually has there.
    The checksum of the pickle is compared; that of the payload is returned.

    Parameters
    ----------
    read_at, offset, length, file, key
        As in `parse_record`.

    Raises
    ------
    FormatError
        Also if the record holds no tensor, the tensor does not fit its storage, or has more
        elements than its storage has; `ForbiddenContentError` if the pickle names anything
        that a tensor does not need.
    CorruptionError
        Also if the pickle's checksum is wrong or the storage's size is not the announced one.
    NotSupportedError
        If it was written on a big-endian machine, or has a dtype that is not known.
    LimitExceededError, and what `read_at` raises
    """
    window = Window(read_at, offset, length, file=file, key=key)
    if length <= SMALL_RECORD_BYTES:
        window.fetch(0, length)
    else:
        window.fetch(length - TAIL_BYTES, TAIL_BYTES)
        window.fetch(0, HEAD_BYTES)
    known = find_known_payload(window.piece, offset, length)
    if known is not None:
        return known
    members = Members(window, max_members=MAX_TENSOR_MEMBERS)
    members.check_little_endian()
    pickle = members.content("data.pkl", limit=MAX_TENSOR_PICKLE_BYTES)
    description = _describe(pickle, window)
    storage = members.member(f"data/{description.storage_key}")
    payload = find_payload(window, description, storage, most_expanded=0)
    remember_payload(payload, offset, length, window.piece(0, min(length, HEAD_BYTES)))
    return payload


def tensor_payload_from_bytes(
    record: BytesLike, base_offset: int = 0, *, file: str, key: str
) -> TensorPayload:
    """As `read_tensor_payload`, of a record in memory that begins at `base_offset` of a file."""
    view = memoryview(record).cast("B")

    def read_at(offset: int, length: int) -> bytes:
        start = offset - base_offset
        return bytes(view[start : start + length])

    return read_tensor_payload(read_at, base_offset, len(view), file=file, key=key)


_descriptions: dict[bytes, TensorDescription] = {}


def _describe(pickle: bytes, window: Window) -> TensorDescription:
    """Read a pickle; chunks of the same shape have the same one, so some are remembered."""
    known = _descriptions.get(pickle)
    if known is None:
        known = read_tensor_description(pickle, source=window.source)
        if len(_descriptions) >= _KNOWN_DESCRIPTIONS:
            _descriptions.clear()
        _descriptions[pickle] = known
    return known


def read_object_pickle(
    record: BytesLike, *, file: str, key: str, verify: bool = True
) -> tuple[bytes, LoadStorage]:
    """Take an object's record apart.

    Parameters
    ----------
    record
        The whole record; the storages that the second result gives are views of it.
    file, key
        For messages.
    verify
        Whether to compare the storages' checksums; that of the pickle always is compared.

    Returns
    -------
    bytes, LoadStorage
        The pickle, and what gives a storage's bytes, for `object_decoder.decode_object`.

    Raises
    ------
    FormatError, CorruptionError, NotSupportedError, LimitExceededError
        As in `parse_record`; the second result raises them too.
    """
    view = memoryview(record).cast("B")
    known = known_object_pickle(view)
    if known is not None:

        def load_none(dtype: DType | None, storage: str, location: str, numel: int) -> memoryview:
            return _parse_object(view, file=file, key=key, verify=verify)[1](
                dtype, storage, location, numel
            )

        return known, load_none
    return _parse_object(view, file=file, key=key, verify=verify)


def _parse_object(
    view: memoryview, *, file: str, key: str, verify: bool
) -> tuple[bytes, LoadStorage]:
    def read_at(offset: int, length: int) -> bytes:
        return bytes(view[offset : offset + length])

    window = Window(read_at, 0, len(view), file=file, key=key)
    members = Members(window, max_members=MAX_MEMBERS)
    members.check_little_endian()
    pickle = members.content("data.pkl", limit=len(view))

    def load_storage(dtype: DType | None, key: str, location: str, numel: int) -> memoryview:
        member = members.member(f"data/{key}")
        data = view[member.offset : member.offset + member.size]
        expected = numel * (1 if dtype is None else dtype.itemsize)
        if member.size != expected:
            window.fail(
                f"storage {key!r} should have {expected} bytes, it has {member.size}",
                member.offset,
                kind=CorruptionError,
            )
        if verify:
            check_crc(window, member, data)
        return data

    return pickle, load_storage
