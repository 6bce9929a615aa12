"""Load plans carried out: by the columns they were made from, or item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt
import torch

from shardpoint.dcp._forking import make_ready_for_threads
from shardpoint.dcp._objects import TorchFactory, object_streams, stored_objects
from shardpoint.dcp._read_items import Reads, ReadTable
from shardpoint.dcp._state_targets import StateTargets
from shardpoint.dcp._tensors import dtype_of, host_memory, put_values, refuse_lost_memory
from shardpoint.dcp.default_planner import DefaultLoadPlanner
from shardpoint.dcp.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from shardpoint.dtypes import DType
from shardpoint.engine.collector import collection_paused
from shardpoint.engine.reading import (
    ReadRequest,
    ReadStatistics,
    Wanted,
    read_regions,
    read_tensors,
)
from shardpoint.errors import CheckpointKeyError, PlanError
from shardpoint.index import CheckpointIndex
from shardpoint.storage import Storage
from shardpoint.transforms import TransformFinder

__all__ = ["carry_out"]

_HOOKS = {
    name: vars(DefaultLoadPlanner)[name]
    for name in (
        "load_bytes",
        "resolve_tensor",
        "commit_tensor",
        "lookup_tensor",
        "transform_tensor",
    )
}


def carry_out(
    plan: LoadPlan,
    planner: LoadPlanner,
    index: CheckpointIndex,
    storage: Storage,
    *,
    threads: int,
    verify: bool,
    finder: TransformFinder,
) -> ReadStatistics:
    """Read all that a plan says, objects first: one that may not be decoded is found before
    any tensor is changed.

    Where nobody has changed the plan that a default planner made, and its hooks are its own,
    no item is ever made.
    """
    make_ready_for_threads()
    items = plan.items
    reads = items.untouched if isinstance(items, ReadTable) else None
    if (
        reads is not None
        and reads.index.tensors is index.tensors
        and isinstance(planner, DefaultLoadPlanner)
        and _has_default_hooks(planner)
    ):
        return _by_columns(
            reads, planner, index, storage, threads=threads, verify=verify, finder=finder
        )
    return _by_items(items, planner, index, storage, threads=threads, verify=verify, finder=finder)


def _has_default_hooks(planner: DefaultLoadPlanner) -> bool:
    """Whether neither a subclass, a program at run time, nor the planner itself has others."""
    return all(
        getattr(type(planner), name) is method and name not in vars(planner)
        for name, method in _HOOKS.items()
    )


def _by_columns(
    reads: Reads,
    planner: DefaultLoadPlanner,
    index: CheckpointIndex,
    storage: Storage,
    *,
    threads: int,
    verify: bool,
    finder: TransformFinder,
) -> ReadStatistics:
    regions = reads.regions
    with collection_paused():
        targets = StateTargets(planner.state_dict, regions, index.tensors)
        rows = _object_rows(index, reads.objects)
        keys = index.objects.keys
        found = stored_objects(
            index,
            storage,
            rows,
            factory=TorchFactory(),
            allowed=planner.allowed,
            verify=verify,
            finder=finder,
        )
        for row, value in found:
            planner.put_object(keys[row], value)
    statistics = read_regions(
        index,
        storage,
        Wanted(regions.tensor, regions.offsets, regions.sizes),
        targets,
        threads=threads,
        verify=verify,
        gap_ratio=0.05,
        finder=finder,
        tally=None,
    )
    return _with_objects(statistics, index, rows)


def _by_items(
    items: Sequence[ReadItem],
    planner: LoadPlanner,
    index: CheckpointIndex,
    storage: Storage,
    *,
    threads: int,
    verify: bool,
    finder: TransformFinder,
) -> ReadStatistics:
    tensors: list[ReadItem] = []
    objects: list[ReadItem] = []
    for item in items:
        is_object = item.type.name == LoadItemType.BYTE_IO.name
        (objects if is_object else tensors).append(item)
    rows = _object_rows(index, [item.storage_index.fqn for item in objects])
    wanting: dict[int, list[ReadItem]] = {}
    for row, item in zip(rows, objects, strict=True):
        wanting.setdefault(row, []).append(item)
    for row, stream in object_streams(index, storage, list(wanting), verify=verify, finder=finder):
        for item in wanting[row]:
            stream.seek(0)
            planner.load_bytes(item, stream)
    statistics = read_tensors(
        index,
        storage,
        _requests_for(index, tensors, planner),
        threads=threads,
        verify=verify,
        finder=finder,
    )
    return _with_objects(statistics, index, list(wanting))


def _object_rows(index: CheckpointIndex, keys: Sequence[str]) -> list[int]:
    rows = dict(zip(index.objects.keys, range(len(index.objects)), strict=True))
    for key in keys:
        if key not in rows:
            raise CheckpointKeyError(f"the checkpoint has no object {key!r}")
    return [rows[key] for key in keys]


def _with_objects(
    statistics: ReadStatistics, index: CheckpointIndex, rows: Sequence[int]
) -> ReadStatistics:
    nbytes = int(index.objects.record_length[list(rows)].sum())
    return replace(statistics, bytes_read=statistics.bytes_read + nbytes)


def _requests_for(
    index: CheckpointIndex, items: Sequence[ReadItem], planner: LoadPlanner
) -> list[ReadRequest]:
    """Return one request for each tensor item.

    Raises
    ------
    CheckpointKeyError
        If an item names a tensor that is not stored.
    """
    rows = {key: row for row, key in enumerate(index.tensors.keys)}
    requests = []
    for item in items:
        key = item.storage_index.fqn
        if key not in rows:
            raise CheckpointKeyError(f"the checkpoint has no tensor {key!r}")
        row = rows[key]
        start = item.storage_index.offset or (0,) * len(item.storage_offsets)
        requests.append(
            ReadRequest(
                tensor=row,
                offsets=tuple(a + b for a, b in zip(start, item.storage_offsets, strict=True)),
                sizes=tuple(item.lengths),
                sink=_PlannerTarget(planner, item, index.tensors.dtype_of(row)),
            )
        )
    return requests


class _PlannerTarget:
    """The tensor that a planner gives for one item.

    Where its own memory cannot take the stored elements (another dtype, another device,
    lazily conjugated), it gets them piece by piece.
    """

    def __init__(self, planner: LoadPlanner, item: ReadItem, dtype: DType) -> None:
        self._planner = planner
        self._item = item
        self._dtype = dtype
        self._tensor: torch.Tensor | None = None

    def memory(self) -> npt.NDArray[Any] | None:
        item = self._item
        tensor = self._planner.resolve_tensor(item).detach()
        if tuple(tensor.shape) != tuple(item.lengths):
            raise PlanError(
                f"key {item.dest_index.fqn!r}: resolve_tensor must give a tensor of shape "
                f"{tuple(item.lengths)}, it gave {tuple(tensor.shape)}"
            )
        refuse_lost_memory(item.dest_index.fqn, tensor)
        self._tensor = tensor
        return host_memory(tensor) if dtype_of(tensor.dtype) == self._dtype else None

    def put(self, start: tuple[int, ...], values: npt.NDArray[Any]) -> None:
        assert self._tensor is not None  # memory comes first
        put_values(self._tensor, start, values, self._dtype)

    def commit(self) -> None:
        tensor = self._tensor
        assert tensor is not None
        # autograd has to know that a tensor it may have saved has changed
        torch.autograd.graph.increment_version(tensor)
        self._planner.commit_tensor(self._item, tensor)
        self._tensor = None
