"""Entries, one object each, to the index's columns: for readers of small headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardpoint.dtypes import DType
from shardpoint.errors import FormatError
from shardpoint.index._columns import (
    NO_FILE,
    UNKNOWN,
    CheckpointIndex,
    Chunks,
    Container,
    Objects,
    Payloads,
    Tensors,
)

__all__ = ["ChunkEntry", "ObjectEntry", "TensorEntry", "build_index", "row_major_strides"]

_MOST_TRANSFORMS = 1 << 15  # their numbers are 16 bits wide


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """One chunk on its way into columns; see `Chunks` for the fields."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str | None
    record_offset: int
    record_length: int
    container: Container = Container.TORCH_RECORD
    transforms: tuple[str, ...] = ()
    payload_offset: int = UNKNOWN
    strides: tuple[int, ...] | None = None  # None: row-major
    payload_length: int = 0
    checksum: int = UNKNOWN
    flags: int = 0


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor on its way into columns; see `Tensors` for the fields."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: Sequence[ChunkEntry]
    requires_grad: bool = False
    pin_memory: bool = False
    memory_format: int = 0


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """One object on its way into columns; see `Objects` for the fields."""

    key: str
    file: str | None
    record_offset: int = 0
    record_length: int = 0
    transforms: tuple[str, ...] = ()
    value: Any = None  # where file is None


class _Numbering:
    """Gives each distinct value the next number."""

    def __init__(self, first: Iterable[Any] = ()) -> None:
        self.numbers: dict[Any, int] = {}
        for value in first:
            self[value]

    def __getitem__(self, value: Any) -> int:
        return self.numbers.setdefault(value, len(self.numbers))


def row_major_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a row-major array of these sizes."""
    strides = [1] * len(sizes)
    for axis in range(len(sizes) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(sizes[axis + 1], 1)
    return tuple(strides)


def build_index(
    tensors: Sequence[TensorEntry],
    objects: Sequence[ObjectEntry],
    *,
    key_order: Sequence[str],
    paths: Mapping[str, tuple[str | int, ...]] | None,
    storage_meta: Mapping[str, Any] | None,
    version: str | None,
    source: str,
    metadata_files: Sequence[str],
) -> CheckpointIndex:
    """Turn entries into columns.

    Raises
    ------
    FormatError
        If a chunk has another number of axes than its tensor, or a number does not fit
        into 64 bits.
    """
    files, transforms = _Numbering(), _Numbering([()])
    axes = max((len(tensor.shape) for tensor in tensors), default=0)
    try:
        chunks = _chunk_columns(tensors, axes, files, transforms)
        object_columns = _object_columns(objects, files, transforms)
        tensor_columns = _tensor_columns(tensors, axes)
    except OverflowError as error:
        raise FormatError("a number in the metadata does not fit into 64 bits") from error
    if len(transforms.numbers) > _MOST_TRANSFORMS:
        raise FormatError(f"more than {_MOST_TRANSFORMS} different lists of transforms")
    return CheckpointIndex(
        tensors=tensor_columns,
        chunks=chunks,
        objects=object_columns,
        files=list(files.numbers),
        transforms=list(transforms.numbers),
        key_order=list(key_order),
        paths=paths,
        storage_meta=storage_meta,
        version=version,
        source=source,
        metadata_files=list(metadata_files),
    )


def _tensor_columns(tensors: Sequence[TensorEntry], axes: int) -> Tensors:
    shape = np.ones((len(tensors), axes), np.int64)
    for row, tensor in enumerate(tensors):
        shape[row, : len(tensor.shape)] = tensor.shape
    counts = np.array([0, *(len(tensor.chunks) for tensor in tensors)], np.int64)
    return Tensors(
        keys=[tensor.key for tensor in tensors],
        dtype=np.array([tensor.dtype.code for tensor in tensors], np.uint8),
        ndim=np.array([len(tensor.shape) for tensor in tensors], np.int16),
        shape=shape,
        first_chunk=np.cumsum(counts),
        requires_grad=np.array([tensor.requires_grad for tensor in tensors], np.bool_),
        pin_memory=np.array([tensor.pin_memory for tensor in tensors], np.bool_),
        memory_format=np.array([tensor.memory_format for tensor in tensors], np.uint8),
    )


def _chunk_columns(
    tensors: Sequence[TensorEntry], axes: int, files: _Numbering, transforms: _Numbering
) -> Chunks:
    count = sum(len(tensor.chunks) for tensor in tensors)
    boxes = np.zeros((3, count, axes), np.int64)
    offsets, sizes, strides = boxes
    sizes[:] = 1
    numbers = np.zeros((count, 10), np.int64)
    rows = ((i, tensor, chunk) for i, tensor in enumerate(tensors) for chunk in tensor.chunks)
    for row, (i, tensor, chunk) in enumerate(rows):
        rank = len(tensor.shape)
        if len(chunk.offsets) != rank or len(chunk.sizes) != rank:
            raise FormatError(
                f"key {tensor.key!r}: a chunk has offsets {chunk.offsets} and sizes "
                f"{chunk.sizes}, but the tensor has shape {tensor.shape}"
            )
        offsets[row, :rank] = chunk.offsets
        sizes[row, :rank] = chunk.sizes
        strides[row, :rank] = (
            row_major_strides(chunk.sizes) if chunk.strides is None else chunk.strides
        )
        numbers[row] = (
            i,
            NO_FILE if chunk.file is None else files[chunk.file],
            chunk.record_offset,
            chunk.record_length,
            chunk.container,
            transforms[chunk.transforms],
            chunk.payload_offset,
            chunk.payload_length,
            chunk.checksum,
            chunk.flags,
        )
    tensor_row, file, record_offset, record_length, container, transform, *payload = numbers.T
    payload_offset, payload_length, checksum, flags = (column.copy() for column in payload)
    payloads = Payloads(payload_offset, strides, payload_length, checksum, flags.astype(np.uint8))
    return Chunks(
        tensor=tensor_row.copy(),
        offsets=offsets,
        sizes=sizes,
        file=file.astype(np.int32),
        record_offset=record_offset.copy(),
        record_length=record_length.copy(),
        container=container.astype(np.uint8),
        transform=transform.astype(np.int16),
        payloads=payloads if (payload_offset != UNKNOWN).any() else None,
    )


def _object_columns(
    objects: Sequence[ObjectEntry], files: _Numbering, transforms: _Numbering
) -> Objects:
    numbers = np.array(
        [
            (
                NO_FILE if entry.file is None else files[entry.file],
                entry.record_offset,
                entry.record_length,
                transforms[entry.transforms],
            )
            for entry in objects
        ],
        np.int64,
    ).reshape(-1, 4)
    return Objects(
        keys=[entry.key for entry in objects],
        file=numbers[:, 0].astype(np.int32),
        record_offset=numbers[:, 1].copy(),
        record_length=numbers[:, 2].copy(),
        transform=numbers[:, 3].astype(np.int16),
        values={entry.key: entry.value for entry in objects if entry.file is None},
    )
