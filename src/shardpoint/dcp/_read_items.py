"""Read items as columns, and the view that shows columns as read items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.dcp._lazy_list import LazyList
from shardpoint.dcp.metadata import MetadataIndex
from shardpoint.dcp.planner import LoadItemType, ReadItem
from shardpoint.index import CheckpointIndex
from shardpoint.planning.intersect import intersect

__all__ = ["LocalRegions", "ReadColumns", "ReadTable", "Reads"]

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LocalRegions:
    """One row a local tensor that is to be filled.

    Attributes
    ----------
    keys
        Flat keys.
    tensor
        ``int64[n]``: rows in the index's `Tensors`.
    ndim
        ``int16[n]``.
    offsets, sizes
        ``int64[n, D]``: the box, padded with 0 and 1.
    hint
        ``int64[n]``: the place among the local chunks of the key.
    """

    keys: Sequence[str]
    tensor: Int64Array
    ndim: npt.NDArray[np.int16]
    offsets: Int64Array
    sizes: Int64Array
    hint: Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class ReadColumns:
    """One row a box to read, then one row an object.

    Attributes
    ----------
    keys
        Flat keys.
    ndim
        ``int16[n]``; -1 for objects.
    local_offsets, local_hint
        The local chunk: where it begins in the tensor, its place among the local ones.
    stored_offsets, stored_hint
        The stored chunk, likewise.
    dest_offsets, storage_offsets, lengths
        The box: in the local chunk, in the stored one, and its sizes.
    """

    keys: Sequence[str]
    ndim: npt.NDArray[np.int16]
    local_offsets: Int64Array
    local_hint: Int64Array
    stored_offsets: Int64Array
    stored_hint: Int64Array
    dest_offsets: Int64Array
    storage_offsets: Int64Array
    lengths: Int64Array


class Reads:
    """What is read: local tensors from an index, and objects.

    Which stored chunks they come from is found when somebody asks.
    """

    def __init__(
        self, index: CheckpointIndex, regions: LocalRegions, objects: Sequence[str]
    ) -> None:
        self.index = index
        self.regions = regions
        self.objects = objects

    @cached_property
    def columns(self) -> ReadColumns:
        """One row a box to read, then one row an object."""
        regions, chunks = self.regions, self.index.chunks
        wanted = np.zeros(len(self.index.tensors), np.bool_)
        wanted[regions.tensor] = True
        candidates = np.flatnonzero(wanted[chunks.tensor])
        found = intersect(
            regions.tensor,
            regions.offsets,
            regions.sizes,
            chunks.tensor[candidates],
            chunks.offsets[candidates],
            chunks.sizes[candidates],
        )
        stored = candidates[found.b]
        count = len(self.objects)

        def with_objects(column: np.ndarray[Any, Any], fill: int = 0) -> np.ndarray[Any, Any]:
            rest = np.full((count, *column.shape[1:]), fill, column.dtype)
            return np.concatenate([column, rest])

        return ReadColumns(
            keys=[*map(regions.keys.__getitem__, found.a.tolist()), *self.objects],
            ndim=with_objects(regions.ndim[found.a], -1),
            local_offsets=with_objects(regions.offsets[found.a]),
            local_hint=with_objects(regions.hint[found.a]),
            stored_offsets=with_objects(chunks.offsets[stored]),
            stored_hint=with_objects(
                stored - self.index.tensors.first_chunk[chunks.tensor[stored]]
            ),
            dest_offsets=with_objects(found.offsets - regions.offsets[found.a]),
            storage_offsets=with_objects(found.offsets - chunks.offsets[stored]),
            lengths=with_objects(found.sizes),
        )


class ReadTable(LazyList[ReadItem, Reads]):
    """Columns that look like a list of read items."""

    @property
    def untouched(self) -> Reads | None:
        """What the list is made from, if nobody has looked at (and so perhaps changed) it."""
        return None if self._kept else self._columns

    def _count(self, columns: Reads) -> int:
        return len(columns.columns.keys)

    def _columns_from(self, items: Iterable[ReadItem]) -> Reads:
        raise TypeError("read items are never turned back into columns")

    def __reduce__(self) -> Any:
        # only plans that planners look at are sent to other ranks
        return list, (list(self),)

    def _make(self, reads: Reads, row: int) -> ReadItem:
        columns = reads.columns
        key, rank = columns.keys[row], int(columns.ndim[row])
        if rank < 0:
            nowhere = torch.Size((0,))
            index = MetadataIndex(key)
            return ReadItem(LoadItemType.BYTE_IO, index, nowhere, index, nowhere, nowhere)

        def size(column: Int64Array) -> torch.Size:
            return torch.Size(column[row, :rank].tolist())

        return ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(
                key, size(columns.local_offsets), int(columns.local_hint[row])
            ),
            dest_offsets=size(columns.dest_offsets),
            storage_index=MetadataIndex(
                key, size(columns.stored_offsets), int(columns.stored_hint[row])
            ),
            storage_offsets=size(columns.storage_offsets),
            lengths=size(columns.lengths),
        )
