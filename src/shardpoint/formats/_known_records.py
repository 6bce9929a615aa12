"""Records whose bytes are known but for a few fields: found by comparison, not by parsing.

What torch 2.7 and later write, and shardpoint too, is the same for all tensors of one form
and for all objects whose pickles have one length, but for the pickle or payload, CRC-32
values, and the fingerprint. Comparing with the known bytes takes a tenth of the time of
reading a zip's directory. Whatever differs in anything else is left to the full parser: the
comparison accepts records and never refuses one.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shardpoint.errors import ShardpointError
from shardpoint.formats._object_layout import object_frame
from shardpoint.formats._record_layout import FINGERPRINT_LENGTH, TensorRecordLayout
from shardpoint.formats._record_members import TensorPayload
from shardpoint.formats.checksum import crc32

__all__ = [
    "Template",
    "find_known_payload",
    "known_object_pickle",
    "object_template",
    "pickle_length",
    "remember_payload",
]

_MOST_PICKLE_BYTES = 4096
_MOST_LENGTHS = 1024
_MOST_PER_LENGTH = 4

ReadPiece = Callable[[int, int], bytes]
"""``read(position in the record, length)``; positions are inside the record."""


@dataclass(frozen=True, slots=True)
class Template:
    """Bytes of which some fields may be anything.

    Attributes
    ----------
    form
        Cuts the bytes into constant and variable pieces by turns; a constant one is first
        and last.
    constants
        The constant pieces.
    """

    form: struct.Struct
    constants: tuple[bytes, ...]

    @classmethod
    def of(cls, data: bytes, fields: Sequence[tuple[int, int]]) -> Template:
        """Make a template of bytes, with the (position, length) of fields that do not touch."""
        sizes, constants, at = [], [], 0
        for position, length in sorted(fields):
            sizes += [position - at, length]
            constants.append(data[at:position])
            at = position + length
        constants.append(data[at:])
        sizes.append(len(data) - at)
        form = struct.Struct("<" + "".join(f"{size}s" for size in sizes))
        return cls(form, tuple(constants))

    def field_sizes(self) -> list[int]:
        """Return the bytes of each field, in their order."""
        return [int(size) for size in self.form.format[1:].split("s")[1:-1:2]]

    def match(self, data: bytes | memoryview) -> tuple[bytes, ...] | None:
        """Return the fields of bytes of the right length; None if a constant piece differs."""
        pieces: tuple[bytes, ...] = self.form.unpack(data)
        return pieces[1::2] if pieces[::2] == self.constants else None


# Objects


@functools.lru_cache(maxsize=_MOST_LENGTHS)
def object_template(length: int) -> Template:
    """Return what the records of objects have in common whose pickles have one length."""
    frame = object_frame(length)
    fields = [(frame.pickle_at, length), (frame.fingerprint_at, FINGERPRINT_LENGTH)]
    fields += [(at, 4) for at in (*frame.pickle_crcs_at, *frame.fingerprint_crcs_at)]
    return Template.of(frame.record, fields)


def known_object_pickle(record: memoryview) -> bytes | None:
    """Return the pickle of an object's record, its CRC-32 compared; None if not known."""
    length = pickle_length(record)
    if length is None:
        return None
    template = object_template(length)
    if template.form.size != len(record):
        return None
    fields = template.match(record)
    if fields is None:
        return None
    # In the order of the record: the descriptors' come before the directory's.
    pickle, crc, _fingerprint, _fingerprint_crc, directory_crc, _directory_fingerprint_crc = fields
    if crc != directory_crc or crc32(pickle).to_bytes(4, "little") != crc:
        return None
    return pickle


@functools.lru_cache(maxsize=1)
def _from_end() -> tuple[int, int]:
    """Return how far before a record's end the pickle's size stands, and the least length."""
    frame = object_frame(1)
    return len(frame.record) - frame.pickle_size_at, len(frame.record)


def pickle_length(record: memoryview) -> int | None:
    """Return the length of a record's pickle, if it is an object's of the usual form."""
    from_end, least = _from_end()
    if len(record) < least:
        return None
    at = len(record) - from_end
    length = int.from_bytes(record[at : at + 4], "little")
    return length if 0 < length <= _MOST_PICKLE_BYTES and length < len(record) else None


# Tensors


@dataclass(frozen=True, slots=True)
class _KnownTensor:
    """Records of one form of tensor; `payload` is that of a record at offset 0."""

    head: bytes
    tail: Template
    payload: TensorPayload

    def match(self, read: ReadPiece, offset: int, length: int) -> TensorPayload | None:
        if read(0, len(self.head)) != self.head:
            return None
        tail = self.tail.form.size
        fields = self.tail.match(read(length - tail, tail))
        # Descriptor, fingerprint and its CRC-32, then the directory's two.
        if fields is None or fields[0] != fields[3]:
            return None
        known = self.payload
        return TensorPayload(
            known.dtype,
            known.shape,
            known.strides,
            offset + known.payload_offset,
            known.payload_length,
            int.from_bytes(fields[0], "little"),
            known.flags,
            known.requires_grad,
        )


_known_tensors: dict[int, tuple[_KnownTensor, ...]] = {}


def find_known_payload(read: ReadPiece, offset: int, length: int) -> TensorPayload | None:
    """Return where a record's tensor lies, if it is of a form that was remembered.

    Parameters
    ----------
    read
        Gives bytes of the record.
    offset, length
        The record's span in its file.
    """
    for known in _known_tensors.get(length, ()):
        found = known.match(read, offset, length)
        if found is not None:
            return found
    return None


def remember_payload(payload: TensorPayload, offset: int, length: int, head: bytes) -> None:
    """Remember a record that was parsed in full, if it has the usual form.

    Parameters
    ----------
    payload
        What the parser found in the record at `offset`.
    length
        Of the record.
    head
        The record's bytes from its start on, as far as they are at hand.
    """
    if payload.flags or payload.checksum is None or not payload.payload_length:
        return
    try:
        layout = TensorRecordLayout(
            payload.dtype, payload.shape, payload.strides, payload.requires_grad
        )
    except ShardpointError:  # strides that a reader takes and nobody writes
        return
    before = len(layout.head)
    is_usual = (
        layout.length == length
        and payload.payload_offset - offset == before
        and payload.payload_length == layout.payload_length
        and head[:before] == layout.head
    )
    others = _known_tensors.get(length, ())
    if not is_usual or len(others) == _MOST_PER_LENGTH:
        return
    if len(_known_tensors) >= _MOST_LENGTHS:
        _known_tensors.clear()
    tail = Template.of(layout.tail(0), layout.tail_fields())
    known = _KnownTensor(layout.head, tail, replace(payload, payload_offset=before))
    _known_tensors[length] = (*others, known)
