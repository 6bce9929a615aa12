"""Write items as columns, and the view that shows columns as write items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardpoint.dcp._layouts import dtensor_box, is_checkpointable, is_in_mesh
from shardpoint.dcp._lazy_list import LazyList
from shardpoint.dcp._tensors import dtype_of, torch_dtype
from shardpoint.dcp.metadata import (
    _MEMORY_FORMATS,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from shardpoint.dcp.planner import TensorWriteData, WriteItem, WriteItemType
from shardpoint.dtypes import BY_CODE
from shardpoint.engine.collector import collection_paused
from shardpoint.errors import NotSupportedError, PlanError, Problem
from shardpoint.planning.save import OBJECT, SHARD, TENSOR, WriteColumns

__all__ = ["WriteTable", "columns_of", "describe_state", "memory_format_of", "properties_of"]

_KINDS = {"TENSOR": TENSOR, "SHARD": SHARD, "BYTE_IO": OBJECT}
_TYPES = {TENSOR: WriteItemType.TENSOR, SHARD: WriteItemType.SHARD, OBJECT: WriteItemType.BYTE_IO}
_PLAIN_TENSORS = frozenset([torch.Tensor, torch.nn.Parameter])
_PLAIN_OBJECTS = frozenset([bool, int, float, str, bytes, type(None), list, tuple])
_FORMATS = {encoding.value: memory_format for memory_format, encoding in _MEMORY_FORMATS.items()}


Numbers = tuple[int, ...]
_Description = tuple[tuple[int, int, int, bool, bool, int], Numbers, Numbers, Numbers]
"""Kind, dtype, number of axes, and the properties; shape, offsets, sizes."""

_OBJECT: _Description = ((OBJECT, 0, 0, False, False, 0), (), (), ())


class _Rows:
    """Rows on their way into `WriteColumns`: keys, and which of few descriptions each has."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.numbers: list[int] = []
        self.hints: dict[int, int] = {}  # by row, of the few that have one
        self._descriptions: dict[_Description, int] = {_OBJECT: 0}

    def add(self, key: str, number: int, hint: int = -1) -> None:
        """Add a row with a description that is known already."""
        if hint != -1:
            self.hints[len(self.keys)] = hint
        self.keys.append(key)
        self.numbers.append(number)

    def add_object(self, key: str, hint: int = -1) -> None:
        self.add(key, 0, hint)

    def add_chunk(
        self,
        key: str,
        kind: int,
        properties: TensorProperties,
        shape: Sequence[int],
        offsets: Sequence[int],
        sizes: Sequence[int],
        hint: int = -1,
    ) -> None:
        if properties.layout is not torch.strided:
            raise NotSupportedError(f"a tensor of layout {properties.layout} cannot be stored")
        numbers = (
            kind,
            dtype_of(properties.dtype).code,
            len(shape),
            properties.requires_grad,
            properties.pin_memory,
            _MEMORY_FORMATS[properties.memory_format].value,
        )
        description = (numbers, tuple(shape), tuple(offsets), tuple(sizes))
        number = self._descriptions.setdefault(description, len(self._descriptions))
        self.add(key, number, hint)

    def add_item(self, item: Any) -> None:
        """Add a write item, ours or torch's."""
        hint = -1 if item.index.index is None else item.index.index
        data = item.tensor_data
        if data is None:
            self.add_object(item.index.fqn, hint)
            return
        self.add_chunk(
            item.index.fqn,
            _KINDS[item.type.name],
            data.properties,
            data.size,
            data.chunk.offsets,
            data.chunk.sizes,
            hint,
        )

    def columns(self) -> WriteColumns:
        described = list(self._descriptions)
        taken = np.array(self.numbers, np.int64)
        axes = max((len(described[n][1]) for n in set(self.numbers)), default=0)
        boxes = np.empty((3, len(described), axes), np.int64)
        boxes[0], boxes[1], boxes[2] = 1, 0, 1
        for number, (_, shape, offsets, sizes) in enumerate(described):
            rank = len(shape)
            boxes[0, number, :rank] = shape
            boxes[1, number, :rank], boxes[2, number, :rank] = offsets, sizes
        numbers = np.array([description[0] for description in described], np.int64)[taken]
        hint = np.full(len(taken), -1, np.int64)
        hint[list(self.hints)] = list(self.hints.values())
        return WriteColumns(
            keys=self.keys,
            kind=numbers[:, 0].astype(np.uint8),
            dtype=numbers[:, 1].astype(np.uint8),
            ndim=numbers[:, 2].astype(np.int16),
            shape=boxes[0, taken],
            offsets=boxes[1, taken],
            sizes=boxes[2, taken],
            requires_grad=numbers[:, 3].astype(np.bool_),
            pin_memory=numbers[:, 4].astype(np.bool_),
            memory_format=numbers[:, 5].astype(np.uint8),
            hint=hint,
        )


