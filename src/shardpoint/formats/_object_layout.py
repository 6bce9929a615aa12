"""Writes torch.save records of objects: a pickle, and the storages that it names."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from shardpoint.formats._record_layout import (
    BEFORE,
    FIELD,
    FINGERPRINT,
    FINGERPRINT_LENGTH,
    PICKLE,
    PREFIX,
    VERSION,
    Zip,
)
from shardpoint.formats._zip_writing import CENTRAL_CRC_AT, CENTRAL_SIZES_AT, DESCRIPTOR_CRC_AT
from shardpoint.formats.checksum import BytesLike, crc32
from shardpoint.formats.record_form import RecordForm

__all__ = ["ObjectFrame", "object_form", "object_frame", "object_record"]

_MOST_FRAMED = 4096  # longer pickles are rarely of the same length


@dataclass(frozen=True, slots=True)
class ObjectFrame:
    """The record of an object without storages, the same for all pickles of one length.

    `record` has zeros for the pickle and in the fields that depend on it.
    """

    record: bytes
    pickle_at: int
    pickle_size_at: int
    pickle_crcs_at: tuple[int, int]
    fingerprint_at: int
    fingerprint_crcs_at: tuple[int, int]


@functools.lru_cache(maxsize=1024)
def object_frame(pickle_length: int) -> ObjectFrame:
    """Return the frame for pickles of that length, which is not 0."""
    zip_ = Zip(0)
    zip_.begin(PICKLE, pickle_length)
    pickle_at = zip_.position
    zip_.write(bytes(pickle_length))
    pickle_crc_at = zip_.position + DESCRIPTOR_CRC_AT
    zip_.close(PICKLE, 0, pickle_length, 0)
    for name, data in (*BEFORE, VERSION):
        zip_.add(name, data)
    header_at = zip_.position
    zip_.begin(FINGERPRINT, FINGERPRINT_LENGTH)
    fingerprint_at = zip_.position
    zip_.write(bytes(FINGERPRINT_LENGTH))
    fingerprint_crc_at = zip_.position + DESCRIPTOR_CRC_AT
    zip_.close(FINGERPRINT, header_at, FINGERPRINT_LENGTH, 0)
    directory_at = zip_.position
    last_entry_at = directory_at + sum(map(len, zip_.entries[:-1]))
    zip_.finish()
    return ObjectFrame(
        record=b"".join(zip_.pieces),
        pickle_at=pickle_at,
        pickle_size_at=directory_at + CENTRAL_SIZES_AT[0],
        pickle_crcs_at=(pickle_crc_at, directory_at + CENTRAL_CRC_AT),
        fingerprint_at=fingerprint_at,
        fingerprint_crcs_at=(fingerprint_crc_at, last_entry_at + CENTRAL_CRC_AT),
    )


@functools.lru_cache(maxsize=1024)
def object_form(pickle_length: int) -> RecordForm | None:
    """Return the form of the records of pickles without storages of that length.

    None where the pickle is so long that few others have its length.
    """
    if not 0 < pickle_length <= _MOST_FRAMED:
        return None
    frame = object_frame(pickle_length)
    end = frame.pickle_at + pickle_length
    fingerprint = b"0" * FINGERPRINT_LENGTH
    template = bytearray(frame.record[end:])
    fingerprint_at = frame.fingerprint_at - end
    template[fingerprint_at : fingerprint_at + FINGERPRINT_LENGTH] = fingerprint
    fingerprint_crc_at = tuple(at - end for at in frame.fingerprint_crcs_at)
    for at in fingerprint_crc_at:
        FIELD.pack_into(template, at, crc32(fingerprint))
    return RecordForm(
        head=frame.record[: frame.pickle_at],
        payload_length=pickle_length,
        template=bytes(template),
        crc_at=tuple(at - end for at in frame.pickle_crcs_at),
        fingerprint_at=fingerprint_at,
        digits_at=fingerprint_at,
        fingerprint_crc_at=fingerprint_crc_at,
    )


def object_record(pickle: bytes, storages: Sequence[BytesLike] = ()) -> bytes:
    """Return the record of an object.

    Parameters
    ----------
    pickle
        The pickle of the object, with persistent ids for its storages.
    storages
        The bytes of the storages with the keys ``"0"``, ``"1"``, ...
    """
    form = None if storages else object_form(len(pickle))
    if form is not None:
        return b"".join((form.head, pickle, form.tail(crc32(pickle))))
    zip_ = Zip(0)
    zip_.add(PICKLE, pickle)
    for name, data in BEFORE:
        zip_.add(name, data)
    crc = 0
    for number, storage in enumerate(storages):
        storage_bytes = memoryview(storage).cast("B")
        crc = crc32(storage_bytes, crc)
        zip_.add(b"%sdata/%d" % (PREFIX, number), storage_bytes)
    zip_.add(*VERSION)
    zip_.add(FINGERPRINT, b"%020d%020d" % (crc32(pickle), crc))
    zip_.finish()
    return b"".join(zip_.pieces)
