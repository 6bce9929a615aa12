"""Records by what they say of themselves: what they hold, and torch's own checksums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from shardpoint.engine._files import OpenFiles
from shardpoint.engine._payload import (
    Payload,
    Place,
    ReadAt,
    from_image,
    from_record,
    known_payload,
    place_of,
)
from shardpoint.engine.checksumming import Spans, checksum_spans
from shardpoint.errors import Problem, ShardpointError
from shardpoint.formats.checksum import crc32
from shardpoint.formats.safetensors import SafetensorsHeader, read_header
from shardpoint.formats.torch_record import HEAD_BYTES, TAIL_BYTES, RecordMember, parse_record
from shardpoint.index import UNKNOWN, CheckpointIndex, Container
from shardpoint.storage import Storage
from shardpoint.verify._report import problem_of

__all__ = ["HeaderResult", "check_headers"]

_SMALL_MEMBER = 1024


@dataclass(slots=True)
class HeaderResult:
    """What was found: problems, and bytes read."""

    problems: list[Problem] = field(default_factory=list)
    bytes_read: int = 0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A member's bytes with the checksum that the record gives for them."""

    key: str
    file: int
    member: RecordMember
    checksum: int


def check_headers(
    index: CheckpointIndex,
    storage: Storage,
    chunks: Sequence[int],
    objects: Sequence[int],
    *,
    are_compared: Callable[[int], bool],
    threads: int,
    progress: Callable[[int], None],
) -> HeaderResult:
    """Check records that have no transform, and safetensors images.

    Every chunk's header must say what the index says. Records that were not compared with a
    checksum of their own are compared with those that torch put into them: one for each member.
    What these do not cover are the members' headers and the directory.

    Parameters
    ----------
    chunks, objects
        Rows, in the order of the files.
    are_compared
        Whether a chunk's record was compared as a whole.
    """
    result = HeaderResult()
    with OpenFiles(storage) as files:
        headers = _Headers(index, files, result)
        for chunk in chunks:
            place = place_of(index, chunk)
            try:
                if place.container == Container.SAFETENSORS_IMAGE:
                    headers.check_image(place)
                else:
                    headers.check_record(place, is_compared=are_compared(chunk))
            except ShardpointError as error:
                result.problems.append(
                    problem_of(error, place.key, place.file, place.record_offset)
                )
        for row in objects:
            headers.check_object(row)
        result.bytes_read += files.bytes_read
    _compare(index, storage, headers.wanted, result, threads=threads, progress=progress)
    return result