@collection_paused()
def describe_state(state_dict: dict[str, Any]) -> WriteTable:
    """Return what this rank would write of a flat state dict, one row a chunk or object.

    Raises
    ------
    PlanError
        If values cannot be stored; names every such key.
    """
    rows, problems = _Rows(), []
    known: dict[tuple[Any, ...], int] = {}
    add_key, add_number = rows.keys.append, rows.numbers.append
    for key, value in state_dict.items():
        kind = type(value)
        if kind in _PLAIN_OBJECTS:
            add_key(key)
            add_number(0)
            continue
        look: tuple[Any, ...] | None = None
        if (
            kind in _PLAIN_TENSORS
            and not hasattr(value, "__create_write_items__")
            and not value.is_nested  # which has no shape
        ):
            # All that `_describe` looks at.
            look = (
                *(value.shape, value.dtype, value.requires_grad, value.layout, value.is_meta),
                value.is_pinned(),
            )
            number = known.get(look)
            if number is not None:
                add_key(key)
                add_number(number)
                continue
        elif kind is DTensor and not hasattr(value._local_tensor, "__create_write_items__"):
            local = value._local_tensor
            look = (
                *(id(value.device_mesh), value.placements, value.shape, local.shape),
                *(value.dtype, value.requires_grad, local.layout, local.is_pinned()),
            )
            number = known.get(look)
            if number is not None:
                add_key(key)
                add_number(number)
                continue
        before = len(rows.numbers)
        try:
            _describe(rows, key, value)
            if look is not None and len(rows.numbers) > before:
                known[look] = rows.numbers[-1]
        except (NotSupportedError, ValueError, TypeError) as error:
            problems.append(Problem(str(error), key))
    if problems:
        raise PlanError("the state dict holds values that cannot be saved", problems)
    return WriteTable.from_columns(rows.columns())


def _describe(rows: _Rows, key: str, value: Any) -> None:
    if is_checkpointable(value):
        for item in value.__create_write_items__(key, value):
            rows.add_item(item)
    elif isinstance(value, DTensor):
        if is_in_mesh(value):
            properties = TensorProperties.create_from_tensor(value.to_local())
            rows.add_chunk(key, SHARD, properties, value.shape, *dtensor_box(value))
    elif isinstance(value, ShardedTensor):
        size, properties = value.metadata().size, sharded_properties(value)
        for shard in value.local_shards():
            box = shard.metadata
            rows.add_chunk(key, SHARD, properties, size, box.shard_offsets, box.shard_sizes)
    elif isinstance(value, torch.Tensor):
        if value.is_nested:
            raise NotSupportedError("a nested tensor cannot be stored: save its parts")
        if value.device.type == "meta":
            raise NotSupportedError("a tensor on the meta device has no values to save")
        rows.add_chunk(
            key,
            TENSOR,
            TensorProperties.create_from_tensor(value),
            value.shape,
            (0,) * value.dim(),
            value.shape,
        )
    else:
        rows.add_object(key)


def sharded_properties(value: ShardedTensor) -> TensorProperties:
    """Return the properties that all shards of a tensor have."""
    given = value.metadata().tensor_properties
    return TensorProperties(
        given.dtype, given.layout, given.requires_grad, given.memory_format, given.pin_memory
    )


def memory_format_of(encoding: int) -> torch.memory_format:
    """Return the memory format that files spell with this number."""
    return _FORMATS.get(encoding, torch.contiguous_format)


def properties_of(columns: Any, row: int) -> TensorProperties:
    """Return the properties in one row of `WriteColumns` or `Tensors`."""
    return TensorProperties(
        dtype=torch_dtype(BY_CODE[int(columns.dtype[row])]),
        requires_grad=bool(columns.requires_grad[row]),
        memory_format=memory_format_of(int(columns.memory_format[row])),
        pin_memory=bool(columns.pin_memory[row]),
    )


class WriteTable(LazyList[WriteItem, WriteColumns]):
    """Columns that look like a list of write items."""

    def _count(self, columns: WriteColumns) -> int:
        return len(columns)

    def _columns_from(self, items: Iterable[WriteItem]) -> WriteColumns:
        return _columns_from_items(items)

    def _make(self, columns: WriteColumns, row: int) -> WriteItem:
        key, hint = columns.keys[row], int(columns.hint[row])
        place = None if hint < 0 else hint
        if columns.kind[row] == OBJECT:
            return WriteItem(MetadataIndex(key, index=place), WriteItemType.BYTE_IO)
        rank = int(columns.ndim[row])
        offsets = torch.Size(columns.offsets[row, :rank].tolist())
        return WriteItem(
            index=MetadataIndex(key, offsets, place),
            type=_TYPES[int(columns.kind[row])],
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, torch.Size(columns.sizes[row, :rank].tolist())),
                properties=properties_of(columns, row),
                size=torch.Size(columns.shape[row, :rank].tolist()),
            ),
        )


def columns_of(items: Iterable[Any]) -> WriteColumns:
    """Return the columns of a plan's items; a plain list may hold torch's items as well."""
    return items.columns if isinstance(items, WriteTable) else _columns_from_items(items)


def _columns_from_items(items: Iterable[Any]) -> WriteColumns:
    rows = _Rows()
    for item in items:
        rows.add_item(item)
    return rows.columns()
