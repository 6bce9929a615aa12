"""What can be wrong with the boxes of a checkpoint: shapes, bounds, overlaps, gaps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from shardpoint.dtypes import BY_CODE
from shardpoint.errors import Problem
from shardpoint.index import CheckpointIndex
from shardpoint.planning._coverage import count_uncovered, first_gap
from shardpoint.planning._join import Boxes, overlapping_pairs
from shardpoint.planning._tiling import is_grid
from shardpoint.region import MAX_VOLUME, BoolArray, Int64Array, contains, volumes

__all__ = ["MOST_NAMED", "Found", "and_more", "box_text", "first_of_each", "geometry_problems"]

MOST_NAMED = 4
"""How many problems of one kind are named for one tensor; the last one counts the rest."""

Found = tuple[int, Problem]
"""A problem and the row of its tensor."""


def geometry_problems(
    index: CheckpointIndex, selected: BoolArray, rows: Int64Array, *, check_coverage: bool
) -> Iterator[Found]:
    """Yield what is wrong with the selected tensors' shapes and the boxes of their chunks.

    Parameters
    ----------
    selected
        ``bool[n]``: the tensors to look at.
    rows
        The rows of these tensors' chunks.
    """
    tensors, chunks = index.tensors, index.chunks
    itemsize = np.array([dtype.itemsize for dtype in BY_CODE], np.int64)[tensors.dtype]
    _, sound = volumes(np.column_stack([tensors.shape, itemsize]))
    for row in np.flatnonzero(selected & ~sound).tolist():
        yield row, Problem(_shape_text(tensors.shape_of(row)), tensors.keys[row])

    tensor = chunks.tensor[rows]
    rows = rows[sound[tensor]]
    tensor = chunks.tensor[rows]
    offsets, sizes = chunks.offsets[rows], chunks.sizes[rows]
    inside = contains(tensors.shape[tensor], offsets, sizes)
    for row, position, more in first_of_each(tensor, np.flatnonzero(~inside)):
        shape = tensors.shape_of(row)
        where = box_text(offsets[position, : len(shape)], sizes[position, : len(shape)])
        message = f"a chunk at {where} is not inside the tensor's shape {shape}"
        yield row, Problem(message + and_more(more), tensors.keys[row])

    if not inside.all():
        tensor, offsets, sizes = tensor[inside], offsets[inside], sizes[inside]
    proved = is_grid(tensors.shape, tensor, offsets, sizes)
    if proved.all():
        return
    outside = np.zeros(len(tensors), np.bool_)
    outside[chunks.tensor[rows[~inside]]] = True
    rest = ~proved[tensor]
    tensor, offsets, sizes = tensor[rest], offsets[rest], sizes[rest]
    boxes = Boxes(tensor, offsets, offsets + sizes)
    overlapping = np.zeros(len(tensors), np.bool_)
    for row, problem in _overlaps(index, boxes, overlapping):
        yield row, problem
    if check_coverage:
        yield from _gaps(index, boxes, selected & sound & ~outside & ~proved, overlapping)


def _shape_text(shape: tuple[int, ...]) -> str:
    if any(size < 0 for size in shape):
        return f"the shape {shape} has a negative number"
    return f"the shape {shape} has {MAX_VOLUME:,} bytes or more"


def _overlaps(index: CheckpointIndex, boxes: Boxes, overlapping: BoolArray) -> Iterator[Found]:
    """Name some overlapping pairs of each tensor; mark in `overlapping` those that have any."""
    named = np.zeros(len(overlapping), np.int64)
    closed = np.zeros(len(overlapping), np.bool_)
    for a, b in overlapping_pairs(boxes, None, closed=closed):
        for row, position, _ in first_of_each(boxes.group[a], np.arange(len(a))):
            overlapping[row] = True
            if named[row] == MOST_NAMED:
                continue
            named[row] += 1
            closed[row] = named[row] == MOST_NAMED
            axes = slice(int(index.tensors.ndim[row]))
            first, second = (
                box_text(boxes.starts[i, axes], boxes.ends[i, axes] - boxes.starts[i, axes])
                for i in (a[position], b[position])
            )
            message = f"the chunks at {first} and at {second} overlap"
            if closed[row]:
                message += "; there may be more"
            yield row, Problem(message, index.tensors.keys[row])


def _gaps(
    index: CheckpointIndex, boxes: Boxes, selected: BoolArray, overlapping: BoolArray
) -> Iterator[Found]:
    """Name a gap of each selected tensor that its chunks do not cover."""
    tensors = index.tensors
    total, _ = volumes(tensors.shape)
    held, _ = volumes(boxes.ends - boxes.starts)
    covered = np.zeros(len(tensors), np.int64)
    np.add.at(covered, boxes.group, held)  # at most `total` where no chunks overlap
    order = np.argsort(boxes.group, kind="stable")
    order = order[held[order] > 0]
    grouped = boxes.group[order]
    for row in np.flatnonzero(selected & (overlapping | (covered != total))).tolist():
        shape = tensors.shape_of(row)
        own = order[slice(*np.searchsorted(grouped, [row, row + 1]))]
        starts, ends = boxes.starts[own, : len(shape)], boxes.ends[own, : len(shape)]
        missing, gap = int(total[row] - covered[row]), None
        if not overlapping[row]:
            gap = first_gap(shape, starts, ends)
        elif counted := count_uncovered(shape, starts, ends):
            missing, gap = counted
        if gap is not None:
            message = f"no chunk covers {missing:,} of {int(total[row]):,} elements"
            if shape:
                message += f", among them those at {box_text(gap.offsets, gap.sizes)}"
            yield row, Problem(message, tensors.keys[row])


def first_of_each(tensor: Int64Array, positions: Int64Array) -> Iterator[tuple[int, int, int]]:
    """Yield (tensor row, position, how many more there are) for the first few of each tensor.

    `positions` point into `tensor`. All but the last one named of a tensor have 0 more.
    """
    positions = positions[np.argsort(tensor[positions], kind="stable")]
    rows, first, counts = np.unique(tensor[positions], return_index=True, return_counts=True)
    for row, begin, count in zip(rows.tolist(), first.tolist(), counts.tolist(), strict=True):
        named = min(count, MOST_NAMED)
        for number, position in enumerate(positions[begin : begin + named].tolist()):
            yield row, position, count - named if number == named - 1 else 0


def and_more(count: int) -> str:
    """Say how many problems of the same kind are not named."""
    return f" (and {count:,} more like it)" if count else ""


def box_text(offsets: Iterable[int], sizes: Iterable[int]) -> str:
    """Say where a box is, as an index of the tensor is written."""
    spans = [f"{int(o)}:{int(o) + int(s)}" for o, s in zip(offsets, sizes, strict=True)]
    return f"[{', '.join(spans)}]"
