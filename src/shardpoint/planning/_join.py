"""Which boxes overlap: a sort-based join that is near-linear for tilings.

The number of pairs that overlap on one axis is known from binary searches alone (see
`_sweep`). Tensors cut along one axis have about as many such pairs as chunks on that axis,
and those pairs are listed and checked on the other axes.

For grids every axis leaves too many pairs. Such a group is cut, at quantiles of the
starts, into slabs along its second-best axis; a box goes into every slab it touches, and
the slabs are the nodes of the next round. A pair that meets in several slabs is reported in
the one that holds the lower corner of its intersection (the reference point of
J.-P. Dittrich and B. Seeger, "Data redundancy and duplicate detection in spatial join
processing", ICDE 2000), so no pair comes twice and nothing has to be remembered.

Worst case: input where slabs do not help (most boxes overlap on all axes but few in all
of them) costs a pass over the pairs of its best axis, in blocks of bounded memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.planning._sweep import (
    Candidates,
    Column,
    Pairs,
    Side,
    candidates,
    matching_pairs,
)
from shardpoint.region import BoolArray, Int64Array

__all__ = ["Boxes", "overlapping_pairs"]

_CHEAP = 24  # pairs to look at for each box before cutting pays
_ROUNDS = 6
_GROWTH = 2  # a cut may at most double the boxes of a node
_KEY_LIMIT = 2**62

FloatArray: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Boxes in columns: ``group`` int64[n], not negative; ``starts``, ``ends`` int64[n, D]."""

    group: Int64Array
    starts: Int64Array
    ends: Int64Array


class _Level(NamedTuple):
    """The nodes of one round.

    ``right`` is ``left`` itself where boxes are joined with each other. ``low`` is
    int64[nodes, axes], the lower corner of each node; ``group`` the boxes' group.
    """

    left: Side
    right: Side
    low: Int64Array
    group: Int64Array

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.left,) if self.right is self.left else (self.left, self.right)

    def of_nodes(self, chosen: BoolArray) -> _Level:
        left = self.left.of_nodes(chosen)
        right = left if self.right is self.left else self.right.of_nodes(chosen)
        return self._replace(left=left, right=right)

    def boxes_of(self, side: Side) -> Int64Array:
        return np.bincount(side.node, minlength=len(self.group))

    def size(self) -> Int64Array:
        """Return the number of boxes of each node."""
        total = np.zeros(len(self.group), np.int64)
        for side in self.sides:
            total += self.boxes_of(side)
        return total


def overlapping_pairs(
    left: Boxes, right: Boxes | None, *, closed: BoolArray | None
) -> Iterator[Pairs]:
    """Yield, in blocks, rows of the pairs of boxes of the same group that share an element.

    Boxes of size zero share nothing. Every pair comes once; blocks come in no useful order.

    Parameters
    ----------
    right
        None to pair the boxes of `left` with each other; then ``a < b`` in every pair.
    closed
        A flag for each group; the caller may set flags between blocks, and pairs of such
        groups stop coming. So a bounded number of pairs takes bounded time, however
        many there are.
    """
    other = left if right is None else right
    rows = [np.flatnonzero((s.ends > s.starts).all(axis=1)) for s in (left, other)]
    if not len(rows[0]) or not len(rows[1]):
        return
    first = Side(0, rows[0], left.group[rows[0]])
    second = first if right is None else Side(1, rows[1], other.group[rows[1]])
    nodes = 1 + int(max(first.node.max(), second.node.max()))
    columns = _useful_columns(left, other, rows, nodes)
    low = np.zeros((nodes, len(columns)), np.int64)
    level = _Level(first, second, low, np.arange(nodes))
    for rounds_left in range(_ROUNDS, -1, -1):
        # Boxes without a partner in their node are done, and so are closed groups.
        useful = (level.boxes_of(level.left) > 0) & (level.boxes_of(level.right) > 0)
        if closed is not None:
            useful &= ~closed[level.group]
        level = level.of_nodes(useful)
        if not len(level.left.row):
            return
        costs, pending = yield from _sweep_cheap(level, columns, closed)
        level = level.of_nodes(pending)
        best = costs.argmin(axis=1)
        if rounds_left:
            axis, pieces = _choose_cuts(level.size(), costs, best)
            following, was_cut = _cut(level, columns, axis, pieces)
        else:
            following, was_cut = None, np.zeros(len(best), np.bool_)
        for number in range(len(columns)):
            rest = level.of_nodes(~was_cut & (best == number))
            for found in candidates(rest.left, rest.right, columns[number]):
                yield from _matching(found, rest, columns, number, closed)
        if following is None:
            return
        level = following


def _useful_columns(
    left: Boxes, right: Boxes, rows: Sequence[Int64Array], nodes: int
) -> list[Column]:
    """Copy out the axes on which some boxes do not overlap; one axis in any case."""
    # No round more than doubles the boxes, or makes more nodes than there are boxes.
    most_nodes = nodes + (len(rows[0]) + len(rows[1])) * _GROWTH**_ROUNDS
    columns = []
    for axis in range(left.starts.shape[1]):
        boxes = (left,) if right is left else (left, right)
        starts = [np.ascontiguousarray(side.starts[:, axis]) for side in boxes]
        ends = [np.ascontiguousarray(side.ends[:, axis]) for side in boxes]
        latest_start = max(int(s[r].max()) for s, r in zip(starts, rows, strict=False))
        first_end = min(int(e[r].min()) for e, r in zip(ends, rows, strict=False))
        if latest_start < first_end:
            continue
        span = max(int(e.max()) for e in ends)
        if span * most_nodes >= _KEY_LIMIT:  # too large for one number: use ranks instead
            coordinates = np.unique(np.concatenate([*starts, *ends]))
            starts = [np.searchsorted(coordinates, s) for s in starts]
            ends = [np.searchsorted(coordinates, e) for e in ends]
            span = len(coordinates)
        columns.append(Column((starts[0], starts[-1]), (ends[0], ends[-1]), span))
    if not columns:
        counts = len(left.group), len(right.group)
        zeros = np.zeros(counts[0], np.int64), np.zeros(counts[1], np.int64)
        columns.append(Column(zeros, (zeros[0] + 1, zeros[1] + 1), 1))
    return columns


