"""Reads chunks whose place, form or target needs more than a read into memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import TypeAlias

import numpy as np

from shardpoint.engine._parts import PIECE, PartRead, ReadContext
from shardpoint.engine._payload import Payload, from_record
from shardpoint.engine._readplan import ChunkWork
from shardpoint.engine._transfer import copy_from_memory
from shardpoint.engine._transformed import decodes_in_parts, find_payload, open_decoded
from shardpoint.formats.checksum import crc32
from shardpoint.index import UNKNOWN, Container
from shardpoint.transforms import MemoryRecord, RecordBytes

__all__ = ["ChunkReader", "is_simple"]

_Task: TypeAlias = Callable[[], None]

_SMALL = 64 << 10  # records up to this size are read whole if they are wanted whole
_GROUP = 1 << 20


def is_simple(work: ChunkWork) -> bool:
    """Whether no header has to be read before the data."""
    return work.payload is not None or bool(work.place.transforms) or _is_small(work)


def _is_small(work: ChunkWork) -> bool:
    """Whether the chunk is read whole, with its record's head and tail."""
    if work.place.transforms or not work.is_wanted_whole:
        return False
    if work.payload is None and work.place.container != Container.TORCH_RECORD:
        return False
    return _span(work)[1] <= _SMALL


def _span(work: ChunkWork) -> tuple[int, int]:
    """Return offset and length of what is read of a small chunk."""
    if work.place.container == Container.TORCH_RECORD:
        return work.place.record_offset, work.place.record_length
    assert work.payload is not None
    return work.payload.offset, work.payload.length


class ChunkReader:
    """Makes the tasks that read chunks that are no segments.

    Attributes
    ----------
    metadata_bytes
        Bytes of records that were read beside their payloads.
    """

    def __init__(self, context: ReadContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self.metadata_bytes = 0

    def tasks(self, works: Sequence[ChunkWork]) -> Iterator[_Task]:
        """Yield what is to be done, in the order of the files."""
        group = _Group()
        for work in works:
            if _is_small(work):
                if not group.takes(work, self._context.gap_ratio):
                    yield partial(self._read_group, group)
                    group = _Group()
                group.add(work)
            elif work.place.transforms:
                yield from self._transformed_tasks(work)
            else:
                assert work.payload is not None
                for part in work.parts:
                    yield from PartRead(self._context, work.place, work.payload, part, None).tasks()
        if group.works:
            yield partial(self._read_group, group)

    def _read_group(self, group: _Group) -> None:
        name = group.works[0].place.file
        data = memoryview(bytearray(group.end - group.start))
        with self._context.files.use(name) as file:
            file.read_into(group.start, [data])
        surplus = 0
        for work in group.works:
            start, length = _span(work)
            record = data[start - group.start : start - group.start + length]
            payload = work.payload
            if payload is None:
                payload = from_record(work.place, _reader(record, start), start, length)
            surplus += length - payload.length
            self._give(work, payload, record, start)
        with self._lock:
            self.metadata_bytes += surplus

    def _transformed_tasks(self, work: ChunkWork) -> Iterator[_Task]:
        """Yield one task for a chunk; several for a large one that can be decoded in parts."""
        place = work.place
        is_large = prod(place.sizes) * place.dtype.itemsize > PIECE
        if not is_large or not decodes_in_parts(place, self._context.finder):
            yield partial(self._read_transformed, work)
            return
        record = self._decoded(work)
        payload = find_payload(place, work.payload, record)
        for part in work.parts:
            yield from PartRead(self._context, place, payload, part, record).tasks()

    def _read_transformed(self, work: ChunkWork) -> None:
        """Read parts of a chunk out of its decoded record; of frames only those they touch."""
        place = work.place
        record = self._decoded(work)
        payload = find_payload(place, work.payload, record)
        if isinstance(record, MemoryRecord):
            self._give(work, payload, record.memory(), 0)
            return
        for part in work.parts:
            for task in PartRead(self._context, place, payload, part, record).tasks():
                task()

    def _decoded(self, work: ChunkWork) -> RecordBytes:
        """Return a chunk's record with its transforms undone."""
        place = work.place
        checksums = self._context.index.chunks.record_checksum
        return open_decoded(
            self._context.files,
            place,
            work.payload,
            checksum=UNKNOWN
            if checksums is None or not self._context.verify
            else int(checksums[place.chunk]),
            finder=self._context.finder,
            tally=self._context.tally,
        )

    def _give(self, work: ChunkWork, payload: Payload, record: memoryview, base: int) -> None:
        """Check a record that is in memory, and copy its parts to where they belong."""
        place = work.place
        if self._context.verify and payload.checksum != UNKNOWN:
            start = payload.offset - base
            payload.compare(place, crc32(record[start : start + payload.length]))
        for part in work.parts:
            memory = self._context.targets.memory(part.number)
            into = np.empty(part.sizes, place.dtype.raw) if memory is None else part.of(memory)
            copy_from_memory(record, base, place, payload, part.start_in(place), into)
            if memory is None:
                self._context.targets.put(part.number, part.start, into)
        self._context.progress.finish([part.number for part in work.parts])


def _reader(data: memoryview, base: int) -> Callable[[int, int], bytes]:
    def read_at(offset: int, length: int) -> bytes:
        return bytes(data[offset - base : offset - base + length])

    return read_at


class _Group:
    """Neighbouring small chunks of one file, read in one call."""

    def __init__(self) -> None:
        self.works: list[ChunkWork] = []
        self.start = self.end = 0
        self._gaps = 0

    def takes(self, work: ChunkWork, gap_ratio: float) -> bool:
        """Whether the chunk can be read together with the ones before."""
        if not self.works:
            return True
        start, length = _span(work)
        end = max(self.end, start + length)
        gaps = self._gaps + max(0, start - self.end)
        return (
            work.place.file == self.works[0].place.file
            and start >= self.start
            and end - self.start <= _GROUP
            and gaps <= gap_ratio * (end - self.start - gaps)
        )

    def add(self, work: ChunkWork) -> None:
        start, length = _span(work)
        if self.works:
            self._gaps += max(0, start - self.end)
            self.end = max(self.end, start + length)
        else:
            self.start, self.end = start, start + length
        self.works.append(work)
