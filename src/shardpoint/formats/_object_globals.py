"""Plain Python values that a pickle makes by calling a name: the closed list and its checks.

Every entry checks its arguments itself and calls only what is written here. Names of Python 2
(``__builtin__``), which pickles of protocol 2 use, mean the same as today's.
"""

from __future__ import annotations

import codecs
import datetime
import pathlib
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

from shardpoint.errors import FormatError
from shardpoint.formats._pickle_guards import WorkBudget, describe

__all__ = ["CALLS", "Call", "canonical_module"]

_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def canonical_module(module: str) -> str:
    """Give today's name of a module."""
    return _MODULES.get(module, module)


class Call:
    """A name that stands for one function of ours.

    Attributes
    ----------
    name
        The dotted name in the pickle.
    function
        Called with the arguments and the budget that large copies are charged to.
    kind
        The builtin type it names, where it may be the default of a ``defaultdict``.
    """

    __slots__ = ("function", "kind", "name")

    def __init__(
        self,
        name: str,
        function: Callable[[tuple[Any, ...], WorkBudget], Any],
        kind: type | None = None,
    ) -> None:
        self.name = name
        self.function = function
        self.kind = kind


def _refuse(name: str, arguments: tuple[Any, ...]) -> FormatError:
    shown = ", ".join(map(describe, arguments[:6])) or "nothing"
    return FormatError(f"{name} is called with {shown}")


def _encode(arguments: tuple[Any, ...], budget: WorkBudget) -> bytes:
    """``_codecs.encode``: how protocol 2 writes bytes."""
    match arguments:
        case (str() as text, str("latin1" | "latin-1")):
            budget.spend(len(text))
            return codecs.encode(text, "latin-1")
    raise _refuse("_codecs.encode", arguments)


def _bytes(arguments: tuple[Any, ...], budget: WorkBudget) -> bytes:
    if arguments:
        raise _refuse("bytes", arguments)
    return b""


def _bytearray(arguments: tuple[Any, ...], budget: WorkBudget) -> bytearray:
    match arguments:
        case ():
            return bytearray()
        case (bytes() as data,):
            budget.spend(len(data))
            return bytearray(data)
        case (str() as text, str("latin1" | "latin-1")):
            budget.spend(len(text))
            return bytearray(text, "latin-1")
    raise _refuse("bytearray", arguments)


def _complex(arguments: tuple[Any, ...], budget: WorkBudget) -> complex:
    match arguments:
        case (float() | int() as real, float() | int() as imaginary):
            return complex(real, imaginary)
    raise _refuse("complex", arguments)


def _members(name: str, arguments: tuple[Any, ...], budget: WorkBudget) -> list[Any]:
    match arguments:
        case ():
            return []
        case (list() | tuple() | set() | frozenset() as items,):
            budget.spend(len(items))
            for item in items:
                budget.check_key(item, items)
            return list(items)
    raise _refuse(name, arguments)


def _set(arguments: tuple[Any, ...], budget: WorkBudget) -> set[Any]:
    return set(_members("set", arguments, budget))


def _frozenset(arguments: tuple[Any, ...], budget: WorkBudget) -> frozenset[Any]:
    return frozenset(_members("frozenset", arguments, budget))


def _sequence(kind: type[list[Any]] | type[tuple[Any, ...]]) -> Callable[..., Any]:
    def make(arguments: tuple[Any, ...], budget: WorkBudget) -> Any:
        match arguments:
            case ():
                return kind()
            case (list() | tuple() as items,):
                budget.spend(len(items))
                return kind(items)
        raise _refuse(kind.__name__, arguments)

    return make


def _no_arguments(name: str, kind: Callable[[], Any]) -> Callable[..., Any]:
    def make(arguments: tuple[Any, ...], budget: WorkBudget) -> Any:
        if arguments:
            raise _refuse(name, arguments)
        return kind()

    return make


def _integers(name: str, kind: Callable[..., Any], *, none: bool) -> Callable[..., Any]:
    """``slice`` and ``range``."""

    def make(arguments: tuple[Any, ...], budget: WorkBudget) -> Any:
        if 1 <= len(arguments) <= 3 and all(
            type(a) is int or (none and a is None) for a in arguments
        ):
            return kind(*arguments)
        raise _refuse(name, arguments)

    return make


def _ordered_dict(arguments: tuple[Any, ...], budget: WorkBudget) -> OrderedDict[Any, Any]:
    result: OrderedDict[Any, Any] = OrderedDict()
    match arguments:
        case ():
            return result
        case (list() as pairs,):  # Python 2 wrote its items this way
            budget.spend(len(pairs))
            for pair in pairs:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise _refuse("collections.OrderedDict", arguments)
                budget.check_key(pair[0], result)
                result[pair[0]] = pair[1]
            return result
    raise _refuse("collections.OrderedDict", arguments)


