"""Values of objects, made short and simple enough to be shown or written as JSON."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np

from shardpoint.formats.object_decoder import (
    DeviceValue,
    DTypeValue,
    LayoutValue,
    MemoryFormatValue,
)

__all__ = ["KIND", "Simple", "simplify", "value_text"]

Simple: TypeAlias = "bool | int | float | str | list[Simple] | dict[str, Simple] | None"
"""What JSON can hold; all numbers are finite."""

KIND = "$type"
"""The name that marks, in a JSON object, a value that JSON has no type for."""

_MOST_VALUES = 200
_MOST_LETTERS = 1000
_MOST_DEPTH = 8
_MOST_BITS = 128
_TEXTUAL = (datetime.date, datetime.time, datetime.timedelta, datetime.timezone, PurePath)


def simplify(value: Any) -> Simple:
    """Return a value as JSON has it, or what can be said of it in short.

    Numbers, strings and short containers of them are themselves. Anything else becomes an
    object with `KIND`: arrays with dtype and shape, long strings and containers with their
    length, numbers that JSON lacks with their text. Never walks more than a few hundred
    values: a pickle can describe far more than it has bytes, by naming one part many times.
    """
    return _Walk().simple(value, 0)


class _Walk:
    """Counts what has been looked at, over one value and everything in it."""

    def __init__(self) -> None:
        self._left = _MOST_VALUES

    def simple(self, value: Any, depth: int) -> Simple:
        self._left -= 1
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, (int, float, complex, str, bytes, bytearray)):
            return _plain(value)
        if isinstance(value, np.ndarray):
            return {KIND: "array", "dtype": str(value.dtype), "shape": list(value.shape)}
        if isinstance(value, np.generic):
            return self._numpy_scalar(value, depth)
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, (list, tuple)):
            return self._items("list", value, depth)
        if isinstance(value, (set, frozenset)):
            items = self._items("set", value, depth)
            return {KIND: "set", "items": items} if isinstance(items, list) else items
        if isinstance(value, (DTypeValue, LayoutValue, MemoryFormatValue)):
            return {KIND: type(value).__name__.removesuffix("Value").lower(), "text": value.name}
        if isinstance(value, DeviceValue):
            return {KIND: "device", "text": _short(str(value))}
        if isinstance(value, _TEXTUAL):
            return {KIND: type(value).__name__, "text": _short(str(value))}
        return {KIND: type(value).__name__}

    def _numpy_scalar(self, value: np.generic, depth: int) -> Simple:
        plain = value.item()
        if isinstance(plain, (bool, int, float, complex, str, bytes)):
            return self.simple(plain, depth)
        return {KIND: "scalar", "dtype": str(value.dtype)}

    def _items(self, kind: str, values: Any, depth: int) -> Simple:
        if len(values) > self._left or depth >= _MOST_DEPTH:
            return {KIND: kind, "length": len(values)}
        return self._all(values, depth)

    def _all(self, values: Iterable[Any], depth: int) -> list[Simple]:
        return [self.simple(value, depth + 1) for value in values]

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> Simple:
        if 2 * len(value) > self._left or depth >= _MOST_DEPTH:
            return {KIND: "dict", "length": len(value)}
        named = all(isinstance(key, str) and len(key) <= _MOST_LETTERS for key in value)
        if named and KIND not in value:
            return {str(key): self.simple(item, depth + 1) for key, item in value.items()}
        pairs: list[Simple] = [self._all(pair, depth) for pair in value.items()]
        return {KIND: "dict", "items": pairs}


def _plain(value: Any) -> Simple:
    """Turn a number, text or bytes; subclasses among them (numpy's float64) become plain."""
    if isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            return {KIND: "int", "bits": value.bit_length()}
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {KIND: "float", "text": str(float(value))}
    if isinstance(value, complex):
        return {KIND: "complex", "text": str(complex(value))}
    if isinstance(value, str):
        if len(value) > _MOST_LETTERS:
            return {KIND: "str", "length": len(value), "start": value[:_MOST_LETTERS]}
        return str(value)
    return {KIND: type(value).__name__, "length": len(value)}


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"


def value_text(value: Simple) -> str:
    """Return a simple value as one line for people; control characters are still in it."""
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if not isinstance(value, dict):
        return repr(value)
    kind = value.get(KIND)
    if kind is None:
        pairs = (f"{key!r}: {value_text(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if kind in ("float", "complex"):
        return str(value["text"])
    details = (f"{key}={value_text(item)}" for key, item in value.items() if key != KIND)
    return f"{kind}({', '.join(details)})"
