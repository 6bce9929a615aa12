"""What a coordinator is, and the one of a process that works alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from shardpoint.errors import ShardpointError

__all__ = ["Coordinator", "SingleProcess"]


class Coordinator(Protocol):
    """Exchanges bytes between ranks. Every method is called by all ranks in the same order.

    Methods raise `RankLostError` where this rank cannot go on because another one is gone
    or did not come within the timeout. The coordinator itself is told by `gather` instead,
    so that it can tell the others.
    """

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        ...

    @property
    def world_size(self) -> int: ...

    @property
    def coordinator_rank(self) -> int:
        """The rank that does the shared work."""
        ...

    @property
    def is_coordinator(self) -> bool:
        """Whether that is this rank."""
        ...

    def begin(self, step: str) -> None:
        """Say which step the following exchanges belong to."""
        ...

    def gather(self, payload: bytes) -> list[bytes | ShardpointError] | None:
        """On the coordinator, return every rank's payload, or why there is none."""
        ...

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        """Give rank ``i`` the coordinator's ``payloads[i]``."""
        ...

    def broadcast(self, payload: bytes | None) -> bytes:
        """Give every rank the coordinator's payload."""
        ...


class SingleProcess:
    """The coordinator of a process that works alone."""

    rank = 0
    world_size = 1
    coordinator_rank = 0
    is_coordinator = True

    def begin(self, step: str) -> None:
        pass

    def gather(self, payload: bytes) -> list[bytes | ShardpointError] | None:
        return [payload]

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        assert payloads is not None
        return payloads[0]

    def broadcast(self, payload: bytes | None) -> bytes:
        assert payload is not None
        return payload
