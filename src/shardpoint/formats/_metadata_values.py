"""What the columns of runs say, once everything that they fetch from the memo is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import DType
from shardpoint.formats._metadata_cursors import FRAME, Int64s, Shapes, Texts
from shardpoint.formats._metadata_grammar import StorageColumns, TensorColumns
from shardpoint.formats._metadata_records import Layout, MemoryFormat
from shardpoint.formats._metadata_tables import Table
from shardpoint.formats._pickle_opcodes import RunsRefused

__all__ = ["TableValues"]

_BINGET, _LONG_BINGET = 0x68, 0x6A
_SHORT_TEXT, _TEXT = 0x8C, 0x58
_HIGHEST = 2**63 - 1


@dataclass(frozen=True, slots=True, eq=False)
class TensorValues:
    """Tensors; columns that number something do so for the list before them."""

    dtypes: list[DType]
    dtype: Int64s
    size: Int64s
    axes: Int64s
    requires_grad: npt.NDArray[np.bool_]
    pin_memory: npt.NDArray[np.bool_]
    memory_formats: list[int]
    memory_format: Int64s
    next_key: Int64s


class TableValues:
    """Texts, numbers and transforms of the rows that were taken from some tables.

    Attributes
    ----------
    texts
        Every text once; columns have positions here.
    transforms
        Every list of transforms once, none first; columns have positions here.
    """

    def __init__(self, data: bytes, tables: Sequence[Table], memo: Mapping[int, Any]) -> None:
        self._data = data
        self._memo = memo
        self._text_numbers: dict[bytes, int] = {}
        self.texts: list[str] = []
        self.transforms: dict[tuple[str, ...], int] = {(): 0}
        self._rows = {id(table): np.flatnonzero(table.first_slot >= 0) for table in tables}
        # What may be fetched: the slots, ascending, and what is in them.
        self._made_shapes: list[tuple[Int64s, Shapes, Int64s]] = []
        self._made_texts: list[tuple[Int64s, Int64s]] = []
        self._own_texts: dict[int, Int64s] = {}
        self._shape_columns: dict[int, tuple[Int64s, Int64s]] = {}
        self._tensors: dict[int, TensorValues] = {}
        for table in tables:
            self._note(table, self._rows[id(table)])

    def _note(self, table: Table, rows: Int64s) -> None:
        first = table.first_slot[rows]
        for shapes in table.shapes:
            within = shapes.slot[rows]
            made = within >= 0
            self._made_shapes.append((first[made] + within[made], shapes, rows[made]))
        for texts in table.texts:
            within = texts.slot[rows]
            made = within >= 0
            numbers = self._read_texts(texts, rows[made])
            self._own_texts[id(texts)] = numbers
            self._made_texts.append((first[made] + within[made], numbers))

    def rows(self, table: Table) -> Int64s:
        """Return the rows that were taken, ascending; all columns here are of these."""
        return self._rows[id(table)]

    def text_number(self, text: str) -> int:
        """Return the position of a text in `texts`."""
        return self._number(text.encode("utf-8", "surrogatepass"))

    def transform_number(self, transforms: tuple[str, ...]) -> int:
        """Return the position of a list of transforms in `transforms`."""
        return self.transforms.setdefault(transforms, len(self.transforms))

    def text_column(self, table: Table, texts: Texts) -> Int64s:
        """Return the positions of the texts of one column; -1 where there is none."""
        rows = self._rows[id(table)]
        reference = texts.reference[rows]
        fetched = reference >= 0
        result = np.full(len(rows), -1, np.int64)
        result[texts.slot[rows] >= 0] = self._own_texts[id(texts)]
        if fetched.any():
            self._check_order(table, rows[fetched], reference[fetched])
            wanted, where = _distinct(reference[fetched])
            result[fetched] = self._fetched_texts(wanted)[where]
        return result

    def _fetched_values(self, table: Table, references: Int64s) -> tuple[list[Any], Int64s]:
        """Return what slots of the memo outside of runs hold, and which each row has."""
        rows = self._rows[id(table)]
        reference = references[rows]
        self._check_order(table, rows, reference)
        wanted, where = _distinct(reference)
        return [self._memo.get(slot) for slot in wanted.tolist()], where

    def shape_columns(self, table: Table, shapes: Shapes) -> tuple[Int64s, Int64s]:
        """Return the numbers of one column, ``int64[n, D]``, and how many of them count."""
        known = self._shape_columns.get(id(shapes))
        if known is None:
            known = self._shape_columns[id(shapes)] = self._read_shapes(table, shapes)
        return known

    def _read_shapes(self, table: Table, shapes: Shapes) -> tuple[Int64s, Int64s]:
        rows = self._rows[id(table)]
        reference = shapes.reference[rows]
        numbers, axes = shapes.numbers[rows], shapes.axes[rows]
        fetched = np.flatnonzero(reference >= 0)
        if len(fetched):
            self._check_order(table, rows[fetched], reference[fetched])
            wanted, where = _distinct(reference[fetched])
            found, found_axes = self._fetched_shapes(wanted)
            wide = max(numbers.shape[1], found.shape[1])
            numbers = _widened(numbers, wide)
            numbers[fetched] = _widened(found, wide)[where]
            axes[fetched] = found_axes[where]
        return numbers, axes

    def tensors(self, table: Table, columns: TensorColumns) -> TensorValues:
        """Return all about the tensors of a table but their chunks."""
        known = self._tensors.get(id(table))
        if known is not None:
            return known
        rows = self._rows[id(table)]
        dtypes, dtype = self._fetched_values(table, columns.dtype)
        layouts, _ = self._fetched_values(table, columns.layout)
        formats, memory_format = self._fetched_values(table, columns.memory_format)
        if not (
            all(type(value) is DType for value in dtypes)
            and all(type(value) is Layout and value.name == "torch.strided" for value in layouts)
            and all(type(value) is MemoryFormat for value in formats)
        ):
            raise RunsRefused
        found = self._tensors[id(table)] = TensorValues(
            dtypes,
            dtype,
            *self.shape_columns(table, columns.size),
            columns.requires_grad[rows],
            columns.pin_memory[rows],
            [value.code for value in formats],
            memory_format,
            self.text_column(table, columns.next_key),
        )
        return found

    def transform_column(self, table: Table, columns: StorageColumns) -> Int64s:
        """Return the positions of the lists of transforms of one column."""
        rows = self._rows[id(table)]
        start, length = columns.transform_start[rows], columns.transform_length[rows]
        result = np.zeros(len(rows), np.int64)
        known: dict[bytes, int] = {}
        listed = np.flatnonzero(length)
        making = np.flatnonzero(columns.transform_slot[rows] >= 0)
        slots = table.first_slot[rows[making]] + columns.transform_slot[rows[making]]
        for row in listed.tolist():
            first = int(start[row])
            code = self._data[first : first + int(length[row])]
            number = known.get(code)
            if number is None:
                before = int(table.first_slot[rows[row]])
                made = self._followed(code, before, slots, start[making], length[making])
                number = self.transform_number(self._list(made, before))
                known[code] = number
            result[row] = number
        return result

    def _followed(
        self, code: bytes, before: int, slots: Int64s, start: Int64s, length: Int64s
    ) -> bytes:
        """Return the code that makes a list: what is given, or what it fetches from a run."""
        while code[0] == FRAME:
            code = code[9:]
        if code[0] not in (_BINGET, _LONG_BINGET):
            return code
        slot = int.from_bytes(code[1:], "little")
        at, hit = _find(slots, np.array([slot]))
        if slot >= before or not hit[0]:
            return code
        first = int(start[at[0]])
        return self._data[first : first + int(length[at[0]])]

    def _check_order(self, table: Table, rows: Int64s, reference: Int64s) -> None:
        if (reference >= table.first_slot[rows]).any():
            raise RunsRefused  # of a value that comes only later

    def _number(self, data: bytes) -> int:
        number = self._text_numbers.get(data)
        if number is None:
            try:
                self.texts.append(str(data, "utf-8", "surrogatepass"))
            except UnicodeDecodeError:
                raise RunsRefused from None
            number = self._text_numbers[data] = len(self.texts) - 1
        return number

    def _read_texts(self, texts: Texts, rows: Int64s) -> Int64s:
        data, known = self._data, self._text_numbers.get
        start = texts.start[rows]
        result = []
        for first, last in zip(start.tolist(), (start + texts.length[rows]).tolist(), strict=True):
            text = data[first:last]
            number = known(text)
            result.append(self._number(text) if number is None else number)
        return np.array(result, np.int64)

    def _fetched_texts(self, wanted: Int64s) -> Int64s:
        result = np.full(len(wanted), -1, np.int64)
        for slots, numbers in self._made_texts:
            at, hit = _find(slots, wanted)
            result[hit] = numbers[at[hit]]
        for row in np.flatnonzero(result < 0).tolist():
            text = self._memo.get(int(wanted[row]))
            if type(text) is not str:
                raise RunsRefused
            result[row] = self.text_number(text)
        return result

    def _fetched_shapes(self, wanted: Int64s) -> tuple[Int64s, Int64s]:
        numbers = np.zeros((len(wanted), 0), np.int64)
        axes = np.full(len(wanted), -1, np.int64)
        for slots, shapes, rows in self._made_shapes:
            at, hit = _find(slots, wanted)
            if hit.any():
                source = rows[at[hit]]
                found = shapes.numbers[source]
                wide = max(numbers.shape[1], found.shape[1])
                numbers = _widened(numbers, wide)
                numbers[hit] = _widened(found, wide)
                axes[hit] = shapes.axes[source]
        rest = np.flatnonzero(axes < 0)
        values: list[Any] = [self._memo.get(slot) for slot in wanted[rest].tolist()]
        for value in values:
            if type(value) is not tuple or not all(
                type(number) is int and 0 <= number <= _HIGHEST for number in value
            ):
                raise RunsRefused
        wide = max([numbers.shape[1], *map(len, values)])
        if wide > 64:
            raise RunsRefused
        numbers = _widened(numbers, wide)
        for row, value in zip(rest.tolist(), values, strict=True):
            numbers[row, : len(value)] = value
            axes[row] = len(value)
        return numbers, axes

    def _list(self, code: bytes, before: int) -> tuple[str, ...]:
        """Return the texts in a list that `code` makes, or fetches from the memo outside of runs.

        What it fetches must have been in the memo before slot `before`.
        """
        while code[0] == FRAME:
            code = code[9:]
        if code[0] in (_BINGET, _LONG_BINGET):
            value = self._memo.get(int.from_bytes(code[1:], "little"))
            if type(value) is not list or not all(type(text) is str for text in value):
                raise RunsRefused
            return tuple(value)
        texts = []
        position = 1
        while position < len(code) - 1:
            opcode = code[position]
            if opcode in (_SHORT_TEXT, _TEXT, _BINGET, _LONG_BINGET):
                head = 2 if opcode in (_SHORT_TEXT, _BINGET) else 5
                number = int.from_bytes(code[position + 1 : position + head], "little")
                position += head
                if opcode in (_SHORT_TEXT, _TEXT):
                    texts.append(self._number(code[position : position + number]))
                    position += number
                else:
                    if number >= before:
                        raise RunsRefused
                    texts.append(int(self._fetched_texts(np.array([number]))[0]))
            else:
                position += 9 if opcode == FRAME else 1  # or MEMOIZE, MARK
        return tuple(self.texts[number] for number in texts)


def _find(slots: Int64s, wanted: Int64s) -> tuple[Int64s, Any]:
    """Return where each wanted slot is among ascending ones, and whether it is there."""
    if not len(slots):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    at = np.minimum(np.searchsorted(slots, wanted), len(slots) - 1)
    return at, slots[at] == wanted


def _distinct(reference: Int64s) -> tuple[Int64s, Int64s]:
    """Return each slot once, and where each reference is among them."""
    if len(reference) > 1 and (np.diff(reference) > 0).all():
        return reference, np.arange(len(reference))
    # A table over all slots is far cheaper than sorting the references.
    seen = np.zeros(int(reference.max()) + 1, np.bool_)
    seen[reference] = True
    wanted = np.flatnonzero(seen)
    return wanted, np.searchsorted(wanted, reference)


def _widened(numbers: Int64s, axes: int) -> Int64s:
    if numbers.shape[1] == axes:
        return numbers
    result = np.zeros((len(numbers), axes), np.int64)
    result[:, : numbers.shape[1]] = numbers
    return result
