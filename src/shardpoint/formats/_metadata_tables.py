"""Finds all values of one kind in a pickle, and has them read into columns.

What stands at a place is read as opcodes where it begins like such a value. Whether opcodes
really begin there, only the interpreter knows, when it gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from shardpoint.formats._metadata_cursors import (
    FRAME,
    Bytes,
    Cursors,
    Int64s,
    Shapes,
    Texts,
    fetch,
)

__all__ = ["Names", "Table", "read_table"]

_BLOCK = 1 << 15  # places that are read at once; their columns stay in the processor's cache
_INSTANCE_SLOTS = 2  # an instance and its dict of fields
# Python's pickler begins a new frame after 64 KiB, and around long texts. Of the frames of a
# pickle that has far more of them, not all are looked at.
_MOST_FRAMES, _LEAST_FRAME = 100, 4096

_Bools: TypeAlias = npt.NDArray[np.bool_]
Columns: TypeAlias = Any
"""A dataclass of arrays of a row each, or of further such dataclasses."""

_C = TypeVar("_C")


@dataclass(frozen=True, slots=True)
class Names:
    """Memo slots of what the instances in one pickle share.

    Attributes
    ----------
    start
        The opcodes that such a value begins with, up to the name of its first field.
    size
        Slot of ``torch.Size``.
    fields
        Slots of the names of further fields, by name.
    classes
        Slots of the classes of instances inside, in their order.
    memoized
        Whether new values are put into the memo.
    """

    start: tuple[bytes, ...]
    size: int
    fields: tuple[tuple[str, int], ...]
    classes: tuple[int, ...]
    memoized: bool

    def field(self, name: str) -> bytes:
        """Return the opcode that fetches the name of a field."""
        return fetch(dict(self.fields)[name])


class Table:
    """All places of a pickle where one kind of value stands, unless the text only looks so.

    Attributes
    ----------
    start, end
        ``int64[n]``: of the opcodes, ascending.
    slots
        ``int64[n]``: memo slots that they fill.
    first_slot
        ``int64[n]``: the first of them, for those that `take` has taken, else -1.
    columns
        What they say.
    texts, shapes
        The columns that are such.
    """

    def __init__(
        self,
        start: Int64s,
        end: Int64s,
        good: _Bools,
        slots: Int64s,
        columns: Columns,
    ) -> None:
        self.start, self.end, self.slots, self.columns = start, end, slots, columns
        parts = [getattr(columns, column.name) for column in fields(columns)]
        self.texts = [part for part in parts if isinstance(part, Texts)]
        self.shapes = [part for part in parts if isinstance(part, Shapes)]
        self.first_slot: Int64s = np.full(len(start), -1, np.int64)
        self._good = good
        follows = good[:-1] & good[1:] & (end[:-1] == start[1:])
        self._breaks = np.append(np.flatnonzero(~follows), len(start) - 1)

    def run_at(self, position: int) -> tuple[int, int]:
        """Return the rows, first and past the last, that follow one another from there on."""
        row = int(np.searchsorted(self.start, position))
        if row == len(self.start) or self.start[row] != position or not self._good[row]:
            return 0, 0
        return row, int(self._breaks[np.searchsorted(self._breaks, row)]) + 1

    def take(self, first: int, last: int, slot: int) -> int:
        """Note that rows are used, and that `slot` was the next; return the one after them."""
        ends = np.cumsum(self.slots[first:last])
        self.first_slot[first:last] = slot + ends - self.slots[first:last]
        return slot + int(ends[-1])


def read_table(source: Bytes, names: Names, first: int, read: Callable[[Cursors], _C]) -> Table:
    """Return all values from position `first` on that begin with certain opcodes.

    `read` passes what follows those, and gives columns.
    """
    start = _starts(source, names, first)

    def read_at(places: Int64s, *, frames: bool) -> tuple[Cursors, _C]:
        at = Cursors(source, places, memoized=names.memoized, frames=frames)
        at.expect(*names.start)
        if names.memoized:
            at.slots = at.slots + _INSTANCE_SLOTS
        columns = read(at)
        at.pass_frames()
        return at, columns

    blocks = [
        read_at(start[row : row + _BLOCK], frames=False)
        for row in range(0, max(len(start), 1), _BLOCK)
    ]
    end = np.concatenate([at.position for at, _ in blocks])
    good = np.concatenate([at.good for at, _ in blocks])
    slots = np.concatenate([at.slots for at, _ in blocks])
    columns = _joined([columns for _, columns in blocks])
    del blocks
    again = np.flatnonzero(~good)
    if len(again):
        at, found = read_at(start[again], frames=True)
        end[again], good[again], slots[again] = at.position, at.good, at.slots
        columns = _replaced(columns, again, found)
    return Table(start, end, good, slots, columns)


def _starts(source: Bytes, names: Names, first: int) -> Int64s:
    """Return where such a value may begin."""
    code = b"".join(names.start)
    newobj = len(names.start[0]) + 1  # the class, EMPTY_TUPLE
    wanted = np.uint64(int.from_bytes(code[:8], "little"))
    places = source.instances() - newobj
    places = places[np.searchsorted(places, first) :]
    starts = places[source.words[places] == wanted]
    more = {start for start in _starts_with_frame(source, code) if start >= first}
    framed = np.array(sorted(more.difference(starts[np.isin(starts, list(more))])), np.int64)
    return np.insert(starts, np.searchsorted(starts, framed), framed)


def _starts_with_frame(source: Bytes, code: bytes) -> list[int]:
    """Return where it begins with a FRAME inside of the first opcodes."""
    data = source.bytes
    found = []
    frame = 2  # behind the protocol
    for _ in range(_MOST_FRAMES + source.size // _LEAST_FRAME):
        if data[frame] != FRAME:
            break
        for cut in range(1, len(code)):
            before = data[max(frame - cut, 0) : frame].tobytes()
            after = data[frame + 9 : frame + 9 + len(code) - cut].tobytes()
            if before + after == code:
                found.append(frame - cut)
        frame += 9 + int(source.words[frame + 1])
        if frame >= source.size:
            break
    return found


def _joined(parts: Sequence[Any]) -> Any:
    """Return the rows of all parts, which are columns of one kind, in one."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        if parts[0].ndim == 1:
            return np.concatenate(parts)
        axes = max(part.shape[1] for part in parts)
        return np.concatenate([_widened(part, axes) for part in parts])
    kind = type(parts[0])
    return kind(*[_joined([getattr(p, column.name) for p in parts]) for column in fields(kind)])


def _replaced(columns: Any, rows: Int64s, found: Any) -> Any:
    """Return the columns with some rows replaced; may change them in place."""
    if isinstance(columns, np.ndarray):
        if columns.ndim == 2:
            axes = max(columns.shape[1], found.shape[1])
            columns, found = _widened(columns, axes), _widened(found, axes)
        columns[rows] = found
        return columns
    kind = type(columns)
    return kind(
        *[
            _replaced(getattr(columns, column.name), rows, getattr(found, column.name))
            for column in fields(kind)
        ]
    )


def _widened(numbers: Int64s, axes: int) -> Int64s:
    if numbers.shape[1] == axes:
        return numbers
    result = np.zeros((len(numbers), axes), np.int64)
    result[:, : numbers.shape[1]] = numbers
    return result
