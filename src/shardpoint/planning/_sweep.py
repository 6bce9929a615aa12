"""One axis of the join: how many pairs overlap on it, and listing those that overlap on all.

On one axis, boxes overlap exactly if one's start lies inside the other, and in an array
sorted by start the boxes that start inside an interval are a contiguous range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from shardpoint.region import BoolArray, Int64Array

__all__ = ["Candidates", "Column", "Pairs", "Side", "candidates", "matching_pairs"]

Pairs: TypeAlias = tuple[Int64Array, Int64Array]

_BLOCK = 1 << 15  # pairs looked at together: their columns stay in cache


class Column(NamedTuple):
    """One axis of all boxes; each pair of arrays is (left, right).

    ``span`` is at least every end, so ``node * span + coordinate`` sorts by node, then
    coordinate.
    """

    starts: tuple[Int64Array, Int64Array]
    ends: tuple[Int64Array, Int64Array]
    span: int


class Side(NamedTuple):
    """Boxes that take part: ``which`` side they are of, their rows, and the node of each."""

    which: int
    row: Int64Array
    node: Int64Array

    def of_nodes(self, chosen: BoolArray) -> Side:
        """Return those whose node is chosen."""
        keep = chosen[self.node]
        return self if keep.all() else Side(self.which, self.row[keep], self.node[keep])

    def starts(self, column: Column) -> Int64Array:
        return column.starts[self.which][self.row]

    def ends(self, column: Column) -> Int64Array:
        return column.ends[self.which][self.row]


class Candidates(NamedTuple):
    """Boxes, and for each the range of ``partners`` (of the same node) that start inside it."""

    boxes: Side
    partners: Side
    first: Int64Array
    last: Int64Array

    def of_nodes(self, chosen: BoolArray) -> Candidates:
        """Return those of the boxes whose node is chosen."""
        keep = chosen[self.boxes.node]
        if keep.all():
            return self
        return Candidates(
            self.boxes.of_nodes(chosen), self.partners, self.first[keep], self.last[keep]
        )


def candidates(left: Side, right: Side, column: Column) -> list[Candidates]:
    """Find the pairs that overlap on one axis.

    Where `left` is `right`, each box comes with itself, and boxes with equal starts come
    twice; `matching_pairs` drops the surplus.
    """
    if left is right:
        return [_starting_inside(left, left, column, strict=False)]
    return [
        _starting_inside(left, right, column, strict=False),
        _starting_inside(right, left, column, strict=True),
    ]


def _starting_inside(boxes: Side, partners: Side, column: Column, *, strict: bool) -> Candidates:
    """Find for each box the partners that start inside it; with `strict`, not at its start."""
    keys = partners.node * column.span + partners.starts(column)
    order = np.argsort(keys, kind="stable")  # stable is fast where chunks are in order already
    keys = keys[order]
    base = boxes.node * column.span
    first = np.searchsorted(keys, base + boxes.starts(column), "right" if strict else "left")
    last = np.searchsorted(keys, base + boxes.ends(column), "left")
    ordered = Side(partners.which, partners.row[order], partners.node[order])
    return Candidates(boxes, ordered, first, last)


def matching_pairs(
    found: Candidates,
    columns: Sequence[Column],
    axis: int,
    *,
    low: Int64Array,
    group: Int64Array,
    mutual: bool,
    closed: BoolArray | None,
) -> Iterator[Pairs]:
    """Yield, in blocks, the (left, right) rows of the candidates that overlap on every axis.

    Parameters
    ----------
    axis
        The axis on which the candidates overlap already.
    low
        ``int64[nodes, axes]``: a pair whose intersection starts below is another node's.
    group
        ``int64[nodes]``: the group that each node is part of.
    mutual
        Both sides are the same boxes: keep one of each two, with the lower row first.
    closed
        A flag for each group, read before each block: pairs of these are left out.
    """
    boxes, partners = found.boxes, found.partners
    for box_at, partner_at in _blocks(found, group, closed):
        box, partner = boxes.row[box_at], partners.row[partner_at]
        for number, column in enumerate(columns):
            if number != axis:
                keep = column.starts[boxes.which][box] < column.ends[partners.which][partner]
                keep &= column.starts[partners.which][partner] < column.ends[boxes.which][box]
                box_at, box, partner = box_at[keep], box[keep], partner[keep]
        keep = np.ones(len(box), np.bool_)
        for number, column in enumerate(columns):
            box_start = column.starts[boxes.which][box]
            partner_start = column.starts[partners.which][partner]
            lowest = low[boxes.node[box_at], number]
            keep &= np.maximum(box_start, partner_start) >= lowest
            if mutual and number == axis:
                keep &= (box_start != partner_start) | (box < partner)
        box, partner = box[keep], partner[keep]
        if mutual:
            yield np.minimum(box, partner), np.maximum(box, partner)
        elif boxes.which == 0:
            yield box, partner
        else:
            yield partner, box


def _blocks(found: Candidates, group: Int64Array, closed: BoolArray | None) -> Iterator[Pairs]:
    """List positions (in boxes, in partners) of all candidates, a bounded number at a time."""
    counts = found.last - found.first
    total = np.cumsum(counts)
    position = 0
    while position < len(counts):
        done = int(total[position - 1]) if position else 0
        stop = max(position + 1, int(np.searchsorted(total, done + _BLOCK, "right")))
        boxes = np.arange(position, stop)
        position = stop
        if closed is not None:
            boxes = boxes[~closed[group[found.boxes.node[boxes]]]]
            if not len(boxes):  # a whole block: look further ahead for the next open group
                ahead = closed[group[found.boxes.node[position : position + _BLOCK]]]
                position += len(ahead) if ahead.all() else int(ahead.argmin())
                continue
        here = counts[boxes]
        count = int(here.sum())
        if count:
            # Consecutive numbers within each box's range, ranges one after the other.
            shift = found.first[boxes] - (np.cumsum(here) - here)
            yield np.repeat(boxes, here), np.arange(count) + np.repeat(shift, here)
