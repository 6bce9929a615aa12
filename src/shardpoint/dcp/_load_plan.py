"""What this rank reads: a state dict against an index, every misfit found before any read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from shardpoint.dcp._layouts import Box, local_boxes, overlaps_itself, shape_and_dtype
from shardpoint.dcp._read_items import ReadColumns, ReadTable
from shardpoint.dcp._tensors import is_narrowing, torch_dtype
from shardpoint.dcp.planner import LoadPlan
from shardpoint.errors import (
    NarrowingWarning,
    NotSupportedError,
    PlanError,
    Problem,
    ShardpointError,
)
from shardpoint.index import CheckpointIndex
from shardpoint.planning.intersect import intersect

__all__ = ["plan_load"]

_SHOWN = 5


def plan_load(
    state_dict: Mapping[str, Any],
    index: CheckpointIndex,
    *,
    strict: bool,
    on_narrowing: Literal["warn", "raise", "allow"],
) -> tuple[LoadPlan, tuple[str, ...], tuple[str, ...]]:
    """Plan the reads that fill a flat state dict.

    Returns
    -------
    plan, missing, unexpected
        Keys of the state dict that the checkpoint lacks, and the reverse.

    Raises
    ------
    PlanError
        Naming every key that is missing (with `strict`), of another kind or shape, or
        (where asked for) of a dtype that cannot hold the saved values.
    """
    tensor_rows = {key: row for row, key in enumerate(index.tensors.keys)}
    object_keys = set(index.objects.keys)
    problems: list[Problem] = []
    narrowed: list[str] = []
    missing: list[str] = []
    tensors: list[tuple[str, int, Box, int]] = []
    objects: list[str] = []
    for key, value in state_dict.items():
        if key in tensor_rows:
            row = tensor_rows[key]
            found = _check_tensor(key, value, index, row, narrowed)
            if isinstance(found, Problem):
                problems.append(found)
            else:
                tensors += [(key, row, box, hint) for hint, box in enumerate(found)]
        elif key not in object_keys:
            missing.append(key)
        else:
            objects.append(key)  # replaces whatever is there, a tensor too
    if strict:
        problems += [Problem("not in the checkpoint", key) for key in missing]
    _report_narrowing(narrowed, on_narrowing, problems)
    unexpected = tuple(key for key in index.key_order if key not in state_dict)
    if problems:
        raise PlanError("the checkpoint does not fit the state dict", problems)
    return LoadPlan(_reads(index, tensors, objects)), tuple(missing), unexpected


def _check_tensor(
    key: str, value: Any, index: CheckpointIndex, row: int, narrowed: list[str]
) -> list[Box] | Problem:
    """Return the boxes to fill, or what does not fit."""
    saved = index.tensors.shape_of(row)
    dtype = index.tensors.dtype_of(row)
    if not isinstance(value, torch.Tensor):
        # nothing to fill in place: the planner of an empty state dict makes tensors first
        return Problem(
            f"saved as a {dtype.name} tensor of shape {saved}, "
            f"wanted as a {type(value).__name__} object",
            key,
        )
    shape, wanted_dtype = shape_and_dtype(value)
    if shape != saved:
        return Problem(f"saved with shape {saved}, wanted with shape {shape}", key)
    if overlaps_itself(value):
        return Problem("the tensor to fill is expanded: its elements share memory", key)
    try:
        if is_narrowing(torch_dtype(dtype), wanted_dtype):
            narrowed.append(f"{key!r} from {dtype.name} to {str(wanted_dtype)[6:]}")
        return local_boxes(value)
    except (ShardpointError, NotSupportedError) as error:
        return Problem(str(error), key)


def _report_narrowing(narrowed: Sequence[str], on_narrowing: str, problems: list[Problem]) -> None:
    if on_narrowing == "raise":
        problems += [Problem(f"would lose precision: {text}") for text in narrowed]
    elif on_narrowing == "warn" and narrowed:
        more = f" and {len(narrowed) - _SHOWN} more" if len(narrowed) > _SHOWN else ""
        warnings.warn(
            f"loading into dtypes that cannot hold every saved value exactly: "
            f"{', '.join(narrowed[:_SHOWN])}{more}; pass on_narrowing='allow' to accept this",
            NarrowingWarning,
            stacklevel=2,
        )


def _reads(
    index: CheckpointIndex, tensors: Sequence[tuple[str, int, Box, int]], objects: Sequence[str]
) -> ReadTable:
    chunks = index.chunks
    axes = chunks.offsets.shape[1]
    count = len(tensors)
    local_offsets = np.zeros((count, axes), np.int64)
    local_sizes = np.ones((count, axes), np.int64)
    for position, (_, _, (offsets, sizes), _) in enumerate(tensors):
        local_offsets[position, : len(offsets)] = offsets
        local_sizes[position, : len(sizes)] = sizes
    rows = np.array([row for _, row, _, _ in tensors], np.int64)
    hints = np.array([hint for _, _, _, hint in tensors], np.int64)
    wanted = np.zeros(len(index.tensors), np.bool_)
    wanted[rows] = True
    candidates = np.flatnonzero(wanted[chunks.tensor])
    found = intersect(
        rows,
        local_offsets,
        local_sizes,
        chunks.tensor[candidates],
        chunks.offsets[candidates],
        chunks.sizes[candidates],
    )
    stored = candidates[found.b]
    no_box = np.zeros((len(objects), axes), np.int64)
    no_hint = np.zeros(len(objects), np.int64)

    def with_objects(column: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.concatenate([column, no_box if column.ndim == 2 else no_hint])

    return ReadTable(
        ReadColumns(
            keys=[tensors[position][0] for position in found.a.tolist()] + list(objects),
            ndim=np.concatenate(
                [index.tensors.ndim[rows[found.a]], np.full(len(objects), -1)]
            ).astype(np.int16),
            local_offsets=with_objects(local_offsets[found.a]),
            local_hint=with_objects(hints[found.a]),
            stored_offsets=with_objects(chunks.offsets[stored]),
            stored_hint=with_objects(stored - index.tensors.first_chunk[chunks.tensor[stored]]),
            dest_offsets=with_objects(found.offsets - local_offsets[found.a]),
            storage_offsets=with_objects(found.offsets - chunks.offsets[stored]),
            lengths=with_objects(found.sizes),
        )
    )
