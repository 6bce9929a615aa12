"""Nested state dicts of torch values: to flat keys, and back into their containers."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardpoint.dcp.stateful import Stateful
from shardpoint.engine.collector import collection_paused
from shardpoint.errors import PlanError
from shardpoint.tree import Path, Rules, flatten

__all__ = ["call_state_dict", "flatten_state", "is_stateful", "materialize_meta_tensors", "set_at"]

_NEVER_STATEFUL = frozenset(
    [
        *(torch.Tensor, torch.nn.Parameter, DTensor, bool, int, float, str, bytes),
        *(dict, list, tuple, type(None)),
    ]
)


@collection_paused()
def flatten_state(
    state_dict: Mapping[str, Any], rules: Rules = "2.4"
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return values and paths by flat key; see `shardpoint.tree.flatten`."""
    return flatten(state_dict, rules=rules, is_tensor=lambda v: isinstance(v, torch.Tensor))


def call_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a shallow copy in which every `Stateful` is replaced by its state."""
    return {
        key: value.state_dict() if is_stateful(value) else value
        for key, value in state_dict.items()
    }


def is_stateful(value: Any) -> TypeGuard[Stateful]:
    """Whether a value is a `Stateful`; tensors and numbers, by the thousands, never are."""
    return type(value) not in _NEVER_STATEFUL and isinstance(value, Stateful)


def set_at(nested: Any, path: Sequence[str | int], value: Any) -> None:
    """Put a value where a path from `flatten_state` leads.

    Flat keys spell every dictionary key as a string; the container's own key, an integer
    say, is found by its spelling.
    """
    container = nested
    for part in path[:-1]:
        container = container[_own_key(container, part)]
    container[_own_key(container, path[-1])] = value


def _own_key(container: Any, part: str | int) -> Any:
    if not isinstance(container, Mapping) or part in container:
        return part
    for key in container:
        if str(key) == part:
            return key
    return part


def materialize_meta_tensors(nested: Any) -> None:
    """Give every tensor on the meta device memory on the process group's default device.

    The containers are changed in place, so that the loaded values end up in them.
    """
    if isinstance(nested, MutableMapping):
        entries: Any = list(nested.items())
    elif isinstance(nested, list):
        entries = list(enumerate(nested))
    else:
        return
    for key, value in entries:
        if isinstance(value, ShardedTensor):
            continue  # always has memory; torch warns when one looks at its device
        if isinstance(value, torch.Tensor):
            if value.device.type == "meta":
                nested[key] = _materialized(value)
        else:
            materialize_meta_tensors(value)


def _materialized(tensor: torch.Tensor) -> torch.Tensor:
    device = _default_device()
    if isinstance(tensor, DTensor):
        return DTensor.from_local(
            torch.empty_like(tensor.to_local(), device=device),
            device_mesh=tensor.device_mesh,
            placements=tensor.placements,
            shape=tensor.size(),
            stride=tensor.stride(),
        )
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise PlanError(f"a {type(tensor).__name__} on the meta device cannot be loaded into")
    return torch.empty_like(tensor, device=device)


def _default_device() -> torch.device:
    if dist.is_available() and dist.is_initialized():
        kind = dist.distributed_c10d._get_pg_default_device().type
        if kind != "cpu":
            module = torch.get_device_module(kind)
            return torch.device(kind, module.current_device())
    return torch.device("cpu")
