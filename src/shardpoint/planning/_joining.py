"""The rows of all ranks, brought together key by key, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import BY_CODE
from shardpoint.errors import PlanError, Problem
from shardpoint.planning._write_columns import OBJECT, WriteColumns
from shardpoint.region import BoolArray, Int64Array

__all__ = ["Joined", "group_rows", "join", "replicas"]

_MOST_PROBLEMS = 50
_KEY_LIMIT = 2**62
_DIGIT = 1 << 16  # numpy sorts 16-bit numbers in linear time


@dataclass(frozen=True, slots=True, eq=False)
class _Heads:
    """What all rows of a key have in common, one row a key."""

    names: list[str]
    is_object: BoolArray
    dtype: npt.NDArray[np.uint8]
    ndim: npt.NDArray[np.int16]
    shape: Int64Array
    requires_grad: BoolArray
    pin_memory: BoolArray
    memory_format: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """The rows of all ranks, ordered by key, then rank.

    Attributes
    ----------
    heads
        What holds for a whole key. Keys are numbered in the order in which they first appear.
    key, rank
        ``int64[n]``: whose each row is.
    order
        ``int64[n]``: its number when the ranks' rows are counted one rank after the other.
    offsets, sizes
        ``int64[n, D]``.
    bounds
        Where each rank's rows begin in that count, and its end.
    """

    heads: _Heads
    key: Int64Array
    rank: Int64Array
    order: Int64Array
    offsets: Int64Array
    sizes: Int64Array
    bounds: Int64Array

    @property
    def nbytes(self) -> Int64Array:
        """``int64[n]``: payload bytes of each chunk; 0 for objects."""
        itemsize = np.array([dtype.itemsize for dtype in BY_CODE], np.int64)[self.heads.dtype]
        volume = self.sizes.prod(axis=1, dtype=np.int64)
        result: Int64Array = volume * np.where(self.heads.is_object, 0, itemsize)[self.key]
        return result

    def by_rank(self, values: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        """Return values of the rows as each rank counts them."""
        flat = np.empty_like(values)
        flat[self.order] = values
        return [
            flat[begin:end]
            for begin, end in zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True)
        ]


@dataclass(slots=True)
class _Numbering:
    """Numbers keys; ranks mostly have the same ones, often the same objects."""

    numbers: dict[str, int] = field(default_factory=dict)
    last_keys: Sequence[str] = ()
    last: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))

    def of(self, keys: Sequence[str]) -> Int64Array:
        if keys is not self.last_keys and keys != self.last_keys:
            numbers = self.numbers
            self.last_keys = keys
            self.last = np.array([numbers.setdefault(k, len(numbers)) for k in keys], np.int64)
        return self.last


def join(columns: Sequence[WriteColumns]) -> Joined:
    """Bring the rows of all ranks together.

    Raises
    ------
    PlanError
        If ranks disagree about a key's shape, dtype or kind; names every such key.
    """
    numbering = _Numbering()
    keys = [numbering.of(c.keys) for c in columns]
    axes = max((c.shape.shape[1] for c in columns), default=0)
    heads = _heads(columns, keys, list(numbering.numbers), axes)
    counts = np.array([len(c) for c in columns], np.int64)
    key = np.concatenate([np.zeros(0, np.int64), *keys])
    order = _by_number(key, len(heads.names))
    return Joined(
        heads=heads,
        key=key[order],
        rank=np.repeat(np.arange(len(columns)), counts)[order],
        order=order,
        offsets=_widened([c.offsets for c in columns], axes, 0)[order],
        sizes=_widened([c.sizes for c in columns], axes, 1)[order],
        bounds=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def _by_number(numbers: Int64Array, count: int) -> Int64Array:
    """Return the stable order of numbers below `count`, digit by digit."""
    order = np.argsort((numbers % _DIGIT).astype(np.uint16), kind="stable")
    while count > _DIGIT:
        numbers, count = numbers // _DIGIT, count // _DIGIT + 1
        digit = (numbers % _DIGIT).astype(np.uint16)[order]
        order = order[np.argsort(digit, kind="stable")]
    return order


def _widened(parts: Sequence[Int64Array], axes: int, fill: int) -> Int64Array:
    result = np.full((sum(map(len, parts)), axes), fill, np.int64)
    begin = 0
    for part in parts:
        result[begin : begin + len(part), : part.shape[1]] = part
        begin += len(part)
    return result


def _heads(
    columns: Sequence[WriteColumns], keys: Sequence[Int64Array], names: list[str], axes: int
) -> _Heads:
    """Describe each key as its first row does, and see that all others say the same."""
    telling = _telling(columns, keys)
    told = [columns[rank] for rank in telling]
    key = np.concatenate([np.zeros(0, np.int64), *(keys[rank] for rank in telling)])

    def column(name: str, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        return np.concatenate([np.zeros(0, dtype), *(getattr(c, name) for c in told)])

    is_object = column("kind", np.uint8) == OBJECT
    dtype, ndim = column("dtype", np.uint8), column("ndim", np.int16)
    shape = _widened([c.shape for c in told], axes, 1)
    _, first = np.unique(key, return_index=True)
    reference = first[key]
    differs = (is_object != is_object[reference]) | (dtype != dtype[reference])
    differs |= (ndim != ndim[reference]) | (shape != shape[reference]).any(axis=1)
    if differs.any():
        rank = np.repeat(telling, [len(c) for c in told])
        _raise_disagreement(names, key, rank, reference, differs, told)
    return _Heads(
        names=names,
        is_object=is_object[first],
        dtype=dtype[first].astype(np.uint8),
        ndim=ndim[first].astype(np.int16),
        shape=shape[first],
        requires_grad=column("requires_grad", np.bool_)[first].astype(np.bool_),
        pin_memory=column("pin_memory", np.bool_)[first].astype(np.bool_),
        memory_format=column("memory_format", np.uint8)[first].astype(np.uint8),
    )


def _telling(columns: Sequence[WriteColumns], keys: Sequence[Int64Array]) -> list[int]:
    """Return the ranks that describe keys in another way than the rank of that kind before."""
    telling: list[int] = []
    for rank, (own, numbers) in enumerate(zip(columns, keys, strict=True)):
        if telling and numbers is keys[telling[-1]]:
            other = columns[telling[-1]]
            same = all(
                getattr(own, name) is getattr(other, name)
                or np.array_equal(getattr(own, name), getattr(other, name))
                for name in ("dtype", "ndim", "shape")
            )
            if same and (
                own.kind is other.kind or np.array_equal(own.kind == OBJECT, other.kind == OBJECT)
            ):
                continue
        telling.append(rank)
    return telling


def _raise_disagreement(
    names: Sequence[str],
    key: Int64Array,
    rank: Int64Array,
    reference: Int64Array,
    differs: BoolArray,
    told: Sequence[WriteColumns],
) -> None:
    begins = np.concatenate([[0], np.cumsum([len(c) for c in told])])

    def text(row: int) -> str:
        part = int(np.searchsorted(begins, row, "right")) - 1
        return f"{_describe(told[part], row - int(begins[part]))} on rank {rank[row]}"

    problems: dict[int, Problem] = {}
    for row in np.flatnonzero(differs).tolist():
        number = int(key[row])
        if number not in problems:
            message = f"ranks disagree: {text(int(reference[row]))}, {text(row)}"
            problems[number] = Problem(message, names[number])
        if len(problems) == _MOST_PROBLEMS:
            break
    raise PlanError("the ranks' state dicts do not fit together", problems.values())


def _describe(columns: WriteColumns, row: int) -> str:
    if columns.kind[row] == OBJECT:
        return "an object"
    shape = tuple(columns.shape[row, : columns.ndim[row]].tolist())
    return f"a {BY_CODE[int(columns.dtype[row])].name} tensor of shape {shape}"


def replicas(joined: Joined) -> tuple[Int64Array, BoolArray]:
    """Return an order in which equal pieces are neighbours, and where in it new ones begin."""
    boxes = [*joined.offsets.T, *joined.sizes.T]
    order = np.arange(len(joined.key))
    is_new, wrong = _compared(joined.key, boxes)
    if wrong.any():  # most often, boxes come in the order of their ranks already
        chosen = np.zeros(len(joined.heads.names), np.bool_)
        chosen[joined.key[1:][wrong]] = True
        rows = np.flatnonzero(chosen[joined.key])
        order[rows] = rows[_sorted_rows([joined.key[rows], *(box[rows] for box in boxes)])]
        is_new, _ = _compared(joined.key[order], [box[order] for box in boxes])
    return order, is_new


def _compared(key: Int64Array, columns: Sequence[Int64Array]) -> tuple[BoolArray, BoolArray]:
    """Return which rows differ from the one before, and which come after a larger one."""
    same = key[1:] == key[:-1]
    larger = np.zeros(len(same), np.bool_)
    for column in columns:
        larger |= same & (column[1:] < column[:-1])
        same &= column[1:] == column[:-1]
    is_new = np.ones(len(key), np.bool_)
    is_new[1:] = ~same
    return is_new, larger


def _sorted_rows(columns: Sequence[Int64Array]) -> Int64Array:
    """Return the stable order of rows, by the first column, then the second, and so on."""
    spans = [int(column.max(initial=0)) + 1 for column in columns]
    if math.prod(spans) >= _KEY_LIMIT or any((column < 0).any() for column in columns):
        return np.lexsort(list(columns)[::-1])
    code = columns[0]
    for column, span in zip(columns[1:], spans[1:], strict=True):
        code = code * span + column
    return np.argsort(code, kind="stable")


def group_rows(rows: Int64Array) -> Int64Array:
    """Return ``int64[n]``: equal numbers for equal rows of ``rows[n, m]``."""
    if len(rows) == 0:
        return np.zeros(0, np.int64)
    order = _sorted_rows(list(rows.T)) if rows.shape[1] else np.arange(len(rows))
    ordered = rows[order]
    new = np.ones(len(rows), np.int64)
    new[0] = 0
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    groups = np.empty(len(rows), np.int64)
    groups[order] = np.cumsum(new)
    return groups
