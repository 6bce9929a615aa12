"""Writes many small records at once: copied together, checksummed there, written in one go.

The checksums are taken of the copy, so they agree with the file whatever happens to the sources
meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shardpoint.engine.sources import AnyRecord, FormedRecord, RecordSource, TensorSource
from shardpoint.engine.written import BlockSums, Write, WrittenRecords
from shardpoint.errors import PlanError
from shardpoint.formats.checksum import crc32, crc32_combine, crc32_of_each
from shardpoint.formats.record_form import RecordForm, finish_records
from shardpoint.index import BLOCK_BYTES

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["write_batch", "wrong_length"]


def write_batch(
    write: Write,
    name: str,
    records: Sequence[AnyRecord],
    written: WrittenRecords,
    first: int,
) -> None:
    """Write records that follow each other, and note their checksums.

    Parameters
    ----------
    write
        Writes to the file.
    name
        Of the file, for messages.
    records
        The records.
    written
        Has their places, and gets their checksums.
    first
        Row of the first of them.

    Raises
    ------
    PlanError
        If a source gives other than the bytes it announced.
    StorageError, and whatever a source raises
    """
    pieces: list[ReadableBuffer] = []
    forms: list[RecordForm] = []
    formed: list[int] = []
    for row, record in enumerate(records, first):
        if type(record) is FormedRecord:
            form = record[0]
            pieces += (form.head, record[1], form.template)
            forms.append(form)
            formed.append(row)
        else:
            assert isinstance(record, RecordSource)
            pieces.append(_whole_record(name, record, written, row))
    data = bytearray().join(pieces)
    last = first + len(records) - 1
    start = int(written.offset[first])
    wanted = int(written.offset[last] + written.length[last]) - start
    if len(data) != wanted:
        raise wrong_length(name, wanted, len(data))
    if forms:
        _finish(forms, np.array(formed, np.int64), data, written, start)
    write(start, [memoryview(data)])


def _finish(
    forms: Sequence[RecordForm],
    rows: npt.NDArray[np.int64],
    data: bytearray,
    written: WrittenRecords,
    start: int,
) -> None:
    """Take the checksums of the copied payloads and put them where they belong."""
    begins = written.payload_offset[rows] - start
    lengths = written.payload_length[rows]
    view = memoryview(data)
    crcs = np.array(
        crc32_of_each(
            [
                view[begin:end]
                for begin, end in zip(begins.tolist(), (begins + lengths).tolist(), strict=True)
            ]
        ),
        np.uint32,
    )
    single = (lengths > 0) & (lengths <= BLOCK_BYTES)
    written.blocks[written.first_block[rows[single]]] = crcs[single]
    for position in np.flatnonzero(lengths > BLOCK_BYTES).tolist():
        row, begin = int(rows[position]), int(begins[position])
        sums = BlockSums()
        sums.add(view[begin : begin + int(lengths[position])])
        crcs[position] = sums.finish()
        _put_blocks(written, row, sums)
    written.payload_checksum[rows] = crcs
    ends = written.offset[rows] + written.length[rows] - start
    written.record_checksum[rows] = finish_records(forms, crcs, np.frombuffer(data, np.uint8), ends)


def _whole_record(name: str, record: RecordSource, written: WrittenRecords, row: int) -> bytes:
    """Return the bytes of a record that makes its own tail."""
    payload = b"".join([bytes(block) for part in record.payload for block in _blocks(part)])
    sums = BlockSums()
    sums.add(memoryview(payload))
    checksum = sums.finish()
    if len(payload) != written.payload_length[row]:
        raise wrong_length(name, int(written.payload_length[row]), len(payload))
    tail = record.tail(checksum)
    whole = b"".join((record.head, payload, tail))
    if len(whole) != record.length:
        raise wrong_length(name, record.length, len(whole))
    _put_blocks(written, row, sums)
    written.payload_checksum[row] = checksum
    before = crc32_combine(crc32(record.head), checksum, len(payload))
    written.record_checksum[row] = crc32_combine(before, crc32(tail), len(tail))
    return whole


def _blocks(part: TensorSource) -> Sequence[bytes]:
    return [bytes(block) for block in part.blocks(BLOCK_BYTES)]


def _put_blocks(written: WrittenRecords, row: int, sums: BlockSums) -> None:
    first = int(written.first_block[row])
    written.blocks[first : first + len(sums.checksums)] = sums.checksums


def wrong_length(name: str, wanted: int | None, found: int) -> PlanError:
    """Return the error of a source that gave other than it announced."""
    return PlanError(f"file {name!r}: a record's source announced {wanted} bytes and gave {found}")
