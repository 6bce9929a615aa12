"""What a planner stored: paths of flattened keys, or plain values of its own.

torch lets a planner put any object into ``Metadata.planner_data``. Its own planners store the
path of each key; others a list with one entry a rank, or paths and more. What consists of
plain values alone is read and written; nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from itertools import chain
from typing import Any, TypeAlias

from shardpoint.errors import FormatError
from shardpoint.formats._pickle_guards import Limits, describe, measure
from shardpoint.formats._pickle_writing import binary, floating, integer

__all__ = ["check_plain", "planner_values", "split_planner_data"]

Paths: TypeAlias = dict[str, tuple[str | int, ...]]

# Shared parts are written out at each place where they appear, so this bounds what is written.
_LIMITS = Limits(max_values=10_000_000)

_LEAVES = frozenset({type(None), bool, int, float, str, bytes})
_BRACKETS: Mapping[type, tuple[bytes, bytes]] = {
    list: (b"](", b"e"),  # EMPTY_LIST MARK ... APPENDS
    tuple: (b"(", b"t"),  # MARK ... TUPLE
    dict: (b"}(", b"u"),  # EMPTY_DICT MARK ... SETITEMS
    set: (b"\x8f(", b"\x90"),  # EMPTY_SET MARK ... ADDITEMS
    frozenset: (b"(", b"\x91"),  # MARK ... FROZENSET
}
_CONSTANTS = {None: b"N", True: b"\x88", False: b"\x89"}


def _is_path(value: Any) -> bool:
    if type(value) is not tuple or not value:
        return False
    return all(type(part) is str or type(part) is int for part in value)


def split_planner_data(
    value: Any, *, keys: Container[str], source: str
) -> tuple[Paths | None, Any]:
    """Return the paths in what a planner stored, and all of it if it is more than paths.

    Parameters
    ----------
    value
        What stands in ``planner_data``, unchecked.
    keys
        The checkpoint's keys: beside other values, only their paths count as paths.
    source
        Where it stands; errors begin with it.

    Raises
    ------
    FormatError
        If there is anything but plain values in it, or it contains itself.
    LimitExceededError
        If it is nested too deeply, or has far too many values when written out.
    """
    if value is None:
        return None, None
    if type(value) is not dict:
        check_plain(value, source=source)
        return None, value
    paths: Paths = {}
    whole = True
    for key, path in value.items():
        if type(key) is str and _is_path(path):
            paths[key] = path
        else:
            whole = False
    if whole:
        return paths, None
    check_plain(value, source=source)
    return {key: path for key, path in paths.items() if key in keys} or None, value


def _parts(value: Any) -> Iterator[Any]:
    if type(value) is dict:
        return chain(value.keys(), value.values())
    return iter(value)


def check_plain(value: Any, *, source: str) -> None:
    """Check that a planner's data is of plain types throughout, and cheap to walk.

    Subclasses of plain types are not plain. Every shared part is looked at once.

    Raises
    ------
    FormatError
        If something in it is of another type, or it contains itself.
    LimitExceededError
        If it is nested too deeply, or has far too many values when written out.
    """
    seen: set[int] = set()
    pending: list[Any] = [value]
    while pending:
        part = pending.pop()
        if type(part) in _LEAVES:
            continue
        if type(part) not in _BRACKETS:
            kind = getattr(part, "torch_name", None)  # what stands for one of torch's classes
            what = f"a {kind}" if type(kind) is str else describe(part)
            raise FormatError(f"{source}: planner_data holds {what}, which is no plain value")
        if id(part) not in seen:
            seen.add(id(part))
            pending.extend(_parts(part))
    measure(value, source=f"{source}: planner_data", limits=_LIMITS)


def planner_values(
    value: Any, define_text: Callable[[str], bytes], define: Callable[[bytes], bytes]
) -> Iterator[bytes]:
    """Yield the opcodes of a checked value, without recursion.

    Containers that appear twice are written twice, and are two values when read.

    Parameters
    ----------
    define_text, define
        Take a text, or the opcodes of bytes, and give the opcodes that fetch it from the memo,
        so that a long one is written once.
    """
    pending: list[Any] = [value]
    ends: list[bytes] = []
    end = object()  # stands behind the parts of the innermost container
    while pending:
        part = pending.pop()
        if part is end:
            yield ends.pop()
            continue
        if type(part) in _LEAVES:
            yield _leaf(part, define_text, define)
            continue
        start, finish = _BRACKETS[type(part)]
        yield start
        ends.append(finish)
        pending.append(end)
        parts = chain.from_iterable(part.items()) if type(part) is dict else part
        pending.extend(reversed(list(parts)))


def _leaf(
    value: Any, define_text: Callable[[str], bytes], define: Callable[[bytes], bytes]
) -> bytes:
    if value is None or type(value) is bool:
        return _CONSTANTS[value]
    if type(value) is int:
        return integer(value)
    if type(value) is float:
        return floating(value)
    return define_text(value) if type(value) is str else define(binary(value))