class _Headers:
    """Checks one record after another; collects what is still to be compared."""

    def __init__(self, index: CheckpointIndex, files: OpenFiles, result: HeaderResult) -> None:
        self.wanted: list[_Wanted] = []
        self._index = index
        self._files = files
        self._result = result
        self._images: dict[tuple[str, int], SafetensorsHeader] = {}
        self._added: set[tuple[int, int, int]] = set()

    def check_record(self, place: Place, *, is_compared: bool) -> None:
        """Raise unless a record says what the index says."""
        offset, length = place.record_offset, place.record_length
        read_at = _reader(self._files, place.file, offset, length)
        found = from_record(place, read_at, offset, length)
        known = known_payload(self._index, place)
        if known is not None:
            _check_same(place, known, found)
        number = int(self._index.chunks.file[place.chunk])
        if not is_compared and (number, offset, length) not in self._added:
            # Metadata may name one large record under a thousand keys.
            self._added.add((number, offset, length))
            self._add_members(read_at, place.key, number, place.file, offset, length)

    def check_image(self, place: Place) -> None:
        """Raise unless a safetensors image says what the index says."""
        name, offset = place.file, place.record_offset
        header = self._images.get((name, offset))
        if header is None:
            with self._files.use(name) as file:
                header = read_header(file.read_at, file.size, offset=offset, file=name)
                data = file.read_at(offset, header.data_start - offset)
            self._images[name, offset] = header
            self._compare_header(place, data)
        known = known_payload(self._index, place)
        found = from_image(place, header)
        if known is not None:
            _check_same(place, known, found)

    def _compare_header(self, place: Place, data: bytes) -> None:
        """Compare an image's header with its checksum, where the index has one."""
        checksums = self._index.chunks.record_checksum
        wanted = UNKNOWN if checksums is None else int(checksums[place.chunk])
        found = crc32(data)
        if wanted not in (UNKNOWN, found):
            start = place.record_offset
            message = (
                f"bytes {start} to {start + len(data)} (the header of the safetensors image) are "
                f"damaged: wanted CRC-32 {wanted:#010x}, found {found:#010x}"
            )
            self._result.problems.append(Problem(message, place.key, place.file, start))

    def check_object(self, row: int) -> None:
        objects = self._index.objects
        number = int(objects.file[row])
        key, name = objects.keys[row], self._index.files[number]
        offset, length = int(objects.record_offset[row]), int(objects.record_length[row])
        try:
            read_at = _reader(self._files, name, offset, length)
            self._add_members(read_at, key, number, name, offset, length)
        except ShardpointError as error:
            self._result.problems.append(problem_of(error, key, name, offset))

    def _add_members(
        self, read_at: ReadAt, key: str, number: int, name: str, offset: int, length: int
    ) -> None:
        """Compare small members at once, and note the others."""
        record = parse_record(read_at, offset, length, file=name, key=key)
        for member in record.members.values():
            if member.crc is None:
                continue
            wanted = _Wanted(key, number, member, member.crc)
            if member.size > _SMALL_MEMBER:
                self.wanted.append(wanted)
                continue
            found = crc32(read_at(member.offset, member.size))
            if found != member.crc:
                self._result.problems.append(_damaged(wanted, name, found))


def _check_same(place: Place, known: Payload, found: Payload) -> None:
    """Raise unless the index has the elements where the record has them."""

    def described(payload: Payload) -> tuple[int, int, int, list[int]]:
        # A stride along an axis of one element moves nothing.
        strides = [
            stride for stride, size in zip(payload.strides, place.sizes, strict=True) if size > 1
        ]
        return payload.offset, payload.length, payload.flags, strides

    if described(known) != described(found):
        raise place.fail(
            f"the index has {known.length} bytes of elements at {known.offset} with strides "
            f"{list(known.strides)}, the record has {found.length} bytes at {found.offset} with "
            f"strides {list(found.strides)}"
        )


def _reader(files: OpenFiles, name: str, offset: int, length: int) -> ReadAt:
    """Return what reads a record; its head and tail are read once."""
    pieces: dict[tuple[int, int], bytes] = {}

    def read_at(start: int, count: int) -> bytes:
        for (first, size), piece in pieces.items():
            if first <= start and start + count <= first + size:
                return piece[start - first : start - first + count]
        with files.use(name) as file:
            data = file.read_at(start, count)
        if count in (HEAD_BYTES, TAIL_BYTES, length):
            pieces[start, count] = data
        return data

    return read_at


def _damaged(wanted: _Wanted, name: str, found: int) -> Problem:
    start, end = wanted.member.offset, wanted.member.offset + wanted.member.size
    return Problem(
        f"bytes {start} to {end} ({wanted.member.name!r}) are damaged: wanted CRC-32 "
        f"{wanted.checksum:#010x}, found {found:#010x}",
        wanted.key,
        name,
        start,
    )


def _compare(
    index: CheckpointIndex,
    storage: Storage,
    wanted: Sequence[_Wanted],
    result: HeaderResult,
    *,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    spans = Spans(
        index.files,
        np.array([item.file for item in wanted], np.int64),
        np.array([item.member.offset for item in wanted], np.int64),
        np.array([item.member.size for item in wanted], np.int64),
    )
    found = checksum_spans(storage, spans, threads=threads, progress=progress)
    result.bytes_read += found.bytes_read
    for at, item in enumerate(wanted):
        name = index.files[item.file]
        if at in found.errors:
            error = found.errors[at]
            result.problems.append(problem_of(error, item.key, name, item.member.offset))
        elif found.values[at] != item.checksum:
            result.problems.append(_damaged(item, name, int(found.values[at])))
