"""The data: shuffled windows of a text, with a place in them that can be saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Batches"]


class Batches:
    """Endless batches of text windows, shuffled anew each epoch.

    Every rank holds the same one and takes its share of each batch, so what a step learns
    from does not depend on the number of ranks. With ``state_dict`` and ``load_state_dict``
    it is what checkpointing calls a `Stateful`: saving and loading need no more than itself.
    """

    def __init__(self, text: bytes, *, length: int, batch_size: int, seed: int) -> None:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        # one byte more than is shown: the last prediction needs an answer
        self._windows = tokens.unfold(0, length + 1, length)
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch = -1
        self._begin_epoch()

    @property
    def batches_per_epoch(self) -> int:
        """How many whole batches the text gives."""
        return len(self._windows) // self._batch_size

    def share(self, rank: int, world_size: int) -> Tensor:
        """Move to the next batch; return the part of it that is this rank's."""
        if self._position == self.batches_per_epoch:
            self._begin_epoch()
        start = self._position * self._batch_size
        self._position += 1
        chosen = self._order[start : start + self._batch_size]
        return self._windows[chosen.tensor_split(world_size)[rank]]

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data, and what shuffles it."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "generator": self._generator_at_start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place."""
        self._generator.set_state(state["generator"])
        self._epoch = state["epoch"] - 1
        self._begin_epoch()
        self._position = state["position"]

    def _begin_epoch(self) -> None:
        self._generator_at_start = self._generator.get_state()
        self._order = torch.randperm(len(self._windows), generator=self._generator)
        self._epoch += 1
        self._position = 0
