"""Writes files of records: small ones gathered, large ones from their own memory.

A record's checksum is taken block by block while the block is in cache, right before the
block is written. Where all sizes are known, the parts of one file are written side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TypeAlias

from shardpoint.engine._checksums import PiecewiseChecksum
from shardpoint.engine.executor import run_tasks
from shardpoint.engine.sources import (
    ArraySource,
    ContiguousSource,
    RecordSource,
    TensorSource,
    no_tail,
)
from shardpoint.errors import PlanError, ShardpointError
from shardpoint.formats.checksum import crc32
from shardpoint.storage import Storage, WritableFile

__all__ = [
    "ArraySource",
    "ContiguousSource",
    "RecordSource",
    "TensorSource",
    "no_tail",
    "write_file",
    "write_files",
]

Span: TypeAlias = tuple[int, int]
"""Byte offset and length of a record in its file."""

_Task: TypeAlias = Callable[[], None]

_BLOCK = 1 << 20  # checksum and write while it is in cache
_PIECE = 32 << 20  # what one thread takes of a large tensor
_SMALL = 256 << 10  # records up to this size are gathered
_BATCH = 4 << 20
_BATCH_RECORDS = 300  # head, payload and tail of each fit into one vectored write


def write_file(
    storage: Storage, name: str, records: Sequence[RecordSource], *, sync: bool
) -> list[Span]:
    """Write one new file in the calling thread; see `write_files`."""
    return write_files(storage, {name: records}, threads=1, sync=sync)[name]


def write_files(
    storage: Storage,
    files: Mapping[str, Sequence[RecordSource]],
    *,
    threads: int,
    sync: bool,
) -> dict[str, list[Span]]:
    """Write new files, each holding its records one after the other without gaps.

    Parameters
    ----------
    storage
        Where to; prepared already.
    files
        Records by file name. A file without records is made with no bytes.
    threads
        How many pieces may be written at once.
    sync
        Make the files and their names durable before returning.

    Returns
    -------
    dict
        For each file the (offset, length) of its records, in their order.

    Raises
    ------
    StorageError
        If the store fails, or a file exists. The files made so far are removed.
    PlanError
        If a source gives other than the bytes it announced.
    Exception
        Whatever a source raises.
    """
    writers = {name: _FileWriter(storage, name, records, sync) for name, records in files.items()}
    try:
        run_tasks(
            (task for writer in writers.values() for task in writer.tasks()),
            threads=threads,
            name="shardpoint-write",
        )
        if sync:
            storage.sync()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    return {name: writer.spans for name, writer in writers.items()}


@dataclass(slots=True, eq=False)
class _FileWriter:
    """One file: created by its first task, closed by its last."""

    storage: Storage
    name: str
    records: Sequence[RecordSource]
    sync: bool
    spans: list[Span] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _file: WritableFile | None = None
    _created: bool = False
    _unfinished: int = 0

    def tasks(self) -> Iterator[_Task]:
        """Yield what is to be done for the file; `spans` are complete when it is done."""
        lengths = [record.length for record in self.records]
        known = [length for length in lengths if length is not None]
        self._unfinished = 1
        if len(known) < len(lengths):
            yield self._counted(partial(_write_sequentially, self))
        else:
            ends = list(accumulate(known, initial=0))
            self.spans = list(zip(ends, known, strict=False))
            for task in self._planned_tasks():
                yield self._counted(task)
        yield self._finish_one

    def open(self) -> WritableFile:
        """Return the file, made at the first call."""
        with self._lock:
            if self._file is None:
                size = sum(length for _, length in self.spans) if self.spans else None
                if not self.records:
                    size = 0
                self._file = self.storage.create(self.name, size=size)
                self._created = True
            return self._file

    def abandon(self) -> None:
        """Close and remove what a failed operation left; its own error is the one that counts."""
        file, self._file = self._file, None
        for cleanup in (file.close if file is not None else None, self._remove):
            try:
                if cleanup is not None:
                    cleanup()
            except ShardpointError:
                continue

    def _remove(self) -> None:
        if self._created:
            self.storage.remove(self.name)

    def _planned_tasks(self) -> Iterator[_Task]:
        """Yield tasks for records whose places are known."""
        batch: list[int] = []
        batch_bytes = 0
        for number, (_, length) in enumerate(self.spans):
            small = length <= _SMALL
            full = batch_bytes + length > _BATCH or len(batch) == _BATCH_RECORDS
            if batch and (full or not small):
                yield partial(_write_batch, self, batch)
                batch, batch_bytes = [], 0
            if small:
                batch.append(number)
                batch_bytes += length
            else:
                yield from _LargeRecord(self, number).tasks()
        if batch:
            yield partial(_write_batch, self, batch)

    def _counted(self, task: _Task) -> _Task:
        with self._lock:
            self._unfinished += 1
        return partial(self._run, task)

    def _run(self, task: _Task) -> None:
        task()
        self._finish_one()

    def _finish_one(self) -> None:
        """Close the file after its last task (of which the end of `tasks` itself is one)."""
        with self._lock:
            self._unfinished -= 1
            if self._unfinished:
                return
        file = self.open()
        if self.sync:
            file.sync()
        file.close()
        self._file = None


def _write_sequentially(writer: _FileWriter) -> None:
    """Write records whose lengths show only when they have been written."""
    file = writer.open()
    offset = 0
    for record in writer.records:
        start = offset
        offset = _write_bytes(file, offset, record.head)
        checksum = 0
        for part in record.payload:
            for block in part.blocks(_BLOCK):
                checksum = crc32(block, checksum)
                offset = _write_bytes(file, offset, block)
        offset = _write_bytes(file, offset, record.tail(checksum))
        if record.length is not None and record.length != offset - start:
            raise _wrong_length(writer, record.length, offset - start)
        writer.spans.append((start, offset - start))


def _write_bytes(file: WritableFile, offset: int, data: bytes | memoryview) -> int:
    if len(data):
        file.write_from(offset, [memoryview(data)])
    return offset + len(data)


def _write_batch(writer: _FileWriter, numbers: Sequence[int]) -> None:
    """Write small records that follow each other in one vectored write."""
    buffers: list[memoryview] = []
    for number in numbers:
        record = writer.records[number]
        length = len(record.head)
        checksum = 0
        buffers.append(memoryview(record.head))
        for part in record.payload:
            data = _small_payload(part)
            checksum = crc32(data, checksum)
            length += len(data)
            buffers.append(memoryview(data))
        tail = record.tail(checksum)
        buffers.append(memoryview(tail))
        length += len(tail)
        if length != record.length:
            raise _wrong_length(writer, record.length, length)
    writer.open().write_from(writer.spans[numbers[0]][0], buffers)


def _small_payload(part: TensorSource) -> memoryview | bytes:
    whole = _memory_of(part)
    if whole is not None:
        return whole
    return b"".join(bytes(block) for block in part.blocks(_SMALL))


def _memory_of(part: TensorSource) -> memoryview | None:
    """Return the memory of a part that is a `ContiguousSource`.

    Not by isinstance, which takes ten times as long for a Protocol on Python 3.11.
    """
    memory: Callable[[], memoryview | None] | None = getattr(part, "memory", None)
    return None if memory is None else memory()


class _LargeRecord:
    """A record whose payload is written in pieces, side by side where it lies in memory."""

    def __init__(self, writer: _FileWriter, number: int) -> None:
        self._writer = writer
        self._record = writer.records[number]
        self._offset, self._length = writer.spans[number]
        sizes = [part.nbytes for part in self._record.payload]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            raise PlanError(
                f"file {writer.name!r}: a record of {self._length} bytes has a part "
                f"whose size is not known"
            )
        self._payload_end = self._offset + len(self._record.head) + sum(known)
        self._pieces: list[_Piece] = []
        offset = self._offset + len(self._record.head)
        for part, size in zip(self._record.payload, known, strict=True):
            whole = _memory_of(part)
            if whole is None or size <= _PIECE:
                self._pieces.append(_Piece(offset, size, part, whole))
            else:
                for start in range(0, size, _PIECE):
                    view = whole[start : start + _PIECE]
                    self._pieces.append(_Piece(offset + start, len(view), part, view))
            offset += size
        self._checksum = PiecewiseChecksum([piece.nbytes for piece in self._pieces])

    def tasks(self) -> Iterator[_Task]:
        if not self._pieces:
            yield partial(self._end, 0)
        for number, piece in enumerate(self._pieces):
            yield partial(self._write_piece, number, piece)

    def _write_piece(self, number: int, piece: _Piece) -> None:
        file = self._writer.open()
        offset = piece.offset
        checksum = 0
        for block in piece.blocks():
            checksum = crc32(block, checksum)
            offset = _write_bytes(file, offset, block)
        if offset != piece.offset + piece.nbytes:
            raise _wrong_length(self._writer, piece.nbytes, offset - piece.offset)
        if self._checksum.put(number, checksum):
            self._end(self._checksum.combined())

    def _end(self, checksum: int) -> None:
        """Write what stands before and after the payload, once its checksum is known."""
        file = self._writer.open()
        _write_bytes(file, self._offset, self._record.head)
        end = _write_bytes(file, self._payload_end, self._record.tail(checksum))
        if end != self._offset + self._length:
            raise _wrong_length(self._writer, self._length, end - self._offset)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A range of a payload: of memory, or a whole part that gives its own blocks."""

    offset: int
    nbytes: int
    part: TensorSource
    view: memoryview | None

    def blocks(self) -> Iterator[memoryview]:
        if self.view is None:
            yield from self.part.blocks(_BLOCK)
            return
        for start in range(0, self.nbytes, _BLOCK):
            yield self.view[start : start + _BLOCK]


def _wrong_length(writer: _FileWriter, wanted: int | None, found: int) -> PlanError:
    return PlanError(
        f"file {writer.name!r}: a record's source announced {wanted} bytes and gave {found}"
    )
