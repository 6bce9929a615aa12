"""A process group of their own for saves in the background.

Messages of one group have to come in the same order on every rank. A save in the background
must not mix its own into those of the training, so it has a gloo group that nothing else
uses. The group speaks through the store that the process group has already: no new port is
opened for a rendezvous (gloo's connections between ranks are as for any gloo group). It is not
on torch's list of groups, so that a save that is under way when the program calls
``destroy_process_group`` still comes to its end.
"""

from __future__ import annotations

import secrets
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardpoint.coordination import Coordinator, SingleProcess, broadcast_result
from shardpoint.dcp._process_group import (
    ProcessGroupCoordinator,
    Timeout,
    seconds_of,
    timeout_of,
)
from shardpoint.errors import PlanError

__all__ = ["background_coordinator"]

_groups: weakref.WeakKeyDictionary[Any, _BackgroundGroup] = weakref.WeakKeyDictionary()


def background_coordinator(
    process_group: dist.ProcessGroup | None, no_dist: bool, *, timeout: Timeout
) -> Coordinator:
    """Return the coordinator for saves in the background; every rank calls this.

    The first call for a group makes the background group, together with the other ranks; it
    is kept as long as the process group.
    """
    seconds = seconds_of(timeout)
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return SingleProcess()
    group = process_group if process_group is not None else dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise PlanError("this process is not a rank of the given process group")
    for old in [old for old in _groups if old not in distributed_c10d._world.pg_map]:
        del _groups[old]  # destroyed, but something still refers to it
    if group not in _groups:
        _groups[group] = _make(group)
    return _BackgroundCoordinator(_groups[group], seconds or timeout_of(group))


class _BackgroundGroup:
    """A gloo group that torch's list of groups does not hold."""

    def __init__(self, name: str, store: Any, rank: int, world_size: int, seconds: float) -> None:
        self.name = name
        self.store = store
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, world_size, timedelta(seconds=seconds))

    def rank(self) -> int:
        return int(self._gloo.rank())

    def size(self) -> int:
        return int(self._gloo.size())

    def send(self, data: list[torch.Tensor], rank: int, tag: int) -> Any:
        return self._gloo.send(data, rank, tag)

    def recv(self, data: list[torch.Tensor], rank: int, tag: int) -> Any:
        return self._gloo.recv(data, rank, tag)


def _make(group: dist.ProcessGroup) -> _BackgroundGroup:
    outer = ProcessGroupCoordinator(group, 0, name="async_save")
    # a name that no group of this store ever had, also where it outlives process groups
    name = broadcast_result(outer, "background group", lambda: secrets.token_hex(8))
    store = distributed_c10d._world.pg_map[group][1]
    own = distributed_c10d.PrefixStore(f"shardpoint-background-{name}", store)
    return _BackgroundGroup(name, own, outer.rank, outer.world_size, timeout_of(group))


class _BackgroundCoordinator(ProcessGroupCoordinator):
    """Exchanges bytes over a background group."""

    def __init__(self, group: _BackgroundGroup, seconds: float) -> None:
        self._use(group, 0, seconds, "async_save")
