"""Columns to pickle opcodes: the same few opcodes for every row, assembled for many rows at once.

A row is made of parts, each of some bytes: the same in all rows, looked up, or a number. The
parts are written as words of eight bytes, one part after another in all rows, so that what a
word has too much is overwritten by what follows; the first part of each row, which has at
least eight bytes, comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Choices", "Part", "assemble", "integers", "looked_up"]

_Words: TypeAlias = npt.NDArray[np.uint64]
Int64s: TypeAlias = npt.NDArray[np.int64]

_WORD = 8


class Part:
    """A part of every row: `words` is ``uint64[n, k]``, of which `length` bytes count."""

    __slots__ = ("length", "words")

    def __init__(self, words: _Words, length: Int64s) -> None:
        self.words = words
        self.length = length


class Choices:
    """Byte strings of which each row of a part has one."""

    __slots__ = ("_lengths", "_words")

    def __init__(self, choices: Sequence[bytes]) -> None:
        lengths = np.fromiter(map(len, choices), np.int64, len(choices))
        words = -(-max(int(lengths.max(initial=0)), 1) // _WORD)
        table = b"".join(map(bytes.ljust, choices, repeat(words * _WORD), repeat(b"\0")))
        self._lengths = lengths
        self._words = np.frombuffer(table, "<u8").astype(np.uint64).reshape(-1, words)

    def __getitem__(self, which: Int64s) -> Part:
        return Part(self._words[which], self._lengths[which])


def looked_up(choices: Sequence[bytes], which: Int64s) -> Part:
    """Return the part that has, in each row, one of a few byte strings."""
    return Choices(choices)[which]


def integers(values: Int64s, where: npt.NDArray[np.bool_] | None = None) -> Part:
    """Return the part that is an int in each row, or in some rows; else nothing.

    As `shardpoint.formats._pickle_writing.integer` writes it.
    """
    word = values.view(np.uint64)
    length = np.full(len(values), 5, np.int64)
    first = (word << np.uint64(8)) | np.uint64(ord("J"))
    positive = values >= 0
    for opcode, width in ((b"M", 2), (b"K", 1)):
        small = positive & (values < 1 << 8 * width)
        first = np.where(small, (word << np.uint64(8)) | np.uint64(opcode[0]), first)
        length[small] = 1 + width
    words = first[:, None]
    large = np.flatnonzero((values < -(1 << 31)) | (values >= 1 << 31))
    if len(large):
        magnitude = np.where(values[large] < 0, -values[large], values[large]).view(np.uint64)
        widths = np.full(len(large), 5, np.int64)
        for bits in (39, 47, 55, 63):
            widths += magnitude >= np.uint64(1 << bits)
        words = np.stack([first, np.zeros_like(first)], axis=1)
        head = (widths.astype(np.uint64) << np.uint64(8)) | np.uint64(0x8A)  # LONG1
        words[large, 0] = head | (word[large] << np.uint64(16))
        words[large, 1] = (values[large] >> 48).view(np.uint64)
        length[large] = 2 + widths
    return Part(words, length if where is None else np.where(where, length, 0))


def assemble(start: bytes, parts: Sequence[Part | bytes], rows: int) -> tuple[memoryview, Int64s]:
    """Return the bytes of all rows, and where each ends.

    Parameters
    ----------
    start
        What every row begins with: at least eight bytes.
    parts
        What follows; bytes are the same in every row.
    rows
        Their number.
    """
    if len(start) < _WORD:
        raise ValueError(f"rows begin with {len(start)} bytes, not {_WORD}")
    total = np.full(rows, len(start), np.int64)
    for part in parts:
        total += len(part) if isinstance(part, bytes) else part.length
    ends = np.cumsum(total)
    size = int(ends[-1]) if rows else 0
    output = np.empty(size + 4 * _WORD, np.uint8)
    words: _Words = np.ndarray((size + 3 * _WORD,), "<u8", buffer=output.data, strides=(1,))
    first = ends - total
    position = first + len(start)
    for part in parts:
        if isinstance(part, bytes):
            _write_constant(words, position, part)
            position = position + len(part)
            continue
        words[position] = part.words[:, 0]
        for number in range(1, part.words.shape[1]):
            longer = np.flatnonzero(part.length > number * _WORD)
            words[position[longer] + number * _WORD] = part.words[longer, number]
        position = position + part.length
    _write_constant(words, first, start)
    return output.data[:size], ends


def _write_constant(words: _Words, position: Int64s, constant: bytes) -> None:
    for begin in range(0, len(constant), _WORD):
        # The last word ends where the constant ends, if that is long enough.
        at = begin if begin + _WORD <= len(constant) else max(len(constant) - _WORD, 0)
        word = constant[at : at + _WORD].ljust(_WORD, b"\0")
        words[position + at] = np.uint64(int.from_bytes(word, "little"))
