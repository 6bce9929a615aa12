"""Takes the long runs of a ``.metadata`` pickle at once, for the interpreter.

The interpreter stays in charge: it offers every place where an instance begins, so the places
are known to be opcodes. From there on, values that follow one another without a gap, up to the
opcode that puts them into their list or dict, are read by vector operations (see
`_metadata_tables`). In the list or dict then stands one `Run` in place of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np

from shardpoint.formats._metadata_cursors import Bytes, Cursors, fetch
from shardpoint.formats._metadata_records import SIZE, ChunkRecord, IndexRecord, StorageRecord
from shardpoint.formats._metadata_tables import (
    ChunkColumns,
    Names,
    Table,
    read_chunks,
    read_storage,
)
from shardpoint.formats._pickle_opcodes import Machine, RunsRefused, set_items

__all__ = ["MetadataRuns", "Run"]

_MOST_TABLES = 4  # of one kind; a pickler always writes the shared parts in the same way
_APPENDS, _SETITEMS = ord("e"), ord("u")
_BINGET, _LONG_BINGET = ord("h"), ord("j")
_TRANSFORMS = "transform_descriptors"


class Run:
    """Rows of a table: chunks in a list, or entries of ``storage_data``, as a key of None."""

    __slots__ = ("first", "last", "table")

    def __init__(self, table: Table, first: int, last: int) -> None:
        self.table = table
        self.first = first
        self.last = last

    @property
    def torch_name(self) -> str:
        """What it is a run of."""
        is_chunks = isinstance(self.table.columns, ChunkColumns)
        return ChunkRecord.torch_name if is_chunks else IndexRecord.torch_name


class MetadataRuns:
    """The runs of one pickle.

    Attributes
    ----------
    data
        The pickle.
    tables
        What was read; values were taken from these only.
    memo
        The slots that do not lie in runs.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.memo: Mapping[int, Any] = {}
        self.tables: list[Table] = []
        self._starts: list[tuple[type, bytes, Table]] = []
        self._bytes: Bytes | None = None
        self._tries: dict[type, int] = {ChunkRecord: _MOST_TABLES, IndexRecord: _MOST_TABLES}
        self._slots: list[int] = []  # the first of each run
        self._runs: list[Run] = []

    @property
    def taken(self) -> bool:
        """Whether there are any."""
        return bool(self._runs)

    def take(self, machine: Machine, position: int) -> int:
        """Take a run; see `shardpoint.formats.pickle_machine.Runs`."""
        stack, marks = machine.stack, machine.marks
        cls = stack[-1]
        if (cls is not ChunkRecord and cls is not IndexRecord) or not marks or machine.puts:
            return 0
        held = len(stack) - 1 - marks[-1]
        if held < 0 or not marks[-1]:
            return 0
        target: Any = stack[marks[-1] - 1]
        is_chunks = cls is ChunkRecord
        if type(target) is not (list if is_chunks else dict) or not (is_chunks or held % 2 == 0):
            return 0
        table, start = self._table(machine, cls, position)
        if table is None:
            return 0
        first, last = table.run_at(start)
        if first == last:
            return 0
        end = int(table.end[last - 1])
        if end >= len(self.data) or self.data[end] != (_APPENDS if is_chunks else _SETITEMS):
            return 0
        run = Run(table, first, last)
        self.memo = machine.memo
        stack.pop()
        items = machine.pop_mark()
        if type(target) is list:
            target.extend(items)
            target.append(run)
        else:
            set_items(target, [*items, run, None], machine.budget)
        slot = len(machine.memo) + machine.skipped
        machine.skipped += table.take(first, last, slot) - slot
        self._slots.append(slot)
        self._runs.append(run)
        return end + 1

    def fetch(self, slot: int) -> Any:
        """Return the text or the numbers that the opcodes of a run put into a memo slot."""
        number = bisect_right(self._slots, slot) - 1
        if number < 0:
            raise KeyError(slot)
        run = self._runs[number]
        table = run.table
        row = run.first + int(
            np.searchsorted(table.first_slot[run.first : run.last], slot, side="right") - 1
        )
        if slot >= table.first_slot[row] + table.slots[row]:
            raise KeyError(slot)
        # Instances and lists can still be changed by what fetches them.
        for text_slot, texts in table.text_slots(np.array([row])):
            if text_slot[0] == slot:
                start = int(texts.start[row])
                text = self.data[start : start + int(texts.length[row])]
                return str(text, "utf-8", "surrogatepass")
        for shape_slot, shapes in table.shape_slots(np.array([row])):
            if shape_slot[0] == slot:
                return tuple(shapes.numbers[row, : shapes.axes[row]].tolist())
        raise RunsRefused

    def _table(self, machine: Machine, cls: type, position: int) -> tuple[Table | None, int]:
        """Return the table that has what begins before `position`, and where that begins."""
        data = self.data
        if position >= 3 and data[position - 3] == _BINGET:
            start = position - 3
        elif position >= 6 and data[position - 6] == _LONG_BINGET:
            start = position - 6
        else:
            return None, 0
        for kind, code, table in self._starts:
            if kind is cls and data.startswith(code, start):
                return table, start
        if not self._tries[cls]:
            return None, 0
        self._tries[cls] -= 1
        if self._bytes is None:
            self._bytes = Bytes(data)
        names = _learn(machine, self._bytes, cls, start)
        if names is None:
            return None, 0
        read = read_chunks if cls is ChunkRecord else read_storage
        table = read(self._bytes, names, start)
        self._starts.append((cls, b"".join(names.start), table))
        self.tables.append(table)
        return table, start


