"""Which cut of a tensor some boxes are: whole, along one axis, a grid, or just boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardpoint.planning.boxes import box_text
from shardpoint.region import Int64Array
from shardpoint.sharding.chunking import chunk_spans

__all__ = ["Layout", "layout_of"]

_MOST_NAMED = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor was cut when it was saved, as far as its boxes tell.

    Attributes
    ----------
    kind
        ``"whole"`` (one box), ``"shard"`` (one axis cut as ``torch.chunk`` cuts), ``"grid"``
        (several axes, or one cut unevenly) or ``"boxes"`` (anything else).
    axes
        The axes that are cut, in order; empty for ``"whole"`` and ``"boxes"``.
    counts
        Into how many pieces each of `axes` is cut. Pieces without elements are counted where
        one axis is cut and they were saved.
    text
        The same for people: ``"whole"``, ``"Shard(0) over 8"``, ``"grid 2 x 4"``, or the boxes.
    """

    kind: str
    axes: tuple[int, ...]
    counts: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        return self.text


def layout_of(shape: tuple[int, ...], offsets: Int64Array, sizes: Int64Array) -> Layout:
    """Return which cut of a tensor these boxes are. They may lie in any order.

    Parameters
    ----------
    shape
        The tensor's.
    offsets, sizes
        ``int64[m, len(shape)]``: the boxes of its chunks.
    """
    count = len(sizes)
    if count == 1 and not offsets.any() and tuple(sizes[0].tolist()) == shape:
        return Layout("whole", (), (), "whole")
    keep = (sizes > 0).all(axis=1)
    if not keep.any():
        return _boxes(offsets, sizes)
    offsets, sizes = offsets[keep], sizes[keep]
    cuts = [_cuts(extent, offsets[:, i], sizes[:, i]) for i, extent in enumerate(shape)]
    spans = [cut for cut in cuts if cut is not None]
    if len(spans) < len(cuts) or int(np.prod([len(cut) for cut in spans])) != len(offsets):
        return _boxes(offsets, sizes)
    if len(np.unique(offsets, axis=0)) < len(offsets):
        return _boxes(offsets, sizes)
    axes = tuple(axis for axis, cut in enumerate(spans) if len(cut) > 1)
    counts = tuple(len(spans[axis]) for axis in axes)
    if not axes:
        return Layout("whole", (), (), "whole")
    if len(axes) == 1:
        for pieces in (count, counts[0]):
            if spans[axes[0]] == _even(shape[axes[0]], pieces):
                return Layout("shard", axes, (pieces,), f"Shard({axes[0]}) over {pieces}")
    grid = " x ".join(str(len(cut)) for cut in spans)
    uneven = any(spans[axis] != _even(shape[axis], len(spans[axis])) for axis in axes)
    return Layout("grid", axes, counts, f"grid {grid}{', uneven' if uneven else ''}")


def _cuts(extent: int, starts: Int64Array, lengths: Int64Array) -> list[tuple[int, int]] | None:
    """Return the pieces of one axis, None where they do not follow each other from end to end."""
    pieces = np.unique(np.column_stack([starts, lengths]), axis=0)
    ends = pieces[:, 0] + pieces[:, 1]
    if pieces[0, 0] != 0 or ends[-1] != extent or (pieces[1:, 0] != ends[:-1]).any():
        return None
    return [(start, length) for start, length in pieces.tolist()]


def _even(extent: int, pieces: int) -> list[tuple[int, int]]:
    """Return the pieces with elements that ``torch.chunk`` makes."""
    return [(start, length) for start, length in chunk_spans(extent, pieces) if length]


def _boxes(offsets: Int64Array, sizes: Int64Array) -> Layout:
    named = [box_text(offsets[i], sizes[i]) for i in range(min(len(offsets), _MOST_NAMED))]
    more = len(offsets) - len(named)
    text = ", ".join(named) + (f" and {more:,} more" if more else "")
    noun = "box" if len(offsets) == 1 else "boxes"
    return Layout("boxes", (), (), f"{len(offsets):,} {noun}" + (f": {text}" if text else ""))
