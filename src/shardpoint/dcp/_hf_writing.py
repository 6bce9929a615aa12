"""What one rank writes of safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import numpy.typing as npt
import torch

from shardpoint.dcp._hf_planning import HuggingFacePlan
from shardpoint.dcp._tensors import dtype_of, host_memory, refuse_lost_memory
from shardpoint.dcp.planner import SavePlanner, WriteItem
from shardpoint.engine.boxes import write_box
from shardpoint.engine.executor import default_threads, run_tasks
from shardpoint.engine.sources import ArraySource, RecordSource
from shardpoint.engine.writing import write_files
from shardpoint.errors import NotSupportedError, PlanError
from shardpoint.formats.huggingface_writing import sharding_metadata
from shardpoint.formats.safetensors import encode_header
from shardpoint.storage import SharedStorage, Storage

__all__ = ["write_own_files", "write_shared_files"]

Place: TypeAlias = tuple[str, int, int]
"""File, byte offset and length of an item."""


def write_shared_files(
    storage: Storage,
    plan: HuggingFacePlan,
    items: Sequence[WriteItem],
    planner: SavePlanner,
    *,
    sync: bool,
) -> list[Place]:
    """Write each item's box to its place in files that all ranks write together."""
    assert isinstance(storage, SharedStorage)
    assert plan.starts is not None
    with ExitStack() as stack:
        files = [stack.enter_context(storage.reopen(name)) for name in plan.files]

        def write(item: WriteItem, number: int, start: int) -> None:
            data = item.tensor_data
            assert data is not None
            array = _host_array(planner, item)
            write_box(files[number], start, tuple(data.size), tuple(data.chunk.offsets), array)

        run_tasks(
            (
                partial(write, item, number, start)
                for item, number, start in zip(items, plan.file_of, plan.starts, strict=True)
            ),
            threads=default_threads(),
            name="shardpoint-write",
        )
        if sync:
            for file in files:
                file.sync()
    return [
        (plan.files[number], start, _nbytes(item))
        for item, number, start in zip(items, plan.file_of, plan.starts, strict=True)
    ]


def write_own_files(
    storage: Storage,
    plan: HuggingFacePlan,
    items: Sequence[WriteItem],
    planner: SavePlanner,
    *,
    sync: bool,
) -> list[Place]:
    """Write files of this rank alone, with its chunks one after the other."""
    records: dict[str, list[RecordSource]] = {}
    places: dict[int, Place] = {}
    for position, name in enumerate(plan.files):
        rows = [row for row, number in enumerate(plan.file_of) if number == position]
        chosen = [items[row] for row in rows]
        tensors = [(item.index.fqn, _dtype(item), _chunk(item)[1]) for item in chosen]
        metadata = sharding_metadata({item.index.fqn: _chunk(item)[0] for item in chosen})
        header, spans = encode_header(tensors, metadata=metadata)
        records[name] = [
            RecordSource(length=len(header), head=header),
            *(
                RecordSource(length=_nbytes(item), payload=(_ItemSource(planner, item),))
                for item in chosen
            ),
        ]
        for row, item in zip(rows, chosen, strict=True):
            start, end = spans[item.index.fqn]
            places[row] = (name, start, end - start)
    write_files(storage, records, threads=default_threads(), sync=sync)
    return [places[row] for row in range(len(items))]


class _ItemSource:
    """A chunk's elements, row-major, asked for when they are to be written."""

    def __init__(self, planner: SavePlanner, item: WriteItem) -> None:
        self._planner = planner
        self._item = item
        self.nbytes = _nbytes(item)

    def blocks(self, block_size: int) -> Iterator[memoryview]:
        yield from ArraySource(_host_array(self._planner, self._item)).blocks(block_size)


def _chunk(item: WriteItem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    data = item.tensor_data
    assert data is not None
    return tuple(data.chunk.offsets), tuple(data.chunk.sizes)


def _dtype(item: WriteItem) -> Any:
    assert item.tensor_data is not None
    return dtype_of(item.tensor_data.properties.dtype)


def _nbytes(item: WriteItem) -> int:
    nbytes = int(_dtype(item).itemsize)
    for size in _chunk(item)[1]:
        nbytes *= size
    return nbytes


def _host_array(planner: SavePlanner, item: WriteItem) -> npt.NDArray[Any]:
    """Return an item's elements in the host's memory.

    Raises
    ------
    PlanError
        If the planner gives something else than the item announces.
    """
    key = item.index.fqn
    tensor = planner.resolve_data(item)
    assert item.tensor_data is not None
    wanted = (item.tensor_data.properties.dtype, _chunk(item)[1])
    if not isinstance(tensor, torch.Tensor) or (tensor.dtype, tuple(tensor.shape)) != wanted:
        found = type(tensor).__name__
        if isinstance(tensor, torch.Tensor):
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise PlanError(
            f"key {key!r}: the plan announces {wanted[0]} of shape {wanted[1]}, resolve_data "
            f"gave {found}"
        )
    refuse_lost_memory(key, tensor)
    array = host_memory(tensor)
    if array is None:
        array = host_memory(tensor.detach().cpu().resolve_conj().resolve_neg())
    if array is None:
        raise NotSupportedError(
            f"key {key!r}: a tensor on {tensor.device} cannot be copied to the host"
        )
    return array
