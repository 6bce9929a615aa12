"""Opens records that were compressed or encrypted, so that any part of them can be read."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from shardpoint.engine._files import OpenFiles
from shardpoint.engine._payload import Payload, Place, from_record
from shardpoint.formats.checksum import crc32
from shardpoint.index import UNKNOWN
from shardpoint.transforms import Origin, RecordBytes, Tally, TransformFinder, open_record, read_at

__all__ = ["decodes_in_parts", "find_payload", "open_decoded"]

_RECORD_SLACK = 1 << 20  # what a record may have beside its payload


class _Stored:
    """A record as it lies in its file; checked when it is read in one go."""

    def __init__(self, files: OpenFiles, place: Place, checksum: int) -> None:
        self._files = files
        self._place = place
        self._checksum = checksum
        self.size = place.record_length

    def read_into(self, offset: int, buffers: Sequence[bytearray | memoryview]) -> None:
        """See `shardpoint.transforms.RecordBytes`."""
        place = self._place
        with self._files.use(place.file) as file:
            file.read_into(place.record_offset + offset, [memoryview(b) for b in buffers])
        if self._checksum == UNKNOWN or sum(map(len, buffers)) != self.size:
            return
        found = 0
        for buffer in buffers:
            found = crc32(buffer, found)
        record = Payload(place.record_offset, (), self.size, self._checksum, 0)
        record.compare(place, found)


def open_decoded(
    files: OpenFiles,
    place: Place,
    payload: Payload | None,
    *,
    checksum: int,
    finder: TransformFinder,
    tally: Tally | None,
) -> RecordBytes:
    """Return a chunk's record with its transforms undone.

    Parameters
    ----------
    payload
        If it is known where in the decoded record the elements are.
    checksum
        Of the stored record, or `UNKNOWN`; compared if some transform needs all of it at once.
    finder, tally
        See `shardpoint.transforms.open_record`.
    """
    most = prod(place.sizes) * place.dtype.itemsize
    if payload is not None:
        most = max(most, payload.offset + payload.length)
    return open_record(
        finder,
        place.transforms,
        _Stored(files, place, checksum),
        most=most + _RECORD_SLACK,
        origin=Origin(place.key, place.file, place.record_offset),
        tally=tally,
    )


def decodes_in_parts(place: Place, finder: TransformFinder) -> bool:
    """Whether opening a chunk's record decodes nothing, and reading from it what is read."""
    origin = Origin(place.key, place.file, place.record_offset)
    found = [finder.find(descriptor, origin) for descriptor in place.transforms]
    return all(getattr(transform, "decodes_in_parts", False) for transform in found)


def find_payload(place: Place, payload: Payload | None, record: RecordBytes) -> Payload:
    """Return where in a decoded record the elements are.

    Raises
    ------
    FormatError
        If they are not inside it, or the record is not what the index says.
    """
    if payload is None:
        return from_record(place, lambda o, n: bytes(read_at(record, o, n)), 0, record.size)
    end = payload.offset + payload.length
    if end > record.size:
        raise place.fail(
            f"the decoded record has {record.size} bytes, its payload should end at {end}"
        )
    return payload
