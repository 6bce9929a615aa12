"""Where each chunk and object was written, put into the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shardpoint.index import (
    NO_FILE,
    UNKNOWN,
    BlockChecksums,
    CheckpointIndex,
    Chunks,
    Container,
    Payloads,
)
from shardpoint.planning.save import group_rows

__all__ = ["Written", "attach_storage"]

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """Where rows were written.

    Attributes
    ----------
    keys, is_object, ndim, offsets
        Which item: an object by its key, a chunk by key and offsets (``int64[n, D]``).
    file
        A file name for each row.
    offset, length
        ``int64[n]``: the record's byte span.
    transforms
        A descriptor tuple for each row.
    payloads
        Where the elements lie in each record, row by row; offset and length `UNKNOWN` for
        objects and where the writer does not say. None where no row says.
    blocks
        Checksums of the payloads' blocks, row by row; None where no row has any.
    record_checksum
        ``int64[n]``: CRC-32 of each record's bytes in the file, or `UNKNOWN`; None where no row
        has one.
    container
        ``uint8[n]``: a `Container` for each row; None where all are torch.save records.
    """

    keys: Sequence[str]
    is_object: BoolArray
    ndim: npt.NDArray[np.int16]
    offsets: Int64Array
    file: Sequence[str]
    offset: Int64Array
    length: Int64Array
    transforms: Sequence[tuple[str, ...]]
    payloads: Payloads | None = None
    blocks: BlockChecksums | None = None
    record_checksum: Int64Array | None = None
    container: npt.NDArray[np.uint8] | None = None


def attach_storage(index: CheckpointIndex, written: Written) -> CheckpointIndex:
    """Return the index with the place of every chunk and object that was written.

    What the writers know of the records' insides comes along: where payloads lie, and all
    checksums. Rows that were not written have `NO_FILE`; what was written but is not in the
    index is ignored, as torch does.
    """
    files: dict[str, int] = {}
    file = np.array([files.setdefault(name, len(files)) for name in written.file], np.int32)
    transforms: dict[tuple[str, ...], int] = {(): 0}
    transform = np.array(
        [transforms.setdefault(t, len(transforms)) for t in written.transforms], np.int16
    )
    chunk_rows = _rows_of_chunks(index.tensors.keys, index.chunks, written)
    object_rows = _rows_of_objects(index.objects.keys, written)
    return replace(
        index,
        files=list(files),
        transforms=list(transforms),
        chunks=replace(
            index.chunks,
            file=_picked(file, chunk_rows, NO_FILE),
            record_offset=_picked(written.offset, chunk_rows, 0),
            record_length=_picked(written.length, chunk_rows, 0),
            transform=_picked(transform, chunk_rows, 0),
            payloads=_picked_payloads(written.payloads, chunk_rows, index.chunks.offsets.shape[1]),
            blocks=_picked_blocks(written.blocks, chunk_rows),
            record_checksum=_picked_checksums(written.record_checksum, chunk_rows),
            container=(
                index.chunks.container
                if written.container is None
                else _picked(written.container, chunk_rows, Container.TORCH_RECORD)
            ),
        ),
        objects=replace(
            index.objects,
            file=_picked(file, object_rows, NO_FILE),
            record_offset=_picked(written.offset, object_rows, 0),
            record_length=_picked(written.length, object_rows, 0),
            transform=_picked(transform, object_rows, 0),
            record_checksum=_picked_checksums(written.record_checksum, object_rows),
        ),
    )


_NOWHERE = -1


def _rows_of_chunks(keys: Sequence[str], chunks: Chunks, written: Written) -> Int64Array:
    """Find each chunk among the written rows, by key and offsets; `_NOWHERE` if it is not."""
    numbers: Mapping[str, int] = {key: i for i, key in enumerate(keys)}
    tensor = np.fromiter(
        map(numbers.get, written.keys, repeat(_NOWHERE)), np.int64, len(written.keys)
    )
    tensor[written.is_object] = _NOWHERE
    rows = np.flatnonzero(tensor != _NOWHERE)
    axes = max(chunks.offsets.shape[1], written.offsets.shape[1])

    def widened(offsets: Int64Array) -> Int64Array:
        return np.pad(offsets, ((0, 0), (0, axes - offsets.shape[1])))

    groups = group_rows(
        np.concatenate(
            [
                np.column_stack([chunks.tensor, widened(chunks.offsets)]),
                np.column_stack([tensor[rows], widened(written.offsets[rows])]),
            ]
        )
    )
    found = np.full(int(groups.max(initial=-1)) + 1, _NOWHERE, np.int64)
    found[groups[len(chunks) :]] = rows
    result: Int64Array = found[groups[: len(chunks)]]
    return result


def _rows_of_objects(keys: Sequence[str], written: Written) -> Int64Array:
    result = np.full(len(keys), _NOWHERE, np.int64)
    numbers = {key: i for i, key in enumerate(keys)}
    for row in np.flatnonzero(written.is_object).tolist():
        target = numbers.get(written.keys[row])
        if target is not None:
            result[target] = row
    return result


def _picked(column: npt.NDArray[_T], rows: Int64Array, missing: int) -> npt.NDArray[_T]:
    """Return the column's values at rows of it, `missing` where a row is `_NOWHERE`."""
    nowhere = np.full((1, *column.shape[1:]), missing, column.dtype)
    # `_NOWHERE` counts from the end.
    result: npt.NDArray[_T] = np.concatenate([column, nowhere])[rows]
    return result


def _picked_checksums(column: Int64Array | None, rows: Int64Array) -> Int64Array | None:
    if column is None:
        return None
    picked = _picked(column, rows, UNKNOWN)
    return picked if (picked != UNKNOWN).any() else None


def _picked_payloads(payloads: Payloads | None, rows: Int64Array, axes: int) -> Payloads | None:
    if payloads is None:
        return None
    offset = _picked(payloads.offset, rows, UNKNOWN)
    if not (offset != UNKNOWN).any():
        return None
    strides = _picked(payloads.strides, rows, 0)
    missing = axes - strides.shape[1]
    if missing:
        strides = np.pad(strides, ((0, 0), (0, missing))) if missing > 0 else strides[:, :axes]
    return Payloads(
        offset=offset,
        strides=np.ascontiguousarray(strides),
        length=_picked(payloads.length, rows, UNKNOWN),
        checksum=_picked(payloads.checksum, rows, UNKNOWN),
        flags=_picked(payloads.flags, rows, 0),
    )


def _picked_blocks(blocks: BlockChecksums | None, rows: Int64Array) -> BlockChecksums | None:
    if blocks is None:
        return None
    counts = _picked(np.diff(blocks.first), rows, 0)
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    if not first[-1]:
        return None
    # Where in `blocks.values` each picked value is: its chunk's first one, and on from there.
    start = _picked(blocks.first[:-1], rows, 0)
    places = np.repeat(start - first[:-1], counts) + np.arange(first[-1])
    return BlockChecksums(blocks.block_size, first, blocks.values[places])
