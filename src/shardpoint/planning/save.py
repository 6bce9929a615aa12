"""The coordinator's work on a save, as pure functions from columns to columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import BY_CODE
from shardpoint.errors import PlanError, Problem
from shardpoint.index import CheckpointIndex, Chunks, Container, Objects, Tensors
from shardpoint.planning.balance import choose_owners
from shardpoint.planning.validate import find_problems

__all__ = ["OBJECT", "SHARD", "TENSOR", "WriteColumns", "deduplicate", "group_rows", "merge"]

TENSOR, SHARD, OBJECT = 0, 1, 2
"""Values of the `kind` column."""

_RECORD_OVERHEAD = 1536
"""Bytes that a torch.save record adds to its payload, about; objects count as this alone."""

_MOST_PROBLEMS = 50

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class WriteColumns:
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

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, keep: BoolArray) -> WriteColumns:
        """Return the rows where `keep` is true."""
        return WriteColumns(
            keys=[key for key, kept in zip(self.keys, keep.tolist(), strict=True) if kept],
            kind=self.kind[keep],
            dtype=self.dtype[keep],
            ndim=self.ndim[keep],
            shape=self.shape[keep],
            offsets=self.offsets[keep],
            sizes=self.sizes[keep],
            requires_grad=self.requires_grad[keep],
            pin_memory=self.pin_memory[keep],
            memory_format=self.memory_format[keep],
            hint=self.hint[keep],
        )

    def with_hint(self, hint: Int64Array) -> WriteColumns:
        """Return the same rows with other hints."""
        return replace(self, hint=hint)

    @property
    def nbytes(self) -> Int64Array:
        """``int64[n]``: payload bytes of each chunk; 0 for objects."""
        itemsize = np.array([dtype.itemsize for dtype in BY_CODE], np.int64)
        volume = self.sizes.prod(axis=1, dtype=np.int64)
        return np.where(self.kind == OBJECT, 0, volume * itemsize[self.dtype])


@dataclass(frozen=True, slots=True, eq=False)
class _AllRanks:
    """The rows of all ranks, one after the other."""

    rows: WriteColumns
    rank: Int64Array
    key: Int64Array  # number of the key, in order of first appearance
    key_names: list[str]


def _concatenate(columns: Sequence[WriteColumns]) -> _AllRanks:
    axes = max((c.shape.shape[1] for c in columns), default=0)

    def padded(name: str, fill: int) -> Int64Array:
        parts: list[Int64Array] = [getattr(c, name) for c in columns]
        wide = [
            np.pad(p, ((0, 0), (0, axes - p.shape[1])), constant_values=fill)
            if p.shape[1] < axes
            else p
            for p in parts
        ]
        return np.concatenate(wide) if wide else np.zeros((0, axes), np.int64)

    def joined(name: str, dtype: npt.DTypeLike) -> Any:
        return np.concatenate([np.zeros(0, dtype), *[getattr(c, name) for c in columns]])

    numbers: dict[str, int] = {}
    keys = [key for c in columns for key in c.keys]
    key = np.array([numbers.setdefault(k, len(numbers)) for k in keys], np.int64)
    rows = WriteColumns(
        keys=keys,
        kind=joined("kind", np.uint8),
        dtype=joined("dtype", np.uint8),
        ndim=joined("ndim", np.int16),
        shape=padded("shape", 1),
        offsets=padded("offsets", 0),
        sizes=padded("sizes", 1),
        requires_grad=joined("requires_grad", np.bool_),
        pin_memory=joined("pin_memory", np.bool_),
        memory_format=joined("memory_format", np.uint8),
        hint=joined("hint", np.int64),
    )
    rank = np.repeat(np.arange(len(columns)), [len(c) for c in columns])
    return _AllRanks(rows, rank, key, list(numbers))


def group_rows(rows: Int64Array) -> Int64Array:
    """Return ``int64[n]``: equal numbers for equal rows of ``rows[n, m]``."""
    if len(rows) == 0:
        return np.zeros(0, np.int64)
    order = np.lexsort(rows.T[::-1]) if rows.shape[1] else np.arange(len(rows))
    ordered = rows[order]
    new = np.ones(len(rows), np.int64)
    new[0] = 0
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    groups = np.empty(len(rows), np.int64)
    groups[order] = np.cumsum(new)
    return groups


def _split(values: npt.NDArray[Any], columns: Sequence[WriteColumns]) -> list[Any]:
    return np.split(values, np.cumsum([len(c) for c in columns])[:-1]) if columns else []


def deduplicate(columns: Sequence[WriteColumns], *, lowest_rank: bool) -> list[BoolArray]:
    """Choose which rank writes each chunk that several ranks hold.

    Equal chunks, and objects of the same key, are written once: by the rank that has the
    fewest bytes so far, or by the lowest one.

    Returns
    -------
    list of bool[n]
        For each rank, which of its rows it writes.

    Raises
    ------
    PlanError
        If ranks disagree about a key's shape, dtype or kind; names every such key.
    """
    everything = _concatenate(columns)
    rows = everything.rows
    _check_agreement(everything)
    replicas = group_rows(
        np.column_stack([everything.key, rows.kind == OBJECT, rows.offsets, rows.sizes])
    )
    keep = choose_owners(
        replicas,
        everything.rank,
        rows.nbytes + _RECORD_OVERHEAD,
        len(columns),
        lowest_rank=lowest_rank,
    )
    return _split(keep, columns)


def _check_agreement(everything: _AllRanks) -> None:
    """Raise where two rows of one key differ in kind, dtype or shape."""
    rows, key = everything.rows, everything.key
    if len(key) == 0:
        return
    _, first = np.unique(key, return_index=True)
    reference = first[key]
    described = np.column_stack([rows.kind == OBJECT, rows.dtype, rows.ndim, rows.shape])
    differs = (described != described[reference]).any(axis=1)
    problems: dict[str, Problem] = {}
    for row in np.flatnonzero(differs).tolist():
        one, other = (
            f"{_describe(rows, r)} on rank {everything.rank[r]}" for r in (int(reference[row]), row)
        )
        problems.setdefault(
            rows.keys[row], Problem(f"ranks disagree: {one}, {other}", rows.keys[row])
        )
        if len(problems) == _MOST_PROBLEMS:
            break
    if problems:
        raise PlanError("the ranks' state dicts do not fit together", problems.values())


def _describe(rows: WriteColumns, row: int) -> str:
    if rows.kind[row] == OBJECT:
        return "an object"
    shape = tuple(rows.shape[row, : rows.ndim[row]].tolist())
    return f"a {BY_CODE[int(rows.dtype[row])].name} tensor of shape {shape}"


def merge(
    columns: Sequence[WriteColumns], *, check_coverage: bool
) -> tuple[list[Int64Array], CheckpointIndex]:
    """Make the index of the checkpoint that these rows, already deduplicated, will be.

    Returns
    -------
    hints
        For each rank and row the chunk's place among the tensor's chunks; -1 for objects.
    index
        Without files; see `attach_storage`.

    Raises
    ------
    PlanError
        If chunks overlap, lie outside their tensor, or (with `check_coverage`) leave gaps.
    """
    everything = _concatenate(columns)
    rows = everything.rows
    is_object = rows.kind == OBJECT
    tensor_rows = np.flatnonzero(~is_object)
    object_rows = np.flatnonzero(is_object)
    order = tensor_rows[np.argsort(everything.key[tensor_rows], kind="stable")]
    key_numbers, first, counts = np.unique(
        everything.key[order], return_index=True, return_counts=True
    )
    head = order[first]
    first_chunk = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    tensor = np.repeat(np.arange(len(head)), counts)
    hint = np.full(len(rows), -1, np.int64)
    hint[order] = np.arange(len(order)) - first_chunk[tensor]
    unknown = np.full(len(order), -1, np.int64)
    index = CheckpointIndex(
        tensors=Tensors(
            keys=[everything.key_names[k] for k in key_numbers.tolist()],
            dtype=rows.dtype[head],
            ndim=rows.ndim[head],
            shape=rows.shape[head],
            first_chunk=first_chunk,
            requires_grad=rows.requires_grad[head],
            pin_memory=rows.pin_memory[head],
            memory_format=rows.memory_format[head],
        ),
        chunks=Chunks(
            tensor=tensor,
            offsets=rows.offsets[order],
            sizes=rows.sizes[order],
            file=np.zeros(len(order), np.int32),
            record_offset=unknown,
            record_length=unknown.copy(),
            container=np.full(len(order), Container.TORCH_RECORD, np.uint8),
            transform=np.zeros(len(order), np.int16),
        ),
        objects=Objects(
            keys=[rows.keys[row] for row in object_rows.tolist()],
            file=np.zeros(len(object_rows), np.int32),
            record_offset=np.zeros(len(object_rows), np.int64),
            record_length=np.zeros(len(object_rows), np.int64),
            transform=np.zeros(len(object_rows), np.int16),
        ),
        files=["(not written yet)"],
        transforms=[()],
        key_order=everything.key_names,
        paths=None,
        storage_meta=None,
        version=None,
        source="dcp",
    )
    problems = find_problems(index, rows=None, file_sizes=None, check_coverage=check_coverage)
    if problems:
        raise PlanError("the ranks' chunks do not make up the tensors", problems)
    return _split(hint, columns), index
