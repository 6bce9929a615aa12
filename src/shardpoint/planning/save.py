"""The coordinator's work on a save, as pure functions from columns to columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from shardpoint.errors import PlanError, Problem
from shardpoint.index import CheckpointIndex, Chunks, Container, Objects, Tensors
from shardpoint.planning._joining import Joined, group_rows, join, replicas
from shardpoint.planning._write_columns import OBJECT, SHARD, TENSOR, WriteColumns
from shardpoint.planning.balance import choose_owners
from shardpoint.planning.validate import find_problems
from shardpoint.region import BoolArray, Int64Array

__all__ = [
    "OBJECT",
    "SHARD",
    "TENSOR",
    "GlobalPlan",
    "WriteColumns",
    "deduplicate",
    "group_rows",
    "merge",
    "plan_writes",
]

_RECORD_OVERHEAD = 1536
"""Bytes that a torch.save record adds to its payload, about; objects count as this alone."""

_MOST_RANKS = 8


@dataclass(frozen=True, slots=True, eq=False)
class GlobalPlan:
    """What all ranks write.

    Attributes
    ----------
    kept
        For each rank ``bool[n]``: which of its rows it writes.
    hints
        For each rank ``int64[n]``: each row's place among the tensor's chunks; -1 for objects
        and for rows that it does not write.
    index
        Of the checkpoint, without files; see `attach_storage`.
    """

    kept: list[BoolArray]
    hints: list[Int64Array]
    index: CheckpointIndex


def plan_writes(
    columns: Sequence[WriteColumns], *, lowest_rank: bool, check_coverage: bool
) -> GlobalPlan:
    """Choose who writes what, and make the index: `deduplicate`, then `merge`, in one pass.

    Raises
    ------
    PlanError
        If ranks disagree, chunks overlap, lie outside their tensor, or (with `check_coverage`)
        leave gaps.
    """
    joined = join(columns)
    keep = _owners(joined, len(columns), lowest_rank=lowest_rank)
    hint, index = _index(joined, keep, check_coverage=check_coverage)
    return GlobalPlan(
        kept=cast(list[BoolArray], joined.by_rank(keep)),
        hints=cast(list[Int64Array], joined.by_rank(hint)),
        index=index,
    )


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
    joined = join(columns)
    keep = _owners(joined, len(columns), lowest_rank=lowest_rank)
    return cast(list[BoolArray], joined.by_rank(keep))


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
    joined = join(columns)
    everything = np.ones(len(joined.key), np.bool_)
    hint, index = _index(joined, everything, check_coverage=check_coverage)
    return cast(list[Int64Array], joined.by_rank(hint)), index


def _owners(joined: Joined, world_size: int, *, lowest_rank: bool) -> BoolArray:
    order, is_new = replicas(joined)
    if is_new.all():
        return np.ones(len(order), np.bool_)
    keep = np.zeros(len(order), np.bool_)
    keep[order] = choose_owners(
        np.cumsum(is_new),
        joined.rank[order],
        joined.nbytes[order] + _RECORD_OVERHEAD,
        world_size,
        lowest_rank=lowest_rank,
    )
    return keep


def _index(
    joined: Joined, keep: BoolArray, *, check_coverage: bool
) -> tuple[Int64Array, CheckpointIndex]:
    """Return each row's place among its tensor's chunks, and the index of the kept rows."""
    heads = joined.heads
    of_object = heads.is_object[joined.key]
    rows = np.flatnonzero(keep & ~of_object)
    object_keys = joined.key[keep & of_object]
    objects = object_keys[np.argsort(joined.order[keep & of_object], kind="stable")]
    tensors = np.flatnonzero(~heads.is_object)
    counts = np.bincount(joined.key[rows], minlength=len(heads.names))[tensors]
    first_chunk = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    tensor = np.repeat(np.arange(len(tensors)), counts)
    hint = np.full(len(keep), -1, np.int64)
    hint[rows] = np.arange(len(rows)) - first_chunk[tensor]
    nowhere = np.zeros(len(objects), np.int64)
    index = CheckpointIndex(
        tensors=Tensors(
            keys=[heads.names[key] for key in tensors.tolist()],
            dtype=heads.dtype[tensors],
            ndim=heads.ndim[tensors],
            shape=heads.shape[tensors],
            first_chunk=first_chunk,
            requires_grad=heads.requires_grad[tensors],
            pin_memory=heads.pin_memory[tensors],
            memory_format=heads.memory_format[tensors],
        ),
        chunks=Chunks(
            tensor=tensor,
            offsets=joined.offsets[rows],
            sizes=joined.sizes[rows],
            file=np.zeros(len(rows), np.int32),
            record_offset=np.full(len(rows), -1, np.int64),
            record_length=np.full(len(rows), -1, np.int64),
            container=np.full(len(rows), Container.TORCH_RECORD, np.uint8),
            transform=np.zeros(len(rows), np.int16),
        ),
        objects=Objects(
            keys=[heads.names[key] for key in objects.tolist()],
            file=nowhere.astype(np.int32),
            record_offset=nowhere,
            record_length=nowhere.copy(),
            transform=nowhere.astype(np.int16),
        ),
        files=["(not written yet)"],
        transforms=[()],
        key_order=heads.names,
        paths=None,
        storage_meta=None,
        version=None,
        source="dcp",
    )
    problems = find_problems(index, rows=None, file_sizes=None, check_coverage=check_coverage)
    if problems:
        problems = _with_ranks(problems, index, joined.rank[rows], len(joined.bounds) - 1)
        raise PlanError("the ranks' chunks do not make up the tensors", problems)
    return hint, index


def _with_ranks(
    problems: Sequence[Problem], index: CheckpointIndex, rank: Int64Array, world_size: int
) -> list[Problem]:
    """Say of each problem which ranks hold chunks of the tensor."""
    rows = {key: row for row, key in enumerate(index.tensors.keys)}
    found = []
    for problem in problems:
        row = rows.get(problem.key or "")
        if row is not None and world_size > 1:
            own = rank[index.tensors.first_chunk[row] : index.tensors.first_chunk[row + 1]]
            ranks = np.unique(own).tolist()
            named = ", ".join(str(number) for number in ranks[:_MOST_RANKS])
            more = f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else ""
            text = (
                f"{problem.message}; its chunks are on rank{'s' * (len(ranks) > 1)} {named}{more}"
            )
            problem = replace(problem, message=f"{text} of {world_size}")
        found.append(problem)
    return found
