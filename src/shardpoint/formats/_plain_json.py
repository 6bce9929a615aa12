"""Plain Python values as JSON that gives the same values back, types and all.

JSON has no tuples, sets, bytes or keys that are no strings, so containers are written as lists
whose first entry names their kind: ``["tuple", 1, 2]``. Text, integers, booleans and None stand
for themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from pathlib import PurePath, PurePosixPath
from typing import Any, TypeAlias

from shardpoint.errors import FormatError, LimitExceededError

__all__ = ["Json", "from_json", "to_json"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""What the module `json` reads and writes."""

_MOST_ALIKE = 1000
_THEMSELVES = frozenset({type(None), bool, int, str})
_KINDS: Mapping[type, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
}


def to_json(value: Any) -> Json:
    """Return a value of plain types, or a path, as JSON.

    Raises
    ------
    FormatError
        If something in it is of another type.
    RecursionError
        If it is nested far deeper than any real one, or contains itself.
    """
    kind = type(value)
    if kind in _THEMSELVES:
        plain: Json = value
        return plain
    if kind is float:
        return ["float", value.hex()]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is dict:
        return ["dict", *map(to_json, chain.from_iterable(value.items()))]
    if kind in _KINDS:
        return [_KINDS[kind], *map(to_json, value)]
    if isinstance(value, PurePath):
        return ["path", str(value)]
    raise FormatError(f"a {kind.__name__} is no plain value")


def _unlike(keys: Collection[Any]) -> Collection[Any]:
    """Return keys or members of which not too many have one hash: each is compared with those."""
    if len(keys) > _MOST_ALIKE and max(Counter(map(hash, keys)).values()) > _MOST_ALIKE:
        raise LimitExceededError(f"more than {_MOST_ALIKE} keys have the same hash")
    return keys


def _pairs(parts: list[Any]) -> dict[Any, Any]:
    if len(parts) % 2:
        raise FormatError("a dict has a key without a value")
    return dict(zip(_unlike(parts[::2]), parts[1::2], strict=True))


_MAKERS: Mapping[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": lambda parts: set(_unlike(parts)),
    "frozenset": lambda parts: frozenset(_unlike(parts)),
    "dict": _pairs,
}
_TEXTS: Mapping[str, Callable[[str], Any]] = {
    "float": float.fromhex,
    "bytes": bytes.fromhex,
    "path": PurePosixPath,
}


def from_json(value: Json) -> Any:
    """Return the value that `to_json` was given; a path as a `PurePosixPath`.

    Raises
    ------
    FormatError
        If it is nothing that `to_json` gives.
    """
    if type(value) in _THEMSELVES:
        return value
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise FormatError(f"a {type(value).__name__} does not say what it is")
    kind, parts = value[0], value[1:]
    try:
        if kind in _TEXTS and len(parts) == 1 and isinstance(parts[0], str):
            return _TEXTS[kind](parts[0])
        if kind in _MAKERS:
            return _MAKERS[kind]([from_json(part) for part in parts])
    except FormatError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"a {kind} has parts that it cannot have: {error}") from error
    raise FormatError(f"{kind[:40]!r} is no kind of value")
