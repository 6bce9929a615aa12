"""The pickle opcodes that are not in the machine's inner loop: one small function each.

Every function takes the machine and the position after the opcode, and gives the position
after its argument. A slice that is cut short by the end of the data needs no check of its own
where a fixed size is read: the next opcode is then looked for past the end, and not found.
"""

from __future__ import annotations

import re
import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from shardpoint.errors import FormatError, LimitExceededError, ShardpointError
from shardpoint.formats._pickle_guards import WorkBudget, describe

if TYPE_CHECKING:
    from shardpoint.formats.pickle_machine import Resolver, Runs

__all__ = ["COLD_OPCODES", "REFUSED_OPCODES", "Machine", "RunsRefused", "set_items"]

_Handler = Callable[["Machine", int], int]

_HIGHEST_PROTOCOL = 5


class RunsRefused(Exception):
    """Something needs single steps where a run was taken: the caller interprets anew without.

    It never leaves the readers, and is no error of the pickle.
    """


class _Memo(dict[int, Any]):
    """A memo of which some slots lie in runs."""

    __slots__ = ("runs",)

    def __init__(self, runs: Runs) -> None:
        super().__init__()
        self.runs = runs

    def __missing__(self, slot: int) -> Any:
        return self.runs.fetch(slot)


class Machine:
    """Stack, marks and memo of one run.

    `skipped` is the number of memo slots that lie in runs, hence not in `memo`; `puts` tells
    whether anything has put a value at a slot that it chose itself.
    """

    __slots__ = (
        "budget",
        "data",
        "marks",
        "memo",
        "puts",
        "resolver",
        "skipped",
        "source",
        "stack",
    )

    def __init__(
        self,
        data: bytes,
        resolver: Resolver,
        *,
        source: str,
        budget: WorkBudget,
        runs: Runs | None,
    ) -> None:
        self.data = data
        self.resolver = resolver
        self.source = source
        self.budget = budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {} if runs is None else _Memo(runs)
        self.skipped = 0
        self.puts = False

    def pop_mark(self) -> list[Any]:
        """Take everything above the last mark off the stack."""
        start = self.marks.pop()
        if start > len(self.stack):
            raise IndexError("values below a mark were used up")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def take(self, position: int, length: int) -> bytes:
        """Give `length` bytes; a claimed length is compared with what is there first."""
        left = len(self.data) - position
        if not 0 <= length <= left:
            raise FormatError(
                f"{self.source}, byte {position}: wants {length} more bytes, "
                f"{max(left, 0)} are left"
            )
        return self.data[position : position + length]

    def line(self, position: int) -> tuple[bytes, int]:
        """Give the text up to the next newline, and the position after it."""
        end = self.data.find(b"\n", position)
        if end < 0:
            raise FormatError(f"{self.source}, byte {position}: a text argument does not end")
        return self.data[position:end], end + 1

    def put(self, index: int) -> None:
        """Remember the top of the stack. Every entry takes an opcode, which bounds the index."""
        if not 0 <= index < len(self.data):
            raise LimitExceededError(
                f"{self.source}: memo index {index} in a pickle of {len(self.data)} bytes"
            )
        if self.skipped:
            raise RunsRefused
        self.puts = True
        self.memo[index] = self.stack[-1]


def set_items(target: Any, items: list[Any], budget: WorkBudget) -> None:
    """Put alternating keys and values into a dict, or an instance that is one."""
    if not isinstance(target, dict):
        raise TypeError(f"items are set on {describe(target)}, which is no dict")
    if len(items) % 2:
        raise ValueError("a key without a value")
    pairs = iter(items)
    try:
        for key, value in zip(pairs, pairs, strict=True):
            if type(key) is not str:
                budget.check_key(key, target)
            target[key] = value
    except ShardpointError:
        raise
    except Exception as error:  # methods of classes that were allowed: they may raise anything
        raise ValueError(f"an item cannot be set: {type(error).__name__}: {error}") from error


def _extend(machine: Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, (list, deque)):
        raise TypeError(f"items are appended to {describe(target)}, which is no list")
    try:
        target.extend(items)
    except Exception as error:  # a list of a class that was allowed: it may raise anything
        raise ValueError(f"items cannot be appended: {type(error).__name__}: {error}") from error


