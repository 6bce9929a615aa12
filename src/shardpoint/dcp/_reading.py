"""Read items to the requests that the engine carries out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.dcp._tensors import dtype_of, host_memory, wrap
from shardpoint.dcp.planner import LoadPlanner, ReadItem
from shardpoint.dtypes import DType
from shardpoint.engine.reading import ReadRequest
from shardpoint.errors import CheckpointKeyError, PlanError
from shardpoint.index import CheckpointIndex

__all__ = ["requests_for"]


def requests_for(
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
    lazily conjugated), they go through a buffer that lives until the item is complete.
    """

    def __init__(self, planner: LoadPlanner, item: ReadItem, dtype: DType) -> None:
        self._planner = planner
        self._item = item
        self._dtype = dtype
        self._tensor: torch.Tensor | None = None
        self._buffer: npt.NDArray[np.generic] | None = None

    def memory(self) -> npt.NDArray[Any]:
        item = self._item
        tensor = self._planner.resolve_tensor(item).detach()
        if tuple(tensor.shape) != tuple(item.lengths):
            raise PlanError(
                f"key {item.dest_index.fqn!r}: resolve_tensor must give a tensor of shape "
                f"{tuple(item.lengths)}, it gave {tuple(tensor.shape)}"
            )
        self._tensor = tensor
        memory = host_memory(tensor) if self._fits(tensor) else None
        if memory is None:
            memory = self._buffer = np.empty(tuple(item.lengths), self._dtype.raw)
        return memory

    def _fits(self, tensor: torch.Tensor) -> bool:
        return dtype_of(tensor.dtype) == self._dtype

    def commit(self) -> None:
        tensor = self._tensor
        assert tensor is not None
        if self._buffer is not None:
            tensor.copy_(wrap(self._buffer, self._dtype))
        else:
            # autograd has to know that a tensor it may have saved has changed
            torch.autograd.graph.increment_version(tensor)
        self._planner.commit_tensor(self._item, tensor)
        self._tensor = self._buffer = None
