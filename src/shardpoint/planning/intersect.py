"""Which parts of what is wanted lie in which stored chunks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shardpoint.planning._join import Boxes, overlapping_pairs
from shardpoint.region import Int64Array, ends

__all__ = ["Intersections", "intersect"]


class Intersections(NamedTuple):
    """One row for each pair of boxes that share an element, sorted by `a`, then `b`.

    ``a``, ``b`` int64[k] are rows of the two inputs; ``offsets``, ``sizes`` int64[k, D] the
    box that both hold, in the tensor's coordinates.
    """

    a: Int64Array
    b: Int64Array
    offsets: Int64Array
    sizes: Int64Array


def intersect(
    a_group: Int64Array,
    a_offsets: Int64Array,
    a_sizes: Int64Array,
    b_group: Int64Array,
    b_offsets: Int64Array,
    b_sizes: Int64Array,
) -> Intersections:
    """Intersect every box of `a` with every box of `b` that has the same group.

    Near-linear for tilings, cut along however many axes: never all pairs are looked at.

    Parameters
    ----------
    a_group, b_group
        ``int64[n]``, ``int64[m]``: rows of tensors, not negative.
    a_offsets, a_sizes, b_offsets, b_sizes
        ``int64[n, D]``, ``int64[m, D]``, padded with 0 and 1.

    Raises
    ------
    PlanError
        If a box has a negative number or ends past what 64 bits hold.
    """
    left = Boxes(a_group, a_offsets, ends(a_offsets, a_sizes))
    right = Boxes(b_group, b_offsets, ends(b_offsets, b_sizes))
    blocks = list(overlapping_pairs(left, right, closed=None))
    count = max(len(b_group), 1)
    pairs = np.concatenate([np.zeros(0, np.int64), *(a * count + b for a, b in blocks)])
    pairs.sort()
    a, b = np.divmod(pairs, count)
    offsets = np.maximum(a_offsets[a], b_offsets[b])
    return Intersections(a, b, offsets, np.minimum(left.ends[a], right.ends[b]) - offsets)