def _check_members(machine: Machine, items: list[Any], into: object) -> list[Any]:
    for item in items:
        machine.budget.check_key(item, into)
    return items


def _proto(machine: Machine, position: int) -> int:
    version = machine.data[position]
    if version > _HIGHEST_PROTOCOL:
        raise FormatError(f"{machine.source}: pickle protocol {version} is not known")
    return position + 1


def _frame(machine: Machine, position: int) -> int:
    length = int.from_bytes(machine.take(position, 8), "little")
    if length > len(machine.data) - position - 8:
        raise FormatError(f"{machine.source}, byte {position}: a frame of {length} bytes is cut")
    return position + 8


def _constant(value: Any) -> _Handler:
    def handler(machine: Machine, position: int) -> int:
        machine.stack.append(value)
        return position

    return handler


def _fresh(kind: Callable[[], Any]) -> _Handler:
    def handler(machine: Machine, position: int) -> int:
        machine.stack.append(kind())
        return position

    return handler


def _sized(width: int, convert: Callable[[bytes], Any]) -> _Handler:
    """An argument whose length comes first, in `width` bytes."""

    def handler(machine: Machine, position: int) -> int:
        length = int.from_bytes(machine.take(position, width), "little")
        position += width
        machine.stack.append(convert(machine.take(position, length)))
        return position + length

    return handler


def _fixed(width: int, convert: Callable[[bytes], Any]) -> _Handler:
    def handler(machine: Machine, position: int) -> int:
        machine.stack.append(convert(machine.take(position, width)))
        return position + width

    return handler


def _text_line(convert: Callable[[bytes], Any]) -> _Handler:
    def handler(machine: Machine, position: int) -> int:
        text, position = machine.line(position)
        machine.stack.append(convert(text))
        return position

    return handler


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _double(data: bytes) -> float:
    value: float = struct.unpack(">d", data)[0]
    return value


def _int_line(text: bytes) -> int | bool:
    if text in (b"00", b"01"):  # how protocol 0 writes a bool
        return text == b"01"
    return int(text)


def _long_line(text: bytes) -> int:
    return int(text.removesuffix(b"L"))


_ESCAPED = re.compile(rb"(?:[^\\]|\\(?:[\\'\"abfnrtv]|x[0-9a-fA-F]{2}|[0-3][0-7]{2}))*", re.DOTALL)


def _string_line(text: bytes) -> str:
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise ValueError("a string without quotes")
    if _ESCAPED.fullmatch(text) is None:  # Python would warn of it
        raise ValueError("a string with an escape that is none")
    # Latin-1 keeps bytes and characters one to one; the escapes are those of Python 2.
    return text[1:-1].decode("unicode_escape").encode("latin-1").decode("utf-8")


def _unicode_line(text: bytes) -> str:
    return text.decode("raw_unicode_escape")


def _tuple_of(count: int) -> _Handler:
    def handler(machine: Machine, position: int) -> int:
        stack = machine.stack
        if len(stack) < count:
            raise IndexError("a tuple of more values than there are")
        stack[-count:] = [tuple(stack[-count:])]
        return position

    return handler


def _from_mark(convert: Callable[[list[Any]], Any]) -> _Handler:
    def handler(machine: Machine, position: int) -> int:
        items = machine.pop_mark()
        machine.stack.append(convert(items))
        return position

    return handler


def _dict(machine: Machine, position: int) -> int:
    items = machine.pop_mark()
    value: dict[Any, Any] = {}
    set_items(value, items, machine.budget)
    machine.stack.append(value)
    return position


def _frozenset(machine: Machine, position: int) -> int:
    items = machine.pop_mark()
    machine.stack.append(frozenset(_check_members(machine, items, items)))
    return position


def _append(machine: Machine, position: int) -> int:
    item = machine.stack.pop()
    _extend(machine, [item])
    return position


def _appends(machine: Machine, position: int) -> int:
    items = machine.pop_mark()
    _extend(machine, items)
    return position


