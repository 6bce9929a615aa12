"""What keeps a small hostile pickle from costing unbounded time, memory or stack.

A pickle is a graph, and a few bytes a level make one that doubles at every level when it is
walked. C code that walks without a check of its own (hashing a nested tuple) even crashes the
process. So keys are walked here, with a count, before they are hashed; and a finished value is
measured once, each shared part one time, before anybody else walks it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from shardpoint.errors import FormatError, LimitExceededError

__all__ = ["DEFAULT_LIMITS", "Limits", "WorkBudget", "describe", "measure"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a pickle may ask for; everything real is far below.

    Attributes
    ----------
    max_depth
        Containers within containers in the result. None leaves the result unmeasured, for
        callers that only walk it to a fixed depth.
    max_values
        Values in the result, shared ones counted at each place where they appear.
    max_key_values
        Values in one dictionary key or set member.
    max_axes
        Numbers in a shape.
    """

    max_depth: int | None = 200
    max_values: int = 50_000_000
    max_key_values: int = 10_000
    max_axes: int = 64


DEFAULT_LIMITS = Limits()

# Keys whose hashes nobody can make equal: Python draws a seed for text and bytes, and of other
# numbers only few have the same (that of an int is its rest by this prime).
_UNLIKE_KEYS = frozenset({str, bytes, bool, float, type(None)})
_BY_IDENTITY: object = object.__hash__
_PRIME = sys.hash_info.modulus

_LEAVES = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray, range})


def describe(value: object) -> str:
    """Say what a value is, in a few words, whatever it is: for error messages."""
    kind = type(value).__name__
    if isinstance(value, str):
        return repr(value) if len(value) <= 200 else f"{value[:200]!r}... ({len(value)} characters)"
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        # The decimal form of a huge int takes quadratic time, and Python refuses it.
        return f"{value} (int)" if value.bit_length() < 200 else "a huge int"
    return f"a {kind}"


class WorkBudget:
    """Counts what is copied or walked; a budget that follows the size of the input.

    A call in a pickle takes a few bytes and may copy or hash a large value made once.
    """

    __slots__ = ("_alike", "_left", "_limits", "_source")

    def __init__(self, input_size: int, *, source: str, limits: Limits) -> None:
        self._left = 100_000 + 32 * input_size
        self._alike: dict[tuple[int, int], int] = {}  # container and hash -> keys
        self._source = source
        self._limits = limits

    def spend(self, amount: int) -> None:
        """Count `amount` bytes or values.

        Raises
        ------
        LimitExceededError
            If the pickle asks for far more than its size can explain.
        """
        self._left -= amount
        if self._left < 0:
            raise LimitExceededError(
                f"{self._source}: the pickle makes or copies far more than its size can explain"
            )

    def check_key(self, key: Any, into: object) -> None:
        """Check that putting `key` into a container is cheap; to be called before.

        A key is compared with all those of the same hash that are there already, so that each
        of them is paid for.

        Raises
        ------
        LimitExceededError
            If it has more parts than a key ever has, or too many keys have the same hash.
        TypeError
            If it cannot be a key.
        """
        kind = type(key)
        if kind in _UNLIKE_KEYS or kind.__hash__ is _BY_IDENTITY:
            return
        if kind is int and -_PRIME < key < _PRIME:
            return
        if kind in (tuple, frozenset):
            self._check_parts(key)
        place = id(into), hash(key)
        alike = self._alike.get(place, 0) + 1
        self._alike[place] = alike
        if alike > 1:
            self.spend(alike * 16)

    def _check_parts(self, key: Any) -> None:
        limit = self._limits.max_key_values
        count = 0
        pending: list[Any] = [key]
        while pending:
            part = pending.pop()
            count += len(part) + 1
            if count > limit:
                raise LimitExceededError(
                    f"{self._source}: a dictionary key or set member has more than {limit} parts"
                )
            pending.extend(p for p in part if type(p) in (tuple, frozenset))
        self.spend(count)


def _children(value: Any) -> Iterator[Any] | None:
    if isinstance(value, dict):
        # The methods of dict itself, so that a subclass cannot answer otherwise.
        parts: Iterator[Any] = chain(dict.keys(value), dict.values(value))
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        parts = iter(value)
    elif isinstance(value, slice):
        parts = iter((value.start, value.stop, value.step))
    else:
        attributes = getattr(value, "__dict__", None)
        return iter(attributes.values()) if type(attributes) is dict and attributes else None
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict and attributes:
        parts = chain(parts, attributes.values())
    return parts


def measure(
    value: Any,
    *,
    source: str,
    limits: Limits,
    on_leaf: Callable[[Any], None] | None = None,
    budget: WorkBudget | None = None,
) -> None:
    """Check that walking `value`, however naively, stays within the limits.

    Every shared part is visited once. `on_leaf` is called with each value that is neither a
    container nor a plain Python value; it may raise.

    Raises
    ------
    FormatError
        If the value contains itself.
    LimitExceededError
        If it is nested deeper, or has more values when written out, than `limits` allow.
    """
    max_depth = limits.max_depth if limits.max_depth is not None else 1 << 60
    sizes: dict[int, tuple[int, int]] = {}  # id -> (values, levels); 0 values: unfinished
    # One entry a container that is being walked: itself, its parts, values so far, depth so far,
    # parts so far (what a class of the caller's calls its length may be anything).
    walk: list[list[Any]] = []
    root = [value]
    current: list[Any] = [root, iter(root), 0, 0, 0]
    while True:
        node, parts, count, depth, seen = current
        entered = False
        for part in parts:
            count += 1
            seen += 1
            if type(part) in _LEAVES:
                continue
            known = sizes.get(id(part))
            if known is None:
                inner = _children(part)
                if inner is None:
                    if on_leaf is not None:
                        on_leaf(part)
                    continue
                if len(walk) >= max_depth:
                    raise LimitExceededError(f"{source}: nested deeper than {max_depth} levels")
                sizes[id(part)] = (0, 0)
                current[2:] = count, depth, seen
                walk.append(current)
                current = [part, inner, 0, 0, 0]
                entered = True
                break
            if known[0] == 0:
                raise FormatError(f"{source}: a {type(part).__name__} contains itself")
            count += known[0] - 1
            depth = max(depth, known[1])
        if entered:
            continue
        if budget is not None:
            budget.spend(1 + seen)
        if count > limits.max_values:
            raise LimitExceededError(
                f"{source}: has more than {limits.max_values} values when written out"
            )
        if not walk:
            return
        if len(walk) + depth > max_depth:
            raise LimitExceededError(f"{source}: nested deeper than {max_depth} levels")
        sizes[id(node)] = (count + 1, depth + 1)
        current = walk.pop()
        current[2] += count
        current[3] = max(current[3], depth + 1)
