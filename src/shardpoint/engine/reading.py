"""Reads regions of tensors: only the bytes they need, straight into their memory.

Small records that are wanted whole are read together with their neighbours. For all others
the header is read first, then the bytes of what is wanted, large ones in pieces side by side.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from operator import add
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import BY_CODE
from shardpoint.engine._blocks import blocks_of
from shardpoint.engine._checksums import PiecewiseChecksum
from shardpoint.engine._dense import DenseReader
from shardpoint.engine._files import BufferPool, OpenFiles
from shardpoint.engine._geometry import Numbers, extent, pick, split_box, split_extent
from shardpoint.engine._geometry import storage_order as order_of
from shardpoint.engine._payload import Payload, Place, from_record
from shardpoint.engine._readplan import ChunkWork, Part, Wanted, plan_reads, wanted_by, works_of
from shardpoint.engine._resolve import resolve_tasks
from shardpoint.engine._segments import find_segments
from shardpoint.engine._transfer import (
    BUFFER,
    Readable,
    apply_flags,
    copy_from_memory,
    read_box,
    read_extent,
)
from shardpoint.engine._transformed import decodes_in_parts, find_payload, open_decoded
from shardpoint.engine.collector import collection_paused
from shardpoint.engine.executor import run_tasks
from shardpoint.engine.objects import read_object
from shardpoint.engine.targets import (
    ArraySink,
    Progress,
    ReadRequest,
    RequestTargets,
    Targets,
    TensorSink,
)
from shardpoint.formats.checksum import crc32
from shardpoint.index import UNKNOWN, CheckpointIndex, Container
from shardpoint.storage import Storage
from shardpoint.transforms import MemoryRecord, RecordBytes, Tally, TransformFinder, Transforms

__all__ = [
    "ArraySink",
    "ReadRequest",
    "ReadStatistics",
    "Targets",
    "TensorSink",
    "Wanted",
    "read_object",
    "read_regions",
    "read_tensors",
]

_Task: TypeAlias = Callable[[], None]

_NAME = "shardpoint-read"
_SMALL = 64 << 10  # records up to this size are read whole if they are wanted whole
_GROUP = 1 << 20
_PIECE = 16 << 20  # what one thread takes of a large chunk


@dataclass(frozen=True, slots=True)
class ReadStatistics:
    """What a read did.

    Attributes
    ----------
    bytes_read
        All bytes read from data files.
    payload_bytes
        Bytes of the elements that were wanted.
    metadata_bytes
        Bytes of record headers, part of `bytes_read`.
    reads
        Calls of the storage.
    seconds
        How long it took.
    """

    bytes_read: int
    payload_bytes: int
    metadata_bytes: int
    reads: int
    seconds: float


def read_tensors(
    index: CheckpointIndex,
    storage: Storage,
    requests: Sequence[ReadRequest],
    *,
    threads: int,
    verify: bool,
    gap_ratio: float = 0.05,
    finder: TransformFinder | None = None,
    tally: Tally | None = None,
) -> ReadStatistics:
    """Fill the sinks of all requests.

    Everything that the index and the files' sizes tell is checked before any sink is asked
    for its memory; so are the headers of all records that are not read whole. After an
    error, sinks may hold some elements, and some may have been committed.

    Where the index says where elements lie, no header is read, nor checked.

    Parameters
    ----------
    threads
        How many pieces may be read at once.
    verify
        Whether to compare checksums: of chunks that are read whole, and where the index has
        them by blocks, of all blocks that are read. A part of a chunk is read up to the borders
        of its blocks, so that all of it is checked, unless that costs more than 128 KiB and
        more than `gap_ratio` of it (for parts in many runs: half of it).
    gap_ratio
        How many bytes nobody wants may be read to save calls, for each wanted one.
    finder
        Knows how transforms are undone; None knows those of shardpoint that need no key.
    tally
        Counts what transforms decode, or None.

    Raises
    ------
    PlanError
        If a region is not in its tensor, or the tensor's chunks overlap, leave holes, are
        outside of it, or are not in their files; with all problems.
    CorruptionError
        If bytes are missing or differ from their checksum.
    FormatError
        If a record is not what its format and the index say.
    UnsafePathError, NotSupportedError, LimitExceededError, StorageError
        And whatever a sink raises.
    """
    return read_regions(
        index,
        storage,
        wanted_by(index, requests),
        RequestTargets(index, requests),
        threads=threads,
        verify=verify,
        gap_ratio=gap_ratio,
        finder=Transforms() if finder is None else finder,
        tally=tally,
    )


def read_regions(
    index: CheckpointIndex,
    storage: Storage,
    wanted: Wanted,
    targets: Targets,
    *,
    threads: int,
    verify: bool,
    gap_ratio: float,
    finder: TransformFinder,
    tally: Tally | None,
) -> ReadStatistics:
    """Fill regions that are given in columns; all else as `read_tensors` does."""
    started = time.perf_counter()
    with collection_paused():
        pairs = plan_reads(index, storage, wanted)
        segments, taken = find_segments(index, wanted, pairs, targets.dense())
        works = works_of(index, wanted, pairs.take(np.flatnonzero(~taken)))
        progress = Progress(np.bincount(pairs.number, minlength=len(wanted)), targets)
    with OpenFiles(storage) as files:
        operation = _Operation(
            index,
            files,
            targets,
            progress,
            verify=verify,
            gap_ratio=gap_ratio,
            finder=finder,
            tally=tally,
        )
        reader = DenseReader(
            index, files, segments, targets, progress, verify=verify, gap_ratio=gap_ratio
        )
        unresolved = [work for work in works if not _is_simple(work)]
        run_tasks(resolve_tasks(files, unresolved), threads=threads, name=_NAME)
        operation.metadata_bytes = files.bytes_read
        tasks = chain(reader.tasks(), operation.tasks(works))
        run_tasks(tasks, threads=threads, name=_NAME)
    progress.commit_empty()
    itemsizes = np.array([dtype.itemsize for dtype in BY_CODE], np.int64)
    itemsize = itemsizes[index.tensors.dtype[wanted.tensor]]
    return ReadStatistics(
        bytes_read=files.bytes_read,
        payload_bytes=int((wanted.sizes.prod(axis=1) * itemsize).sum()),
        metadata_bytes=operation.metadata_bytes + reader.metadata_bytes,
        reads=files.reads,
        seconds=time.perf_counter() - started,
    )


def _is_simple(work: ChunkWork) -> bool:
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


class _Operation:
    """One read: what its tasks share."""

    def __init__(
        self,
        index: CheckpointIndex,
        files: OpenFiles,
        targets: Targets,
        progress: Progress,
        *,
        verify: bool,
        gap_ratio: float,
        finder: TransformFinder,
        tally: Tally | None,
    ) -> None:
        self.index = index
        self.finder = finder
        self.tally = tally
        self.files = files
        self.targets = targets
        self.progress = progress
        self.verify = verify
        self.gap_ratio = gap_ratio
        self.buffers = BufferPool(BUFFER)
        self.metadata_bytes = 0
        self._lock = threading.Lock()

    def tasks(self, works: Sequence[ChunkWork]) -> Iterator[_Task]:
        """Yield what is to be done, in the order of the files."""
        group = _Group()
        for work in works:
            if _is_small(work):
                if not group.takes(work, self.gap_ratio):
                    yield partial(self._read_group, group)
                    group = _Group()
                group.add(work)
            elif work.place.transforms:
                yield from self._transformed_tasks(work)
            else:
                assert work.payload is not None
                for part in work.parts:
                    yield from _PartRead(self, work.place, work.payload, part, None).tasks()
        if group.works:
            yield partial(self._read_group, group)

    def _read_group(self, group: _Group) -> None:
        name = group.works[0].place.file
        data = memoryview(bytearray(group.end - group.start))
        with self.files.use(name) as file:
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
        is_large = prod(place.sizes) * place.dtype.itemsize > _PIECE
        if not is_large or not decodes_in_parts(place, self.finder):
            yield partial(self._read_transformed, work)
            return
        record = self._decoded(work)
        payload = find_payload(place, work.payload, record)
        for part in work.parts:
            yield from _PartRead(self, place, payload, part, record).tasks()

    def _read_transformed(self, work: ChunkWork) -> None:
        """Read parts of a chunk out of its decoded record; of frames only those they touch."""
        place = work.place
        record = self._decoded(work)
        payload = find_payload(place, work.payload, record)
        if isinstance(record, MemoryRecord):
            self._give(work, payload, record.memory(), 0)
            return
        for part in work.parts:
            for task in _PartRead(self, place, payload, part, record).tasks():
                task()

    def _decoded(self, work: ChunkWork) -> RecordBytes:
        """Return a chunk's record with its transforms undone."""
        place = work.place
        checksums = self.index.chunks.record_checksum
        return open_decoded(
            self.files,
            place,
            work.payload,
            checksum=UNKNOWN
            if checksums is None or not self.verify
            else int(checksums[place.chunk]),
            finder=self.finder,
            tally=self.tally,
        )

    def _give(self, work: ChunkWork, payload: Payload, record: memoryview, base: int) -> None:
        """Check a record that is in memory, and copy its parts to where they belong."""
        place = work.place
        if self.verify and payload.checksum != UNKNOWN:
            start = payload.offset - base
            payload.compare(place, crc32(record[start : start + payload.length]))
        for part in work.parts:
            memory = self.targets.memory(part.number)
            into = np.empty(part.sizes, place.dtype.raw) if memory is None else part.of(memory)
            copy_from_memory(record, base, place, payload, part.start_in(place), into)
            if memory is None:
                self.targets.put(part.number, part.start, into)
        self.progress.finish([part.number for part in work.parts])


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


