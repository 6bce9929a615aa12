"""Any checkpoint to one that torch.distributed.checkpoint loads."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shardpoint.convert.source import Allowed, InOrder, Source, flat_bytes
from shardpoint.dtypes import BY_CODE
from shardpoint.engine import committing
from shardpoint.engine.alone import chunks_alone
from shardpoint.engine.sources import RecordSource
from shardpoint.engine.writing import write_file
from shardpoint.engine.written import WrittenRecords
from shardpoint.formats.dcp_metadata import write_metadata
from shardpoint.formats.torch_record import TensorRecordLayout, object_record
from shardpoint.formats.value_pickling import pickle_value, tensor_bytes
from shardpoint.index import (
    BLOCK_BYTES,
    BlockChecksums,
    CheckpointIndex,
    ChunkEntry,
    Container,
    ObjectEntry,
    TensorEntry,
    build_index,
)
from shardpoint.storage import Storage, storage_at
from shardpoint.transforms import Transform

__all__ = ["to_checkpoint"]

_VERSION = "1.0.0"


def to_checkpoint(
    source: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str],
    *,
    threads: int | None = None,
    allowed: Allowed | None = None,
    transforms: Iterable[Transform] = (),
    sync: bool = True,
) -> None:
    """Write a checkpoint as torch.distributed.checkpoint has it, in one data file.

    Chunks stay as they are; each is read, and written row-major, when its turn comes. A
    checkpoint that is at the target already stays readable until the new one is complete.

    Parameters
    ----------
    source
        Any checkpoint that `shardpoint.open` opens.
    target
        The folder, by path or URL.
    threads
        How many pieces of a chunk are read at once.
    allowed
        Classes beyond the closed list that objects may be made of.
    transforms
        What undoes compression or encryption of the source beyond what is known anyway; see
        `shardpoint.open`. What is written is plain.
    sync
        Make everything durable before the checkpoint counts.

    Raises
    ------
    CheckpointNotFoundError, FormatError, CorruptionError, StorageError, NotSupportedError
        As `shardpoint.open` and reading do.
    """
    opened = Source(source, threads=threads, allowed=allowed, transforms=transforms)
    storage = storage_at(target)
    storage.prepare()
    name = f"{committing.data_prefix(0, committing.new_token(storage))}0.distcp"
    records = _object_records(opened)
    objects = len(records)
    chunks = InOrder(
        _chunk_bytes(opened.index),
        lambda rows: opened.read(chunks_alone(opened.index, rows), range(len(rows))),
    )
    records += [_chunk_record(opened, chunks, row) for row in range(len(opened.index.chunks))]
    written = write_file(storage, name, records, sync=sync)
    index = _with_checksums(
        _written(opened.index, name, written, objects, os.fspath(target)), written, objects
    )
    metadata = write_metadata(index)
    native = committing.index_for(index, metadata)
    made = [name, native[0]]
    try:
        committing.commit(storage, committing.METADATA_NAME, metadata, index=native, sync=sync)
    except BaseException:
        if not committing.holds_any(storage, committing.METADATA_NAME, made):
            for file in made:
                storage.remove(file)
        raise
    committing.remove_replaced(storage, {*made, *index.files})


def _object_records(source: Source) -> list[RecordSource]:
    values = source.objects()
    records = []
    for key in source.index.objects.keys:
        pickle, tensors = pickle_value(values[key])
        record = object_record(pickle, [tensor_bytes(tensor) for tensor in tensors])
        records.append(RecordSource(length=len(record), head=record))
    return records


def _chunk_record(source: Source, chunks: InOrder, chunk: int) -> RecordSource:
    index = source.index
    row = int(index.chunks.tensor[chunk])
    axes = int(index.tensors.ndim[row])
    sizes = tuple(index.chunks.sizes[chunk, :axes].tolist())
    layout = TensorRecordLayout(index.tensors.dtype_of(row), sizes)
    payload = _ChunkSource(chunks, chunk, layout.payload_length)
    return RecordSource(
        length=layout.length, head=layout.head, payload=(payload,), tail=layout.tail
    )


def _chunk_bytes(index: CheckpointIndex) -> npt.NDArray[np.int64]:
    itemsizes = np.array([dtype.itemsize for dtype in BY_CODE], np.int64)
    sizes: npt.NDArray[np.int64] = index.chunks.sizes.prod(axis=1)
    return sizes * itemsizes[index.tensors.dtype[index.chunks.tensor]]


class _ChunkSource:
    """One chunk's elements, read when they are to be written."""

    def __init__(self, chunks: InOrder, chunk: int, nbytes: int) -> None:
        self._chunks = chunks
        self._chunk = chunk
        self.nbytes = nbytes

    def blocks(self, block_size: int) -> Iterator[memoryview]:
        whole = flat_bytes(self._chunks.take(self._chunk))
        for start in range(0, len(whole), block_size):
            yield whole[start : start + block_size]


def _written(
    old: CheckpointIndex,
    file: str,
    written: WrittenRecords,
    object_count: int,
    place: Any,
) -> CheckpointIndex:
    """Return the index of what was written: objects first, then chunks in their old order."""
    tensors = []
    for row, key in enumerate(old.tensors.keys):
        shape = old.tensors.shape_of(row)
        first, last = (int(n) for n in old.tensors.first_chunk[row : row + 2])
        chunks = [
            ChunkEntry(
                offsets=tuple(old.chunks.offsets[chunk, : len(shape)].tolist()),
                sizes=tuple(old.chunks.sizes[chunk, : len(shape)].tolist()),
                file=file,
                record_offset=int(written.offset[object_count + chunk]),
                record_length=int(written.length[object_count + chunk]),
                container=Container.TORCH_RECORD,
                payload_offset=int(written.payload_offset[object_count + chunk]),
                payload_length=int(written.payload_length[object_count + chunk]),
                checksum=int(written.payload_checksum[object_count + chunk]),
            )
            for chunk in range(first, last)
        ]
        requires_grad = bool(old.tensors.requires_grad[row])
        dtype = old.tensors.dtype_of(row)
        tensors.append(TensorEntry(key, dtype, shape, chunks, requires_grad=requires_grad))
    objects = [
        ObjectEntry(key, file, int(written.offset[row]), int(written.length[row]))
        for row, key in enumerate(old.objects.keys)
    ]
    return build_index(
        tensors,
        objects,
        key_order=old.key_order,
        paths=old.paths,
        storage_meta={
            "checkpoint_id": place,
            "save_id": secrets.token_hex(16),
            "load_id": None,
            "modules": [],
        },
        version=_VERSION,
        source="dcp",
        metadata_files=[committing.METADATA_NAME],
    )


def _with_checksums(
    index: CheckpointIndex, written: WrittenRecords, object_count: int
) -> CheckpointIndex:
    """Return the index with the checksums of all records and of the payloads' blocks."""
    first = written.first_block[object_count:]
    blocks = BlockChecksums(BLOCK_BYTES, first - first[0], written.blocks[first[0] :])
    checksums = written.record_checksum.astype(np.int64)
    return replace(
        index,
        chunks=replace(index.chunks, blocks=blocks, record_checksum=checksums[object_count:]),
        objects=replace(index.objects, record_checksum=checksums[:object_count]),
    )
