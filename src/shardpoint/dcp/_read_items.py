"""Read items as columns, and the view that shows columns as read items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.dcp._lazy_list import LazyList
from shardpoint.dcp.metadata import MetadataIndex
from shardpoint.dcp.planner import LoadItemType, ReadItem

__all__ = ["ReadColumns", "ReadTable"]

Int64Array = npt.NDArray[np.int64]


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


class ReadTable(LazyList[ReadItem, ReadColumns]):
    """Columns that look like a list of read items."""

    def _count(self) -> int:
        return len(self._columns.keys)

    def _columns_from(self, items: Iterable[ReadItem]) -> ReadColumns:
        raise TypeError("read items are never turned back into columns")

    def __reduce__(self) -> tuple[Any, ...]:
        # only plans that planners look at are sent to other ranks
        return list, (list(self),)

    def _make(self, row: int) -> ReadItem:
        columns = self._columns
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