class _Learner:
    """Reads one value, and notes which slots its parts are fetched from."""

    def __init__(self, machine: Machine, source: Bytes, start: int, *, memoized: bool) -> None:
        self.memo = machine.memo
        self.at = Cursors(source, np.array([start]), memoized=memoized, frames=True)

    def slot(self, wanted: Any) -> int:
        """Pass a fetch of a certain value, and return its slot."""
        number = int(self.at.references()[0])
        found = self.memo.get(number)
        if found is not wanted and (type(wanted) is not str or found != wanted):
            self.at.good[:] = False
        return number

    def new(self) -> None:
        """Pass the making of an instance up to its first field."""
        self.at.expect(b")")
        self.at.expect_new(b"\x81")
        self.at.expect_new(b"}")
        self.at.expect(b"(")


def _learn(machine: Machine, source: Bytes, cls: type, start: int) -> Names | None:
    """Return the slots that the value at a place uses, or None if it is not as expected."""
    memo = machine.memo
    size = next((slot for slot, value in memo.items() if value is SIZE), None)
    if size is None:
        return None
    newobj = start + (3 if machine.data[start] == _BINGET else 6)
    memoized = machine.data[newobj + 1 : newobj + 2] == b"\x94"
    learner = _Learner(machine, source, start, memoized=memoized)
    at = learner.at
    class_slot = learner.slot(cls)
    learner.new()
    first_slot = learner.slot("offsets" if cls is ChunkRecord else "fqn")
    fields: dict[str, int] = {}
    info = -1
    if cls is ChunkRecord:
        at.shapes(size)
        fields["sizes"] = learner.slot("sizes")
        at.shapes(size)
    else:
        at.texts()
        fields["index"] = learner.slot("index")
        at.integers_or_none()
        offset = None
        if at.next()[0] != _SETITEMS:
            offset = learner.slot("offset")
            at.shapes(size)
        at.expect(b"u", b"b")
        info = learner.slot(StorageRecord)
        learner.new()
        fields["relative_path"] = learner.slot("relative_path")
        at.texts()
        fields["offset"] = learner.slot("offset")
        at.integers()
        fields["length"] = learner.slot("length")
        at.integers()
        at.good &= offset is None or offset == fields["offset"]
        found = [
            slot for slot, value in memo.items() if type(value) is str and value == _TRANSFORMS
        ]
        if found:
            fields[_TRANSFORMS] = found[0]
    if not at.good[0]:
        return None
    memoize = (b"\x94",) if memoized else ()
    parts = (fetch(class_slot), b")", b"\x81", *memoize, b"}", *memoize, b"(", fetch(first_slot))
    return Names(parts, size, tuple(fields.items()), info, memoized)
