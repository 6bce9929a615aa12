"""Writes records whose lengths show only when they have been written: one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shardpoint.engine._write_batches import wrong_length
from shardpoint.engine.sources import AnyRecord, FormedRecord, RecordSource
from shardpoint.engine.written import BlockSums, WrittenRecords
from shardpoint.formats.checksum import crc32, crc32_combine
from shardpoint.storage import WritableFile

__all__ = ["write_streams"]

_BLOCK = 1 << 20


def write_streams(file: WritableFile, name: str, records: Sequence[AnyRecord]) -> WrittenRecords:
    """Write records one after the other; return where they are and their checksums.

    Parameters
    ----------
    file, name
        The file, and its name for messages.
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
        head = record.form.head if isinstance(record, FormedRecord) else record.head
        start = offset
        offset = _write(file, offset, memoryview(head))
        for block in _payload(record):
            sums.add(block)
            offset = _write(file, offset, block)
        checksum = sums.finish()
        tail = (record.form if isinstance(record, FormedRecord) else record).tail(checksum)
        offset = _write(file, offset, memoryview(tail))
        length = record.form.length if isinstance(record, FormedRecord) else record.length
        if length is not None and length != offset - start:
            raise wrong_length(name, length, offset - start)
        before = crc32_combine(crc32(head), checksum, sums.nbytes)
        checksums.append((checksum, crc32_combine(before, crc32(tail), len(tail))))
        places.append((len(head), sums.nbytes, offset - start))
        blocks += sums.checksums
    table = np.array(places, np.int64).reshape(-1, 3).T.copy()
    written = WrittenRecords.planned(table[0], table[1], table[2])
    sums_of = np.array(checksums, np.uint32).reshape(-1, 2)
    written.payload_checksum[:], written.record_checksum[:] = sums_of[:, 0], sums_of[:, 1]
    written.blocks[:] = blocks
    return written


def _payload(record: AnyRecord) -> Iterator[memoryview]:
    if isinstance(record, RecordSource):
        for part in record.payload:
            yield from part.blocks(_BLOCK)
        return
    whole = memoryview(record.payload).cast("B")
    for start in range(0, len(whole), _BLOCK):
        yield whole[start : start + _BLOCK]


def _write(file: WritableFile, offset: int, data: memoryview) -> int:
    if len(data):
        file.write_from(offset, [data])
    return offset + len(data)
