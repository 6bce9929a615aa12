"""Who is missing: what ranks leave in the process group's store, read when contact is lost.

Connections tell at once of a process that ended. Of one that hangs they tell nothing, and a
rank that has waited too long closes all of its own. So every rank notes the step it has
reached, and the coordinator notes whom it missed before it gives up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

__all__ = ["RollCall"]

_PREFIX = "shardpoint"
_LOOKS_EVERY = 0.05  # seconds


class RollCall:
    """Marks of one group's ranks in its store. Without a store it knows nothing.

    Parameters
    ----------
    operation
        The number of the save or load, the same on all ranks.
    """

    def __init__(self, group: Any, rank: int, operation: int) -> None:
        self._store: Any = _store_of(group)
        self._rank = rank
        self._operation = operation

    def arrive(self, number: int, step: str, coordinator_rank: int) -> None:
        """Note that this rank has reached a step."""
        self._set(f"at/{self._rank}", [self._operation, number, step, coordinator_rank])

    def absent(self, number: int, coordinator_rank: int, world_size: int) -> dict[int, str]:
        """Return the ranks that have not reached a step, and where they are."""
        found: dict[int, str] = {}
        for rank in range(world_size):
            mark = self._get(f"at/{rank}")
            if self._store is None:
                return {}
            if mark is None or tuple(mark[:2]) < (self._operation, number):
                where = "never came" if mark is None else f"did not get past step {mark[2]!r}"
                found[rank] = where
            elif mark[3] != coordinator_rank:
                found[rank] = f"takes rank {mark[3]} for the coordinator, not {coordinator_rank}"
        return found

    def report(self, missed: dict[int, str]) -> None:
        """Note, as the coordinator, whom it missed."""
        self._set(f"lost/{self._operation}", missed)

    def reported(self, *, patience: float) -> dict[int, str]:
        """Return whom the coordinator missed, if it says so within some seconds."""
        deadline = time.monotonic() + patience
        while self._store is not None:
            found = self._get(f"lost/{self._operation}")
            if found is not None:
                return {int(rank): text for rank, text in found.items()}
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOKS_EVERY)
        return {}

    def _set(self, key: str, value: Sequence[object] | dict[int, str]) -> None:
        if self._store is not None:
            try:
                self._store.set(f"{_PREFIX}/{key}", json.dumps(value))
            except RuntimeError:  # the process that keeps the store is gone
                self._store = None

    def _get(self, key: str) -> Any:
        if self._store is None:
            return None
        try:
            if self._store.check([f"{_PREFIX}/{key}"]):
                return json.loads(self._store.get(f"{_PREFIX}/{key}"))
        except RuntimeError:
            self._store = None
        return None


def _store_of(group: Any) -> Any:
    own = getattr(group, "store", None)
    if own is not None:
        return own
    try:
        return dist.distributed_c10d._get_process_group_store(group)
    except (AttributeError, KeyError):
        return None
