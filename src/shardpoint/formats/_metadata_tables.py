"""Finds the two things that a large ``.metadata`` consists of, and reads them into columns.

They are the ``ChunkStorageMetadata`` in the list of a tensor, and the pairs of a
``MetadataIndex`` and a ``_StorageInfo`` in ``storage_data``, as Python's pickler and
`write_metadata` write them. What stands at a place is read as opcodes only where they begin
like one of those; whether opcodes really begin there, only the interpreter knows, when it
gets there.
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

__all__ = ["ChunkColumns", "Names", "StorageColumns", "Table", "read_chunks", "read_storage"]

_BLOCK = 1 << 15  # places that are read at once; their columns stay in the processor's cache
_SEARCHED = 1 << 22  # bytes that are searched at once
_MOST_DESCRIPTORS = 4
# Python's pickler begins a new frame after 64 KiB, and around long texts. Of the frames of a
# pickle that has far more of them, not all are looked at.
_MOST_FRAMES, _LEAST_FRAME = 100, 4096
_INSTANCE_SLOTS = 2  # an instance and its dict of fields
_NEWOBJ = 0x81
_LIST, _MARK, _APPEND, _APPENDS = ord("]"), ord("("), ord("a"), ord("e")

_Bools: TypeAlias = npt.NDArray[np.bool_]


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
    info
        Slot of the class ``_StorageInfo``; -1 where it is not needed.
    memoized
        Whether new values are put into the memo.
    """

    start: tuple[bytes, ...]
    size: int
    fields: tuple[tuple[str, int], ...]
    info: int
    memoized: bool

    def field(self, name: str) -> bytes:
        """Return the opcode that fetches the name of a field."""
        return fetch(dict(self.fields)[name])


@dataclass(frozen=True, slots=True, eq=False)
class ChunkColumns:
    """Chunks; `offset_slots` is the number of memo slots that the making of offsets fills."""

    offsets: Shapes
    offset_slots: Int64s
    sizes: Shapes


@dataclass(frozen=True, slots=True, eq=False)
class StorageColumns:
    """Entries of ``storage_data``.

    Attributes
    ----------
    key, path
        Texts.
    position
        ``index``; -1 is None.
    has_offset
        Whether the index has an offset.
    offset
        That offset.
    offset_slots
        Memo slots filled by the making of it.
    record_offset, record_length
        Of the record.
    transform_start, transform_length
        The opcodes that give the list of transforms; of length 0 where there is none.
    """

    key: Texts
    position: Int64s
    has_offset: _Bools
    offset: Shapes
    offset_slots: Int64s
    path: Texts
    record_offset: Int64s
    record_length: Int64s
    transform_start: Int64s
    transform_length: Int64s