def _counter(arguments: tuple[Any, ...], budget: WorkBudget) -> Counter[Any]:
    match arguments:
        case ():
            return Counter()
        case (dict() as counts,):
            budget.spend(len(counts))
            for key, count in counts.items():
                budget.check_key(key, arguments)
                if not isinstance(count, (int, float)):
                    raise _refuse("collections.Counter", (count,))
            return Counter(counts)
    raise _refuse("collections.Counter", arguments)


def _default_dict(arguments: tuple[Any, ...], budget: WorkBudget) -> defaultdict[Any, Any]:
    match arguments:
        case () | (None,):
            return defaultdict(None)
        case (Call() as call,) if call.kind is not None:
            return defaultdict(call.kind)
    raise _refuse("collections.defaultdict", arguments)


def _deque(arguments: tuple[Any, ...], budget: WorkBudget) -> deque[Any]:
    items: Any
    match arguments:
        case ():
            return deque()
        case (list() | tuple() as items,):
            budget.spend(len(items))
            return deque(items)
        case (list() | tuple() as items, int() | None as length):
            budget.spend(len(items))
            return deque(items, length)
    raise _refuse("collections.deque", arguments)


def _time(kind: Any, size: int, *, zone: bool) -> Callable[..., Any]:
    """``date``, ``time`` and ``datetime``, which pickle as their own packed bytes."""

    def make(arguments: tuple[Any, ...], budget: WorkBudget) -> Any:
        match arguments:
            case (bytes() as packed,) if len(packed) == size:
                return kind(packed)
            case (bytes() as packed, datetime.timezone() as offset) if zone and len(packed) == size:
                return kind(packed, offset)
        raise _refuse(f"datetime.{kind.__name__}", arguments)

    return make


def _time_delta(arguments: tuple[Any, ...], budget: WorkBudget) -> datetime.timedelta:
    match arguments:
        case (int(), int(), int()):
            return datetime.timedelta(*arguments)
    raise _refuse("datetime.timedelta", arguments)


def _time_zone(arguments: tuple[Any, ...], budget: WorkBudget) -> datetime.timezone:
    match arguments:
        case (datetime.timedelta(),) | (datetime.timedelta(), str()):
            return datetime.timezone(*arguments)
    raise _refuse("datetime.timezone", arguments)


def _path(kind: type[pathlib.PurePath]) -> Callable[..., Any]:
    def make(arguments: tuple[Any, ...], budget: WorkBudget) -> Any:
        if not all(type(part) is str for part in arguments):
            raise _refuse(f"pathlib.{kind.__name__}", arguments)
        budget.spend(sum(map(len, arguments)))
        return kind(*arguments)

    return make


_WINDOWS = sys.platform == "win32"
_PATHS: Mapping[str, type[pathlib.PurePath]] = {
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
    # A path of the other system cannot be made, only its pure form.
    "PosixPath": pathlib.PurePosixPath if _WINDOWS else pathlib.PosixPath,
    "WindowsPath": pathlib.WindowsPath if _WINDOWS else pathlib.PureWindowsPath,
}


def _table() -> dict[str, Call]:
    calls = [
        Call("_codecs.encode", _encode),
        Call("builtins.bytes", _bytes, bytes),
        Call("builtins.bytearray", _bytearray, bytearray),
        Call("builtins.complex", _complex, complex),
        Call("builtins.set", _set, set),
        Call("builtins.frozenset", _frozenset, frozenset),
        Call("builtins.list", _sequence(list), list),
        Call("builtins.tuple", _sequence(tuple), tuple),
        Call("builtins.dict", _no_arguments("dict", dict), dict),
        Call("builtins.int", _no_arguments("int", int), int),
        Call("builtins.float", _no_arguments("float", float), float),
        Call("builtins.str", _no_arguments("str", str), str),
        Call("builtins.bool", _no_arguments("bool", bool), bool),
        Call("builtins.slice", _integers("slice", slice, none=True)),
        Call("builtins.range", _integers("range", range, none=False)),
        Call("builtins.xrange", _integers("range", range, none=False)),
        Call("collections.OrderedDict", _ordered_dict, OrderedDict),
        Call("collections.Counter", _counter, Counter),
        Call("collections.defaultdict", _default_dict),
        Call("collections.deque", _deque, deque),
        Call("datetime.date", _time(datetime.date, 4, zone=False)),
        Call("datetime.time", _time(datetime.time, 6, zone=True)),
        Call("datetime.datetime", _time(datetime.datetime, 10, zone=True)),
        Call("datetime.timedelta", _time_delta),
        Call("datetime.timezone", _time_zone),
        *(
            Call(f"{module}.{name}", _path(kind))
            for module in ("pathlib", "pathlib._local")  # the latter since Python 3.13
            for name, kind in _PATHS.items()
        ),
    ]
    return {call.name: call for call in calls}


CALLS: Mapping[str, Call] = _table()