class _PartRead:
    """One box of one large chunk, read in pieces."""

    def __init__(
        self,
        operation: _Operation,
        place: Place,
        payload: Payload,
        part: Part,
        record: RecordBytes | None,
    ) -> None:
        self._operation = operation
        self._record = record
        self._place = place
        self._part = part
        order = order_of(place.sizes, payload.strides)
        self._is_ordered = order is not None
        self._order: Numbers = tuple(range(len(place.sizes))) if order is None else order
        self._payload = Payload(
            payload.offset,
            pick(payload.strides, self._order),
            payload.length,
            payload.checksum,
            payload.flags,
        )
        self._start = pick(part.start_in(place), self._order)
        sizes = pick(part.sizes, self._order)
        itemsize = place.dtype.itemsize
        if self._is_ordered:
            # Pieces of regions that have no memory are all there is of a buffer.
            has_memory = operation.targets.memory(part.number) is not None
            pieces = split_box(sizes, (_PIECE if has_memory else BUFFER) // itemsize)
        else:
            pieces = split_extent(sizes, self._payload.strides, BUFFER // itemsize)
        self._pieces = list(pieces)
        # Only then do the pieces, one after the other, have all of the payload's bytes.
        self._is_checked = (
            operation.verify
            and payload.checksum != UNKNOWN
            and self._is_ordered
            and part.sizes == place.sizes
            and prod(part.sizes) * itemsize == payload.length
            and extent(part.sizes, payload.strides) == prod(part.sizes)
        )
        self._blocks = None
        if operation.verify and not self._is_checked and record is None:
            self._blocks = blocks_of(operation.index, place.chunk)
        self._checksum = PiecewiseChecksum([prod(size) * itemsize for _, size in self._pieces])

    def tasks(self) -> Iterator[_Task]:
        for number in range(len(self._pieces)):
            yield partial(self._read_piece, number)

    def _open(self) -> AbstractContextManager[Readable]:
        """Give what to read from: the file, or the decoded record."""
        if self._record is not None:
            return nullcontext(self._record)
        return self._operation.files.use(self._place.file)

    def _read_piece(self, number: int) -> None:
        offsets, sizes = self._pieces[number]
        part, targets = self._part, self._operation.targets
        memory = targets.memory(part.number)
        if memory is None:
            into: npt.NDArray[Any] = np.empty(sizes, self._place.dtype.raw)
        else:
            box: list[Any] = [slice(o, o + n) for o, n in zip(offsets, sizes, strict=True)]
            into = part.of(memory).transpose(self._order)[(*box, ...)]
        start = tuple(map(add, self._start, offsets))
        found = 0
        with self._open() as file:
            if self._is_ordered:
                found = read_box(
                    file,
                    self._payload,
                    start,
                    into,
                    buffers=self._operation.buffers,
                    gap_ratio=self._operation.gap_ratio,
                    checksum=self._is_checked,
                    blocks=self._blocks,
                )
            else:
                read_extent(file, self._payload, start, into, self._blocks)
        apply_flags(into, self._place, self._payload.flags)
        if memory is None:
            back = np.argsort(self._order).tolist()
            at = tuple(map(add, part.start, pick(offsets, back)))
            targets.put(part.number, at, into.transpose(back))
        if self._checksum.put(number, found):
            if self._is_checked:
                self._payload.compare(self._place, self._checksum.combined())
            self._operation.progress.finish([self._part.number])