_C = TypeVar("_C", ChunkColumns, StorageColumns)


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
    memoized
        Whether they fill slots.
    """

    def __init__(
        self,
        start: Int64s,
        end: Int64s,
        good: _Bools,
        slots: Int64s,
        columns: ChunkColumns | StorageColumns,
        *,
        memoized: bool,
    ) -> None:
        self.start, self.end, self.slots, self.columns = start, end, slots, columns
        self.memoized = memoized
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

    def text_slots(self, rows: Int64s) -> list[tuple[Int64s, Texts]]:
        """Return the slots that the texts of some rows have filled; -1 where none."""
        columns = self.columns
        if not self.memoized or isinstance(columns, ChunkColumns):
            return []
        key = self.first_slot[rows] + _INSTANCE_SLOTS
        key_is_new = columns.key.reference[rows] < 0
        path = key + key_is_new + columns.offset_slots[rows] + _INSTANCE_SLOTS
        path_is_new = columns.path.reference[rows] < 0
        return [
            (np.where(key_is_new, key, -1), columns.key),
            (np.where(path_is_new, path, -1), columns.path),
        ]

    def list_slots(self, rows: Int64s) -> Int64s:
        """Return the slots that the lists of transforms of some rows fill; -1 if they do not."""
        columns = self.columns
        if not self.memoized or isinstance(columns, ChunkColumns):
            return np.full(len(rows), -1, np.int64)
        slot = self.first_slot[rows] + 2 * _INSTANCE_SLOTS + columns.offset_slots[rows]
        slot += columns.key.reference[rows] < 0
        return slot + (columns.path.reference[rows] < 0)

    def shape_slots(self, rows: Int64s) -> list[tuple[Int64s, Shapes]]:
        """Return the slots that each ``torch.Size`` of some rows has filled; -1 where none."""
        if not self.memoized:
            return []
        columns = self.columns
        last = self.first_slot[rows] + _INSTANCE_SLOTS + columns.offset_slots[rows] - 1
        if isinstance(columns, ChunkColumns):
            sizes = self.first_slot[rows] + self.slots[rows] - 1
            return [
                (np.where(columns.offsets.reference[rows] < 0, last, -1), columns.offsets),
                (np.where(columns.sizes.reference[rows] < 0, sizes, -1), columns.sizes),
            ]
        made = columns.has_offset[rows] & (columns.offset.reference[rows] < 0)
        last += columns.key.reference[rows] < 0
        return [(np.where(made, last, -1), columns.offset)]


def read_chunks(source: Bytes, names: Names, first: int) -> Table:
    """Return the ``ChunkStorageMetadata`` from position `first` on."""

    def read(at: Cursors) -> ChunkColumns:
        offsets, slots = _shapes(at, names)
        at.expect(names.field("sizes"))
        sizes, _ = _shapes(at, names)
        at.expect(b"u", b"b")
        return ChunkColumns(offsets, slots, sizes)

    return _read(source, names, first, read)


def read_storage(source: Bytes, names: Names, first: int) -> Table:
    """Return the pairs of ``MetadataIndex`` and ``_StorageInfo`` from position `first` on."""

    def read(at: Cursors) -> StorageColumns:
        key = at.texts()
        at.expect(names.field("index"))
        position = at.integers_or_none()
        has_offset, offset, slots = _optional_offset(at, names)
        at.expect(b"u", b"b", fetch(names.info), b")")
        at.expect_new(b"\x81")
        at.expect_new(b"}")
        at.expect(b"(", names.field("relative_path"))
        path = at.texts()
        at.expect(names.field("offset"))
        record_offset = at.integers()
        at.expect(names.field("length"))
        record_length = at.integers()
        transforms = _optional_transforms(at, names)
        at.expect(b"u", b"b")
        return StorageColumns(
            key,
            position,
            has_offset,
            offset,
            slots,
            path,
            record_offset,
            record_length,
            *transforms,
        )

    return _read(source, names, first, read)


def _shapes(at: Cursors, names: Names) -> tuple[Shapes, Int64s]:
    before = at.slots.copy()
    shapes = at.shapes(names.size)
    return shapes, at.slots - before


def _optional_offset(at: Cursors, names: Names) -> tuple[_Bools, Shapes, Int64s]:
    there = at.next() != ord("u")
    if there.all():
        at.expect(names.field("offset"))
        return there, *_shapes(at, names)
    count = len(there)
    rows = np.flatnonzero(there)
    slots, axes = np.zeros(count, np.int64), np.zeros(count, np.int64)
    reference = np.full(count, -1, np.int64)
    part = at.part(rows)
    part.expect(names.field("offset"))
    shapes, slots[rows] = _shapes(part, names)
    at.put(rows, part)
    axes[rows], reference[rows] = shapes.axes, shapes.reference
    numbers = np.zeros((count, shapes.numbers.shape[1]), np.int64)
    numbers[rows] = shapes.numbers
    return there, Shapes(numbers, axes, reference), slots


def _optional_transforms(at: Cursors, names: Names) -> tuple[Int64s, Int64s]:
    start = np.zeros(len(at.position), np.int64)
    length = np.zeros(len(at.position), np.int64)
    rows = np.flatnonzero(at.next() != ord("u"))
    if not len(rows):
        return start, length
    part = at.part(rows)
    if "transform_descriptors" not in dict(names.fields):
        part.good[:] = False
    else:
        part.expect(names.field("transform_descriptors"))
        start[rows] = part.position
        _pass_list(part)
        length[rows] = part.position - start[rows]
    at.put(rows, part)
    return start, length


def _pass_list(at: Cursors) -> None:
    """Pass a list of a few texts: made here, or from the memo."""
    made = at.next() == _LIST
    if not made.all():
        rows = np.flatnonzero(~made)
        part = at.part(rows)
        part.references()
        at.put(rows, part)
        rows = np.flatnonzero(made)
        part = at.part(rows)
        if len(rows):
            _pass_list(part)
        at.put(rows, part)
        return
    at.expect_new(b"]")
    marked = at.next() == _MARK
    at.position = at.position + marked
    at.good &= marked | (at.next() != _APPEND)
    for _ in range(_MOST_DESCRIPTORS):
        opcode = at.next()
        rows = np.flatnonzero((opcode != _APPEND) & (opcode != _APPENDS))
        if not len(rows):
            break
        part = at.part(rows)
        part.texts()
        part.good &= marked[rows] | (part.next() == _APPEND)
        at.put(rows, part)
    at.good &= at.next() == np.where(marked, _APPENDS, _APPEND)
    at.position = at.position + 1


def _read(source: Bytes, names: Names, first: int, read: Callable[[Cursors], _C]) -> Table:
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
    return Table(start, end, good, slots, columns, memoized=names.memoized)


def _starts(source: Bytes, names: Names, first: int) -> Int64s:
    """Return where such a value may begin."""
    code = b"".join(names.start)
    newobj = len(names.start[0]) + 1  # the class, EMPTY_TUPLE
    wanted = np.uint64(int.from_bytes(code[:8], "little"))
    found = []
    for begin in range(first, source.size, _SEARCHED):
        block = source.bytes[begin + newobj : min(begin + _SEARCHED, source.size) + newobj]
        places = np.flatnonzero(block == _NEWOBJ) + begin
        found.append(places[source.words[places] == wanted])
    starts = np.concatenate(found) if found else np.zeros(0, np.int64)
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
