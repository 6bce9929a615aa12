"""Reads one box of one large chunk, in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from operator import add
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.engine._blocks import blocks_of
from shardpoint.engine._checksums import PiecewiseChecksum
from shardpoint.engine._files import BufferPool, OpenFiles
from shardpoint.engine._geometry import Numbers, extent, pick, split_box, split_extent
from shardpoint.engine._geometry import storage_order as order_of
from shardpoint.engine._payload import Payload, Place
from shardpoint.engine._readplan import Part
from shardpoint.engine._transfer import (
    BUFFER,
    Readable,
    apply_flags,
    read_box,
    read_extent,
)
from shardpoint.engine.targets import Progress, Targets
from shardpoint.index import UNKNOWN, CheckpointIndex
from shardpoint.transforms import RecordBytes, Tally, TransformFinder

__all__ = ["PIECE", "PartRead", "ReadContext"]

_Task: TypeAlias = Callable[[], None]

PIECE = 16 << 20  # what one thread takes of a large chunk


@dataclass(frozen=True, slots=True, eq=False)
class ReadContext:
    """What all tasks of one read share; see `shardpoint.engine.reading.read_tensors`.

    `buffers` are of `BUFFER` bytes.
    """

    index: CheckpointIndex
    files: OpenFiles
    targets: Targets
    progress: Progress
    buffers: BufferPool
    verify: bool
    gap_ratio: float
    finder: TransformFinder
    tally: Tally | None


class PartRead:
    """One box of one large chunk, read in pieces."""

    def __init__(
        self,
        context: ReadContext,
        place: Place,
        payload: Payload,
        part: Part,
        record: RecordBytes | None,
    ) -> None:
        self._context = context
        self._record = record
        self._place = place
        self._part = part
        order = order_of(place.sizes, payload.strides)
        self._is_ordered = order is not None
        self._order: Numbers = tuple(range(len(place.sizes))) if order is None else order
        self._payload = Payload(
            payload.offset,
            pick(payload.strides, self._order),
            payload.length,
            payload.checksum,
            payload.flags,
        )
        self._start = pick(part.start_in(place), self._order)
        sizes = pick(part.sizes, self._order)
        itemsize = place.dtype.itemsize
        if self._is_ordered:
            # Pieces of regions that have no memory are all there is of a buffer.
            has_memory = context.targets.memory(part.number) is not None
            pieces = split_box(sizes, (PIECE if has_memory else BUFFER) // itemsize)
        else:
            pieces = split_extent(sizes, self._payload.strides, BUFFER // itemsize)
        self._pieces = list(pieces)
        # Only then do the pieces, one after the other, have all of the payload's bytes.
        self._is_checked = (
            context.verify
            and payload.checksum != UNKNOWN
            and self._is_ordered
            and part.sizes == place.sizes
            and prod(part.sizes) * itemsize == payload.length
            and extent(part.sizes, payload.strides) == prod(part.sizes)
        )
        self._blocks = None
        if context.verify and not self._is_checked and record is None:
            self._blocks = blocks_of(context.index, place.chunk)
        self._checksum = PiecewiseChecksum([prod(size) * itemsize for _, size in self._pieces])

    def tasks(self) -> Iterator[_Task]:
        for number in range(len(self._pieces)):
            yield partial(self._read_piece, number)

    def _open(self) -> AbstractContextManager[Readable]:
        """Give what to read from: the file, or the decoded record."""
        if self._record is not None:
            return nullcontext(self._record)
        return self._context.files.use(self._place.file)

    def _read_piece(self, number: int) -> None:
        offsets, sizes = self._pieces[number]
        part, targets = self._part, self._context.targets
        memory = targets.memory(part.number)
        if memory is None:
            into: npt.NDArray[Any] = np.empty(sizes, self._place.dtype.raw)
        else:
            box: list[Any] = [slice(o, o + n) for o, n in zip(offsets, sizes, strict=True)]
            into = part.of(memory).transpose(self._order)[(*box, ...)]
        start = tuple(map(add, self._start, offsets))
        found = 0
        with self._open() as file:
            if self._is_ordered:
                found = read_box(
                    file,
                    self._payload,
                    start,
                    into,
                    buffers=self._context.buffers,
                    gap_ratio=self._context.gap_ratio,
                    checksum=self._is_checked,
                    blocks=self._blocks,
                )
            else:
                read_extent(file, self._payload, start, into, self._blocks)
        apply_flags(into, self._place, self._payload.flags)
        if memory is None:
            back = np.argsort(self._order).tolist()
            at = tuple(map(add, part.start, pick(offsets, back)))
            targets.put(part.number, at, into.transpose(back))
        if self._checksum.put(number, found):
            if self._is_checked:
                self._payload.compare(self._place, self._checksum.combined())
            self._context.progress.finish([self._part.number])
