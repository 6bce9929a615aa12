"""What one rank would write, in columns, and how these travel between ranks."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.coordination import Shared
from shardpoint.dtypes import BY_CODE
from shardpoint.region import BoolArray, Int64Array

__all__ = ["OBJECT", "SHARD", "TENSOR", "WriteColumns"]

TENSOR, SHARD, OBJECT = 0, 1, 2
"""Values of the `kind` column."""

Packed: TypeAlias = tuple[str, int, bytes]
_NARROW = ("<i1", "<u1", "<i2", "<u2", "<i4", "<i8")
_FAST = 1  # the coordinator unpacks equal parts once, so size on the wire is what counts


@dataclass(frozen=True, slots=True, eq=False)
class WriteColumns(Shared):
    """What one rank would write: one row a chunk or object.

    Attributes
    ----------
    keys
        Flat keys.
    kind
        ``uint8[n]``: `TENSOR`, `SHARD` or `OBJECT`.
    dtype, ndim, requires_grad, pin_memory, memory_format
        As in `Tensors`; 0 for objects.
    shape, offsets, sizes
        ``int64[n, D]``: the whole tensor and the chunk, padded with 1, 0 and 1.
    hint
        ``int64[n]``: the chunk's place among the tensor's chunks, -1 where not yet given.
    """

    keys: Sequence[str]
    kind: npt.NDArray[np.uint8]
    dtype: npt.NDArray[np.uint8]
    ndim: npt.NDArray[np.int16]
    shape: Int64Array
    offsets: Int64Array
    sizes: Int64Array
    requires_grad: BoolArray
    pin_memory: BoolArray
    memory_format: npt.NDArray[np.uint8]
    hint: Int64Array
    # The columns that these are rows of, and which rows: what their sender need not be told.
    _origin: tuple[WriteColumns, Int64Array] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, keep: BoolArray) -> WriteColumns:
        """Return the rows where `keep` is true."""
        return self._rows(np.flatnonzero(keep), self.hint[keep])

    def with_hint(self, hint: Int64Array) -> WriteColumns:
        """Return the same rows with other hints."""
        return self._rows(np.arange(len(self)), hint)

    def _rows(self, rows: Int64Array, hint: Int64Array) -> WriteColumns:
        whole = len(rows) == len(self)  # rows ascend
        keys = self.keys if whole else [self.keys[row] for row in rows.tolist()]
        at: Any = slice(None) if whole else rows
        result = WriteColumns(
            keys=keys,
            kind=self.kind[at],
            dtype=self.dtype[at],
            ndim=self.ndim[at],
            shape=self.shape[at],
            offsets=self.offsets[at],
            sizes=self.sizes[at],
            requires_grad=self.requires_grad[at],
            pin_memory=self.pin_memory[at],
            memory_format=self.memory_format[at],
            hint=hint,
        )
        base, before = self._origin or (self, None)
        origin = base, rows if before is None else before[rows]
        object.__setattr__(result, "_origin", origin)
        return result

    @property
    def nbytes(self) -> Int64Array:
        """``int64[n]``: payload bytes of each chunk; 0 for objects."""
        itemsize = np.array([dtype.itemsize for dtype in BY_CODE], np.int64)
        volume = self.sizes.prod(axis=1, dtype=np.int64)
        return np.where(self.kind == OBJECT, 0, volume * itemsize[self.dtype])

    def shared_state(self) -> tuple[Hashable, ...]:
        if self._origin is not None:
            base, rows = self._origin
            return base, _packed(rows), _packed(self.hint)
        return (
            _Described.of(self),
            tuple(_packed(axis) for axis in self.offsets.T),
            tuple(_packed(axis) for axis in self.sizes.T),
            _packed(self.hint),
        )

    @classmethod
    def from_shared_state(cls, *state: Any) -> WriteColumns:
        if isinstance(state[0], WriteColumns):
            base, rows, hint = state
            taken: WriteColumns = base._rows(_unpacked(rows), _unpacked(hint))
            return taken
        described, offsets, sizes, hint = state
        return cls(
            keys=described.keys,
            kind=described.kind,
            dtype=described.dtype,
            ndim=described.ndim,
            shape=described.shape,
            offsets=_columns(offsets, len(described.keys)),
            sizes=_columns(sizes, len(described.keys)),
            requires_grad=described.flags[0],
            pin_memory=described.flags[1],
            memory_format=described.memory_format,
            hint=_unpacked(hint),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Described(Shared):
    """The part of `WriteColumns` in which ranks are mostly alike."""

    keys: tuple[str, ...]
    kind: npt.NDArray[np.uint8]
    dtype: npt.NDArray[np.uint8]
    ndim: npt.NDArray[np.int16]
    shape: Int64Array
    flags: tuple[BoolArray, BoolArray]
    memory_format: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, columns: WriteColumns) -> _Described:
        return cls(
            keys=tuple(columns.keys),
            kind=columns.kind,
            dtype=columns.dtype,
            ndim=columns.ndim,
            shape=columns.shape,
            flags=(columns.requires_grad, columns.pin_memory),
            memory_format=columns.memory_format,
        )

    def shared_state(self) -> tuple[Hashable, ...]:
        columns = (self.kind, self.dtype, self.ndim, *self.flags, self.memory_format)
        data = pickle.dumps((self.keys, [column.tobytes() for column in columns]), protocol=5)
        return zlib.compress(data, _FAST), tuple(_packed(axis) for axis in self.shape.T)

    @classmethod
    def from_shared_state(cls, *state: Any) -> _Described:
        data, shape = state
        keys, columns = pickle.loads(zlib.decompress(data))  # noqa: S301  from our own ranks
        kind, dtype, ndim, requires_grad, pin_memory, memory_format = columns
        return cls(
            keys=keys,
            kind=np.frombuffer(kind, np.uint8),
            dtype=np.frombuffer(dtype, np.uint8),
            ndim=np.frombuffer(ndim, np.int16),
            shape=_columns(shape, len(keys)),
            flags=(np.frombuffer(requires_grad, np.bool_), np.frombuffer(pin_memory, np.bool_)),
            memory_format=np.frombuffer(memory_format, np.uint8),
        )


def _packed(column: Int64Array) -> Packed:
    """Return a column in as few bytes as its numbers need; one number where all are equal."""
    if len(column) == 0:
        return "<u1", 0, b""
    low, high = int(column.min()), int(column.max())
    if low == high:
        return "", len(column), low.to_bytes(8, "little", signed=True)
    for code in _NARROW:
        limits = np.iinfo(code)
        if limits.min <= low and high <= limits.max:
            break
    return code, len(column), column.astype(code).tobytes()


def _unpacked(packed: Packed) -> Int64Array:
    code, count, data = packed
    if not code:
        return np.full(count, int.from_bytes(data, "little", signed=True), np.int64)
    return np.frombuffer(data, code).astype(np.int64)


def _columns(packed: Sequence[Packed], count: int) -> Int64Array:
    result = np.empty((count, len(packed)), np.int64)
    for axis, column in enumerate(packed):
        result[:, axis] = _unpacked(column)
    return result
