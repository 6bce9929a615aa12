"""Which box of a tensor this rank holds, and the local tensor that holds it."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shardpoint.dcp.metadata import MetadataIndex
from shardpoint.errors import NotSupportedError, PlanError

__all__ = [
    "Box",
    "dtensor_box",
    "find_local",
    "is_checkpointable",
    "is_in_mesh",
    "local_boxes",
    "overlaps_itself",
    "shape_and_dtype",
]

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""

_MOST_BOXES = 4096
_boxes: dict[tuple[object, ...], Box] = {}  # by all that a box depends on


def is_in_mesh(tensor: DTensor) -> bool:
    """Whether this rank holds a part of the tensor at all."""
    return tensor.device_mesh.get_coordinate() is not None


def is_checkpointable(value: Any) -> TypeGuard[Any]:
    """Whether a value, or the local tensor of a `DTensor`, brings its own chunks.

    That is torch's protocol for tensor subclasses: ``__create_write_items__``,
    ``__create_chunk_list__`` and ``__get_tensor_shard__``.
    """
    if isinstance(value, DTensor):
        return is_in_mesh(value) and hasattr(value._local_tensor, "__create_write_items__")
    return hasattr(value, "__create_write_items__")


def dtensor_box(tensor: DTensor) -> Box:
    """Return the box that this rank holds.

    Raises
    ------
    NotSupportedError
        If a placement is partial: no rank has the values. Reduce it first.
    PlanError
        If the local tensor is not of the size that the placements say.
    """
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise NotSupportedError(
            f"a DTensor with placements {tensor.placements} holds partial sums; "
            "redistribute it to Replicate() or Shard() first"
        )
    offsets, sizes = _box_in_mesh(tensor)
    local = tuple(tensor._local_tensor.shape)  # to_local() is for autograd, and slow
    if sizes != local:
        raise PlanError(
            f"a DTensor of shape {tuple(tensor.shape)} with placements {tensor.placements} should "
            f"have a local tensor of shape {sizes} here, found {local}"
        )
    return offsets, local


def _box_in_mesh(tensor: DTensor) -> Box:
    """Return the box that the placements give this rank. Most layers are like one before."""
    mesh, placements = tensor.device_mesh, tensor.placements
    look = tuple(mesh.shape), tuple(mesh.get_coordinate() or ()), placements, tensor.shape
    box = _boxes.get(look)
    if box is None:
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        if len(_boxes) >= _MOST_BOXES:
            _boxes.clear()
        box = _boxes[look] = tuple(offsets), tuple(sizes)
    return box


def shape_and_dtype(value: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Return a tensor's global shape and element type."""
    if isinstance(value, ShardedTensor):  # its own attributes warn that it is deprecated
        metadata = value.metadata()
        return tuple(metadata.size), metadata.tensor_properties.dtype
    return tuple(value.shape), value.dtype


def overlaps_itself(value: torch.Tensor) -> bool:
    """Whether several elements of a plain or local tensor lie at one place in memory."""
    if isinstance(value, ShardedTensor):
        return any(overlaps_itself(shard.tensor) for shard in value.local_shards())
    if is_checkpointable(value):
        return False
    local = value._local_tensor if isinstance(value, DTensor) else value
    return any(
        size > 1 and stride == 0 for size, stride in zip(local.shape, local.stride(), strict=True)
    )


def local_boxes(value: torch.Tensor) -> list[Box]:
    """Return the boxes of a tensor that this rank holds; none where it has no part in it."""
    if is_checkpointable(value):
        chunks = value.__create_chunk_list__()
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
    if isinstance(value, DTensor):
        return [dtensor_box(value)] if is_in_mesh(value) else []
    if isinstance(value, ShardedTensor):
        return [
            (tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes))
            for shard in value.local_shards()
        ]
    return [((0,) * value.dim(), tuple(value.shape))]


def find_local(key: str, value: Any, offset: torch.Size | None, hint: int | None) -> torch.Tensor:
    """Return the plain local tensor that begins at `offset` in a value of a state dict.

    Raises
    ------
    PlanError
        If this rank holds no such chunk.
    """
    if is_checkpointable(value):
        found: torch.Tensor = value.__get_tensor_shard__(MetadataIndex(key, offset, hint))
        return found
    if isinstance(value, DTensor):
        return value.to_local()
    if isinstance(value, ShardedTensor):
        shards = value.local_shards()
        if offset is None:
            raise PlanError(f"key {key!r} is a ShardedTensor: an offset is needed to find a shard")
        if hint is not None and hint < len(shards):
            shards = [shards[hint], *shards]
        for shard in shards:
            if tuple(shard.metadata.shard_offsets) == tuple(offset):
                return shard.tensor
        raise PlanError(f"key {key!r}: this rank holds no shard at offset {tuple(offset)}")
    if not isinstance(value, torch.Tensor):
        raise PlanError(f"key {key!r} is {type(value).__name__}, not a tensor")
    if offset is not None and any(offset):
        raise PlanError(f"key {key!r} is one whole tensor, it has no chunk at {tuple(offset)}")
    return value
