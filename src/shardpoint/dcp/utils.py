"""Finding what an index names in a state dict."""

from __future__ import annotations

from typing import Any

import torch

from shardpoint.dcp._layouts import find_local
from shardpoint.dcp.metadata import STATE_DICT_TYPE, MetadataIndex
from shardpoint.errors import CheckpointKeyError

__all__ = ["find_state_dict_object", "find_tensor_shard"]


def find_tensor_shard(tensor: torch.Tensor, index: MetadataIndex) -> torch.Tensor:
    """Return the plain local tensor that an index names in a tensor.

    Raises
    ------
    PlanError
        If this rank holds no such chunk.
    """
    return find_local(index.fqn, tensor, index.offset, index.index)


def find_state_dict_object(state_dict: STATE_DICT_TYPE, index: MetadataIndex) -> Any:
    """Return the value, or for tensors the local chunk, that an index names in a flat state dict.

    Raises
    ------
    CheckpointKeyError
        If there is no such key.
    PlanError
        If this rank holds no such chunk.
    """
    if index.fqn not in state_dict:
        raise CheckpointKeyError(f"the state dict has no key {index.fqn!r}")
    value = state_dict[index.fqn]
    if isinstance(value, torch.Tensor) or index.offset is not None:
        return find_local(index.fqn, value, index.offset, index.index)
    return value
