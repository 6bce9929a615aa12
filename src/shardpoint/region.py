"""Half-open n-dimensional boxes: one as a value, many as columns.

A box covers the elements ``offset <= index < offset + size`` on every axis. Columns hold
one box a row, ``int64[n, D]``; axes that a box does not have are padded with offset 0 and
size 1, which changes no intersection and no volume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.errors import PlanError

__all__ = ["MAX_VOLUME", "Region", "contains", "ends", "volumes"]

Int64Array: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

MAX_VOLUME = 2**62
"""Volumes from here on count as too large: products below it never overflow int64."""


@dataclass(frozen=True, slots=True)
class Region:
    """One half-open box; checked when made, never clamped.

    Attributes
    ----------
    offsets, sizes
        One number an axis, none of them negative. A 0-d region holds one element.

    Raises
    ------
    PlanError
        If the axes differ in number or a number is negative.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise PlanError(f"a region has offsets {self.offsets} but sizes {self.sizes}")
        if any(o < 0 for o in self.offsets) or any(s < 0 for s in self.sizes):
            raise PlanError(f"a region has a negative number: {self.offsets}, {self.sizes}")


def ends(offsets: Int64Array, sizes: Int64Array) -> Int64Array:
    """Return ``offsets + sizes`` of many boxes.

    Raises
    ------
    PlanError
        If the columns differ in shape, a number is negative, or a sum leaves int64.
    """
    if offsets.shape != sizes.shape or offsets.ndim != 2:
        raise PlanError(f"box columns have shapes {offsets.shape} and {sizes.shape}")
    result = offsets + sizes
    # Two numbers that are not negative overflow to a negative sum.
    if any(column.min(initial=0) < 0 for column in (offsets, sizes, result)):
        raise PlanError("a box has a negative number, or ends past what 64 bits hold")
    return result


def contains(shape: Int64Array, offsets: Int64Array, sizes: Int64Array) -> BoolArray:
    """Tell which boxes are well formed and lie inside their tensor, row by row.

    Nothing here overflows, whatever the columns hold.

    Parameters
    ----------
    shape
        ``int64[n, D]``: for each box the shape of its tensor, not negative.
    """
    well_formed = (offsets >= 0) & (sizes >= 0)
    inside = (offsets <= shape) & (sizes <= shape - offsets)  # wraps only if not well formed
    result: BoolArray = np.all(well_formed & inside, axis=1)
    return result


def volumes(sizes: Int64Array) -> tuple[Int64Array, BoolArray]:
    """Return the number of elements of each row of sizes, and which of them are right.

    A row is right if its numbers are not negative and its volume is below `MAX_VOLUME`;
    the others hold 0.
    """
    empty = (sizes == 0).any(axis=1)
    with np.errstate(over="ignore"):
        estimate = np.prod(np.where(empty[:, np.newaxis], 0, sizes).astype(np.float64), axis=1)
    right = (sizes >= 0).all(axis=1) & (estimate < MAX_VOLUME)
    # Integer products wrap, so a true product that fits is exact whatever the partial ones did.
    return np.where(right, np.prod(sizes, axis=1, dtype=np.int64), 0), right
