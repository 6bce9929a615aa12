"""Messages between two ranks each, all under way together, and whom that failed with."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Exchange", "tree_of"]


class Exchange:
    """Messages under way, each with one rank, and one deadline for all.

    Attributes
    ----------
    broken
        Ranks with whom it did not work, and why.
    late
        The first rank whose time was over; `is_late` says whether there is one.
    """

    def __init__(self, group: Any, seconds: float) -> None:
        self._group = group
        self._deadline = time.monotonic() + seconds
        self._works: list[tuple[int, torch.Tensor, Any]] = []
        self.broken: dict[int, str] = {}
        self.late = -1

    @property
    def is_late(self) -> bool:
        return self.late >= 0

    def start(self, post: Callable[..., Any], data: torch.Tensor, rank: int, tag: int) -> None:
        """Post a message to or from a rank; `data` stays as it is until `finish`."""
        if rank in self.broken:
            return
        try:
            # the group's own methods: the group need not be on torch's list
            if post is dist.isend:
                work = self._group.send([data], rank, tag)
            else:
                work = self._group.recv([data], rank, tag)
        except RuntimeError as error:
            self._fails(rank, error)
        else:
            self._works.append((rank, data, work))

    def finish(self) -> list[int]:
        """Wait for all that is posted; return the ranks with whom it worked."""
        works, self._works = self._works, []
        done = []
        for rank, _, work in works:
            left = max(self._deadline - time.monotonic(), 0.001)
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                self._fails(rank, error)
            else:
                done.append(rank)
        return [rank for rank in done if rank not in self.broken]

    def _fails(self, rank: int, error: RuntimeError) -> None:
        if not self.is_late and time.monotonic() >= self._deadline:
            self.late = rank
        self.broken.setdefault(rank, _reason(error))


def _reason(error: RuntimeError) -> str:
    """Return the sentence of gloo's message that says what happened."""
    text = re.sub(r"^\[[^\]]*\] *", "", str(error).partition("\n")[0])
    return text.partition(". ")[0]


def tree_of(rank: int, root: int, world_size: int) -> tuple[int, list[int]]:
    """Return a rank's parent and children, largest subtree first, in a binomial tree."""
    place = (rank - root) % world_size
    lowest = place & -place if place else 1 << world_size.bit_length()
    steps = (1 << bit for bit in reversed(range(world_size.bit_length())))
    children = [place + step for step in steps if step < lowest and place + step < world_size]
    parent = place & (place - 1)
    return (parent + root) % world_size, [(child + root) % world_size for child in children]
