"""The `Coordinator` over a torch process group: bytes on the CPU, no device memory.

Ranks speak with the coordinator one to one, so that each knows whose connection broke; what
all are told goes down a tree. A rank whose process ends is noticed at once. A rank that
hangs is noticed by the timeout, and then named by what ranks left in the group's store.
"""

from __future__ import annotations

import contextlib
import pickle
import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from shardpoint.coordination import Coordinator, SingleProcess
from shardpoint.dcp._exchange import Exchange, tree_of
from shardpoint.dcp._roll_call import RollCall
from shardpoint.errors import PlanError, RankLostError, ShardpointError

__all__ = ["ProcessGroupCoordinator", "Timeout", "coordinator_for", "seconds_of", "timeout_of"]

Timeout = float | timedelta | None
"""Seconds, or None for the process group's own."""

_cpu_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_operations: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

_DEFAULT_SECONDS = 1800.0
_TAG = 0x5D_0000  # far from the tags that programs use on the same group
_FRAME = 1024  # bytes of a first message: most are not longer
_HEADER = 64  # of these: length, step
_GRACE = 5.0  # seconds that ranks wait longer for the coordinator than it for them, at most
_PATIENCE = 1.0  # seconds for the coordinator's note, once its connection is closed


def coordinator_for(
    process_group: dist.ProcessGroup | None,
    coordinator_rank: int,
    no_dist: bool,
    *,
    timeout: Timeout = None,
    name: str = "",
) -> Coordinator:
    """Return the coordinator over a group, or the single process where there is none.

    Parameters
    ----------
    timeout
        How long one rank waits for another; None is the group's own timeout.
    name
        What is done, for messages.
    """
    seconds = seconds_of(timeout)
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return SingleProcess()
    return ProcessGroupCoordinator(process_group, coordinator_rank, timeout=seconds, name=name)


def seconds_of(timeout: Timeout) -> float | None:
    """Return seconds, or None; refuse what is not more than 0."""
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not seconds > 0:
        raise PlanError(f"timeout must be more than 0 seconds, not {timeout}")
    return seconds


