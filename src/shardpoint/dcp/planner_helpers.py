"""Pieces that planners are made of: write items and read items for one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardpoint.dcp._layouts import local_boxes
from shardpoint.dcp._state import materialize_meta_tensors
from shardpoint.dcp._write_items import describe_state
from shardpoint.dcp.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from shardpoint.dcp.planner import LoadItemType, ReadItem, WriteItem
from shardpoint.errors import PlanError
from shardpoint.planning.intersect import intersect

__all__ = ["create_read_items_for_chunk_list"]


def create_read_items_for_chunk_list(
    fqn: str,
    checkpoint_md: TensorStorageMetadata,
    local_chunks: list[ChunkStorageMetadata],
) -> list[ReadItem]:
    """Return what is to be read to fill some local boxes of a stored tensor.

    Parameters
    ----------
    fqn
        The tensor's flat key.
    checkpoint_md
        What is stored of it.
    local_chunks
        The boxes, in the whole tensor, that are wanted.

    Returns
    -------
    One item for each pair of a local and a stored box that share elements.
    """
    axes = len(checkpoint_md.size)
    stored = _boxes(checkpoint_md.chunks, axes)
    wanted = _boxes(local_chunks, axes)
    found = intersect(
        np.zeros(len(local_chunks), np.int64),
        *wanted,
        np.zeros(len(checkpoint_md.chunks), np.int64),
        *stored,
    )
    return [
        _create_read_item_for_tensor(
            dest_index=MetadataIndex(fqn, wanted[0][a].tolist(), a),
            dest_offsets=(offsets - wanted[0][a]).tolist(),
            storage_index=MetadataIndex(fqn, stored[0][b].tolist(), b),
            storage_offsets=(offsets - stored[0][b]).tolist(),
            lengths=sizes.tolist(),
        )
        for a, b, offsets, sizes in zip(
            found.a.tolist(), found.b.tolist(), found.offsets, found.sizes, strict=True
        )
    ]


def _boxes(
    chunks: Sequence[Any], axes: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    for chunk in chunks:
        if len(chunk.offsets) != axes or len(chunk.sizes) != axes:
            raise PlanError(
                f"a chunk has offsets {tuple(chunk.offsets)} and sizes {tuple(chunk.sizes)}, but "
                f"the tensor has {axes} axes"
            )
    shape = (len(chunks), axes)
    return (
        np.array([tuple(chunk.offsets) for chunk in chunks], np.int64).reshape(shape),
        np.array([tuple(chunk.sizes) for chunk in chunks], np.int64).reshape(shape),
    )


def _create_read_item_for_tensor(
    dest_index: MetadataIndex,
    dest_offsets: Sequence[int],
    storage_index: MetadataIndex,
    storage_offsets: Sequence[int],
    lengths: Sequence[int],
) -> ReadItem:
    """Return the item that reads one box."""
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=dest_index,
        dest_offsets=torch.Size(dest_offsets),
        storage_index=storage_index,
        storage_offsets=torch.Size(storage_offsets),
        lengths=torch.Size(lengths),
    )


def _create_read_item_for_byteio(
    dest_index: MetadataIndex,
    dest_offset: int,
    storage_index: MetadataIndex,
    storage_offset: int,
    length: int,
) -> ReadItem:
    """Return the item that reads one object."""
    return ReadItem(
        type=LoadItemType.BYTE_IO,
        dest_index=dest_index,
        dest_offsets=torch.Size((dest_offset,)),
        storage_index=storage_index,
        storage_offsets=torch.Size((storage_offset,)),
        lengths=torch.Size((length,)),
    )


def _create_read_items(
    fqn: str, md: TensorStorageMetadata | BytesStorageMetadata, obj: Any
) -> list[ReadItem]:
    """Return what is to be read to fill a value of a state dict."""
    if isinstance(md, BytesStorageMetadata) or not hasattr(md, "chunks"):  # or torch's own
        index = MetadataIndex(fqn)
        return [_create_read_item_for_byteio(index, 0, index, 0, 0)]
    if not isinstance(obj, torch.Tensor):
        raise PlanError(f"key {fqn!r}: a stored tensor cannot fill a {type(obj).__name__}")
    return create_read_items_for_chunk_list(fqn, md, _create_chunk_list(obj))


def _create_chunk_list(tensor: torch.Tensor) -> list[ChunkStorageMetadata]:
    """Return the boxes of a tensor that this rank holds."""
    return [
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        for offsets, sizes in local_boxes(tensor)
    ]


def _create_write_items(fqn: str, object: Any) -> list[WriteItem]:
    """Return what this rank would write of a value of a state dict."""
    return list(describe_state({fqn: object}))


def _create_write_item_for_tensor(fqn: str, tensor: torch.Tensor) -> WriteItem:
    """Return what is written of a plain tensor."""
    return _only(fqn, tensor)


def _create_write_items_for_dtensor(fqn: str, tensor: DTensor) -> WriteItem:
    """Return what this rank writes of a `DTensor`."""
    return _only(fqn, tensor)


def _create_write_item_for_bytesio(fqn: str, bytes: Any) -> WriteItem:
    """Return what is written of an object."""
    return _only(fqn, bytes)


def _only(fqn: str, value: Any) -> WriteItem:
    items = _create_write_items(fqn, value)
    if len(items) != 1:
        raise PlanError(f"key {fqn!r}: this rank holds {len(items)} chunks of it, wanted one")
    return items[0]


def _init_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Give every tensor on the meta device memory, in place, and return the state dict."""
    materialize_meta_tensors(state_dict)
    return state_dict


def _iterate_state_dict(
    iter_object: Any,
    dtensor_func: Callable[[Any], Any],
    sharded_tensor_func: Callable[[Any], Any],
    tensor_func: Callable[[Any], Any],
) -> Any:
    """Return nested containers with each tensor replaced by what the function of its kind gives."""

    def walk(value: Any) -> Any:
        if isinstance(value, DTensor):
            return dtensor_func(value)
        if isinstance(value, ShardedTensor):
            return sharded_tensor_func(value)
        if isinstance(value, torch.Tensor):
            return tensor_func(value)
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(walk(item) for item in value)
        return value

    return walk(iter_object)
