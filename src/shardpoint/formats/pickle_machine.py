"""A closed interpreter of Python's pickle format, protocols 0 to 5. It runs no code.

What a pickle may name and call is decided by a `Resolver` alone; the machine itself only
moves plain values between stack, memo and containers. It is no subclass of
``pickle.Unpickler``, which imports modules, calls what it finds there, grows its memo to any
index it is told, and believes every length.

Source: the opcodes as the standard library's ``pickletools`` documents them. Left out on
purpose: INST, OBJ (calls of protocol 0 and 1), EXT1/2/4 (a registry of the reading process),
PERSID (text), NEXT_BUFFER and READONLY_BUFFER (data outside the pickle). No checkpoint has them.
"""

from __future__ import annotations

from typing import Any, Protocol

from shardpoint.errors import (
    ForbiddenContentError,
    FormatError,
    LimitExceededError,
    ShardpointError,
)
from shardpoint.formats._pickle_guards import DEFAULT_LIMITS, Limits, WorkBudget, describe, measure
from shardpoint.formats._pickle_opcodes import COLD_OPCODES, REFUSED_OPCODES, Machine, set_items

__all__ = ["DEFAULT_LIMITS", "Limits", "Resolver", "Runs", "run_pickle"]

_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a damaged pickle makes the plain operations below raise, and torch, which is asked for
values that the pickle describes, with its RuntimeError among them."""


class Resolver(Protocol):
    """Decides what the names in a pickle mean. All of it is closed lists.

    Arguments come straight from the pickle: their types are unchecked, and they may be nested
    deeply or share parts. An implementation checks types before it hashes, compares or walks.
    """

    def find_global(self, module: str, name: str) -> Any:
        """Give the token, or the value, that a global name stands for.

        Raises
        ------
        ForbiddenContentError
            If the name is not on the list.
        """

    def reduce(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Give the result of calling a token (REDUCE)."""

    def new_object(self, cls: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Give a new instance (NEWOBJ, NEWOBJ_EX)."""

    def build(self, instance: Any, state: Any) -> Any:
        """Give the instance with its state set (BUILD)."""

    def persistent_load(self, identifier: Any) -> Any:
        """Give what a persistent id stands for (BINPERSID)."""


class Runs(Protocol):
    """Takes many values at once where the same opcodes come again and again.

    The machine offers the places where an instance is about to be made. What is taken there
    must have the effect that the opcodes have, one by one; what cannot be had is had by
    raising `RunsRefused` and interpreting the pickle again without.
    """

    def take(self, machine: Machine, position: int) -> int:
        """Do what the opcodes from before `position` on do, and give the position after them.

        The class is on top of the stack, the empty tuple of arguments is not yet. Slots of the
        memo that are passed over are counted in `Machine.skipped`. 0: nothing was done.
        """

    def fetch(self, slot: int) -> Any:
        """Give the value in a slot of the memo that was passed over, or raise KeyError."""


def run_pickle(
    data: bytes | bytearray | memoryview,
    resolver: Resolver,
    *,
    source: str,
    limits: Limits = DEFAULT_LIMITS,
    runs: Runs | None = None,
) -> tuple[Any, int]:
    """Interpret one pickle at the start of `data`.

    Parameters
    ----------
    data
        The pickle; more may follow it.
    resolver
        What names mean.
    source
        Where the pickle comes from; errors begin with it.
    limits
        Bounds of the result.
    runs
        What takes many values at once, if anything does.

    Returns
    -------
    tuple
        The value, and the position after it in `data`.

    Raises
    ------
    ForbiddenContentError
        If an instruction or a name is used that is not on the closed list.
    LimitExceededError
        If the value is nested too deeply, or asks for more work than the pickle's size explains.
    FormatError
        If the bytes are no pickle, or are cut off.
    """
    content = bytes(data)
    budget = WorkBudget(len(content), source=source, limits=limits)
    machine = Machine(content, resolver, source=source, budget=budget, runs=runs)
    value, position = _run(machine, runs)
    if limits.max_depth is not None:
        measure(value, source=source, limits=limits)
    return value, position


def _run(machine: Machine, runs: Runs | None) -> tuple[Any, int]:
    """Run to STOP.

    An index has tens of millions of opcodes, so what its pickles are mostly made of stands here
    in one chain of comparisons, most frequent first, on local names; a call for each opcode
    would double the time. The sequences that Python's pickler always writes together for an
    instance and for a short call are taken in one step, which nearly halves it again; each
    does what its opcodes would do one by one. The rest is in `COLD_OPCODES`.
    """
    data, stack, marks, memo = machine.data, machine.stack, machine.marks, machine.memo
    push, pop, integer, cold = stack.append, stack.pop, int.from_bytes, COLD_OPCODES
    resolver, budget = machine.resolver, machine.budget
    reduce, new_object, build = resolver.reduce, resolver.new_object, resolver.build
    position = skipped = 0
    try:
        while True:
            opcode = data[position]
            position += 1
            if opcode == 0x68:  # BINGET
                push(memo[data[position]])
                position += 1
            elif opcode == 0x6A:  # LONG_BINGET
                push(memo[integer(data[position : position + 4], "little")])
                position += 4
            elif opcode == 0x4B:  # BININT1
                push(data[position])
                position += 1
            elif opcode == 0x94:  # MEMOIZE
                memo[len(memo) + skipped] = stack[-1]
            elif opcode == 0x71:  # BINPUT
                machine.put(data[position])
                position += 1
            elif opcode == 0x29:  # EMPTY_TUPLE
                if runs is not None and data[position] == 0x81:
                    after = runs.take(machine, position)
                    if after:
                        position, skipped = after, machine.skipped
                        continue
                if data[position : position + 5] == _NEW_INSTANCE:
                    stack[-1] = memo[len(memo) + skipped] = new_object(stack[-1], (), {})
                    fields: dict[Any, Any] = {}
                    memo[len(memo) + skipped] = fields
                    push(fields)
                    marks.append(len(stack))
                    position += 5
                else:
                    push(())
            elif opcode == 0x86:  # TUPLE2
                second = pop()
                stack[-1] = (stack[-1], second)
                if data[position : position + 5] == _WRAP_AND_CALL:
                    memo[len(memo) + skipped] = stack[-1]
                    arguments: tuple[Any, ...] = (pop(),)
                    memo[len(memo) + skipped] = arguments
                    stack[-1] = memo[len(memo) + skipped] = reduce(stack[-1], arguments)
                    position += 5
            elif opcode == 0x75:  # SETITEMS
                items = machine.pop_mark()
                set_items(stack[-1], items, budget)
                if data[position] == 0x62:  # BUILD
                    state = pop()
                    stack[-1] = build(stack[-1], state)
                    position += 1
            elif opcode == 0x62:  # BUILD
                state = pop()
                stack[-1] = build(stack[-1], state)
            elif opcode == 0x4D:  # BININT2
                push(data[position] | data[position + 1] << 8)
                position += 2
            elif opcode == 0x4A:  # BININT
                push(integer(data[position : position + 4], "little", signed=True))
                position += 4
            elif opcode == 0x8C or opcode == 0x58:  # SHORT_BINUNICODE, BINUNICODE
                width = 1 if opcode == 0x8C else 4
                length = integer(data[position : position + width], "little")
                position += width
                push(str(data[position : position + length], "utf-8", "surrogatepass"))
                position += length
            elif opcode == 0x28:  # MARK
                marks.append(len(stack))
            elif opcode == 0x7D:  # EMPTY_DICT
                push({})
            elif opcode == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif opcode == 0x52:  # REDUCE
                arguments = _arguments(pop())
                stack[-1] = reduce(stack[-1], arguments)
            elif opcode == 0x81:  # NEWOBJ
                arguments = _arguments(pop())
                stack[-1] = new_object(stack[-1], arguments, {})
            elif opcode in cold:
                position = cold[opcode](machine, position)
            elif opcode == 0x2E:  # STOP
                value = pop()
                if stack or marks:
                    raise ValueError("values are left over")
                return value, position
            else:
                raise _unknown_opcode(machine, opcode, position - 1)
    except ShardpointError:
        raise
    except _DAMAGE as error:
        raise _damaged(machine, error, position) from error


_NEW_INSTANCE = b"\x81\x94}\x94("  # NEWOBJ MEMOIZE EMPTY_DICT MEMOIZE MARK, after EMPTY_TUPLE
_WRAP_AND_CALL = b"\x94\x85\x94R\x94"  # MEMOIZE TUPLE1 MEMOIZE REDUCE MEMOIZE, after TUPLE2


def _arguments(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise TypeError(f"arguments are {describe(value)}, not a tuple")
    return value


def _damaged(machine: Machine, error: Exception, position: int) -> FormatError:
    if isinstance(error, MemoryError):
        return LimitExceededError(f"{machine.source}, byte {position}: no memory for what it holds")
    if position >= len(machine.data):
        reason = "it is cut off"
    elif isinstance(error, KeyError) and type(error.args[0]) is int:
        reason = f"it uses memo entry {error}, which nothing has set"
    else:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return FormatError(f"{machine.source}, byte {position}: is no valid pickle ({reason})")


def _unknown_opcode(machine: Machine, opcode: int, position: int) -> FormatError:
    where = f"{machine.source}, byte {position}"
    if position == 0:
        return FormatError(f"{machine.source}: is no pickle (it begins with 0x{opcode:02x})")
    if opcode in REFUSED_OPCODES:
        return ForbiddenContentError(
            f"{where}: the pickle instruction {REFUSED_OPCODES[opcode]} is refused"
        )
    return FormatError(f"{where}: is no valid pickle (0x{opcode:02x} is no instruction)")
