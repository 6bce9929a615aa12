"""Flat keys and their paths, as a plan carries them to the coordinator."""

from __future__ import annotations

import json
import zlib
from collections.abc import Hashable
from typing import Any

from shardpoint.coordination import Shared

__all__ = ["Paths"]


class Paths(dict[str, tuple[str | int, ...]], Shared):
    """Path by flat key; a dictionary that ranks with equal ones send once.

    On the coordinator such ranks share one object: what changes it changes it for all.
    """

    def shared_state(self) -> tuple[Hashable, ...]:
        return (zlib.compress(json.dumps(list(self.items())).encode(), 1),)

    @classmethod
    def from_shared_state(cls, *state: Any) -> Paths:
        return cls((key, tuple(path)) for key, path in json.loads(zlib.decompress(state[0])))
