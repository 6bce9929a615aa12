"""Files of `SerializationFormat.SAFETENSORS`: objects, then one safetensors image of all tensors.

Layout of torch 2.13: an object's entry is as ever; every tensor's entry has the image's offset,
and the bytes of the tensor as its length; the data are found by the image's header. torch keeps
one tensor of a name in a file and loses others; here those go into files of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import BY_CODE
from shardpoint.engine.writing import (
    AnyRecord,
    ArraySource,
    FormedRecord,
    RecordSource,
    TensorSource,
    WrittenRecords,
)
from shardpoint.formats.safetensors import encode_header, written_order
from shardpoint.planning.save import OBJECT, WriteColumns

__all__ = ["image_records", "in_images", "without_repeated_keys"]

Int64Array = npt.NDArray[np.int64]


def without_repeated_keys(
    files: Iterable[Int64Array], columns: WriteColumns
) -> Iterator[Int64Array]:
    """Yield the rows of each file, of which one that has a key several times becomes several."""
    for rows in files:
        seen: dict[str, int] = {}
        parts: list[list[int]] = []
        for row in rows.tolist():
            key = columns.keys[row]
            number = seen[key] = seen.get(key, -1) + 1
            if number == len(parts):
                parts.append([])
            parts[number].append(row)
        yield from (np.array(part, np.int64) for part in parts)


def image_records(
    columns: WriteColumns, records: Sequence[AnyRecord], strides: Int64Array, rows: Int64Array
) -> tuple[list[AnyRecord], Int64Array]:
    """Return the records of one file, and its rows in the order of their records.

    The objects come first, then one record that is the image's header, then the tensors.

    Parameters
    ----------
    columns, records, strides
        All rows: what they are, their torch.save records, and the strides of their payloads.
    rows
        Of the file.

    Raises
    ------
    NotSupportedError
        If safetensors has no such dtype.
    """
    is_object = columns.kind[rows] == OBJECT
    objects, tensors = rows[is_object], rows[~is_object]
    dtypes = {row: BY_CODE[int(columns.dtype[row])] for row in tensors.tolist()}
    order = written_order({columns.keys[row]: dtype for row, dtype in dtypes.items()})
    by_key = {columns.keys[row]: row for row in dtypes}
    tensors = np.array([by_key[key] for key in order], np.int64)

    def box(column: Int64Array, row: int) -> tuple[int, ...]:
        return tuple(column[row, : columns.ndim[row]].tolist())

    header, _ = encode_header(
        [(columns.keys[row], dtypes[row], box(columns.sizes, row)) for row in tensors.tolist()],
        metadata=_metadata({columns.keys[row]: box(columns.offsets, row) for row in dtypes}),
    )
    made: list[AnyRecord] = [records[row] for row in objects.tolist()]
    made.append(RecordSource(length=len(header), head=header))
    for row in tensors.tolist():
        source = _RowMajor(
            _payload_of(records[row]),
            dtypes[row].raw,
            box(columns.sizes, row),
            box(strides, row),
        )
        made.append(RecordSource(length=source.nbytes, payload=(source,)))
    return made, np.concatenate([objects, tensors])


def in_images(written: WrittenRecords, objects: int) -> WrittenRecords:
    """Return the columns of a file without the header's row; tensors get its offset and checksum.

    Parameters
    ----------
    written
        Of the records that `image_records` gave.
    objects
        How many of them are objects.
    """
    keep = np.arange(len(written)) != objects
    offset = written.offset.copy()
    offset[objects:] = offset[objects]
    record_checksum = written.record_checksum.copy()
    record_checksum[objects:] = record_checksum[objects]
    counts = np.diff(written.first_block)[keep]  # the header has no payload, so no blocks
    return replace(
        written,
        offset=offset[keep],
        length=written.length[keep],
        payload_offset=written.payload_offset[keep],
        payload_length=written.payload_length[keep],
        payload_checksum=written.payload_checksum[keep],
        record_checksum=record_checksum[keep],
        first_block=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
    )


def _metadata(offsets: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    sharding = {key: {"saved_offsets": list(box)} for key, box in offsets.items()}
    return {
        "DCP_SHARDING_INFO": json.dumps(sharding),
        "DCP_VERSION": "1.0",
        "format": "pt",
    }


def _payload_of(record: AnyRecord) -> TensorSource:
    if isinstance(record, FormedRecord):
        return ArraySource(np.frombuffer(memoryview(record.payload).cast("B"), np.uint8))
    (part,) = record.payload
    return part


class _RowMajor:
    """A payload in row-major order, whatever its strides are; a `TensorSource`."""

    def __init__(
        self,
        payload: TensorSource,
        dtype: npt.DTypeLike,
        sizes: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> None:
        self._payload = payload
        self._sizes = sizes
        self._dtype = np.dtype(dtype)
        self._strides = tuple(stride * self._dtype.itemsize for stride in strides)
        self.nbytes = int(np.prod(sizes, dtype=np.int64)) * self._dtype.itemsize
        in_order = [(n, s) for n, s in zip(sizes, strides, strict=True) if n != 1]
        expected = 1
        self._is_ordered = True
        for size, stride in reversed(in_order):
            self._is_ordered &= stride == expected
            expected *= size

    def memory(self) -> memoryview | None:
        """See `ContiguousSource`."""
        memory = getattr(self._payload, "memory", None)
        return memory() if self._is_ordered and memory is not None else None

    def blocks(self, block_size: int) -> Iterator[memoryview]:
        """See `TensorSource`."""
        if self._is_ordered or not self.nbytes:
            yield from self._payload.blocks(block_size)
            return
        memory = getattr(self._payload, "memory", lambda: None)()
        if memory is None:
            memory = b"".join(bytes(block) for block in self._payload.blocks(block_size))
        array = np.ndarray(self._sizes, self._dtype, memory, strides=self._strides)
        yield from ArraySource(array).blocks(block_size)
