"""Writes boxes of tensors into files in which the whole tensors lie row-major.

Several processes that know the layout can so write one file without any of them having more
than its own parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.storage import WritableFile

__all__ = ["write_box"]

AnyArray: TypeAlias = npt.NDArray[Any]

_PIECE = 16 << 20


def write_box(
    file: WritableFile, start: int, shape: Sequence[int], offsets: Sequence[int], box: AnyArray
) -> None:
    """Write a box of a tensor.

    Parameters
    ----------
    start
        Where in the file the tensor begins.
    shape
        Of the whole tensor.
    offsets
        Where in the tensor the box begins.
    box
        Its elements, with any strides; copied piece by piece where they are not row-major.

    Raises
    ------
    StorageError
    """
    if box.size == 0:
        return
    strides = [prod(shape[axis + 1 :]) * box.itemsize for axis in range(len(shape))]
    start += sum(a * b for a, b in zip(offsets, strides, strict=True))
    axis = _run_axis(shape, box.shape)
    for position in product(*map(range, box.shape[:axis])):
        at = start + sum(a * b for a, b in zip(position, strides, strict=False))
        for piece in _pieces(box[position]):
            file.write_from(at, [piece])
            at += len(piece)


def _run_axis(shape: Sequence[int], sizes: Sequence[int]) -> int:
    """Return how many outer axes have to be stepped through: the rest is one run of bytes."""
    axis = len(shape)
    while axis and shape[axis - 1] == sizes[axis - 1]:
        axis -= 1
    return max(axis - 1, 0)


def _pieces(run: AnyArray) -> Iterator[memoryview]:
    """Yield a run's bytes, row-major, in pieces."""
    if run.flags.c_contiguous or run.nbytes <= _PIECE or run.ndim == 0:
        data = np.ascontiguousarray(run).reshape(-1).view(np.uint8).data
        for first in range(0, len(data), _PIECE):
            yield data[first : first + _PIECE]
        return
    for part in run:
        yield from _pieces(part)
