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
    axes = max((len(t.shape) for t in tensors), default=0)
    count = len(tensors)
    chunk_count = sum(len(t.chunks) for t in tensors)
    shape = np.ones((count, axes), np.int64)
    first_chunk = np.zeros(count + 1, np.int64)
    offsets = np.zeros((chunk_count, axes), np.int64)
    sizes = np.ones((chunk_count, axes), np.int64)
    strides = np.zeros((chunk_count, axes), np.int64)
    numbers = np.zeros((chunk_count, 10), np.int64)
    files, transforms = _Numbering(), _Numbering([()])
    row = 0
    try:
        for i, tensor in enumerate(tensors):
            rank = len(tensor.shape)
            shape[i, :rank] = tensor.shape
            for chunk in tensor.chunks:
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
                row += 1
            first_chunk[i + 1] = row
        object_numbers = np.array(
            [
                (
                    NO_FILE if o.file is None else files[o.file],
                    o.record_offset,
                    o.record_length,
                    transforms[o.transforms],
                )
                for o in objects
            ],
            np.int64,
        ).reshape(-1, 4)
    except OverflowError as error:
        raise FormatError("a number in the metadata does not fit into 64 bits") from error
    known = bool((numbers[:, 6] != UNKNOWN).any())
    return CheckpointIndex(
        tensors=Tensors(
            keys=[t.key for t in tensors],
            dtype=np.array([t.dtype.code for t in tensors], np.uint8),
            ndim=np.array([len(t.shape) for t in tensors], np.int16),
            shape=shape,
            first_chunk=first_chunk,
            requires_grad=np.array([t.requires_grad for t in tensors], np.bool_),
            pin_memory=np.array([t.pin_memory for t in tensors], np.bool_),
            memory_format=np.array([t.memory_format for t in tensors], np.uint8),
        ),
        chunks=Chunks(
            tensor=numbers[:, 0].copy(),
            offsets=offsets,
            sizes=sizes,
            file=numbers[:, 1].astype(np.int32),
            record_offset=numbers[:, 2].copy(),
            record_length=numbers[:, 3].copy(),
            container=numbers[:, 4].astype(np.uint8),
            transform=numbers[:, 5].astype(np.int16),
            payloads=Payloads(
                offset=numbers[:, 6].copy(),
                strides=strides,
                length=numbers[:, 7].copy(),
                checksum=numbers[:, 8].copy(),
                flags=numbers[:, 9].astype(np.uint8),
            )
            if known
            else None,
        ),
        objects=Objects(
            keys=[o.key for o in objects],
            file=object_numbers[:, 0].astype(np.int32),
            record_offset=object_numbers[:, 1].copy(),
            record_length=object_numbers[:, 2].copy(),
            transform=object_numbers[:, 3].astype(np.int16),
            values={o.key: o.value for o in objects if o.file is None},
        ),
        files=list(files.numbers),
        transforms=list(transforms.numbers),
        key_order=list(key_order),
        paths=paths,
        storage_meta=storage_meta,
        version=version,
        source=source,
        metadata_files=list(metadata_files),
    )
