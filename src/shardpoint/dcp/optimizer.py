"""Optimizer states of FSDP1 that were saved sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardProperties
from torch.distributed._shard.sharded_tensor.shard import Shard

from shardpoint.dcp.default_planner import DefaultLoadPlanner
from shardpoint.dcp.metadata import STATE_DICT_TYPE, TensorStorageMetadata
from shardpoint.dcp.planner import LoadPlanner
from shardpoint.dcp.sharding_spec import ChunkShardingSpec
from shardpoint.dcp.state_dict_loader import _load_state_dict
from shardpoint.dcp.storage import StorageReader
from shardpoint.errors import CheckpointKeyError, NotSupportedError
from shardpoint.tree import unflatten

__all__ = ["load_sharded_optimizer_state_dict"]


def load_sharded_optimizer_state_dict(
    model_state_dict: STATE_DICT_TYPE,
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
) -> STATE_DICT_TYPE:
    """Return the optimizer state of a checkpoint, sharded along the first axis.

    For FSDP1 with ``SHARDED_STATE_DICT``, whose optimizer state is not there to be filled
    before the first step. Tensors of more than one element become `ShardedTensor`s cut evenly
    over the ranks that the model is sharded over; the others, and objects, are whole.

    Parameters
    ----------
    model_state_dict
        The model's sharded state: its group of ranks and device are taken.
    optimizer_key
        The name that the optimizer has in the checkpoint.
    storage_reader
        What to read from.
    planner
        What to read; None is a `DefaultLoadPlanner`.

    Returns
    -------
    A nested state dict with `optimizer_key` at its top.

    Raises
    ------
    CheckpointKeyError
        If the checkpoint has nothing under that name.
    NotSupportedError
        If the model's tensors are sharded twice over (FSDP1 over ShardedTensor).
    CheckpointException
        On every rank, if any rank failed.
    """
    group, device = _group_and_device(model_state_dict)
    metadata = storage_reader.read_metadata()
    paths: Mapping[str, tuple[str | int, ...]] = metadata.planner_data or {}
    state: dict[str, Any] = {}
    for key, stored in metadata.state_dict_metadata.items():
        if paths.get(key, (key,))[0] == optimizer_key:
            state[key] = (
                _allocate(stored, group, device)
                if isinstance(stored, TensorStorageMetadata)
                else None
            )
    if not state:
        raise CheckpointKeyError(f"the checkpoint has nothing under {optimizer_key!r}")
    _load_state_dict(
        state,
        storage_reader,
        process_group=group,
        planner=planner if planner is not None else DefaultLoadPlanner(),
    )
    nested: STATE_DICT_TYPE = unflatten(state, {key: paths.get(key, (key,)) for key in state})
    return nested


def _group_and_device(
    model_state_dict: Mapping[str, Any],
) -> tuple[dist.ProcessGroup | None, torch.device]:
    """Return the ranks that a model is sharded over (None: all of them), and where it lies."""
    group: dist.ProcessGroup | None = None
    device = torch.device("cpu")
    for key, value in model_state_dict.items():
        if not isinstance(value, torch.Tensor):
            continue
        if isinstance(value, ShardedTensor):
            group = value._process_group
            for shard in value.local_shards():
                if isinstance(shard.tensor, ShardedTensor):
                    raise NotSupportedError(
                        f"key {key!r} is a ShardedTensor of ShardedTensors: use DTensor, and "
                        f"torch.distributed.checkpoint.state_dict to get its optimizer state"
                    )
                device = shard.tensor.device
        elif value.device.type != "meta":
            device = value.device
    return group, device


def _allocate(
    stored: TensorStorageMetadata, group: dist.ProcessGroup | None, device: torch.device
) -> torch.Tensor:
    """Return memory for a stored tensor, or for this rank's part of it."""
    dtype = stored.properties.dtype
    is_alone = not dist.is_available() or not dist.is_initialized()
    if is_alone or stored.size.numel() == 1 or not stored.size:
        return torch.empty(stored.size, dtype=dtype, device=device)
    ranks = group if group is not None else dist.group.WORLD
    world_size, rank = dist.get_world_size(ranks), dist.get_rank(ranks)
    spec = ChunkShardingSpec(0, [f"rank:{r}/{_of_rank(device, r)}" for r in range(world_size)])
    layout: ShardedTensorMetadata = spec.build_metadata(stored.size, ShardProperties(dtype=dtype))
    own = layout.shards_metadata[rank]
    shards = [Shard(torch.empty(own.shard_sizes, dtype=dtype, device=device), own)]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, layout, process_group=ranks, sharding_spec=spec
    )


def _of_rank(device: torch.device, rank: int) -> str:
    """Return the device that a rank has, of the kind that this one has."""
    if device.type == "cpu":
        return "cpu"
    return f"{device.type}:{rank % torch.get_device_module(device.type).device_count()}"
