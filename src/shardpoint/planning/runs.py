"""Boxes to byte runs in a payload, and runs to reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Runs", "byte_runs", "coalesce"]

Int64Array: TypeAlias = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Byte spans: ``starts``, ``lengths`` int64[r], ascending, apart from each other."""

    starts: Int64Array
    lengths: Int64Array


def byte_runs(
    payload_strides: Sequence[int],
    itemsize: int,
    sub_offsets: Sequence[int],
    sub_sizes: Sequence[int],
) -> Runs:
    """Return the bytes of a payload that a box of its elements lies in.

    The fewest runs: what touches is one. Works for any axis order, for stride 0 (an axis
    whose elements share their bytes), gaps and overlapping elements.

    Parameters
    ----------
    payload_strides
        Elements from one index to the next on each axis; none negative.
    sub_offsets, sub_sizes
        The box in the payload's own coordinates. It must lie in the payload, and the
        payload in memory that 64 bits can address: see `planning.validate`.

    Returns
    -------
    Runs relative to the payload's element 0; none for a box of size zero.
    """
    if math.prod(sub_sizes) == 0:
        return Runs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    base = sum(o * s for o, s in zip(sub_offsets, payload_strides, strict=True)) * itemsize
    steps = sorted(
        (stride * itemsize, size)
        for stride, size in zip(payload_strides, sub_sizes, strict=True)
        if stride and size > 1
    )
    length = itemsize
    while steps and steps[0][0] <= length:  # the copies of what there is touch or overlap
        step, size = steps.pop(0)
        length += step * (size - 1)
    starts = np.array([base], np.int64)
    for step, size in reversed(steps):
        starts = (starts[:, np.newaxis] + np.arange(size) * step).ravel()
    return _merged(starts, np.full(len(starts), length, np.int64))


def coalesce(starts: Int64Array, lengths: Int64Array, *, gap_budget_bytes: int) -> Runs:
    """Join runs across gaps, the smallest first, while the gaps' sum is within the budget.

    Parameters
    ----------
    starts, lengths
        Runs in ascending order of start. They may overlap, as wanted parts of several
        requests do: these always become one.
    gap_budget_bytes
        How many bytes may be read that nobody asked for.
    """
    runs = _merged(starts, lengths)
    gaps = runs.starts[1:] - (runs.starts + runs.lengths)[:-1]
    order = np.argsort(gaps, kind="stable")
    # A sum of gaps is at most the distance from the first run to the last: no overflow.
    bridged = np.zeros(len(gaps), np.bool_)
    bridged[order[np.cumsum(gaps[order]) <= gap_budget_bytes]] = True
    return _without_borders(runs.starts, runs.starts + runs.lengths, bridged)


def _merged(starts: Int64Array, lengths: Int64Array) -> Runs:
    """Join runs that touch or overlap."""
    if (np.diff(starts) < 0).any():  # only axes that overlap each other come in this order
        order = np.argsort(starts, kind="stable")
        starts, lengths = starts[order], lengths[order]
    stops = np.maximum.accumulate(starts + lengths)
    return _without_borders(starts, stops, starts[1:] <= stops[:-1])


def _without_borders(starts: Int64Array, stops: Int64Array, joined: npt.NDArray[np.bool_]) -> Runs:
    """Join run ``i`` and ``i + 1`` where ``joined[i]``; `stops` ascend."""
    if not joined.any():
        return Runs(starts, stops - starts)
    apart = ~joined
    begins = starts[np.concatenate([[True], apart])]
    return Runs(begins, stops[np.concatenate([apart, [True]])] - begins)
