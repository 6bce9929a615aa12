"""What many ranks would write, without the ranks: items in torch's own classes."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

__all__ = ["COLUMNS", "Chunk", "chunks", "plans"]

Chunk = tuple[str, tuple[int, ...], tuple[int, ...]]

COLUMNS = 128
_REPLICATED_EVERY = 20


def key_of(number: int) -> str:
    """Return the key of a tensor."""
    return f"model.layers.{number}.weight"


def plans(ranks: int, tensors: int) -> list[SavePlan]:
    """Return one plan for each rank.

    Every tensor is sharded by rows, one row a rank; every twentieth is replicated instead:
    all ranks list the whole of it. Rank 0 has a scalar besides.
    """
    properties = TensorProperties(dtype=torch.bfloat16)
    whole = torch.Size((ranks, COLUMNS))
    row = torch.Size((1, COLUMNS))
    origin = torch.Size((0, 0))
    paths = {key_of(number): ("model", key_of(number)[6:]) for number in range(tensors)}
    result = []
    for rank in range(ranks):
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
