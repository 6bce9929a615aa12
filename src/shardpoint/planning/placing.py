"""Where each chunk and object was written, put into the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shardpoint.index import NO_FILE, BlockChecksums, CheckpointIndex, Chunks, Payloads
from shardpoint.planning.save import group_rows

__all__ = ["Written", "attach_storage"]

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


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


def attach_storage(index: CheckpointIndex, written: Written) -> CheckpointIndex:
    """Return the index with the place of every chunk and object that was written.

    Rows that were not written have `NO_FILE`; what was written but is not in the index is
    ignored, as torch does.
    """
    files: dict[str, int] = {}
    file = np.array([files.setdefault(name, len(files)) for name in written.file], np.int32)
    transforms: dict[tuple[str, ...], int] = {(): 0}
    transform = np.array(
        [transforms.setdefault(t, len(transforms)) for t in written.transforms], np.int16
    )
    place = np.column_stack([file, written.offset, written.length, transform]).astype(np.int64)
    chunk_place = _places(index.tensors.keys, index.chunks, written, place)
    object_place = _object_places(index.objects.keys, written, place)
    return replace(
        index,
        files=list(files),
        transforms=list(transforms),
        chunks=replace(
            index.chunks,
            file=chunk_place[:, 0].astype(np.int32),
            record_offset=chunk_place[:, 1],
            record_length=chunk_place[:, 2],
            transform=chunk_place[:, 3].astype(np.int16),
        ),
        objects=replace(
            index.objects,
            file=object_place[:, 0].astype(np.int32),
            record_offset=object_place[:, 1],
            record_length=object_place[:, 2],
            transform=object_place[:, 3].astype(np.int16),
        ),
    )


def _places(keys: Sequence[str], chunks: Chunks, written: Written, place: Int64Array) -> Int64Array:
    """Find each chunk among the written rows, by key and offsets."""
    numbers: Mapping[str, int] = {key: i for i, key in enumerate(keys)}
    tensor = np.array(
        [
            -1 if is_object else numbers.get(key, -1)
            for key, is_object in zip(written.keys, written.is_object.tolist(), strict=True)
        ],
        np.int64,
    )
    rows = np.flatnonzero(tensor >= 0)
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
    found = np.zeros((int(groups.max()) + 1 if len(groups) else 0, 4), np.int64)
    found[:, 0] = NO_FILE
    found[groups[len(chunks) :]] = place[rows]
    result: Int64Array = found[groups[: len(chunks)]]
    return result


def _object_places(keys: Sequence[str], written: Written, place: Int64Array) -> Int64Array:
    result = np.zeros((len(keys), 4), np.int64)
    result[:, 0] = NO_FILE
    numbers = {key: i for i, key in enumerate(keys)}
    for row in np.flatnonzero(written.is_object).tolist():
        target = numbers.get(written.keys[row])
        if target is not None:
            result[target] = place[row]
    return result