def _sweep_cheap(
    level: _Level, columns: Sequence[Column], closed: BoolArray | None
) -> Generator[Pairs, None, tuple[FloatArray, BoolArray]]:
    """Finish the nodes that have an axis with few pairs.

    Returns the number of pairs of each node on each axis, infinite where it was not counted,
    and which nodes are left.
    """
    pending = np.ones(len(level.group), np.bool_)
    costs = np.full((len(pending), len(columns)), np.inf)
    for axis, column in enumerate(columns):
        level = level.of_nodes(pending)
        if not len(level.left.row):
            break
        counted = candidates(level.left, level.right, column)
        cost = np.zeros(len(pending))
        for found in counted:
            cost += np.bincount(
                found.boxes.node, weights=found.last - found.first, minlength=len(pending)
            )
        # With one axis to tell boxes apart, the pairs on it are the answer.
        cheap = cost <= (np.inf if len(columns) == 1 else _CHEAP * level.size())
        costs[:, axis] = cost
        for found in counted:
            yield from _matching(found.of_nodes(cheap), level, columns, axis, closed)
        pending &= ~cheap
    return costs, pending


def _matching(
    found: Candidates,
    level: _Level,
    columns: Sequence[Column],
    axis: int,
    closed: BoolArray | None,
) -> Iterator[Pairs]:
    mutual = level.left is level.right
    return matching_pairs(
        found, columns, axis, low=level.low, group=level.group, mutual=mutual, closed=closed
    )


def _choose_cuts(
    size: Int64Array, costs: FloatArray, best: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Return for each node the axis to cut along, and into how many slabs (1: not at all)."""
    if costs.shape[1] == 1:
        return best, np.ones(len(best), np.int64)
    node = np.arange(len(best))
    others = costs.copy()
    others[node, best] = np.inf
    axis = others.argmin(axis=1)
    boxes = np.maximum(size, 1).astype(np.float64)
    # Slabs divide the pairs on the best axis. A cut goes through as many boxes as one box
    # overlaps on that axis, on average: do not copy more than half of all.
    wanted = 2 * costs[node, best] / (_CHEAP * boxes) + 1
    affordable = boxes**2 / (2 * np.maximum(others[node, axis], 1))
    pieces = np.minimum(np.minimum(wanted, affordable), boxes / 4)
    return axis, np.where(size > 0, pieces, 1).astype(np.int64)


def _cut(
    level: _Level, columns: Sequence[Column], axis: Int64Array, pieces: Int64Array
) -> tuple[_Level | None, BoolArray]:
    """Cut nodes into slabs; return the slabs as nodes, and which nodes were cut."""
    was_cut = np.zeros(len(pieces), np.bool_)
    parts = []
    count = 0
    for number, column in enumerate(columns):
        chosen = (pieces > 1) & (axis == number)
        if chosen.any():
            part, done = _cut_along(level.of_nodes(chosen), column, number, pieces * chosen, count)
            was_cut |= done
            count += len(part.group)
            parts.append(part)
    if not parts:
        return None, was_cut
    left = _joined([part.left for part in parts])
    right = left if level.right is level.left else _joined([part.right for part in parts])
    low = np.concatenate([part.low for part in parts])
    return _Level(left, right, low, np.concatenate([part.group for part in parts])), was_cut


def _joined(sides: Sequence[Side]) -> Side:
    return Side(
        sides[0].which,
        np.concatenate([side.row for side in sides]),
        np.concatenate([side.node for side in sides]),
    )


def _cut_along(
    level: _Level, column: Column, number: int, pieces: Int64Array, first_node: int
) -> tuple[_Level, BoolArray]:
    """Cut every node of `level` along one axis; new nodes are numbered from `first_node`."""
    size = level.size()
    lowest = level.low[:, number]
    keys = [
        side.node * column.span + np.maximum(side.starts(column), lowest[side.node])
        for side in level.sides
    ]
    ordered = np.sort(np.concatenate(keys))
    nodes = np.flatnonzero(size)
    slabs = pieces[nodes]
    parent = np.repeat(nodes, slabs)
    slab = np.arange(len(parent)) - np.repeat(np.cumsum(slabs) - slabs, slabs)
    begin = np.searchsorted(ordered, parent * column.span)
    borders = ordered[begin + slab * size[parent] // pieces[parent]]

    grown = np.zeros(len(size), np.int64)
    touched = []
    for side, key in zip(level.sides, keys, strict=True):
        last_key = side.node * column.span + side.ends(column) - 1
        first = np.searchsorted(borders, key, "right") - 1
        copies = np.searchsorted(borders, last_key, "right") - first
        touched.append((side, first, copies))
        grown += np.bincount(side.node, weights=copies, minlength=len(size)).astype(np.int64)
    was_cut = (size > 0) & (grown <= _GROWTH * size)
    new = []
    for side, first, copies in touched:
        copies = copies * was_cut[side.node]
        within = np.arange(copies.sum()) - np.repeat(np.cumsum(copies) - copies, copies)
        node = np.repeat(first, copies) + within + first_node
        new.append(Side(side.which, np.repeat(side.row, copies), node))
    low = level.low[parent]
    low[:, number] = np.maximum(low[:, number], borders - parent * column.span)
    return _Level(new[0], new[-1], low, level.group[parent]), was_cut
