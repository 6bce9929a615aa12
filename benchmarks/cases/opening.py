"""The metadata that torch has written for many ranks, opened."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import raw
import torch
from contenders import LIBRARIES, library
from measuring import Measurement, evict, measure
from settings import Settings
from synthetic import Chunk, chunks, plans
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo

from cases import Case, Job

__all__ = ["CASES"]

_LENGTH = 4096


def _prepare(settings: Settings, folder: Path) -> None:
    """Write the ``.metadata`` that torch would write; there are no data files."""
    planner = DefaultSavePlanner()
    made, metadata = planner.create_global_plan(plans(settings.ranks, settings.tensors))
    metadata.storage_data = {
        item.index: _StorageInfo(f"__{rank}_0.distcp", _LENGTH * number, _LENGTH)
        for rank, plan in enumerate(made)
        for number, item in enumerate(plan.items)
    }
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


def _run(job: Job) -> dict[str, Measurement]:
    size = (job.prepared / ".metadata").stat().st_size
    opened: list[Any] = []
    operation = _operation(job, size)
    result = measure(
        lambda: opened.append(operation()),
        needed_bytes=size,
        before=lambda: evict(job.prepared) if job.settings.cold else None,
    )
    if job.contender in LIBRARIES:
        _check_metadata(job.settings, opened.pop())
    elif job.contender == "shardpoint.open":
        _check_index(job.settings, opened.pop().index)
    return {"open": result}


def _operation(job: Job, size: int) -> Callable[[], Any]:
    if job.contender in LIBRARIES:
        module = library(job.contender)
        return lambda: module.FileSystemReader(job.prepared).read_metadata()
    if job.contender == "shardpoint.open":
        import shardpoint

        return lambda: shardpoint.open(job.prepared)
    return lambda: raw.read(job.prepared / ".metadata", [memoryview(bytearray(size))])


def _check_metadata(settings: Settings, metadata: Any) -> None:
    """Look at every chunk and at its place."""
    found: set[Chunk] = set()
    for key, entry in metadata.state_dict_metadata.items():
        if key == "step":
            continue
        if entry.properties.dtype != torch.bfloat16:
            raise ValueError(f"key {key!r}: another dtype came back than was saved")
        found.update((key, tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks)
    places = {(place.relative_path, place.offset) for place in metadata.storage_data.values()}
    _check(settings, found, len(places) - 1)


def _check_index(settings: Settings, index: Any) -> None:
    columns = index.chunks
    keys = [index.tensors.keys[row] for row in columns.tensor.tolist()]
    boxes = zip(keys, columns.offsets.tolist(), columns.sizes.tolist(), strict=True)
    places = set(zip(columns.file.tolist(), columns.record_offset.tolist(), strict=True))
    _check(settings, {(key, tuple(o), tuple(s)) for key, o, s in boxes}, len(places))


def _check(settings: Settings, found: set[Chunk], places: int) -> None:
    expected = chunks(settings.ranks, settings.tensors)
    if found != expected or places != len(expected):
        raise ValueError("other chunks came back than were saved, or not all of their places")


CASES = [
    Case(
        "metadata",
        "torch's .metadata opened",
        (*LIBRARIES, "shardpoint.open", "raw"),
        _run,
        _prepare,
    )
]
