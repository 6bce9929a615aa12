"""Whether an index's columns can be believed: every number checked before it is used.

All of it is arithmetic on whole columns. The smallest and the largest value of a column are
looked for first, which is one pass and nearly always enough.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import BY_CODE
from shardpoint.errors import FormatError, LimitExceededError, Problem
from shardpoint.formats._pickle_guards import DEFAULT_LIMITS
from shardpoint.index import (
    CONJUGATE,
    NEGATIVE,
    NO_FILE,
    UNKNOWN,
    BlockChecksums,
    CheckpointIndex,
    Chunks,
    Container,
    Objects,
    Payloads,
    Tensors,
)

__all__ = ["check_columns", "check_first"]

_MAX_FORMAT = 4  # values of torch's _MEM_FORMAT_ENCODING are 0 to 3
_HIGHEST = np.iinfo(np.int64).max
_FULL32 = 0xFFFFFFFF
_SLAB = 1 << 15  # rows whose intermediate results stay in the processor's cache


def check_columns(index: CheckpointIndex, *, file: str) -> None:
    """Check all columns of an index whose shapes fit together.

    Raises
    ------
    FormatError
        Names the file, the column, and the first row with a value that cannot be.
    LimitExceededError
        If tensors have more axes than is possible.
    """
    checks = _Checks(file)
    files, transforms = len(index.files), len(index.transforms)
    checks.tensors(index.tensors)
    checks.chunks(index.tensors, index.chunks, files=files, transforms=transforms)
    checks.objects(index.objects, files=files, transforms=transforms)
    if index.chunks.payloads is not None:
        checks.payloads(index.tensors, index.chunks, index.chunks.payloads)
    if index.chunks.blocks is not None:
        checks.blocks(index.chunks, index.chunks.blocks)


def check_first(first: npt.NDArray[np.int64], total: int, name: str, *, file: str) -> None:
    """Check that a column of positions starts at 0, never falls and ends at `total`.

    Raises
    ------
    FormatError
    """
    if not len(first) or first[0] != 0 or first[-1] != total or (first[1:] < first[:-1]).any():
        message = f"column {name!r} does not go from 0 to {total} without falling"
        raise FormatError(str(Problem(message, file=file)))


class _Checks:
    """Complaints name the index's file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def fail(self, message: str) -> NoReturn:
        raise FormatError(str(Problem(message, file=self.file)))

    def between(self, column: npt.NDArray[Any], lowest: int, highest: int, name: str) -> None:
        if not column.size or (column.min() >= lowest and column.max() <= highest):
            return
        wrong = (column < lowest) | (column > highest)
        row = int(np.flatnonzero(wrong.reshape(len(column), -1).any(axis=1))[0])
        self.fail(
            f"column {name!r}, row {row}: {column[row].tolist()} is not from {lowest} to {highest}"
        )

    def first_wrong(
        self, wrong: npt.NDArray[np.bool_] | np.bool_, message: str, *, after: int = 0
    ) -> None:
        if wrong.any():
            self.fail(f"row {after + int(np.flatnonzero(wrong)[0])}: {message}")

    def tensors(self, tensors: Tensors) -> None:
        axes = tensors.shape.shape[1]
        if axes > DEFAULT_LIMITS.max_axes:
            message = f"tensors have {axes} axes; at most {DEFAULT_LIMITS.max_axes} are possible"
            raise LimitExceededError(str(Problem(message, file=self.file)))
        self.between(tensors.dtype, 0, len(BY_CODE) - 1, "tensors.dtype")
        self.between(tensors.ndim, 0, axes, "tensors.ndim")
        self.between(tensors.shape, 0, _HIGHEST, "tensors.shape")
        self.between(tensors.memory_format, 0, _MAX_FORMAT - 1, "tensors.memory_format")
        missing = np.arange(axes) >= tensors.ndim[:, None]
        wrong = missing & (tensors.shape != 1)
        self.first_wrong(wrong.any(axis=1), "the shape is not padded")

    def places(self, places: Chunks | Objects, name: str, *, files: int, transforms: int) -> None:
        self.between(places.file, NO_FILE, files - 1, f"{name}.file")
        self.between(places.record_offset, 0, _HIGHEST, f"{name}.record_offset")
        self.between(places.record_length, 0, _HIGHEST, f"{name}.record_length")
        self.between(places.transform, 0, transforms - 1, f"{name}.transform")
        self.no_overflow(places.record_offset, places.record_length, f"{name}.record_length")
        if places.record_checksum is not None:
            self.between(places.record_checksum, UNKNOWN, _FULL32, f"{name}.record_checksum")

    def no_overflow(
        self, start: npt.NDArray[np.int64], length: npt.NDArray[np.int64], name: str
    ) -> None:
        """Check that no end is past what 64 bits hold; what is `UNKNOWN` has none."""
        if start.max(initial=0) > _HIGHEST - length.max(initial=0):
            wrong = start > _HIGHEST - np.maximum(length, 0)
            self.first_wrong(
                wrong.reshape(len(wrong), -1).any(axis=1),
                f"the end that {name!r} gives does not fit into 64 bits",
            )

    def chunks(self, tensors: Tensors, chunks: Chunks, *, files: int, transforms: int) -> None:
        self.between(chunks.offsets, 0, _HIGHEST, "chunks.offsets")
        self.between(chunks.sizes, 0, _HIGHEST, "chunks.sizes")
        self.no_overflow(chunks.offsets, chunks.sizes, "chunks.sizes")
        self.between(chunks.container, 0, max(Container), "chunks.container")
        self.places(chunks, "chunks", files=files, transforms=transforms)
        axes = tensors.shape.shape[1]
        for rank in np.unique(tensors.ndim).tolist():
            if rank == axes:
                continue
            rows = (tensors.ndim == rank)[chunks.tensor]
            padding = (chunks.offsets[rows, rank:] != 0) | (chunks.sizes[rows, rank:] != 1)
            if padding.any():
                self.fail(f"a chunk of a tensor of {rank} axes has boxes that are not padded")

    def objects(self, objects: Objects, *, files: int, transforms: int) -> None:
        self.places(objects, "objects", files=files, transforms=transforms)

    def payloads(self, tensors: Tensors, chunks: Chunks, payloads: Payloads) -> None:
        self.between(payloads.offset, UNKNOWN, _HIGHEST, "payloads.offset")
        self.between(payloads.length, UNKNOWN, _HIGHEST, "payloads.length")
        self.between(payloads.strides, 0, _HIGHEST, "payloads.strides")
        self.between(payloads.checksum, UNKNOWN, _FULL32, "payloads.checksum")
        self.between(payloads.flags, 0, CONJUGATE | NEGATIVE, "payloads.flags")
        self.no_overflow(payloads.offset, payloads.length, "payloads.length")
        for start in range(0, len(chunks), _SLAB):
            self.payload_spans(chunks, payloads, slice(start, start + _SLAB))

    def payload_spans(self, chunks: Chunks, payloads: Payloads, rows: slice) -> None:
        offset, length = payloads.offset[rows], payloads.length[rows]
        start = chunks.record_offset[rows]
        end = start + chunks.record_length[rows]
        known = offset != UNKNOWN
        no_length = known & (length < 0)
        self.first_wrong(no_length, "a known payload has no length", after=rows.start)
        is_image = chunks.container[rows] == Container.SAFETENSORS_IMAGE
        plain = (chunks.transform[rows] == 0) & ~is_image
        outside = known & plain & ((offset < start) | (offset + length > end))
        self.first_wrong(outside, "a chunk's payload is outside its record", after=rows.start)

    def blocks(self, chunks: Chunks, blocks: BlockChecksums) -> None:
        payloads = chunks.payloads
        if payloads is None:
            if blocks.first[-1]:
                self.fail("there are checksums of blocks of payloads that are not known")
            return
        for start in range(0, len(chunks), _SLAB):
            rows = slice(start, start + _SLAB)
            counts = np.diff(blocks.first[start : start + _SLAB + 1])
            wanted = -(-payloads.length[rows] // blocks.block_size)
            unfit = (payloads.offset[rows] == UNKNOWN) | (chunks.transform[rows] != 0)
            wrong = (counts > 0) & (unfit | (counts != wanted))
            self.first_wrong(
                wrong, "a chunk has checksums of other blocks than it has", after=start
            )
