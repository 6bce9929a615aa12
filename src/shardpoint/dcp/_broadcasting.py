"""One rank reads a file; every rank gets the parts it wants."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import add
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.coordination import Coordinator, gather_scatter
from shardpoint.dcp._tensors import dtype_of_array, wrap
from shardpoint.dcp.planner import LoadItemType, LoadPlanner, ReadItem
from shardpoint.engine.executor import default_threads
from shardpoint.engine.opening import open_index
from shardpoint.engine.reading import ArraySink, ReadRequest, read_tensors
from shardpoint.errors import PlanError, Problem

__all__ = ["broadcast_tensors"]

AnyArray: TypeAlias = npt.NDArray[Any]

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets in the whole tensor, and sizes."""

Wanted: TypeAlias = dict[str, list[Box]]

Shapes: TypeAlias = dict[str, tuple[int, ...]]
"""Of the whole tensors, as a rank's planner describes them."""


def broadcast_tensors(
    place: str | os.PathLike[str],
    items: Iterable[ReadItem],
    planner: LoadPlanner,
    coordinator: Coordinator,
) -> None:
    """Fill what `planner` gives for each item; every rank of the coordinator calls this.

    The coordinating rank holds one tensor at a time, and the parts of it that it sends.

    Raises
    ------
    PlanError
        If an item is an object, or does not fit what the file holds.
    RankFailedError
        On every rank, if one of them failed.
    """
    own: dict[str, list[ReadItem]] = {}
    for item in items:
        own.setdefault(item.storage_index.fqn, []).append(item)
    reader = _Reader(place)
    keys: list[str] = gather_scatter(
        coordinator, "plan", lambda: (_boxes(own), _shapes(own, planner)), reader.open
    )
    fill: Callable[[], None] = _nothing
    for key in keys:
        # A rank whose planner fails says so in the next step, where the others hear of it.
        parts = gather_scatter(coordinator, "read", fill, partial(reader.parts, key))
        fill = partial(_fill, own.get(key, []), parts, planner)
    fill()


def _nothing() -> None:
    return


def _boxes(items: Mapping[str, Sequence[ReadItem]]) -> Wanted:
    """Return where each item's elements lie in the whole tensor."""
    problems = [
        Problem("is an object: only tensors can be loaded from this file", key)
        for key, some in items.items()
        if any(item.type.name == LoadItemType.BYTE_IO.name for item in some)
    ]
    if problems:
        raise PlanError("the file cannot be loaded in this way", problems)
    wanted: Wanted = {}
    for key, some in items.items():
        for item in some:
            start = item.storage_index.offset or (0,) * len(item.storage_offsets)
            offsets = tuple(a + b for a, b in zip(start, item.storage_offsets, strict=True))
            wanted.setdefault(key, []).append((offsets, tuple(item.lengths)))
    return wanted


def _shapes(keys: Iterable[str], planner: LoadPlanner) -> Shapes:
    """Return the shapes that the state dict has, where the planner tells: parts do not."""
    metadata = getattr(planner, "metadata", None)
    described = {} if metadata is None else metadata.state_dict_metadata
    return {key: tuple(described[key].size) for key in keys if hasattr(described.get(key), "size")}


def _fill(items: Sequence[ReadItem], parts: Sequence[AnyArray], planner: LoadPlanner) -> None:
    for item, part in zip(items, parts, strict=True):
        target = planner.resolve_tensor(item).detach()
        if tuple(target.shape) != part.shape:
            raise PlanError(
                f"key {item.dest_index.fqn!r}: resolve_tensor must give a tensor of shape "
                f"{part.shape}, it gave {tuple(target.shape)}"
            )
        target.copy_(wrap(np.array(part), dtype_of_array(part.dtype)))
        planner.commit_tensor(item, target)


class _Reader:
    """The coordinating rank's side: the file, and what all ranks want of it."""

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self._place = place
        self._wanted: list[Wanted] = []
        self._rows: dict[str, int] = {}

    def open(self, asked: list[tuple[Wanted, Shapes]]) -> list[list[str]]:
        """Open the file; return, for each rank, the keys to go through."""
        self._wanted = [wanted for wanted, _ in asked]
        self._index, self._storage = open_index(self._place)
        self._rows = {key: row for row, key in enumerate(self._index.tensors.keys)}
        problems: dict[str, Problem] = {}
        for rank, (wanted, shapes) in enumerate(asked):
            for key in wanted:
                message = self._misfit(key, wanted[key], shapes.get(key))
                if message is not None:
                    problems.setdefault(key, Problem(f"{message} on rank {rank}", key))
        if problems:
            raise PlanError("the file does not fit the state dict", problems.values())
        keys = list(dict.fromkeys(key for wanted in self._wanted for key in wanted))
        return [keys] * len(asked)

    def _misfit(self, key: str, boxes: Sequence[Box], shape: tuple[int, ...] | None) -> str | None:
        """Say what is wrong with what a rank wants of a tensor, if anything is."""
        if key not in self._rows:
            return "the file has no such tensor, which is wanted"
        stored = self._index.tensors.shape_of(self._rows[key])
        if shape is not None and shape != stored:
            return f"has shape {stored} in the file, and {shape} in the state dict"
        for offsets, sizes in boxes:
            end = tuple(map(add, offsets, sizes))
            if len(stored) != len(end) or any(a > b for a, b in zip(end, stored, strict=True)):
                return f"has shape {stored} in the file, and a part up to {end} is wanted"
        return None

    def parts(self, key: str, ready: Sequence[None]) -> list[list[AnyArray]]:
        """Read one tensor; return, for each rank that is ready, the boxes it wants of it."""
        row = self._rows[key]
        shape = self._index.tensors.shape_of(row)
        whole = np.empty(shape, self._index.tensors.dtype_of(row).numpy)
        request = ReadRequest(
            tensor=row, offsets=(0,) * len(shape), sizes=shape, sink=ArraySink(whole)
        )
        read_tensors(self._index, self._storage, [request], threads=default_threads(), verify=True)
        return [
            [whole[_slices(offsets, sizes)] for offsets, sizes in of_rank.get(key, ())]
            for of_rank in self._wanted
        ]


def _slices(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + b) for a, b in zip(offsets, sizes, strict=True))
