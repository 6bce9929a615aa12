"""Copies of many tensors into one slab: one pass over memory, shared memory copied once.

What is copied are spans of bytes. Tensors whose memory overlaps give one span, so tensors
that share memory share it in the copy too. A tensor with holes (a few columns of a
matrix) is copied element by element instead, into memory without holes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.dcp._slabs import Lease, Slab
from shardpoint.dcp._tensors import dense_strides
from shardpoint.engine.executor import default_threads, run_tasks
from shardpoint.errors import StorageError

__all__ = ["Layout", "copy_tensors", "lay_out"]

_ALIGNMENT = 64
_PIECE = 32 << 20  # what one thread takes of a large span
_SMALL = 256 << 10  # spans up to this size are copied without letting go of the GIL
_CLONED = 32 << 10  # up to this size a tensor made in torch is cheaper than one made over memory
_MOST_HOLES = 1.25  # memory over elements, up to which holes are copied along

_memmove_alone = ctypes.CDLL(None).memmove
_memmove_held = ctypes.PyDLL(None).memmove
for _function in (_memmove_alone, _memmove_held):
    _function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    _function.restype = ctypes.c_void_p

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Spans:
    """Spans of one device: source address, bytes, offset in the slab, a tensor in each."""

    begin: Ints
    length: Ints
    offset: Ints
    row: Ints


@dataclass(slots=True, eq=False)
class Layout:
    """Where the copies of tensors come to lie.

    Attributes
    ----------
    size
        Bytes of all copies.
    offset
        Byte offset of each tensor.
    span_offset, span_length
        Of the span that the tensor lies in, which is its storage.
    dense
        Rows that are copied element by element.
    shared
        Rows that lie in a span with others.
    cloned
        Rows of small tensors that get memory of their own.
    spans
        What is copied from each device.
    """

    size: int
    offset: Ints
    span_offset: Ints
    span_length: Ints
    dense: set[int] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)
    cloned: set[int] = field(default_factory=set)
    spans: dict[torch.device, _Spans] = field(default_factory=dict)


def lay_out(tensors: Sequence[torch.Tensor], *, clone_small: bool) -> Layout:
    """Decide where copies of strided tensors lie; nothing is copied yet.

    With `clone_small`, not all have to lie in the slab.
    """
    count = len(tensors)
    begin, itemsize = np.zeros(count, np.int64), np.ones(count, np.int64)
    zeros = np.zeros((3, count), np.int64)
    layout = Layout(0, zeros[0], zeros[1], zeros[2])
    clonable = np.zeros(count, np.bool_)
    length = layout.span_length
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for row, tensor in enumerate(tensors):
        nbytes = tensor.nbytes
        if nbytes == 0:
            continue
        item = tensor.itemsize
        itemsize[row] = item
        span = nbytes
        if not tensor.is_contiguous():
            reach = sum(
                (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            span = (reach + 1) * item
        elif clone_small and nbytes <= _CLONED and tensor.is_cpu:
            clonable[row] = True
        if span > nbytes * _MOST_HOLES:
            layout.dense.add(row)
        else:
            begin[row], length[row] = tensor.data_ptr(), span
            by_device[tensor.device].append(row)
    for device, rows in by_device.items():
        _place_spans(layout, device, np.array(rows), begin, clonable)
    # a tensor at an odd address, say over bytes of a file, cannot be made over its span
    layout.dense.update(np.flatnonzero((layout.offset - layout.span_offset) % itemsize).tolist())
    for row in sorted(layout.dense):
        layout.offset[row] = layout.span_offset[row] = layout.size
        layout.span_length[row] = tensors[row].nbytes
        layout.size += -(-tensors[row].nbytes // _ALIGNMENT) * _ALIGNMENT
    layout.shared -= layout.dense
    return layout


def _place_spans(
    layout: Layout,
    device: torch.device,
    rows: Ints,
    begin: Ints,
    clonable: npt.NDArray[np.bool_],
) -> None:
    """Merge overlapping memory of one device's tensors into spans and give each a place."""
    length = layout.span_length
    rows = rows[np.argsort(begin[rows], kind="stable")]
    first = begin[rows]
    reached = np.maximum.accumulate(first + length[rows])
    is_new = np.ones(len(rows), np.bool_)
    is_new[1:] = first[1:] >= reached[:-1]
    starts = np.flatnonzero(is_new)
    group = np.cumsum(is_new) - 1
    lengths = reached[np.append(starts[1:], len(rows)) - 1] - first[starts]
    is_alone = np.bincount(group) == 1
    is_cloned = is_alone & clonable[rows[starts]]
    room = np.where(is_cloned, 0, -(-lengths // _ALIGNMENT) * _ALIGNMENT)
    offsets = layout.size + np.cumsum(room) - room
    layout.offset[rows] = offsets[group] + first - first[starts][group]
    layout.span_offset[rows] = offsets[group]
    layout.span_length[rows] = lengths[group]
    layout.size += int(room.sum())
    layout.shared.update(rows[~is_alone[group]].tolist())
    layout.cloned.update(rows[starts[is_cloned]].tolist())
    copied = starts[~is_cloned]
    layout.spans[device] = _Spans(
        first[copied], lengths[~is_cloned], offsets[~is_cloned], rows[copied]
    )


def copy_tensors(
    tensors: Sequence[torch.Tensor], layout: Layout, lease: Lease, *, non_blocking: bool
) -> list[torch.Tensor]:
    """Copy into the slab; return for each tensor one of the same values and strides there.

    Each copy has a storage of its own (those that shared memory share one): whoever pickles
    it does not get the whole slab. With `non_blocking`, copies from an accelerator may be
    under way on return.
    """
    memory, dense, shared, cloned = lease.memory, layout.dense, layout.shared, layout.cloned
    storages: dict[int, torch.UntypedStorage] = {}
    places = zip(
        layout.offset.tolist(),
        layout.span_offset.tolist(),
        layout.span_length.tolist(),
        strict=True,
    )
    copies: list[torch.Tensor] = []
    for row, (tensor, (offset, begin, length)) in enumerate(zip(tensors, places, strict=True)):
        if row in cloned:
            copy = tensor.clone()
            copies.append(copy.requires_grad_() if tensor.requires_grad else copy)
            continue
        kind, shape = tensor.dtype, tensor.shape
        if length == 0:
            copy = torch.empty_strided(shape, tensor.stride(), dtype=kind)
        elif row in dense or (row not in shared and tensor.is_contiguous()):
            copy = torch.frombuffer(memory, dtype=kind, count=shape.numel(), offset=offset)
            strides = dense_strides(tensor) if row in dense else tensor.stride()
            copy = copy.view(shape)
            if strides is not None and copy.stride() != strides:
                copy = copy.as_strided(shape, strides)
            if row in dense:
                copy.copy_(tensor, non_blocking=non_blocking)
        else:
            if begin not in storages:
                storages[begin] = _bytes_at(memory, begin, length).untyped_storage()
            copy = torch.empty(0, dtype=kind)
            step = (offset - begin) // tensor.itemsize
            copy.set_(storages[begin], step, shape, tensor.stride())
        if tensor.requires_grad:
            copy.requires_grad_()
        copies.append(copy)
    for device, spans in layout.spans.items():
        if device.type == "cpu":
            _copy_on_host(spans, lease.slab)
        else:
            _copy_from_device(tensors, spans, memory, non_blocking)
    return copies


def _bytes_at(memory: npt.NDArray[np.uint8], offset: int, length: int) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8, count=length, offset=offset)


def _copy_on_host(spans: _Spans, slab: Slab) -> None:
    table = np.stack((spans.offset, spans.begin, spans.length), 1)
    small = spans.length <= _SMALL
    for offset, begin, length in table[small].tolist():
        _memmove_held(slab.address + offset, begin, length)
    copier = _Copier(slab)
    run_tasks(
        (partial(copier.copy, *piece) for piece in _pieces(table[~small].tolist())),
        threads=default_threads(),
        name="shardpoint-stage",
    )
    slab.is_untouched = False


def _pieces(table: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    for offset, begin, length in table:
        for at in range(0, length, _PIECE):
            yield offset + at, begin + at, min(_PIECE, length - at)


class _Copier:
    """Copies large spans into a slab, in several threads.

    New pages of shared memory cost less when they are written through its file than when they
    are touched. The kernel lets one thread at a time write to a file, so others touch them.
    """

    def __init__(self, slab: Slab) -> None:
        self._address = slab.address
        self._file = slab.file if slab.is_untouched else None
        self._writing = threading.Lock()

    def copy(self, offset: int, begin: int, length: int) -> None:
        """Copy memory of an address to an offset in the slab."""
        if self._file is None or not self._writing.acquire(blocking=False):
            _memmove_alone(self._address + offset, begin, length)
            return
        try:
            while length:
                source = (ctypes.c_char * length).from_address(begin)
                count = os.pwrite(self._file, source, offset)
                offset, begin, length = offset + count, begin + count, length - count
        except OSError as error:
            raise StorageError(
                error.errno, f"cannot copy the state to shared memory: {error.strerror}"
            ) from error
        finally:
            self._writing.release()


def _copy_from_device(
    tensors: Sequence[torch.Tensor],
    spans: _Spans,
    memory: npt.NDArray[np.uint8],
    non_blocking: bool,
) -> None:
    table = np.stack((spans.row, spans.begin, spans.length, spans.offset), 1)
    for row, begin, length, offset in table.tolist():
        tensor = tensors[row]
        own = tensor.untyped_storage()
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        source.set_(own, begin - own.data_ptr(), (length,), (1,))
        _bytes_at(memory, offset, length).copy_(source, non_blocking=non_blocking)
