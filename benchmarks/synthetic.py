"""What many ranks would write, without the ranks, in torch's own classes and in columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from shardpoint.dtypes import dtype_named
from shardpoint.index import CheckpointIndex, Chunks, Objects, Tensors

__all__ = ["COLUMNS", "Chunk", "chunks", "index_of_many", "metadata_of_many", "plans"]

Chunk = tuple[str, tuple[int, ...], tuple[int, ...]]

COLUMNS = 128
RECORD = 4096
_REPLICATED_EVERY = 20


def key_of(number: int) -> str:
    """Return the key of a tensor."""
    return f"model.layers.{number}.weight"


def plans(ranks: int, tensors: int, *, only: int | None = None) -> list[SavePlan]:
    """Return one plan for each rank, or for the first few `only`.

    Every tensor is sharded by rows, one row a rank; every twentieth is replicated instead:
    all ranks list the whole of it. Rank 0 has a scalar besides.
    """
    properties = TensorProperties(dtype=torch.bfloat16)
    whole = torch.Size((ranks, COLUMNS))
    row = torch.Size((1, COLUMNS))
    origin = torch.Size((0, 0))
    paths = {key_of(number): ("model", key_of(number)[6:]) for number in range(tensors)}
    result = []
    for rank in range(ranks if only is None else only):
        offsets = torch.Size((rank, 0))
        items = []
        for number in range(tensors):
            if number % _REPLICATED_EVERY:
                kind, at, chunk = WriteItemType.SHARD, offsets, ChunkStorageMetadata(offsets, row)
            else:
                kind, at, chunk = WriteItemType.TENSOR, origin, ChunkStorageMetadata(origin, whole)
            data = TensorWriteData(chunk=chunk, properties=properties, size=whole)
            items.append(WriteItem(MetadataIndex(key_of(number), at), kind, tensor_data=data))
        if rank == 0:
            items.append(WriteItem(MetadataIndex("step"), WriteItemType.BYTE_IO))
        result.append(SavePlan(items, planner_data={**paths, "step": ("step",)}))
    return result


def chunks(ranks: int, tensors: int) -> set[Chunk]:
    """Return key, offsets and sizes of all chunks that the plans have, each once."""
    result: set[Chunk] = set()
    for number in range(tensors):
        key = key_of(number)
        if number % _REPLICATED_EVERY:
            result.update((key, (rank, 0), (1, COLUMNS)) for rank in range(ranks))
        else:
            result.add((key, (0, 0), (ranks, COLUMNS)))
    return result


def metadata_of_many(ranks: int, tensors: int) -> Metadata:
    """Return the metadata, in torch's classes, of what `plans` would save."""
    properties = TensorProperties(dtype=torch.bfloat16)
    whole, row = torch.Size((ranks, COLUMNS)), torch.Size((1, COLUMNS))
    origin = torch.Size((0, 0))
    state: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    paths: dict[str, tuple[str, ...]] = {"step": ("step",)}
    for number in range(tensors):
        key = key_of(number)
        paths[key] = ("model", key[6:])
        if number % _REPLICATED_EVERY:
            boxes = [(torch.Size((rank, 0)), row) for rank in range(ranks)]
        else:
            boxes = [(origin, whole)]
        state[key] = TensorStorageMetadata(
            properties, whole, [ChunkStorageMetadata(*box) for box in boxes]
        )
        for rank, (offsets, _) in enumerate(boxes):
            name = f"__{rank}_0.distcp"
            index = MetadataIndex(key, offsets, rank)
            places[index] = _StorageInfo(name, RECORD * number, RECORD)
    state["step"] = BytesStorageMetadata()
    places[MetadataIndex("step")] = _StorageInfo("__0_0.distcp", RECORD * tensors, RECORD)
    return Metadata(state, paths, places, StorageMeta(), "1.0.0")


def index_of_many(ranks: int, tensors: int) -> CheckpointIndex:
    """Return the same in shardpoint's columns."""
    counts = np.where(np.arange(tensors) % _REPLICATED_EVERY, ranks, 1)
    tensor = np.repeat(np.arange(tensors), counts)
    first = np.concatenate([[0], np.cumsum(counts)])
    rank = np.arange(len(tensor)) - first[tensor]
    zeros = np.zeros(len(tensor), np.int64)
    replicated = counts[tensor] == 1
    keys = [key_of(number) for number in range(tensors)]
    return CheckpointIndex(
        tensors=Tensors(
            keys=keys,
            dtype=np.full(tensors, dtype_named("bfloat16").code, np.uint8),
            ndim=np.full(tensors, 2, np.int16),
            shape=np.tile(np.array([[ranks, COLUMNS]]), (tensors, 1)),
            first_chunk=first,
            requires_grad=np.zeros(tensors, np.bool_),
            pin_memory=np.zeros(tensors, np.bool_),
            memory_format=np.zeros(tensors, np.uint8),
        ),
        chunks=Chunks(
            tensor=tensor,
            offsets=np.column_stack([rank, zeros]),
            sizes=np.column_stack([np.where(replicated, ranks, 1), zeros + COLUMNS]),
            file=rank.astype(np.int32),
            record_offset=RECORD * tensor,
            record_length=zeros + RECORD,
            container=zeros.astype(np.uint8),
            transform=zeros.astype(np.int16),
        ),
        objects=Objects(
            keys=["step"],
            file=np.zeros(1, np.int32),
            record_offset=np.array([RECORD * tensors]),
            record_length=np.array([RECORD]),
            transform=np.zeros(1, np.int16),
        ),
        files=[f"__{number}_0.distcp" for number in range(ranks)],
        transforms=[()],
        key_order=[*keys, "step"],
        paths={**{key: ("model", key[6:]) for key in keys}, "step": ("step",)},
        storage_meta={"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []},
        version="1.0.0",
        source="dcp",
    )
