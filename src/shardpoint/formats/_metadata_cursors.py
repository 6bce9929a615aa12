"""Reads the same kind of pickle opcodes at many places of one pickle at once.

A `Cursors` stands before an opcode in each of many places. Its methods read what the
interpreter would read next there, for all of them in a few vector operations, and mark places
where something else stands. It starts only where somebody knows that an opcode starts, and
moves by whole opcodes, so it never mistakes the inside of a text or a number for opcodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["FRAME", "Bytes", "Cursors", "Int64s", "Shapes", "Texts", "fetch"]

Int64s: TypeAlias = npt.NDArray[np.int64]
_Bools: TypeAlias = npt.NDArray[np.bool_]
_Words: TypeAlias = npt.NDArray[np.uint64]

FRAME = 0x95
_MEMOIZE = 0x94
_BINGET, _LONG_BINGET = ord("h"), ord("j")
_SHORT_TEXT, _TEXT = 0x8C, ord("X")
_LONG1 = 0x8A
_NONE, _MARK, _TUPLE, _EMPTY_TUPLE = ord("N"), ord("("), ord("t"), ord(")")
_TRUE, _FALSE = 0x88, 0x89
_FRAME_BYTES = 9
_MOST_AXES = 16
_NEWOBJ = 0x81
_SEARCHED = 1 << 22  # bytes that are searched at once
_PADDING = 1024  # zeros behind the pickle, so that nothing has to ask whether it has ended


def _table(entries: dict[int, int], kind: type[np.generic]) -> npt.NDArray[np.generic]:
    table = np.zeros(256, kind)
    for opcode, value in entries.items():
        table[opcode] = value
    return table


_INTEGERS = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
_INTEGER_HEAD: Int64s = _table({**dict.fromkeys(_INTEGERS, 1), _LONG1: 2}, np.int64).view(np.int64)
_INTEGER_WIDTH: Int64s = _table(_INTEGERS, np.int64).view(np.int64)
_HIGHEST: _Words = _table(
    {ord("K"): 255, ord("M"): 65535, ord("J"): 2**31 - 1, _LONG1: 2**63 - 1}, np.uint64
).view(np.uint64)
_MASKS: _Words = np.array([(1 << 8 * width) - 1 for width in range(9)], np.uint64)
# Of a fetch or a text: bytes before what may follow it, and of the number in it.
_HEADS = {_BINGET: 2, _LONG_BINGET: 5, _SHORT_TEXT: 2, _TEXT: 5}
_HEAD: Int64s = _table(_HEADS, np.int64).view(np.int64)
_ARGUMENT: _Words = _table(
    {opcode: (1 << 8 * (head - 1)) - 1 for opcode, head in _HEADS.items()}, np.uint64
).view(np.uint64)
_IS_FETCH: _Bools = _table({_BINGET: 1, _LONG_BINGET: 1}, np.bool_).view(np.bool_)
_TUPLE_OF: npt.NDArray[np.uint8] = np.zeros(_MOST_AXES + 1, np.uint8)
_TUPLE_OF[:4] = (_EMPTY_TUPLE, 0x85, 0x86, 0x87)


def fetch(slot: int) -> bytes:
    """Return the opcode that fetches a memo slot."""
    return b"h" + bytes((slot,)) if slot < 1 << 8 else b"j" + slot.to_bytes(4, "little")


class Bytes:
    """A pickle as numbers.

    Attributes
    ----------
    bytes
        ``uint8``: the pickle, and zeros behind it.
    words
        ``uint64``: at each position the eight bytes from there on.
    size
        Of the pickle.
    """

    __slots__ = ("_instances", "bytes", "size", "words")

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self.bytes = np.zeros(self.size + _PADDING, np.uint8)
        self.bytes[: self.size] = np.frombuffer(data, np.uint8)
        count = len(self.bytes) - 8
        self.words: _Words = np.ndarray((count,), "<u8", buffer=self.bytes.data, strides=(1,))
        self._instances: Int64s | None = None

    def instances(self) -> Int64s:
        """Return all positions that look like the opcode NEWOBJ, ascending."""
        if self._instances is None:
            blocks = range(0, self.size, _SEARCHED)
            self._instances = np.concatenate(
                [np.flatnonzero(self.bytes[at : at + _SEARCHED] == _NEWOBJ) + at for at in blocks]
            )
        return self._instances


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Texts: the bytes at `start`, or what memo slot `reference` holds where that is not -1.

    `slot` is the memo slot that it was put into, counted from the first of the row, or -1.
    """

    start: Int64s
    length: Int64s
    reference: Int64s
    slot: Int64s


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """Some ``torch.Size``.

    `numbers` is ``int64[n, D]``, of which `axes` count; where `reference` is not -1, it is
    instead what that memo slot holds. `slot` is as in `Texts`.
    """

    numbers: Int64s
    axes: Int64s
    reference: Int64s
    slot: Int64s


