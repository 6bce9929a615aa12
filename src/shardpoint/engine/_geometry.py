"""How boxes of elements lie in a payload: pure arithmetic on sizes and strides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

__all__ = ["Numbers", "extent", "pick", "split_box", "split_extent", "storage_order"]

Numbers: TypeAlias = tuple[int, ...]


def extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements of a payload a box reaches over, from its first element on."""
    if 0 in sizes:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


def storage_order(sizes: Sequence[int], strides: Sequence[int]) -> Numbers | None:
    """Return the axes in the order in which the payload has them, outermost first.

    In that order the box is row-major in the payload, perhaps with gaps between its rows.
    None where there is no such order: elements are shared, interleaved or apart.
    """
    order = sorted(range(len(sizes)), key=lambda axis: (sizes[axis] > 1, -strides[axis]))
    inner = 1
    innermost = True
    for axis in reversed(order):
        if sizes[axis] <= 1:
            break
        if strides[axis] < inner or (innermost and strides[axis] != 1):
            return None
        inner = strides[axis] * sizes[axis]
        innermost = False
    return tuple(order)


def pick(numbers: Sequence[int], order: Sequence[int]) -> Numbers:
    """Return the numbers in another order of axes."""
    return tuple(numbers[axis] for axis in order)


def split_box(sizes: Sequence[int], limit: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield (offsets, sizes) of pieces of at most `limit` elements, in row-major order.

    Each piece is a contiguous range of the box's elements in that order.
    """
    if math.prod(sizes) <= limit:
        yield (0,) * len(sizes), tuple(sizes)
        return
    row = math.prod(sizes[1:])
    if row > limit:
        for i in range(sizes[0]):
            for offsets, piece in split_box(sizes[1:], limit):
                yield (i, *offsets), (1, *piece)
        return
    rows = limit // row
    rest = (0,) * (len(sizes) - 1)
    for start in range(0, sizes[0], rows):
        yield (start, *rest), (min(rows, sizes[0] - start), *sizes[1:])


def split_extent(
    sizes: Numbers, strides: Sequence[int], limit: int
) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield (offsets, sizes) of pieces that reach over at most `limit` elements each."""
    if extent(sizes, strides) <= limit or math.prod(sizes) == 1:
        yield (0,) * len(sizes), sizes
        return
    axis = max((a for a in range(len(sizes)) if sizes[a] > 1), key=lambda a: strides[a])
    half = sizes[axis] // 2
    for start, count in ((0, half), (half, sizes[axis] - half)):
        part = (*sizes[:axis], count, *sizes[axis + 1 :])
        for offsets, piece in split_extent(part, strides, limit):
            yield (*offsets[:axis], offsets[axis] + start, *offsets[axis + 1 :]), piece
