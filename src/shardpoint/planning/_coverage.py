"""Which part of one tensor no chunk covers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from shardpoint.region import Int64Array, Region

__all__ = ["count_uncovered", "first_gap"]

_MOST_CELLS = 1 << 20
_MOST_AXES = 8


def first_gap(shape: Sequence[int], starts: Int64Array, ends: Int64Array) -> Region:
    """Return a box that no chunk touches, of a tensor that the chunks do not fill.

    Linear in the number of chunks. Axis by axis, takes the first slab in which the chunks'
    cross-sections do not add up to the tensor's.

    Parameters
    ----------
    starts, ends
        Boxes that hold elements, lie in the tensor, do not overlap, and have together
        fewer elements than the tensor.
    """
    offsets, sizes = [], []
    for axis, extent in enumerate(shape):
        cross = np.prod((ends - starts)[:, axis + 1 :], axis=1, dtype=np.int64)
        edges = np.unique(np.concatenate([[0, extent], starts[:, axis], ends[:, axis]]))
        change = np.zeros(len(edges), np.int64)
        np.add.at(change, np.searchsorted(edges, starts[:, axis]), cross)
        np.subtract.at(change, np.searchsorted(edges, ends[:, axis]), cross)
        slab = int((np.cumsum(change)[:-1] < math.prod(shape[axis + 1 :])).argmax())
        begin, end = edges[slab : slab + 2].tolist()
        offsets.append(begin)
        sizes.append(end - begin)
        through = (starts[:, axis] <= begin) & (end <= ends[:, axis])
        starts, ends = starts[through], ends[through]
    return Region(tuple(offsets), tuple(sizes))


def count_uncovered(
    shape: Sequence[int], starts: Int64Array, ends: Int64Array
) -> tuple[int, Region] | None:
    """Count the elements that no chunk covers, and name a box of them; chunks may overlap.

    Cuts the tensor at every chunk's edge and counts the chunks over each cell. Returns None
    where every cell has one, and where there are too many cells to look.

    Parameters
    ----------
    starts, ends
        One or more boxes that hold elements and lie in the tensor, which has fewer than
        `MAX_VOLUME`.
    """
    edges = [
        np.unique(np.concatenate([[0, extent], starts[:, axis], ends[:, axis]]))
        for axis, extent in enumerate(shape)
    ]
    # An axis with a single cell is one that every chunk spans: it tells nothing.
    cut = [axis for axis, edge in enumerate(edges) if len(edge) > 2]
    cells = math.prod(len(edges[axis]) for axis in cut)
    if not cut or len(cut) > _MOST_AXES or cells > _MOST_CELLS:
        return None
    change = np.zeros([len(edges[axis]) for axis in cut], np.int64)
    for corner in itertools.product((False, True), repeat=len(cut)):
        where = tuple(
            np.searchsorted(edges[axis], (ends if at_end else starts)[:, axis])
            for axis, at_end in zip(cut, corner, strict=True)
        )
        np.add.at(change, where, -1 if sum(corner) % 2 else 1)
    for position in range(len(cut)):
        change = np.cumsum(change, axis=position)
    uncovered = change[(slice(-1),) * len(cut)] == 0
    if not uncovered.any():
        return None
    elements = np.int64(math.prod(size for axis, size in enumerate(shape) if axis not in cut))
    weights = uncovered * elements
    for position, axis in enumerate(cut):
        along = [1] * len(cut)
        along[position] = -1
        weights = weights * np.diff(edges[axis]).reshape(along)
    first = np.unravel_index(int(uncovered.argmax()), uncovered.shape)
    cell = dict(zip(cut, (int(i) for i in first), strict=True))
    begins = [int(edge[cell.get(axis, 0)]) for axis, edge in enumerate(edges)]
    stops = [int(edge[cell.get(axis, 0) + 1]) for axis, edge in enumerate(edges)]
    sizes = tuple(stop - begin for begin, stop in zip(begins, stops, strict=True))
    return int(weights.sum()), Region(tuple(begins), sizes)
