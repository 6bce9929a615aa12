"""Takes the long runs of a ``.metadata`` pickle at once, for the interpreter.

The interpreter stays in charge: it offers every place where an instance begins, so the places
are known to be opcodes. From there on, values that follow one another without a gap, up to the
opcode that puts them into their list or dict, are read by vector operations (see
`_metadata_grammar`). In the list or dict then stands one `Run` in place of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from shardpoint.formats._metadata_cursors import Bytes, Cursors, fetch
from shardpoint.formats._metadata_grammar import (
    TensorColumns,
    read_chunks,
    read_storage,
    read_tensors,
)
from shardpoint.formats._metadata_records import (
    SIZE,
    ChunkRecord,
    IndexRecord,
    PropertiesRecord,
    StorageRecord,
    TensorRecord,
)
from shardpoint.formats._metadata_tables import Names, Table
from shardpoint.formats._pickle_opcodes import Machine, RunsRefused, set_items

__all__ = ["RUN", "MetadataRuns", "Run"]

_MOST_TABLES = 4  # of one kind; a pickler always writes the shared parts in the same way
_SETITEMS = ord("u")
_BINGET, _LONG_BINGET = ord("h"), ord("j")
_TRANSFORMS = "transform_descriptors"


class Run:
    """Rows of a table in place of the values that they are.

    Chunks stand in the list of a tensor. Entries of ``storage_data`` stand there as a key, and
    tensors in ``state_dict_metadata``, both with the value `RUN`; `key` is that of the first
    tensor.
    """

    __slots__ = ("first", "key", "last", "table")

    def __init__(self, table: Table, first: int, last: int, key: str) -> None:
        self.table = table
        self.first = first
        self.last = last
        self.key = key

    def __len__(self) -> int:
        return self.last - self.first

    def __bool__(self) -> bool:
        return True


class _RunValue:
    """The type of `RUN`."""

    __slots__ = ()


RUN = _RunValue()


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
        self._tries: dict[type, int] = dict.fromkeys(_KINDS, _MOST_TABLES)
        self._slots: list[int] = []  # the first of each run
        self._runs: list[Run] = []

    @property
    def taken(self) -> bool:
        """Whether there are any."""
        return bool(self._runs)

    @property
    def taken_tensors(self) -> int:
        """How many runs of tensors there are."""
        return sum(isinstance(run.table.columns, TensorColumns) for run in self._runs)

    def take(self, machine: Machine, position: int) -> int:
        """Take a run; see `shardpoint.formats.pickle_machine.Runs`."""
        stack, marks = machine.stack, machine.marks
        cls = stack[-1]
        kind = _KINDS.get(cls) if type(cls) is type else None
        if kind is None or not marks or not marks[-1] or machine.puts:
            return 0
        held = len(stack) - 1 - marks[-1]
        if held < 0 or type(stack[marks[-1] - 1]) is not kind.target or held % 2 not in kind.held:
            return 0
        table, start = self._table(machine, cls, position)
        if table is None:
            return 0
        first, last = table.run_at(start)
        if first == last:
            return 0
        end = int(table.end[last - 1])
        if end >= len(self.data):
            return 0
        self.memo = machine.memo
        run = Run(table, first, last, "")
        if cls is TensorRecord:
            if not self._take_tensors(machine, run):
                return 0
        elif self.data[end] != kind.ends:
            return 0
        else:
            self._take_all(machine, run)
            end += 1
        slot = len(machine.memo) + machine.skipped
        machine.skipped += table.take(first, last, slot) - slot
        self._slots.append(slot)
        self._runs.append(run)
        return end

    @staticmethod
    def _take_all(machine: Machine, run: Run) -> None:
        """Do what the opcode behind the run does: put everything into the list or dict."""
        machine.stack.pop()
        items = machine.pop_mark()
        target = machine.stack[-1]
        if type(target) is list:
            target.extend(items)
            target.append(run)
        else:
            set_items(target, [*items, run, RUN], machine.budget)

    def _take_tensors(self, machine: Machine, run: Run) -> bool:
        """Put the run on the stack as a key and its value, and the key of what follows it.

        Other entries may stand between such runs. Whatever else than SETITEMS then takes what
        is on the stack comes upon something that is nowhere allowed, or a run gets lost.
        """
        stack, columns = machine.stack, run.table.columns
        assert isinstance(columns, TensorColumns)
        row = run.last - 1
        following: list[Any] = []
        if columns.has_next[row]:
            reference = int(columns.next_key.reference[row])
            if reference < 0:
                start = int(columns.next_key.start[row])
                text = self.data[start : start + int(columns.next_key.length[row])]
                following = [_decoded(text)]
            else:
                following = [machine.memo.get(reference)]
        if any(type(key) is not str for key in (stack[-2], *following)):
            return False
        run.key = stack[-2]
        stack[-2:] = [run, RUN, *following]
        return True

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
        within = slot - int(table.first_slot[row])
        if within >= table.slots[row]:
            raise KeyError(slot)
        # Instances and lists can still be changed by what fetches them.
        for texts in table.texts:
            if texts.slot[row] == within:
                start = int(texts.start[row])
                text = self.data[start : start + int(texts.length[row])]
                return _decoded(text)
        for shapes in table.shapes:
            if shapes.slot[row] == within:
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
        table = _KINDS[cls].read(self._bytes, names, start)
        self._starts.append((cls, b"".join(names.start), table))
        self.tables.append(table)
        return table, start


def _decoded(text: bytes) -> str | None:
    """Return a text, or None if it is none: then the interpreter finds that out."""
    try:
        return str(text, "utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None


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
    class_slot = learner.slot(cls)
    learner.new()
    kind = _KINDS[cls]
    first_slot = learner.slot(kind.first_field)
    classes, fields = kind.learn(learner, size)
    if not learner.at.good[0]:
        return None
    memoize = (b"\x94",) if memoized else ()
    parts = (fetch(class_slot), b")", b"\x81", *memoize, b"}", *memoize, b"(", fetch(first_slot))
    return Names(parts, size, tuple(fields.items()), classes, memoized)


_Learned: TypeAlias = tuple[tuple[int, ...], dict[str, int]]


def _learn_chunk(learner: _Learner, size: int) -> _Learned:
    learner.at.shapes(size)
    return (), {"sizes": learner.slot("sizes")}


def _learn_tensor(learner: _Learner, size: int) -> _Learned:
    at = learner.at
    properties = learner.slot(PropertiesRecord)
    at.expect(b")")
    at.expect_new(b"\x81")
    at.expect(b"(")
    at.references()
    at.references()
    at.flags()
    at.references()
    at.flags()
    at.expect_new(b"t")
    at.expect(b"b")
    fields = {"size": learner.slot("size")}
    at.shapes(size)
    fields["chunks"] = learner.slot("chunks")
    at.expect_new(b"]")
    if at.next()[0] == ord("("):
        at.expect(b"(")
    chunk = learner.slot(ChunkRecord)
    learner.new()
    fields["offsets"] = learner.slot("offsets")
    fields |= _learn_chunk(learner, size)[1]
    return (properties, chunk), fields


def _learn_storage(learner: _Learner, size: int) -> _Learned:
    at = learner.at
    at.texts()
    fields = {"index": learner.slot("index")}
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
    for slot, value in learner.memo.items():
        if type(value) is str and value == _TRANSFORMS:
            fields[_TRANSFORMS] = slot
    return (info,), fields


@dataclass(frozen=True, slots=True)
class _Kind:
    """How runs of one kind stand in a pickle.

    `target` is what they are put into, by the opcode `ends`; of what is on the stack for it
    before, `held` is the number of values, modulo 2.
    """

    target: type
    held: tuple[int, ...]
    ends: int
    first_field: str
    learn: Callable[[_Learner, int], _Learned]
    read: Callable[[Bytes, Names, int], Table]


_KINDS: Mapping[type, _Kind] = {
    ChunkRecord: _Kind(list, (0, 1), ord("e"), "offsets", _learn_chunk, read_chunks),
    IndexRecord: _Kind(dict, (0,), _SETITEMS, "fqn", _learn_storage, read_storage),
    TensorRecord: _Kind(dict, (1,), _SETITEMS, "properties", _learn_tensor, read_tensors),
}
