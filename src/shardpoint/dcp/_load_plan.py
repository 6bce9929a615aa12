"""What this rank reads: a state dict against an index, every misfit found before any read."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from shardpoint.dcp._layouts import Box, local_boxes, overlaps_itself, shape_and_dtype
from shardpoint.dcp._read_items import LocalRegions, Reads, ReadTable
from shardpoint.dcp._tensors import is_narrowing, torch_dtype
from shardpoint.dcp.planner import LoadPlan
from shardpoint.dtypes import BY_CODE
from shardpoint.engine.collector import collection_paused
from shardpoint.errors import (
    NarrowingWarning,
    NotSupportedError,
    PlanError,
    Problem,
    ShardpointError,
)
from shardpoint.index import CheckpointIndex

__all__ = ["plan_load"]

_SHOWN = 5
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@collection_paused()
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
    fit = _Fit(index)
    object_keys = set(index.objects.keys)
    missing: list[str] = []
    objects: list[str] = []
    for key, value in state_dict.items():
        if fit.add(key, value):
            continue
        if key in object_keys:
            objects.append(key)  # replaces whatever is there, a tensor too
        else:
            missing.append(key)
    problems = fit.problems
    if strict:
        problems += [Problem("not in the checkpoint", key) for key in missing]
    _report_narrowing(fit.narrowed, on_narrowing, problems)
    unexpected = tuple(key for key in index.key_order if key not in state_dict)
    if problems:
        raise PlanError("the checkpoint does not fit the state dict", problems)
    plan = LoadPlan(ReadTable.from_columns(Reads(index, fit.regions(), objects)))
    return plan, tuple(missing), unexpected


class _Fit:
    """Collects the local tensors to fill, and what does not fit."""

    def __init__(self, index: CheckpointIndex) -> None:
        tensors = index.tensors
        self._index = index
        self._rows = dict(zip(tensors.keys, range(len(tensors)), strict=True))
        self._shapes = tensors.shape.tolist()
        self._ranks = tensors.ndim.tolist()
        self._codes = tensors.dtype.tolist()
        self._dtypes: dict[int, torch.dtype] = {}
        for code in set(self._codes):
            with contextlib.suppress(NotSupportedError):  # said with the key where it is wanted
                self._dtypes[code] = torch_dtype(BY_CODE[code])
        self._keys: list[str] = []
        self._wanted: list[int] = []
        self._parts: list[tuple[int, int, Box]] = []
        self.problems: list[Problem] = []
        self.narrowed: list[str] = []

    def add(self, key: str, value: Any) -> bool:
        """Look at one value; return False if the checkpoint has no tensor of that key."""
        row = self._rows.get(key)
        if row is None:
            return False
        # Most are plain, whole, and as they were saved: no more is asked of those.
        if (
            type(value) in _PLAIN
            and value.dtype is self._dtypes.get(self._codes[row])
            and value.is_contiguous()
            and list(value.shape) == self._shapes[row][: self._ranks[row]]
        ):
            self._keys.append(key)
            self._wanted.append(row)
            return True
        found = _check_tensor(key, value, self._index, row, self.narrowed)
        if isinstance(found, Problem):
            self.problems.append(found)
            return True
        for hint, box in enumerate(found):
            self._parts.append((len(self._keys), hint, box))
            self._keys.append(key)
            self._wanted.append(row)
        return True

    def regions(self) -> LocalRegions:
        """Return what is to be filled."""
        tensors = self._index.tensors
        rows = np.array(self._wanted, np.int64)
        sizes = tensors.shape[rows]
        offsets = np.zeros_like(sizes)
        hints = np.zeros(len(rows), np.int64)
        for number, hint, (start, size) in self._parts:
            hints[number] = hint
            offsets[number, : len(start)] = start
            sizes[number, : len(size)] = size
        return LocalRegions(self._keys, rows, tensors.ndim[rows], offsets, sizes, hints)


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
