"""A rank's own view of a checkpoint in which every rank has metadata of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shardpoint.index import CheckpointIndex

__all__ = ["preferring"]

Rows = npt.NDArray[np.int64]
Integer = TypeVar("Integer", bound=np.integer)


def preferring(union: CheckpointIndex, own: CheckpointIndex) -> CheckpointIndex:
    """Return all ranks' index with `own`'s places for everything that `own` has too.

    Ranks that save without each other write what they share more than once, and their
    objects may differ: a rank that resumes wants its own.
    """
    files = {name: number for number, name in enumerate(union.files)}
    transforms = {descriptors: number for number, descriptors in enumerate(union.transforms)}
    file_numbers = np.array(
        [*(files.setdefault(name, len(files)) for name in own.files), -1], np.int32
    )
    transform_numbers = np.array(
        [transforms.setdefault(names, len(transforms)) for names in own.transforms], np.int16
    )
    into, taken = _same_chunks(union, own)
    chunks, objects = union.chunks, union.objects
    rows = {key: row for row, key in enumerate(objects.keys)}
    shared = [(rows[key], row) for row, key in enumerate(own.objects.keys) if key in rows]
    objects_into = np.array([row for row, _ in shared], np.int64)
    objects_taken = np.array([row for _, row in shared], np.int64)
    return replace(
        union,
        files=list(files),
        transforms=list(transforms),
        chunks=replace(
            chunks,
            file=_put(chunks.file, into, file_numbers[own.chunks.file[taken]]),
            record_offset=_put(chunks.record_offset, into, own.chunks.record_offset[taken]),
            record_length=_put(chunks.record_length, into, own.chunks.record_length[taken]),
            transform=_put(chunks.transform, into, transform_numbers[own.chunks.transform[taken]]),
        ),
        objects=replace(
            objects,
            file=_put(objects.file, objects_into, file_numbers[own.objects.file[objects_taken]]),
            record_offset=_put(
                objects.record_offset, objects_into, own.objects.record_offset[objects_taken]
            ),
            record_length=_put(
                objects.record_length, objects_into, own.objects.record_length[objects_taken]
            ),
            transform=_put(
                objects.transform,
                objects_into,
                transform_numbers[own.objects.transform[objects_taken]],
            ),
        ),
    )


def _same_chunks(union: CheckpointIndex, own: CheckpointIndex) -> tuple[Rows, Rows]:
    """Return the rows of chunks that both have: the same box of the same tensor."""
    boxes = {
        (union.tensors.keys[int(union.chunks.tensor[row])], *_box(union, row)): row
        for row in range(len(union.chunks))
    }
    pairs = [
        (boxes[box], row)
        for row in range(len(own.chunks))
        if (box := (own.tensors.keys[int(own.chunks.tensor[row])], *_box(own, row))) in boxes
    ]
    return (
        np.array([row for row, _ in pairs], np.int64),
        np.array([row for _, row in pairs], np.int64),
    )


def _box(index: CheckpointIndex, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    axes = int(index.tensors.ndim[index.chunks.tensor[row]])
    return (
        tuple(index.chunks.offsets[row, :axes].tolist()),
        tuple(index.chunks.sizes[row, :axes].tolist()),
    )


def _put(
    column: npt.NDArray[Integer], rows: Rows, values: npt.NDArray[Integer]
) -> npt.NDArray[Integer]:
    changed = column.copy()
    changed[rows] = values
    return changed
