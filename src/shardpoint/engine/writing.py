"""Writes files of records: small ones gathered, large ones from their own memory.

Every byte of a payload is checksummed once, block by block, right before it is written. The
zip's own checksum, that of the record and that of the payload are combined from the blocks'.
Where all sizes are known, the parts of one file are written side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np

from shardpoint.engine._write_batches import write_batch
from shardpoint.engine._write_large import large_record_tasks
from shardpoint.engine._write_streams import write_streams
from shardpoint.engine.executor import run_tasks
from shardpoint.engine.sources import (
    AnyRecord,
    ArraySource,
    ContiguousSource,
    FormedRecord,
    RecordSource,
    TensorSource,
    no_tail,
)
from shardpoint.engine.written import WrittenRecords
from shardpoint.errors import PlanError, ShardpointError
from shardpoint.formats.payload_shift import aligned_form
from shardpoint.storage import Storage, WritableFile

__all__ = [
    "AnyRecord",
    "ArraySource",
    "ContiguousSource",
    "FormedRecord",
    "RecordSource",
    "TensorSource",
    "WrittenRecords",
    "no_tail",
    "write_file",
    "write_files",
]

_Task: TypeAlias = Callable[[], None]

_SMALL = 256 << 10  # records up to this size are gathered
_BATCH = 2 << 20


def write_file(
    storage: Storage, name: str, records: Sequence[AnyRecord], *, sync: bool
) -> WrittenRecords:
    """Write one new file in the calling thread; see `write_files`."""
    return write_files(storage, {name: records}, threads=1, sync=sync)[name]


def write_files(
    storage: Storage,
    files: Mapping[str, Sequence[AnyRecord]],
    *,
    threads: int,
    sync: bool,
) -> dict[str, WrittenRecords]:
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
        For each file where its records are, in their order, and their checksums.

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
    return {name: writer.result() for name, writer in writers.items()}


@dataclass(slots=True, eq=False)
class _FileWriter:
    """One file: created by its first task, closed by its last."""

    storage: Storage
    name: str
    records: Sequence[AnyRecord]
    sync: bool
    _written: WrittenRecords | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _file: WritableFile | None = None
    _created: bool = False
    _unfinished: int = 0

    def tasks(self) -> Iterator[_Task]:
        """Yield what is to be done for the file; `result` is complete when it is done."""
        self._unfinished = 1
        self.records = _aligned(self.records)
        written = _planned(self.name, self.records)
        if written is None:
            yield self._counted(self._write_streams)
        else:
            self._written = written
            for task in self._planned_tasks(written):
                yield self._counted(task)
        yield self._finish_one

    def result(self) -> WrittenRecords:
        """Return what was written, when all tasks are done."""
        assert self._written is not None
        return self._written

    def open(self) -> WritableFile:
        """Return the file, made at the first call."""
        with self._lock:
            if self._file is None:
                size = None if self._written is None else int(self._written.length.sum())
                self._file = self.storage.create(self.name, size=size)
                self._created = True
            return self._file

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write to the file; on its way to the disk at once where it is to be durable."""
        file = self.open()
        file.write_from(offset, buffers)
        if self.sync:
            # So that the sync at the end finds little left to do.
            start_writeback: Callable[[int, int], None] | None
            start_writeback = getattr(file, "start_writeback", None)
            if start_writeback is not None:
                start_writeback(offset, sum(map(len, buffers)))

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

    def _write_streams(self) -> None:
        self.open()
        self._written = write_streams(self.write, self.name, self.records)

    def _planned_tasks(self, written: WrittenRecords) -> Iterator[_Task]:
        """Yield tasks for records whose places are known."""
        first = batch_bytes = 0
        for number, length in enumerate(written.length.tolist()):
            small = length <= _SMALL
            if number > first and (batch_bytes + length > _BATCH or not small):
                yield partial(self._write_batch, written, first, number)
                first, batch_bytes = number, 0
            if small:
                batch_bytes += length
            else:
                yield from large_record_tasks(
                    self.write, self.name, self.records[number], written, number
                )
                first = number + 1
        if first < len(written):
            yield partial(self._write_batch, written, first, len(written))

    def _write_batch(self, written: WrittenRecords, first: int, stop: int) -> None:
        write_batch(self.write, self.name, self.records[first:stop], written, first)

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


def _aligned(records: Sequence[AnyRecord]) -> Sequence[AnyRecord]:
    """Bring the payloads of large records to places that are fast to write and to read."""
    if not any(type(record) is FormedRecord and record.form.length > _SMALL for record in records):
        return records
    result = list(records)
    offset = 0
    for row, record in enumerate(records):
        if type(record) is FormedRecord:
            if record.form.length > _SMALL:
                record = record._replace(form=aligned_form(record.form, offset))
                result[row] = record
            offset += record.form.length
        else:
            assert isinstance(record, RecordSource)
            if record.length is None:
                return records
            offset += record.length
    return result


def _planned(name: str, records: Sequence[AnyRecord]) -> WrittenRecords | None:
    """Return where the records will be; None where not all of their lengths are known."""
    numbers: dict[object, int] = {}
    rows: list[tuple[int, int, int]] = []
    taken = []
    for record in records:
        shape = record.form if type(record) is FormedRecord else record
        number = numbers.get(shape)
        if number is None:
            row = _lengths(name, record)
            if row is None:
                return None
            number = numbers[shape] = len(rows)
            rows.append(row)
        taken.append(number)
    table = np.array(rows, np.int64).reshape(-1, 3)[np.array(taken, np.int64)].T.copy()
    return WrittenRecords.planned(table[0], table[1], table[2])


def _lengths(name: str, record: AnyRecord) -> tuple[int, int, int] | None:
    """Return the bytes before the payload, of it, and of the record; None if not known."""
    if isinstance(record, FormedRecord):
        return len(record.form.head), record.form.payload_length, record.form.length
    if record.length is None:
        return None
    return len(record.head), _payload_length(name, record), record.length


def _payload_length(name: str, record: RecordSource) -> int:
    total = 0
    for part in record.payload:
        size = part.nbytes
        if size is None:
            raise PlanError(
                f"file {name!r}: a record of {record.length} bytes has a part whose size is not "
                f"known"
            )
        total += size
    return total