class Cursors:
    """Places in one pickle.

    Attributes
    ----------
    position
        ``int64[n]``: where the next opcode is.
    good
        ``bool[n]``: False once something unexpected stood there.
    slots
        ``int64[n]``: memo slots that the opcodes passed so far have filled.
    memoized
        Whether every new value is put into the memo, as Python's pickler does.
    frames
        Whether to look for FRAME before each opcode. Few values have one inside, and looking
        costs as much as reading.
    """

    __slots__ = ("_source", "frames", "good", "memoized", "position", "slots")

    def __init__(self, source: Bytes, position: Int64s, *, memoized: bool, frames: bool) -> None:
        self._source = source
        self.position = position.copy()
        self.memoized = memoized
        self.frames = frames
        self.good: _Bools = np.ones(len(position), np.bool_)
        self.slots: Int64s = np.zeros(len(position), np.int64)

    def part(self, rows: Int64s) -> Cursors:
        """Return some of these places, to be moved on and put back with `put`."""
        part = Cursors(
            self._source, self.position[rows], memoized=self.memoized, frames=self.frames
        )
        part.good, part.slots = self.good[rows], self.slots[rows]
        return part

    def put(self, rows: Int64s, part: Cursors) -> None:
        """Take the state of a `part` back."""
        self.position[rows], self.good[rows], self.slots[rows] = (
            part.position,
            part.good,
            part.slots,
        )

    def next(self) -> npt.NDArray[np.uint8]:
        """Return the next opcodes, without passing them."""
        if self.frames:
            self.pass_frames()
        opcodes: npt.NDArray[np.uint8] = self._source.bytes[self.position]
        return opcodes

    def pass_frames(self) -> None:
        """Pass a FRAME where one stands."""
        source = self._source
        rows = np.flatnonzero(source.bytes[self.position] == FRAME)
        if len(rows):
            after = self.position[rows] + _FRAME_BYTES
            left = np.maximum(source.size - after, 0).astype(np.uint64)
            self.good[rows] &= source.words[after - 8] <= left
            self.position[rows] = np.minimum(after, source.size)

    def expect(self, *opcodes: bytes) -> None:
        """Pass these opcodes."""
        words = self._source.words
        for code in opcodes if self.frames else _in_words(opcodes):
            if self.frames:
                self.pass_frames()
            wanted = np.uint64(int.from_bytes(code, "little"))
            self.good &= words[self.position] & _MASKS[len(code)] == wanted
            self.position = self.position + len(code)

    def expect_memoize(self, where: _Bools | None) -> None:
        """Pass MEMOIZE, at all places or at some, if new values are memoized."""
        if not self.memoized:
            return
        found = self.next() == _MEMOIZE
        if where is None:
            self.good &= found
            self.position = self.position + 1
            self.slots = self.slots + 1
        else:
            self.good &= found | ~where
            self.position = self.position + where
            self.slots = self.slots + where

    def integers(self) -> Int64s:
        """Pass an int of 0 to 2**63 - 1."""
        self.good &= _INTEGER_HEAD[self.next()] > 0
        return self._integers()

    def _integers(self) -> Int64s:
        """Pass an int where there is one; elsewhere give 0 and stay."""
        source, position = self._source, self.position
        opcode = source.bytes[position]
        head, width = _INTEGER_HEAD[opcode], _INTEGER_WIDTH[opcode]
        long = opcode == _LONG1
        if long.any():
            given = source.bytes[position + 1].astype(np.int64)
            width = np.where(long, np.minimum(given, 8), width)
            value = source.words[position + head] & _MASKS[width]
            sign = value >> (np.maximum(width, 1) * 8 - 1).astype(np.uint64)
            self.good &= ~long | ((given <= 8) & (sign == 0))
        else:
            value = source.words[position + head] & _MASKS[width]
        self.good &= value <= _HIGHEST[opcode]
        self.position = position + head + width
        numbers: Int64s = value.view(np.int64)
        return numbers

    def integers_or_none(self) -> Int64s:
        """Pass an int, or None, which becomes -1."""
        opcode = self.next()
        none = opcode == _NONE
        self.good &= none | (_INTEGER_HEAD[opcode] > 0)
        value = self._integers()
        self.position = self.position + none
        return np.where(none, -1, value)

    def texts(self) -> Texts:
        """Pass a text: one that stands here, or one from the memo."""
        source = self._source
        opcode = self.next()
        head = _HEAD[opcode]
        self.good &= head > 0
        number = (source.words[self.position + 1] & _ARGUMENT[opcode]).view(np.int64)
        fetched = _IS_FETCH[opcode]
        start = self.position + head
        length = np.where(fetched, 0, number)
        end = start + length
        self.good &= end <= source.size
        self.position = np.minimum(end, source.size)
        if self.memoized:
            self.expect_memoize(~fetched)
        else:
            self.good &= fetched  # a text that nothing else uses is not expected
        return Texts(start, length, np.where(fetched, number, -1), self._last_slot(~fetched))

    def _last_slot(self, made: _Bools) -> Int64s:
        """Return the slot filled last, where a value was made; elsewhere -1."""
        if not self.memoized:
            return np.full(len(made), -1, np.int64)
        return np.where(made, self.slots - 1, -1)

    def at_text(self) -> _Bools:
        """Return whether a text or a fetch comes next, without passing it."""
        there: _Bools = _HEAD[self.next()] > 0
        return there

    def flags(self) -> _Bools:
        """Pass a bool."""
        opcode = self.next()
        value: _Bools = opcode == _TRUE
        self.good &= value | (opcode == _FALSE)
        self.position = self.position + 1
        return value

    def references(self) -> Int64s:
        """Pass a fetch, and give the slot."""
        opcode = self.next()
        self.good &= _IS_FETCH[opcode]
        number = (self._source.words[self.position + 1] & _ARGUMENT[opcode]).view(np.int64)
        self.position = self.position + _HEAD[opcode]
        return number

    def shapes(self, size_slot: int) -> Shapes:
        """Pass a ``torch.Size``: made here by the function in `size_slot`, or from the memo."""
        slot = self.references()
        reference = np.where(slot == size_slot, -1, slot)
        made = reference < 0
        rows = np.flatnonzero(made)
        if len(rows) == len(reference):
            numbers, axes = self._numbers()
            return Shapes(numbers, axes, reference, self._last_slot(made))
        axes = np.zeros(len(reference), np.int64)
        numbers = np.zeros((len(reference), 0), np.int64)
        if len(rows):
            part = self.part(rows)
            found, axes[rows] = part._numbers()
            self.put(rows, part)
            numbers = np.zeros((len(reference), found.shape[1]), np.int64)
            numbers[rows] = found
        return Shapes(numbers, axes, reference, self._last_slot(made))

    def _numbers(self) -> tuple[Int64s, Int64s]:
        """Pass a tuple of ints, and the call with it."""
        marked = self.next() == _MARK
        if marked.any():
            self.position = self.position + marked
        axes = np.zeros(len(marked), np.int64)
        columns: list[Int64s] = []
        while len(columns) < _MOST_AXES:
            found = _INTEGER_HEAD[self.next()] > 0
            if not found.any():
                break
            columns.append(self._integers())
            axes += found
        closing = np.where(marked, np.where(axes > 0, _TUPLE, 0), _TUPLE_OF[axes])
        self.good &= (self.next() == closing) & (closing > 0)
        self.position = self.position + 1
        self.expect_memoize(None if axes.all() else axes > 0)
        self.expect_new(b"\x85")
        self.expect_new(b"R")
        numbers = np.stack(columns, axis=1) if columns else np.zeros((len(axes), 0), np.int64)
        return numbers, axes

    def expect_new(self, *opcodes: bytes) -> None:
        """Pass opcodes of which the last makes a value, and its MEMOIZE."""
        if self.memoized:
            self.expect(*opcodes, b"\x94")
            self.slots = self.slots + 1
        else:
            self.expect(*opcodes)


def _in_words(opcodes: tuple[bytes, ...]) -> list[bytes]:
    code = b"".join(opcodes)
    return [code[start : start + 8] for start in range(0, len(code), 8)]
