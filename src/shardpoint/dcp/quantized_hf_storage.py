"""Safetensors checkpoints with block-scaled weights, dequantised while they are loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.futures import Future

from shardpoint.dcp._dequantizing import (
    Box,
    Pairs,
    block_boxes,
    dequantize_blocks,
    dequantize_mxfp4,
    find_pairs,
)
from shardpoint.dcp._tensors import dtype_of, wrap
from shardpoint.dcp.hf_storage import HuggingFaceStorageReader
from shardpoint.dcp.planner import LoadPlan, LoadPlanner, ReadItem
from shardpoint.engine.reading import ArraySink, ReadRequest, ReadStatistics, read_tensors
from shardpoint.errors import NotSupportedError, PlanError, Problem
from shardpoint.index import CheckpointIndex
from shardpoint.storage import Storage

__all__ = ["QuantizedHuggingFaceStorageReader"]


class QuantizedHuggingFaceStorageReader(HuggingFaceStorageReader):
    """Reads safetensors files whose weights have scales, as plain weights.

    Weights ``x.weight`` with ``x.weight_scale_inv`` have a scale for each square block;
    ``x_blocks`` with ``x_scales`` are MXFP4, and are loaded with the shape that they have
    once dequantised. Everything else is read as it is. Of a slice only its own blocks and
    their scales are read, in whatever files they lie.

    Parameters
    ----------
    path
        The folder or URL.
    thread_count
        Reading threads, where more than the number that fits the machine.
    target_dtype
        The dtype of dequantised weights; they are converted from it to the state dict's.
    block_size
        Rows and columns of a block.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        thread_count: int = 1,
        target_dtype: torch.dtype = torch.float32,
        block_size: int = 128,
    ) -> None:
        if block_size < 1:
            raise PlanError(f"block_size must be at least 1, not {block_size}")
        super().__init__(path, thread_count)
        self.target_dtype = target_dtype
        self.block_size = block_size
        self._stored: CheckpointIndex | None = None
        self._rows: dict[str, int] = {}
        self._pairs = Pairs({}, {})

    def _open(self, rank: int | None) -> tuple[CheckpointIndex, Storage]:
        index, storage = super()._open(rank)
        self._stored = index
        self._rows = {key: row for row, key in enumerate(index.tensors.keys)}
        shapes = {key: index.tensors.shape_of(row) for key, row in self._rows.items()}
        self._pairs = find_pairs(shapes, self.block_size)
        return self._dequantised(index), storage

    def _dequantised(self, index: CheckpointIndex) -> CheckpointIndex:
        """Return the index as planners see it: with the shapes and dtype after dequantising."""
        tensors, chunks = index.tensors, index.chunks
        dtype, ndim, shape = tensors.dtype.copy(), tensors.ndim.copy(), tensors.shape.copy()
        offsets, sizes = chunks.offsets.copy(), chunks.sizes.copy()
        split = []
        for key, dequantised in self._pairs.shapes.items():
            row = self._rows[key]
            dtype[row] = dtype_of(self.target_dtype).code
            axes = len(dequantised)
            if axes == int(ndim[row]):
                continue
            first, last = int(tensors.first_chunk[row]), int(tensors.first_chunk[row + 1])
            if last - first != 1:
                split.append(Problem(f"is in {last - first} chunks", key))
                continue
            padding = shape.shape[1] - axes
            ndim[row] = axes
            shape[row] = (*dequantised, *(1,) * padding)
            sizes[first] = shape[row]
            offsets[first] = 0
        if split:
            lines = "\n".join(f"  - {problem}" for problem in split)
            raise NotSupportedError(f"MXFP4 weights can only be read whole:\n{lines}")
        return replace(
            index,
            tensors=replace(tensors, dtype=dtype, ndim=ndim, shape=shape),
            chunks=replace(chunks, offsets=offsets, sizes=sizes),
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        scales = self._pairs.scales
        plain = [item for item in plan.items if item.storage_index.fqn not in scales]
        future = super().read_data(replace(plan, items=plain), planner)
        for item in plan.items:
            if item.storage_index.fqn in scales:
                self._read_quantised(item, planner)
        return future

    def _read_quantised(self, item: ReadItem, planner: LoadPlanner) -> None:
        key = item.storage_index.fqn
        start = item.storage_index.offset or (0,) * len(item.storage_offsets)
        offsets = tuple(a + b for a, b in zip(start, item.storage_offsets, strict=True))
        sizes = tuple(item.lengths)
        target = planner.resolve_tensor(item).detach()
        if tuple(target.shape) != sizes:
            raise PlanError(
                f"key {item.dest_index.fqn!r}: resolve_tensor must give a tensor of shape "
                f"{sizes}, it gave {tuple(target.shape)}"
            )
        if len(self._stored_shape(key)) == len(sizes):
            scale_box = block_boxes((offsets, sizes), self.block_size)
            weight, scales = self._read_pair(key, (offsets, sizes), scale_box)
            dequantize_blocks(weight, scales, offsets, self.block_size, target, self.target_dtype)
        else:
            box, skipped = self._group_box(key, offsets, sizes)
            weight, scales = self._read_pair(key, box, (box[0][:-1], box[1][:-1]))
            dequantize_mxfp4(weight, scales, skipped, target, self.target_dtype)
        planner.commit_tensor(item, target)

    def _group_box(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[Box, int]:
        """Return the stored box of the groups that a box touches, and the values before it."""
        width = self._stored_shape(key)[-1]
        values = width * 2
        first = offsets[-1] // values if values else 0
        last = -(-(offsets[-1] + sizes[-1]) // values) if values and sizes[-1] else first
        box = (*offsets[:-1], first, 0), (*sizes[:-1], last - first, width)
        return box, offsets[-1] - first * values

    def _stored_shape(self, key: str) -> tuple[int, ...]:
        assert self._stored is not None
        return self._stored.tensors.shape_of(self._rows[key])

    def _read_pair(self, key: str, box: Box, scale_box: Box) -> list[torch.Tensor]:
        """Read a box of a weight, and one of its scales."""
        index = self._stored
        assert index is not None
        wanted = [(self._rows[key], box), (self._rows[self._pairs.scales[key]], scale_box)]
        arrays: list[npt.NDArray[Any]] = [
            np.empty(sizes, index.tensors.dtype_of(row).raw) for row, (_, sizes) in wanted
        ]
        read = read_tensors(
            index,
            self.storage,
            [
                ReadRequest(tensor=row, offsets=offsets, sizes=sizes, sink=ArraySink(array))
                for (row, (offsets, sizes)), array in zip(wanted, arrays, strict=True)
            ],
            threads=self.thread_count,
            verify=self.verify,
        )
        self._count(read)
        return [
            wrap(array, index.tensors.dtype_of(row))
            for (row, _), array in zip(wanted, arrays, strict=True)
        ]

    def _count(self, read: ReadStatistics) -> None:
        before = self.statistics
        if before is not None:
            self.statistics = replace(before, bytes_read=before.bytes_read + read.bytes_read)
