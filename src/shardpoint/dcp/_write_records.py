"""What a plan writes to the records that the engine writes: many tensors alike, at little cost."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.dcp._classes import tell_of_classes
from shardpoint.dcp._layouts import find_local, is_checkpointable
from shardpoint.dcp._objects import object_pickle
from shardpoint.dcp._records import record_of, uses_default_lookup
from shardpoint.dcp._tensors import (
    LOWEST_ADDRESS,
    dense_strides,
    dtype_of,
    refuse_lost_memory,
)
from shardpoint.dcp.planner import SavePlanner, WriteItem
from shardpoint.engine.collector import collection_paused
from shardpoint.engine.writing import AnyRecord, FormedRecord, RecordSource
from shardpoint.errors import ShardpointError
from shardpoint.formats.record_form import RecordForm
from shardpoint.formats.torch_record import TensorRecordLayout, object_form, object_record
from shardpoint.index import row_major_strides
from shardpoint.planning.save import OBJECT, WriteColumns

__all__ = ["PreparedRecords", "prepare_records", "row_major"]

Int64Array = npt.NDArray[np.int64]

_OWN_MEMORY = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRecords:
    """The records of a plan's rows.

    Attributes
    ----------
    records
        One a row.
    strides
        ``int64[n, D]``: of each payload, in elements, padded with 0.
    """

    records: list[AnyRecord]
    strides: Int64Array


@collection_paused()
def prepare_records(
    items: Sequence[WriteItem], columns: WriteColumns, planner: SavePlanner
) -> PreparedRecords:
    """Return what is to be written for each item.

    Parameters
    ----------
    items, columns
        The same plan, as items and as columns. Items are looked at only where columns are not
        enough: with a planner that gives other than the state dict's own values, and for
        values that are no plain tensors in the memory of this host.
    planner
        Gives the values.

    Raises
    ------
    PlanError
        If the planner gives something else than the plan announces.
    """
    axes = columns.sizes.shape[1]
    strides = row_major(columns.sizes, columns.ndim)
    is_object = columns.kind == OBJECT
    if not uses_default_lookup(planner):
        made = [record_of(planner, item, keep=False)[0] for item in items]
        tell_of_classes(
            (columns.keys[row], made[row]) for row in np.flatnonzero(is_object).tolist()
        )
        return PreparedRecords(list(made), strides)
    state_dict: Mapping[str, Any] = planner.state_dict  # type: ignore[attr-defined]
    with torch.no_grad():  # a shard's local tensor is then had without a node of a graph
        records, variant_of, variants = _formed_records(columns, state_dict)
    formed = variant_of >= 0
    if variants:
        described = np.array([variant.row(axes) for variant in variants], np.int64)
        found = described[np.maximum(variant_of, 0)]
        planned = np.column_stack([columns.dtype, columns.ndim, columns.sizes])
        formed &= (found[:, : 2 + axes] == planned).all(axis=1)
        strides[formed] = found[formed, 2 + axes :]
    asked: list[tuple[str, RecordSource]] = []
    for row in np.flatnonzero(~formed).tolist():
        if records[row] is None or not is_object[row]:
            record, own_strides = record_of(planner, items[row], keep=True)
            records[row] = record
            if is_object[row]:
                asked.append((columns.keys[row], record))
            if own_strides is not None:
                strides[row, : len(own_strides)] = own_strides
    tell_of_classes(asked)
    return PreparedRecords(cast("list[AnyRecord]", records), strides)


@dataclass(frozen=True, slots=True, eq=False)
class _Variant:
    """What the tensors of one dtype, shape and strides have in common."""

    form: RecordForm
    memory_at: Callable[[int], Any]
    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_complex: bool

    def row(self, axes: int) -> list[int]:
        """Return dtype, number of axes, shape and strides, the last two padded."""
        shape, padding = self.shape[:axes], axes - len(self.shape)
        strides = self.strides[:axes]
        return [
            *(self.dtype, len(self.shape)),
            *(*shape, *[1] * padding),
            *(*strides, *[0] * padding),
        ]


def _formed_records(
    columns: WriteColumns, state_dict: Mapping[str, Any]
) -> tuple[list[AnyRecord | None], Int64Array, list[_Variant]]:
    """Make the records of plain objects, and of tensors whose memory can be written as it is.

    Returns
    -------
    records
        For each row; None where another way is needed.
    variant_of
        ``int64[n]``: the tensor's place in the next; -1 for all others.
    variants
        What was met.
    """
    records: list[AnyRecord | None] = [None] * len(columns)
    variant_of = [-1] * len(columns)
    variants: list[_Variant] = []
    make_record = tuple.__new__
    numbers: dict[tuple[Any, ...], int] = {}
    objects = (columns.kind == OBJECT).tolist()
    for row, (key, is_object) in enumerate(zip(columns.keys, objects, strict=True)):
        value = state_dict.get(key)
        if is_object:
            records[row] = _object_record(value)
            continue
        tensor = value if type(value) in _OWN_MEMORY else _local_tensor(columns, row, value)
        if tensor is None or not tensor.is_cpu or tensor.is_neg():
            continue
        look = (tensor.dtype, tensor.shape, tensor.stride())
        try:
            number = numbers[look]
        except KeyError:
            variant = _variant(tensor)
            number = numbers[look] = -1 if variant is None else len(variants)
            if variant is not None:
                variants.append(variant)
        if number < 0:
            continue
        variant = variants[number]
        if variant.is_complex and tensor.is_conj():
            continue
        address = tensor.data_ptr()
        if address < LOWEST_ADDRESS:
            refuse_lost_memory(key, tensor)
        # What `FormedRecord(...)` does, without a call in Python.
        memory = variant.memory_at(address)
        records[row] = make_record(FormedRecord, (variant.form, memory, tensor))
        variant_of[row] = number
    return records, np.array(variant_of, np.int64), variants


def _local_tensor(columns: WriteColumns, row: int, value: Any) -> torch.Tensor | None:
    """Return the plain tensor that holds a chunk; None where it is no plain one."""
    if value is None or is_checkpointable(value):
        return None
    offset = torch.Size(columns.offsets[row, : columns.ndim[row]].tolist())
    hint = int(columns.hint[row])
    try:
        tensor = find_local(columns.keys[row], value, offset, hint if hint >= 0 else None)
    except ShardpointError:
        return None  # the other way finds the same, and says so with more
    return tensor if type(tensor) in _OWN_MEMORY else None


def _variant(tensor: torch.Tensor) -> _Variant | None:
    """Return None where the memory is not dense, or not plain elements."""
    if tensor.layout is not torch.strided:
        return None
    shape, dtype = tuple(tensor.shape), dtype_of(tensor.dtype)
    if tensor.numel():
        strides = dense_strides(tensor)
        if strides is None:
            return None
    else:
        strides = row_major_strides(shape)
    form = TensorRecordLayout(dtype, shape, strides).form
    memory_at = (ctypes.c_char * form.payload_length).from_address if tensor.numel() else _nothing
    return _Variant(form, memory_at, dtype.code, shape, strides, tensor.is_complex())


def _nothing(address: int) -> bytes:
    return b""


def _object_record(value: Any) -> AnyRecord | None:
    """Return the record of an object that is plain numbers, strings and containers."""
    pickled = object_pickle(value)
    if pickled is None:
        return None
    form = object_form(len(pickled))
    if form is None:
        record = object_record(pickled)
        return RecordSource(length=len(record), head=record)
    return FormedRecord(form, pickled)


def row_major(sizes: Int64Array, ndim: npt.NDArray[np.int16]) -> Int64Array:
    """Return ``int64[n, D]``: row-major strides in elements, padded with 0."""
    strides = np.ones_like(sizes)
    np.cumprod(np.maximum(sizes[:, :0:-1], 1), axis=1, out=strides[:, -2::-1])
    strides[np.arange(sizes.shape[1]) >= ndim[:, None]] = 0
    return strides
