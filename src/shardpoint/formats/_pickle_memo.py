"""What a pickle refers to by the number of its memo, defined once at its start."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import filterfalse

import numpy as np

from shardpoint.formats._pickle_writing import joined_texts, text

__all__ = ["Memo"]

_LONG_FETCH = struct.Struct("<cI").pack
_TO_MEMO = b"\x940"  # MEMOIZE POP


class Memo:
    """Hands out the bytes that fetch a value; those that make it go to `output` once."""

    def __init__(self, output: list[bytes]) -> None:
        self._output = output
        self._known: dict[bytes, bytes] = {}
        self._texts: dict[str, bytes] = {}
        self._count = 0

    def define(self, definition: bytes) -> bytes:
        fetch = self._known.get(definition)
        if fetch is None:
            fetch = self._known[definition] = self._fetch()
            self._output.append(definition + _TO_MEMO)
        return fetch

    def _fetch(self) -> bytes:
        """Return what fetches the next value that is put into the memo."""
        number = self._count
        self._count = number + 1
        return _LONG_FETCH(b"j", number) if number >= 1 << 8 else b"h" + bytes((number,))

    def text(self, value: str) -> bytes:
        fetch = self._texts.get(value)
        if fetch is None:
            fetch = self._texts[value] = self._fetch()
            self._output.append(text(value) + _TO_MEMO)
        return fetch

    def texts(self, values: Iterable[str]) -> dict[str, bytes]:
        """Return the fetches of these texts, and of all others met so far."""
        texts = self._texts
        new = list(dict.fromkeys(filterfalse(texts.__contains__, values)))
        short = max(0, (1 << 8) - self._count)
        for value in new[:short]:
            self.text(value)
        many = new[short:]
        if many:
            self._output.append(joined_texts(many, _TO_MEMO))
            fetches = np.empty(len(many), [("opcode", "S1"), ("number", "<u4")])
            fetches["opcode"] = b"j"
            fetches["number"] = np.arange(self._count, self._count + len(many))
            texts.update(zip(many, fetches.view("V5").tolist(), strict=True))
            self._count += len(many)
        return texts

    def name(self, module: str, name: str) -> bytes:
        return self.define(self.text(module) + self.text(name) + b"\x93")
