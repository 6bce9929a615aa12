"""Whether boxes cover a tensor, each element once: every overlap and every gap, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shardpoint.errors import Problem
from shardpoint.planning.boxes import Boxes, box_text, overlapping_pairs
from shardpoint.region import MAX_VOLUME, Int64Array, Region, volumes

__all__ = ["gaps", "overlaps", "tiling_problems"]


def tiling_problems(
    boxes: Sequence[Region], shape: Sequence[int] | None, *, key: str | None = None
) -> list[Problem]:
    """Return every way in which boxes fail to tile a tensor.

    Parameters
    ----------
    boxes
        In any order. Empty ones cover nothing, but must lie inside the tensor.
    shape
        The tensor's; None looks at the boxes alone, and so at overlaps only.
    key
        The tensor's name, for the problems.

    Returns
    -------
    One problem for each box that has another number of axes, or else for each that is not inside
    the tensor, or else for each pair that overlaps and each gap.
    """
    if not boxes:
        is_empty = shape is None or 0 in shape
        return [] if is_empty else [Problem("there are no boxes", key)]
    axes = len(boxes[0].offsets) if shape is None else len(shape)
    found = [
        f"box {number} has {len(box.offsets)} axes, wanted {axes}"
        for number, box in enumerate(boxes)
        if len(box.offsets) != axes
    ]
    if not found and shape is not None:
        found = [
            f"box {number} at {box_text(box.offsets, box.sizes)} is not inside {tuple(shape)}"
            for number, box in enumerate(boxes)
            if any(o + s > n for o, s, n in zip(box.offsets, box.sizes, shape, strict=True))
        ]
    if not found:
        found = [
            f"boxes {a} at {box_text(boxes[a].offsets, boxes[a].sizes)} and {b} at "
            f"{box_text(boxes[b].offsets, boxes[b].sizes)} overlap"
            for a, b in overlaps(boxes)
        ]
        if shape is not None:
            found += [
                f"no box covers {box_text(gap.offsets, gap.sizes)}" for gap in gaps(boxes, shape)
            ]
    return [Problem(message, key) for message in found]


def overlaps(boxes: Sequence[Region]) -> list[tuple[int, int]]:
    """Return the positions of all pairs of boxes that share an element, the lower one first."""
    offsets, sizes = _columns(boxes)
    rows = np.flatnonzero((sizes > 0).all(axis=1))
    columns = Boxes(np.zeros(len(rows), np.int64), offsets[rows], (offsets + sizes)[rows])
    return sorted(
        (int(rows[a]), int(rows[b]))
        for first, second in overlapping_pairs(columns, None, closed=None)
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    )


def gaps(boxes: Sequence[Region], shape: Sequence[int]) -> list[Region]:
    """Return boxes that hold every element of a tensor that no box covers, each of them once.

    Boxes may overlap; all must lie inside the tensor. Costs nothing more than a sum where they
    tile it.
    """
    offsets, sizes = _columns(boxes)
    total, _ = volumes(np.array(shape, np.int64).reshape(1, len(shape)))
    held, _ = volumes(sizes)
    if 0 in shape or (0 < total[0] < MAX_VOLUME and held.sum() == total[0] and not overlaps(boxes)):
        return []
    rows = np.flatnonzero((sizes > 0).all(axis=1))
    return [
        Region(tuple(begin for begin, _ in spans), tuple(end - begin for begin, end in spans))
        for spans in _uncovered(tuple(shape), offsets[rows], (offsets + sizes)[rows])
    ]


_Spans = tuple[tuple[int, int], ...]


def _uncovered(shape: tuple[int, ...], starts: Int64Array, ends: Int64Array) -> Iterator[_Spans]:
    """Cut the first axis where boxes begin or end, and look into each slab; joins equal slabs."""
    if not len(starts):
        yield tuple((0, extent) for extent in shape)
        return
    if not shape:
        return
    edges = np.unique(np.concatenate([[0, shape[0]], starts[:, 0], ends[:, 0]])).tolist()
    open_since: dict[_Spans, int] = {}
    for begin, end in zip(edges, [*edges[1:], None], strict=True):
        here: set[_Spans] = set()
        if end is not None:
            through = (starts[:, 0] <= begin) & (ends[:, 0] >= end)
            here = set(_uncovered(shape[1:], starts[through, 1:], ends[through, 1:]))
        for rest in [rest for rest in open_since if rest not in here]:
            yield ((open_since.pop(rest), begin), *rest)
        for rest in here:
            open_since.setdefault(rest, begin)


def _columns(boxes: Sequence[Region]) -> tuple[Int64Array, Int64Array]:
    axes = len(boxes[0].offsets) if boxes else 0
    shape = (len(boxes), axes)
    return (
        np.array([box.offsets for box in boxes], np.int64).reshape(shape),
        np.array([box.sizes for box in boxes], np.int64).reshape(shape),
    )
