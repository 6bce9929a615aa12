"""Writes one large record: its payload in pieces, side by side where it lies in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from shardpoint.engine._write_batches import wrong_length
from shardpoint.engine.sources import AnyRecord, FormedRecord, TensorSource
from shardpoint.engine.written import BlockSums, Write, WrittenRecords, combined
from shardpoint.formats.checksum import crc32, crc32_combine
from shardpoint.index import BLOCK_BYTES

__all__ = ["large_record_tasks"]

# What is checksummed and then written at once: whole blocks. While one thread takes checksums
# another writes, so this is also for how long the file waits when both take them.
_WRITE = 2 << 20
_PIECE = 16 << 20  # what one thread takes of a large tensor; whole writes
_BUFFER = 1 << 20  # what sources that gather elements are asked for at a time


def large_record_tasks(
    write: Write,
    name: str,
    record: AnyRecord,
    written: WrittenRecords,
    row: int,
) -> Iterator[Callable[[], None]]:
    """Yield what is to be done for one record, in any order and side by side.

    Parameters
    ----------
    write
        Writes to the file.
    name
        Of the file, for messages.
    record
        The record.
    written
        Has its place, and gets its checksums.
    row
        The record's row there.
    """
    large = _LargeRecord(write, name, record, written, row)
    memory = _memory_of(record)
    if memory is None:
        assert not isinstance(record, FormedRecord)
        yield partial(large.write_parts, record.payload)
        return
    if len(memory) != written.payload_length[row]:
        raise wrong_length(name, int(written.payload_length[row]), len(memory))
    pieces = range(0, len(memory), _PIECE) if len(memory) else range(1)
    large.unfinished = len(pieces)
    for start in pieces:
        yield partial(large.write_piece, start, memory[start : start + _PIECE])


def _memory_of(record: AnyRecord) -> memoryview | None:
    """Return the payload's memory, if all of it lies in one place."""
    if isinstance(record, FormedRecord):
        return memoryview(record.payload).cast("B")
    if len(record.payload) != 1:
        return None if record.payload else memoryview(b"")
    # Not by isinstance, which takes ten times as long for a Protocol on Python 3.11.
    memory: Callable[[], memoryview | None] | None = getattr(record.payload[0], "memory", None)
    return None if memory is None else memory()


class _LargeRecord:
    def __init__(
        self,
        write: Write,
        name: str,
        record: AnyRecord,
        written: WrittenRecords,
        row: int,
    ) -> None:
        self._write = write
        self._name = name
        self._written = written
        self._row = row
        self._lock = threading.Lock()
        self._offset = int(written.payload_offset[row])
        self._nbytes = int(written.payload_length[row])
        self._first_block = int(written.first_block[row])
        self._source = record.form if isinstance(record, FormedRecord) else record
        self._head = memoryview(self._source.head)
        self.unfinished = 0

    def write_piece(self, start: int, piece: memoryview) -> None:
        """Write a part of the payload from its own memory; the last one ends the record."""
        blocks = self._written.blocks
        last = max(0, len(piece) - 1) // _WRITE * _WRITE
        for at in range(0, last + 1, _WRITE):
            view = piece[at : at + _WRITE]
            block = self._first_block + (start + at) // BLOCK_BYTES
            for begin in range(0, len(view), BLOCK_BYTES):
                blocks[block] = crc32(view[begin : begin + BLOCK_BYTES])
                block += 1
            offset, buffers = self._offset + start + at, [view]
            if start + at == 0:
                offset -= len(self._head)
                buffers.insert(0, self._head)
            if at == last and len(piece) == self._nbytes:
                buffers.append(self._tail())
            self._write(offset, buffers)
        with self._lock:
            self.unfinished -= 1
            if self.unfinished:
                return
        if len(piece) < self._nbytes:
            self._write(self._offset + self._nbytes, [self._tail()])

    def write_parts(self, parts: Sequence[TensorSource]) -> None:
        """Write a payload that its parts give piece by piece, and end the record."""
        sums = BlockSums()
        for part in parts:
            before = sums.nbytes
            for block in part.blocks(_BUFFER):
                at = sums.nbytes
                if at + len(block) > self._nbytes:
                    raise wrong_length(self._name, self._nbytes, at + len(block))
                sums.add(block)
                self._write(self._offset + at, [block])
            if sums.nbytes - before != part.nbytes:
                raise wrong_length(self._name, part.nbytes, sums.nbytes - before)
        sums.finish()
        end = self._first_block + len(sums.checksums)
        self._written.blocks[self._first_block : end] = sums.checksums
        self._write(self._offset - len(self._head), [self._head])
        self._write(self._offset + self._nbytes, [self._tail()])

    def _tail(self) -> memoryview:
        """Return what stands after the payload, now that its checksum is known, and note that."""
        written, row = self._written, self._row
        stop = int(written.first_block[row + 1])
        checksum = combined(written.blocks[self._first_block : stop].tolist(), self._nbytes)
        tail = self._source.tail(checksum)
        length = len(self._head) + self._nbytes + len(tail)
        if length != written.length[row]:
            raise wrong_length(self._name, int(written.length[row]), length)
        written.payload_checksum[row] = checksum
        before = crc32_combine(crc32(self._head), checksum, self._nbytes)
        written.record_checksum[row] = crc32_combine(before, crc32(tail), len(tail))
        return memoryview(tail)