def timeout_of(group: dist.ProcessGroup) -> float:
    """Return the timeout that a group was made with."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout.total_seconds()
    return _DEFAULT_SECONDS


def _cpu_group(group: dist.ProcessGroup, seconds: float) -> dist.ProcessGroup:
    """Return a group of the same ranks that can send CPU tensors; made once and kept."""
    if "cpu" in {str(device) for device in group._device_types}:
        return group
    if group not in _cpu_groups:
        ranks = dist.get_process_group_ranks(group)
        _cpu_groups[group] = dist.new_group(
            ranks,
            timeout=timedelta(seconds=seconds),
            backend="gloo",
            use_local_synchronization=True,
        )
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
    timeout
        Seconds that one rank waits for another; None is the group's own timeout.
    name
        What is done, for messages: ``"save"``, ``"load"``.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        coordinator_rank: int,
        *,
        timeout: float | None = None,
        name: str = "",
    ) -> None:
        group = process_group if process_group is not None else dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise PlanError("this process is not a rank of the given process group")
        seconds = timeout if timeout is not None else timeout_of(group)
        self._use(_cpu_group(group, seconds), coordinator_rank, seconds, name)

    def _use(self, group: Any, coordinator_rank: int, seconds: float, name: str) -> None:
        """Speak over a group of torch's, or over one that only this package knows."""
        self._seconds = seconds
        self._group = group
        self._rank: int = group.rank()
        self._world_size: int = group.size()
        if not 0 <= coordinator_rank < self._world_size:
            raise PlanError(
                f"coordinator_rank is {coordinator_rank}, but the group has {self._world_size} "
                f"ranks; give one of 0 to {self._world_size - 1}"
            )
        self._coordinator_rank = coordinator_rank
        # Ranks wait a little longer for the coordinator: it is the one that knows who is late.
        self._patience = self._seconds + (
            0.0 if self.is_coordinator else min(_GRACE, self._seconds / 4 + 0.25)
        )
        operation = _operations.get(self._group, 0) + 1
        _operations[self._group] = operation
        self._roll_call = RollCall(self._group, self._rank, operation)
        self._name = name
        self._step = ""
        self._number = 0

    @property
    def group(self) -> dist.ProcessGroup:
        """The group over which bytes travel."""
        found: dist.ProcessGroup = self._group
        return found

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

    def begin(self, step: str) -> None:
        self._step = f"{self._name}: {step}" if self._name else step
        self._number += 1
        self._roll_call.arrive(self._number, self._step, self._coordinator_rank)

    def gather(self, payload: bytes) -> list[bytes | ShardpointError] | None:
        if not self.is_coordinator:
            self._send({self._coordinator_rank: payload})
            return None
        received = self._receive(self._others())
        received[self._rank] = payload
        return [received[rank] for rank in range(self._world_size)]

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        if payloads is None:
            return self._receive_one(self._coordinator_rank)
        self._send({rank: payloads[rank] for rank in self._others()})
        return payloads[self._rank]

    def broadcast(self, payload: bytes | None) -> bytes:
        parent, children = tree_of(self._rank, self._coordinator_rank, self._world_size)
        if payload is None:
            try:
                payload = self._receive_one(parent)
            except RankLostError as lost:
                with contextlib.suppress(RankLostError):
                    self._send(dict.fromkeys(children, pickle.dumps(lost)), is_loss=True)
                raise
        self._send(dict.fromkeys(children, payload))
        return payload

    def _others(self) -> list[int]:
        return [rank for rank in range(self._world_size) if rank != self._rank]

    def _receive_one(self, source: int) -> bytes:
        received = self._receive([source])[source]
        if isinstance(received, ShardpointError):
            raise received
        return received

    def _receive(self, sources: Sequence[int]) -> dict[int, bytes | ShardpointError]:
        """Return what each of some ranks sends, or why it did not.

        Raises
        ------
        RankLostError
            If a rank did not come in time; after that nobody can be heard any more.
        """
        frames = {rank: torch.empty(_FRAME, dtype=torch.uint8) for rank in sources}
        received: dict[int, bytes | ShardpointError] = {}
        exchange = Exchange(self._group, self._patience)
        for rank, frame in frames.items():
            exchange.start(dist.irecv, frame, rank, _TAG)
        bodies: dict[int, torch.Tensor] = {}
        for rank in exchange.finish():
            length = int(frames[rank][:8].view(torch.int64))
            if length > _FRAME - _HEADER:
                bodies[rank] = torch.empty(length - (_FRAME - _HEADER), dtype=torch.uint8)
                exchange.start(dist.irecv, bodies[rank], rank, _TAG + 1)
        whole = set(exchange.finish())
        for rank, frame in frames.items():
            if rank not in exchange.broken and (rank in whole or rank not in bodies):
                received[rank] = self._opened(rank, frame, bodies.get(rank))
        return {**received, **self._lost(exchange)}

    def _opened(
        self, rank: int, frame: torch.Tensor, body: torch.Tensor | None
    ) -> bytes | ShardpointError:
        """Return the payload of a message, or what is wrong with its coming now."""
        data = frame.numpy().tobytes()
        length, is_loss, number = np.frombuffer(data, np.int64, 3).tolist()
        payload = data[_HEADER : _HEADER + length]
        if body is not None:
            payload += body.numpy().tobytes()
        if is_loss:
            lost: RankLostError = pickle.loads(payload)  # noqa: S301  from our own ranks
            return lost
        step = data[24:_HEADER].rstrip(b"\0").decode(errors="replace")
        # The coordinator notices, and whatever it says to that is meant for the others.
        if self.is_coordinator and (number, step) != (self._number, self._label()):
            return PlanError(
                f"the ranks are not doing the same: rank {rank} is in step {number}, {step!r}, and "
                f"rank {self._rank} in step {self._number}, {self._label()!r}; every rank of the "
                f"group has to make the same calls in the same order"
            )
        return payload

    def _label(self) -> str:
        return self._step.encode()[: _HEADER - 24].decode(errors="replace")

    def _send(self, payloads: Mapping[int, bytes], *, is_loss: bool = False) -> None:
        """Send, and wait until all have received.

        Raises
        ------
        RankLostError
            If some could not; the others have received it, unless the time was over.
        """
        exchange = Exchange(self._group, self._patience)
        for rank, payload in payloads.items():
            head = np.array([len(payload), is_loss, self._number], np.int64).tobytes()
            head = (head + self._label().encode()).ljust(_HEADER, b"\0")
            frame = head + payload[: _FRAME - _HEADER]
            exchange.start(dist.isend, _tensor(frame.ljust(_FRAME, b"\0")), rank, _TAG)
            if len(payload) > _FRAME - _HEADER:
                body = _tensor(memoryview(payload)[_FRAME - _HEADER :])
                exchange.start(dist.isend, body, rank, _TAG + 1)
        for _ in exchange.finish():
            pass
        lost = self._lost(exchange)
        if lost:
            text = "; ".join(dict.fromkeys(map(str, lost.values())))
            raise RankLostError(text, [rank for why in lost.values() for rank in why.ranks])

    def _lost(self, exchange: Exchange) -> dict[int, RankLostError]:
        """Return, for each rank of an exchange that failed, who is to blame.

        Raises
        ------
        RankLostError
            On the coordinator, if the time is over: it can tell the others by its note only.
        """
        if not exchange.broken:
            return {}
        if self.is_coordinator:
            if not exchange.is_late:
                return {
                    rank: RankLostError(f"rank {rank} is gone: {why}", [rank])
                    for rank, why in exchange.broken.items()
                }
            missing = self._missing() or {exchange.late: "is there, but does not answer"}
            self._roll_call.report(missing)
            raise self._late(missing)
        missing = self._roll_call.reported(patience=_PATIENCE)
        if missing:
            return dict.fromkeys(exchange.broken, self._late(missing))
        if exchange.is_late:
            missing = self._missing()
            if missing:
                return dict.fromkeys(exchange.broken, self._late(missing))
            return {
                rank: RankLostError(f"rank {rank} did not answer {self._within()}", [rank])
                for rank in exchange.broken
            }
        return {
            rank: RankLostError(f"rank {rank} is gone: {why}", [rank])
            for rank, why in exchange.broken.items()
        }

    def _missing(self) -> dict[int, str]:
        return self._roll_call.absent(self._number, self._coordinator_rank, self._world_size)

    def _late(self, missing: Mapping[int, str]) -> RankLostError:
        texts = ", ".join(f"rank {rank} {where}" for rank, where in missing.items())
        lost = RankLostError(
            f"{texts}; waited for in step {self._step!r} {self._within()}", missing
        )
        lost.is_final = True
        return lost

    def _within(self) -> str:
        return f"within the timeout of {self._seconds:g} seconds"


def _tensor(data: bytes | memoryview) -> torch.Tensor:
    copy = np.frombuffer(data, np.uint8).copy()  # torch warns of memory that cannot be written
    return torch.from_numpy(copy)
