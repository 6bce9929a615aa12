"""Write items to the records that the engine writes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.dcp._tensors import dense_strides, dtype_of, host_memory, refuse_lost_memory
from shardpoint.dcp.default_planner import DefaultSavePlanner
from shardpoint.dcp.planner import SavePlanner, TensorWriteData, WriteItem, WriteItemType
from shardpoint.engine._geometry import split_box
from shardpoint.engine.writing import ArraySource, RecordSource
from shardpoint.errors import PlanError, ShardpointError
from shardpoint.formats.torch_record import TensorRecordLayout

__all__ = ["record_of", "uses_default_lookup"]


_LOOKUP = {
    name: vars(DefaultSavePlanner)[name]
    for name in ("resolve_data", "lookup_object", "transform_object")
}


def uses_default_lookup(planner: SavePlanner) -> bool:
    """Whether the planner gives the state dict's own values, whichever way it is asked.

    Not so where a subclass, a program at run time, or the planner itself has other methods.
    """
    return isinstance(planner, DefaultSavePlanner) and all(
        getattr(type(planner), name) is method and name not in vars(planner)
        for name, method in _LOOKUP.items()
    )


def record_of(
    planner: SavePlanner, item: WriteItem, *, keep: bool
) -> tuple[RecordSource, tuple[int, ...] | None]:
    """Return the record of one item, and the payload's strides; None where row-major.

    Parameters
    ----------
    keep
        Ask the planner for tensors now, and hold on to them until they are written. False
        for planners that make new tensors (a cast, say): those are asked for when their turn
        comes, so that each is made once and not all of them are in memory at once.

    Raises
    ------
    PlanError
        If the planner gives something else than the item announces; without `keep`, when a
        tensor's bytes are asked for.
    """
    if item.type.name == WriteItemType.BYTE_IO.name:
        return _object_record(item, _resolved(planner, item)), None
    tensor = _checked(item, _resolved(planner, item)) if keep else None
    strides = None if tensor is None else dense_strides(tensor)
    planned = _tensor_data(item)
    layout = TensorRecordLayout(
        dtype_of(planned.properties.dtype), tuple(planned.chunk.sizes), strides
    )
    source = _TensorSource(planner, item, tensor, layout.payload_length)
    record = RecordSource(
        length=layout.length, head=layout.head, payload=(source,), tail=layout.tail
    )
    return record, strides


def _resolved(planner: SavePlanner, item: WriteItem) -> Any:
    try:
        return planner.resolve_data(item)
    except ShardpointError:
        raise
    except Exception as error:
        error.add_note(f"while saving key {item.index.fqn!r}")
        raise


def _tensor_data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise PlanError(f"key {item.index.fqn!r}: its write item has no tensor_data")
    return item.tensor_data


def _object_record(item: WriteItem, data: Any) -> RecordSource:
    if not isinstance(data, io.BytesIO):
        raise PlanError(
            f"key {item.index.fqn!r}: resolve_data must give an io.BytesIO for an object, "
            f"it gave {type(data).__name__}"
        )
    record = data.getvalue()
    return RecordSource(length=len(record), head=record)


def _checked(item: WriteItem, data: Any) -> torch.Tensor:
    key, planned = item.index.fqn, _tensor_data(item)
    if not isinstance(data, torch.Tensor):
        raise PlanError(
            f"key {key!r}: resolve_data must give a tensor, it gave {type(data).__name__}"
        )
    wanted = (planned.properties.dtype, tuple(planned.chunk.sizes))
    found = (data.dtype, tuple(data.shape))
    if wanted != found:
        raise PlanError(
            f"key {key!r}: the plan announces {wanted[0]} of shape {wanted[1]}, resolve_data "
            f"gave {found[0]} of shape {found[1]}; a planner that changes tensors must change "
            f"the item's tensor_data too"
        )
    refuse_lost_memory(key, data)
    return data


class _TensorSource:
    """A tensor's bytes in the order of its memory, or row-major."""

    def __init__(
        self, planner: SavePlanner, item: WriteItem, tensor: torch.Tensor | None, nbytes: int
    ) -> None:
        self._planner = planner
        self._item = item
        self._tensor = tensor
        self.nbytes = nbytes

    def memory(self) -> memoryview | None:
        if self._tensor is None:
            return None
        array = host_memory(self._tensor)
        return None if array is None else ArraySource(_in_memory_order(array)).memory()

    def blocks(self, block_size: int) -> Iterator[memoryview]:
        tensor = self._tensor
        if tensor is None:
            data = _resolved(self._planner, self._item)
            tensor = _checked(self._item, data).contiguous()
        array = host_memory(tensor)
        if array is None:
            yield from _staged_blocks(tensor, block_size)
        else:
            yield from ArraySource(_in_memory_order(array)).blocks(block_size)


def _staged_blocks(tensor: torch.Tensor, block_size: int) -> Iterator[memoryview]:
    """Yield the bytes of a tensor on a device, or of a lazy view, through one host buffer."""
    tensor = tensor.detach()
    permuted = tensor.permute(
        sorted(range(tensor.dim()), key=lambda axis: tensor.stride(axis), reverse=True)
    )
    tensor = permuted if permuted.is_contiguous() else tensor
    count = min(tensor.numel(), max(1, block_size // tensor.itemsize))
    buffer = torch.empty(count, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    memory = host_memory(buffer)
    assert memory is not None
    for offsets, sizes in split_box(tuple(tensor.shape), count):
        piece = tensor
        for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            piece = piece.narrow(axis, offset, size)
        into = buffer[: piece.numel()]
        into.view(piece.shape).copy_(piece)
        yield memory[: piece.numel()].view(np.uint8).data


def _in_memory_order(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a dense array with its axes in the order of its memory; others as they are."""
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    permuted = array.transpose(order)
    return permuted if permuted.flags.c_contiguous else array
