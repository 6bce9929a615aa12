"""The `Coordinator` over a torch process group: bytes on the CPU, no device memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardpoint.coordination import Coordinator, SingleProcess
from shardpoint.errors import PlanError, ShardpointError

__all__ = ["ProcessGroupCoordinator", "coordinator_for"]

_cpu_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def coordinator_for(
    process_group: dist.ProcessGroup | None, coordinator_rank: int, no_dist: bool
) -> Coordinator:
    """Return the coordinator over a group, or the single process where there is none."""
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return SingleProcess()
    return ProcessGroupCoordinator(process_group, coordinator_rank)


def _cpu_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a group of the same ranks that can send CPU tensors; made once and kept."""
    if "cpu" in {str(device) for device in group._device_types}:
        return group
    if group not in _cpu_groups:
        ranks = dist.get_process_group_ranks(group)
        _cpu_groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    found: dist.ProcessGroup = _cpu_groups[group]
    return found


class ProcessGroupCoordinator:
    """Exchanges bytes between the ranks of a process group.

    Parameters
    ----------
    process_group
        None is the default group.
    coordinator_rank
        The rank, in the group, that does the shared work.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, coordinator_rank: int) -> None:
        group = process_group if process_group is not None else dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise PlanError("this process is not a rank of the given process group")
        self._group = _cpu_group(group)
        self._rank: int = dist.get_rank(self._group)
        self._world_size: int = dist.get_world_size(self._group)
        self._coordinator_rank = coordinator_rank
        self._source: int = dist.get_global_rank(self._group, coordinator_rank)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def coordinator_rank(self) -> int:
        return self._coordinator_rank

    @property
    def is_coordinator(self) -> bool:
        return self._rank == self._coordinator_rank

    def gather(self, payload: bytes) -> list[bytes] | None:
        lengths = self._lengths(len(payload))
        width = max(lengths)
        received = self._empty(width) if self.is_coordinator else None
        self._run("gather", dist.gather, _padded(payload, width), received, self._source)
        return None if received is None else _unpadded(received, lengths)

    def all_gather(self, payload: bytes) -> list[bytes]:
        lengths = self._lengths(len(payload))
        width = max(lengths)
        if width == 0:
            return [b""] * self._world_size
        received = self._empty(width)
        self._run("all_gather", dist.all_gather, received, _padded(payload, width))
        return _unpadded(received, lengths)

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        sizes = [len(payload) for payload in payloads] if payloads is not None else []
        table = torch.tensor(sizes or [0] * self._world_size, dtype=torch.int64)
        self._run("scatter", dist.broadcast, table, self._source)
        lengths: list[int] = table.tolist()
        width = max(lengths)
        received = torch.empty(width, dtype=torch.uint8)
        sent = None if payloads is None else [_padded(p, width) for p in payloads]
        self._run("scatter", dist.scatter, received, sent, self._source)
        return _unpadded([received], [lengths[self._rank]])[0]

    def broadcast(self, payload: bytes | None) -> bytes:
        length = torch.tensor([0 if payload is None else len(payload)], dtype=torch.int64)
        self._run("broadcast", dist.broadcast, length, self._source)
        width = int(length.item())
        data = (
            _padded(payload, width)
            if payload is not None
            else torch.empty(width, dtype=torch.uint8)
        )
        self._run("broadcast", dist.broadcast, data, self._source)
        return _unpadded([data], [width])[0]

    def _lengths(self, length: int) -> list[int]:
        own = torch.tensor([length], dtype=torch.int64)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self._world_size)]
        self._run("all_gather", dist.all_gather, lengths, own)
        return [int(n.item()) for n in lengths]

    def _empty(self, width: int) -> list[torch.Tensor]:
        return [torch.empty(width, dtype=torch.uint8) for _ in range(self._world_size)]

    def _run(self, name: str, collective: Any, *arguments: Any) -> None:
        try:
            collective(*arguments, group=self._group)
        except RuntimeError as error:
            raise ShardpointError(
                f"rank {self._rank} lost contact with the other ranks in {name}: another rank "
                f"is gone, or did not come within the process group's timeout: {error}"
            ) from error


def _padded(payload: bytes, width: int) -> torch.Tensor:
    data = torch.empty(width, dtype=torch.uint8)
    if payload:
        data[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return data


def _unpadded(received: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[bytes]:
    return [data[:length].numpy().tobytes() for data, length in zip(received, lengths, strict=True)]