def _set_item(machine: Machine, position: int) -> int:
    value = machine.stack.pop()
    key = machine.stack.pop()
    set_items(machine.stack[-1], [key, value], machine.budget)
    return position


def _add_items(machine: Machine, position: int) -> int:
    items = machine.pop_mark()
    target = machine.stack[-1]
    if not isinstance(target, set):
        raise TypeError(f"members are added to {describe(target)}, which is no set")
    target.update(_check_members(machine, items, target))
    return position


def _pop(machine: Machine, position: int) -> int:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()
    return position


def _pop_mark(machine: Machine, position: int) -> int:
    machine.pop_mark()
    return position


def _duplicate(machine: Machine, position: int) -> int:
    machine.stack.append(machine.stack[-1])
    return position


def _put_line(machine: Machine, position: int) -> int:
    text, position = machine.line(position)
    machine.put(int(text))
    return position


def _put_long(machine: Machine, position: int) -> int:
    machine.put(int.from_bytes(machine.take(position, 4), "little"))
    return position + 4


def _get_line(machine: Machine, position: int) -> int:
    text, position = machine.line(position)
    machine.stack.append(machine.memo[int(text)])
    return position


def _global_lines(machine: Machine, position: int) -> int:
    module, position = machine.line(position)
    name, position = machine.line(position)
    machine.stack.append(machine.resolver.find_global(_utf8(module), _utf8(name)))
    return position


def _stack_global(machine: Machine, position: int) -> int:
    name = machine.stack.pop()
    module = machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise TypeError(f"a class named by {describe(module)} and {describe(name)}")
    machine.stack.append(machine.resolver.find_global(module, name))
    return position


def _new_object_with_keywords(machine: Machine, position: int) -> int:
    keywords = machine.stack.pop()
    arguments = machine.stack.pop()
    cls = machine.stack.pop()
    if type(keywords) is not dict or type(arguments) is not tuple:
        raise TypeError("arguments that are no tuple, or keywords that are no dict")
    machine.stack.append(machine.resolver.new_object(cls, arguments, keywords))
    return position


def _persistent(machine: Machine, position: int) -> int:
    identifier = machine.stack.pop()
    machine.stack.append(machine.resolver.persistent_load(identifier))
    return position


COLD_OPCODES: Mapping[int, _Handler] = {
    0x80: _proto,
    0x95: _frame,
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("]"): _fresh(list),
    0x8F: _fresh(set),
    ord("G"): _fixed(8, _double),
    0x8A: _sized(1, _signed),  # LONG1
    0x8B: _sized(4, _signed),  # LONG4
    ord("X"): _sized(4, _utf8),
    0x8D: _sized(8, _utf8),  # BINUNICODE8
    ord("C"): _sized(1, bytes),
    ord("B"): _sized(4, bytes),
    0x8E: _sized(8, bytes),  # BINBYTES8
    0x96: _sized(8, bytearray),  # BYTEARRAY8
    ord("U"): _sized(1, _utf8),  # strings of Python 2
    ord("T"): _sized(4, _utf8),
    ord("I"): _text_line(_int_line),
    ord("L"): _text_line(_long_line),
    ord("F"): _text_line(float),
    ord("S"): _text_line(_string_line),
    ord("V"): _text_line(_unicode_line),
    0x87: _tuple_of(3),
    ord("t"): _from_mark(tuple),
    ord("l"): _from_mark(list),
    ord("d"): _dict,
    0x91: _frozenset,
    ord("a"): _append,
    ord("e"): _appends,
    ord("s"): _set_item,
    0x90: _add_items,
    ord("0"): _pop,
    ord("1"): _pop_mark,
    ord("2"): _duplicate,
    ord("p"): _put_line,
    ord("r"): _put_long,
    ord("g"): _get_line,
    ord("c"): _global_lines,
    0x93: _stack_global,
    0x92: _new_object_with_keywords,
    ord("Q"): _persistent,
}

REFUSED_OPCODES: Mapping[int, str] = {
    ord("i"): "INST",
    ord("o"): "OBJ",
    ord("P"): "PERSID",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}
