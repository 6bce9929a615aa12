"""What a user's slices select of a tensor: a box to read, and what to take of it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from types import EllipsisType
from typing import SupportsIndex, TypeAlias

from shardpoint.errors import PlanError

__all__ = ["AxisSelection", "Selected", "Selection", "select"]

AxisSelection: TypeAlias = SupportsIndex | slice | EllipsisType
Selection: TypeAlias = AxisSelection | tuple[AxisSelection, ...]


@dataclass(frozen=True, slots=True)
class Selected:
    """A box, and the indexing that turns the array of the box into what was asked for.

    Attributes
    ----------
    offsets, sizes
        The smallest box that holds everything selected.
    take
        One entry an axis of the box: 0 where an integer took the axis away, else a slice
        that is the whole axis or picks every n-th element.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    take: tuple[int | slice, ...]

    @property
    def takes_all(self) -> bool:
        """Whether the box is the result as it is."""
        return all(part == slice(None) for part in self.take)


def select(shape: tuple[int, ...], selection: Selection, *, key: str) -> Selected:
    """Resolve integers, slices and one Ellipsis as numpy does.

    Raises
    ------
    PlanError
        If the shape has a negative number, there are more entries than axes, more than one
        Ellipsis, an integer is out of range, or an entry is of another kind (None, arrays and
        lists select nothing here).
    """
    if any(size < 0 for size in shape):
        raise PlanError(f"key {key!r}: the shape {shape} has a negative number")
    entries = _per_axis(shape, selection, key)
    offsets: list[int] = []
    sizes: list[int] = []
    take: list[int | slice] = []
    for axis, (entry, size) in enumerate(zip(entries, shape, strict=True)):
        part: int | slice
        if isinstance(entry, slice):
            offset, length, part = _resolve_slice(entry, size, f"key {key!r}, axis {axis}")
        else:
            position = _position(entry, f"key {key!r}, axis {axis}")
            if not -size <= position < size:
                raise PlanError(
                    f"key {key!r}: index {position} is out of range for axis {axis}, which has "
                    f"size {size}"
                )
            offset, length, part = position % size, 1, 0
        offsets.append(offset)
        sizes.append(length)
        take.append(part)
    return Selected(tuple(offsets), tuple(sizes), tuple(take))


def _per_axis(
    shape: tuple[int, ...], selection: Selection, key: str
) -> list[SupportsIndex | slice]:
    """Return one entry an axis, with the Ellipsis replaced and missing ones filled in."""
    # A list is refused below: for numpy it would select rows, not one entry an axis.
    given = selection if isinstance(selection, tuple) else (selection,)
    ellipses = [i for i, entry in enumerate(given) if isinstance(entry, EllipsisType)]
    if len(ellipses) > 1:
        raise PlanError(f"key {key!r}: more than one Ellipsis in the slices")
    missing = len(shape) - len(given) + len(ellipses)
    if missing < 0:
        raise PlanError(
            f"key {key!r}: {len(given) - len(ellipses)} slices for a tensor of shape {shape}"
        )
    at = ellipses[0] if ellipses else len(given)
    return [
        *(entry for entry in given[:at] if not isinstance(entry, EllipsisType)),
        *[slice(None)] * missing,
        *(entry for entry in given[at:] if not isinstance(entry, EllipsisType)),
    ]


def _position(entry: object, where: str) -> int:
    if isinstance(entry, bool):
        raise PlanError(f"{where}: a bool selects nothing; use integers, slices and Ellipsis")
    try:
        return operator.index(entry)  # type: ignore[arg-type]
    except TypeError:
        raise PlanError(
            f"{where}: {type(entry).__name__} selects nothing; use integers, slices and Ellipsis"
        ) from None


def _resolve_slice(entry: slice, size: int, where: str) -> tuple[int, int, slice]:
    try:
        start, stop, step = entry.indices(size)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}: {entry}: {error}") from None
    positions = range(start, stop, step)
    if not positions:
        return min(max(start, 0), size), 0, slice(None)
    low, high = min(positions[0], positions[-1]), max(positions[0], positions[-1])
    return low, high - low + 1, slice(None) if step == 1 else slice(None, None, step)
