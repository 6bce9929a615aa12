"""Writes records whose lengths show only when they have been written: one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from shardpoint.engine._write_batches import wrong_length
from shardpoint.engine.sources import AnyRecord, FormedRecord, RecordSource
from shardpoint.engine.written import BlockSums, Write, WrittenRecords
from shardpoint.formats.checksum import crc32, crc32_combine

__all__ = ["RecordParts", "parts_of", "write_streams"]

_BLOCK = 1 << 20


def write_streams(write: Write, name: str, records: Sequence[AnyRecord]) -> WrittenRecords:
    """Write records one after the other; return where they are and their checksums.

    Parameters
    ----------
    write, name
        Writes to the file; its name, for messages.
    records
        Of any lengths, known or not.

    Raises
    ------
    PlanError
        If a source gives other than the bytes it announced.
    StorageError, and whatever a source raises
    """
    places = []
    checksums = []
    blocks: list[int] = []
    offset = 0
    for record in records:
        sums = BlockSums()
        parts = parts_of(record)
        start = offset
        offset = _write(write, offset, memoryview(parts.head))
        for block in parts.blocks(_BLOCK):
            sums.add(block)
            offset = _write(write, offset, block)
        checksum = sums.finish()
        tail = parts.tail(checksum)
        offset = _write(write, offset, memoryview(tail))
        if parts.length is not None and parts.length != offset - start:
            raise wrong_length(name, parts.length, offset - start)
        before = crc32_combine(crc32(parts.head), checksum, sums.nbytes)
        checksums.append((checksum, crc32_combine(before, crc32(tail), len(tail))))
        places.append((len(parts.head), sums.nbytes, offset - start))
        blocks += sums.checksums
    table = np.array(places, np.int64).reshape(-1, 3).T.copy()
    written = WrittenRecords.planned(table[0], table[1], table[2])
    sums_of = np.array(checksums, np.uint32).reshape(-1, 2)
    written.payload_checksum[:], written.record_checksum[:] = sums_of[:, 0], sums_of[:, 1]
    written.blocks[:] = blocks
    return written


class RecordParts(NamedTuple):
    """A record of any kind, taken apart: `RecordSource` says what each is."""

    length: int | None
    head: bytes
    blocks: Callable[[int], Iterator[memoryview]]
    tail: Callable[[int], bytes]


def parts_of(record: AnyRecord) -> RecordParts:
    """Take a record apart; ``blocks(size)`` gives the payload, once."""
    if isinstance(record, FormedRecord):
        form, whole = record.form, memoryview(record.payload).cast("B")
        return RecordParts(form.length, form.head, partial(_slices, whole), form.tail)
    return RecordParts(record.length, record.head, partial(_blocks, record), record.tail)


def _slices(whole: memoryview, size: int) -> Iterator[memoryview]:
    for start in range(0, len(whole), size):
        yield whole[start : start + size]


def _blocks(record: RecordSource, size: int) -> Iterator[memoryview]:
    for part in record.payload:
        yield from part.blocks(size)


def _write(write: Write, offset: int, data: memoryview) -> int:
    if len(data):
        write(offset, [data])
    return offset + len(data)
