"""What `shardpoint.open` is given, checked before anything is opened."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from shardpoint.errors import PlanError
from shardpoint.transforms import Transform

__all__ = ["checked_threads", "checked_transforms"]


def checked_threads(threads: int) -> int:
    """Return the number of threads; TypeError or PlanError where it is none."""
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        raise TypeError(f"threads must be an int or None, not {type(threads).__name__}")
    if threads < 1:
        raise PlanError(f"threads must be 1 or more, not {threads}")
    return operator.index(threads)


def checked_transforms(transforms: object) -> tuple[Transform, ...]:
    """Return transforms as a tuple; TypeError where one of them is none."""
    if isinstance(transforms, str | bytes) or not isinstance(transforms, Iterable):
        raise TypeError(f"transforms must be a list of them, not {type(transforms).__name__}")
    checked = tuple(transforms)
    for transform in checked:
        if not isinstance(getattr(transform, "name", None), str) or not hasattr(transform, "undo"):
            raise TypeError(f"a transform has a name and a method undo, {transform!r} has not")
    return checked
