"""Half-open n-dimensional boxes: one as a value, many as columns.

A box covers the elements ``offset <= index < offset + size`` on every axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardpoint.errors import PlanError

__all__ = ["Region"]


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
