"""Checkpoints made for tests of the engine: records by layout, an index by hand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import BY_CODE, DType
from shardpoint.engine.reading import ReadRequest
from shardpoint.engine.writing import ArraySource, RecordSource, write_files
from shardpoint.formats.checksum import crc32
from shardpoint.formats.torch_record import TensorRecordLayout, tensor_payload_from_bytes
from shardpoint.index import (
    UNKNOWN,
    BlockChecksums,
    CheckpointIndex,
    ChunkEntry,
    Payloads,
    TensorEntry,
    build_index,
)
from shardpoint.storage import Storage

Array = npt.NDArray[Any]
Box = tuple[tuple[int, ...], tuple[int, ...]]

_BY_NUMPY = {dtype.numpy: dtype for dtype in reversed(BY_CODE)}


def dtype_of(array: Array) -> DType:
    return _BY_NUMPY[array.dtype]


@dataclass
class Chunk:
    """A box of a tensor, in which file it goes, and its axes from outermost to innermost."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    order: tuple[int, ...]


def grid(
    key: str,
    shape: Sequence[int],
    cuts: Sequence[Sequence[int]],
    *,
    files: Sequence[str] = ("__0_0.distcp", "__1_0.distcp"),
    order: tuple[int, ...] | None = None,
) -> list[Chunk]:
    """Cut a tensor along every axis at the given positions."""
    boxes: list[Box] = [((), ())]
    for size, at in zip(shape, cuts, strict=True):
        edges = [0, *sorted(set(at)), size]
        spans = [(a, b - a) for a, b in itertools.pairwise(edges)]
        boxes = [((*o, a), (*s, n)) for o, s in boxes for a, n in spans]
    axes = tuple(range(len(shape))) if order is None else order
    return [Chunk(key, o, s, files[i % len(files)], axes) for i, (o, s) in enumerate(boxes)]


def save(storage: Storage, arrays: Mapping[str, Array], chunks: Sequence[Chunk]) -> CheckpointIndex:
    """Write chunks as torch.save records and return the index."""
    storage.prepare()
    files: dict[str, list[RecordSource]] = {}
    places: list[tuple[str, int]] = []
    for chunk in chunks:
        box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        part = arrays[chunk.key][(*box, ...)]
        stored = np.ascontiguousarray(part.transpose(chunk.order)).reshape(
            [part.shape[axis] for axis in chunk.order]
        )
        steps = [0] * part.ndim
        for axis, step in zip(chunk.order, stored.strides, strict=True):
            steps[axis] = step // part.itemsize
        layout = TensorRecordLayout(dtype_of(part), part.shape, tuple(steps))
        records = files.setdefault(chunk.file, [])
        places.append((chunk.file, len(records)))
        records.append(RecordSource(layout.length, layout.head, [ArraySource(stored)], layout.tail))
    spans = {
        name: written.spans()
        for name, written in write_files(storage, files, threads=2, sync=False).items()
    }
    entries: dict[str, list[ChunkEntry]] = {key: [] for key in arrays}
    for chunk, (file, number) in zip(chunks, places, strict=True):
        offset, length = spans[file][number]
        entries[chunk.key].append(ChunkEntry(chunk.offsets, chunk.sizes, file, offset, length))
    return build_index(
        [TensorEntry(k, dtype_of(a), a.shape, entries[k]) for k, a in arrays.items()],
        [],
        key_order=list(arrays),
        paths=None,
        storage_meta=None,
        version="1.0.0",
        source="dcp",
        metadata_files=[".metadata"],
    )


def with_payloads(index: CheckpointIndex, storage: Storage, *, block: int) -> CheckpointIndex:
    """Return the index with what the records' headers say, and checksums of blocks."""
    chunks = index.chunks
    count = len(chunks)
    payloads = Payloads(
        offset=np.full(count, UNKNOWN, np.int64),
        strides=np.zeros_like(chunks.sizes),
        length=np.full(count, UNKNOWN, np.int64),
        checksum=np.full(count, UNKNOWN, np.int64),
        flags=np.zeros(count, np.uint8),
    )
    data = {name: storage.read(name) for name in index.files}
    first, values = [0], []
    for row in range(count):
        file = data[index.files[chunks.file[row]]]
        start, length = int(chunks.record_offset[row]), int(chunks.record_length[row])
        record = file[start : start + length]
        found = tensor_payload_from_bytes(record, start, file="f", key="k")
        payloads.offset[row] = found.payload_offset
        payloads.strides[row, : len(found.strides)] = found.strides
        payloads.length[row] = found.payload_length
        payloads.checksum[row] = UNKNOWN if found.checksum is None else found.checksum
        payload = file[found.payload_offset : found.payload_offset + found.payload_length]
        values += [crc32(payload[at : at + block]) for at in range(0, len(payload), block)]
        first.append(len(values))
    blocks = BlockChecksums(block, np.array(first, np.int64), np.array(values, np.uint32))
    return replace(index, chunks=replace(chunks, payloads=payloads, blocks=blocks))


class Sink:
    """A sink that notes what is done to it."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.is_dense = array.flags.c_contiguous
        self.asked = 0
        self.commits = 0

    def memory(self) -> Array:
        self.asked += 1
        size = self.array.dtype.itemsize
        return self.array.view(np.dtype("<c16") if size == 16 else np.dtype(f"<u{size}"))

    def commit(self) -> None:
        self.commits += 1


def request(index: CheckpointIndex, key: str, box: Box | None = None) -> ReadRequest:
    """Ask for a box (or all) of a tensor, into a new array."""
    row = list(index.tensors.keys).index(key)
    shape = index.tensors.shape_of(row)
    offsets, sizes = ((0,) * len(shape), shape) if box is None else box
    sink = Sink(np.empty(sizes, index.tensors.dtype_of(row).numpy))
    return ReadRequest(row, offsets, sizes, sink)


def sink_of(read: ReadRequest) -> Sink:
    assert isinstance(read.sink, Sink)
    return read.sink


def with_chunk_column(index: CheckpointIndex, name: str, values: Array) -> CheckpointIndex:
    """Return the index with one column of its chunks replaced."""
    return replace(index, chunks=replace(index.chunks, **{name: values}))
