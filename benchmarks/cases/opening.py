"""The metadata of many ranks, opened: torch's file alone, and with the native index beside it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import raw
import torch
from contenders import library
from measuring import Measurement, evict, measure, scaled
from synthetic import Chunk, chunks, index_of_many, metadata_of_many

from cases import Case, Job
from shardpoint.engine.committing import index_for
from shardpoint.formats.dcp_metadata import write_metadata

__all__ = ["CASES"]

_TORCH_RANKS = 512
"""The most that torch opens in the memory of a usual machine, and in the time of a benchmark."""


def _prepare(job: Job, *, ranks: int) -> None:
    """Write torch's ``.metadata`` by torch, and ours with its index; there are no data files."""
    torchs = job.prepared / "torch"
    torchs.mkdir()
    with (torchs / ".metadata").open("wb") as file:
        pickle.dump(metadata_of_many(min(ranks, _TORCH_RANKS), job.settings.tensors), file)
    ours = job.prepared / "ours"
    ours.mkdir()
    index = index_of_many(ranks, job.settings.tensors)
    metadata = write_metadata(index)
    name, native = index_for(index, metadata)
    (ours / ".metadata").write_bytes(metadata)
    (ours / name).write_bytes(native)
    alone = job.prepared / "alone"
    alone.mkdir()
    (alone / ".metadata").write_bytes(metadata)


def _run(job: Job, *, ranks: int) -> dict[str, Measurement]:
    contender = job.contender
    place = job.prepared / {"with index": "ours", "raw": "ours"}.get(
        contender.partition(", ")[2] or contender,
        "torch" if contender.startswith("torch") else "alone",
    )
    size = (place / ".metadata").stat().st_size
    opened: list[Any] = []
    result = measure(
        partial(_open, contender, place, size, opened.append),
        needed_bytes=size,
        before=lambda: evict(place) if job.settings.cold else None,
    )
    tensors = job.settings.tensors
    if contender == "torch, extrapolated":
        return {"open": scaled(result, ranks / _TORCH_RANKS)}
    if contender == "torch":
        _check_metadata(ranks, tensors, opened.pop())
    elif contender.startswith("shardpoint"):
        index = opened.pop()
        _check_index(ranks, tensors, getattr(index, "index", None) or index._index)
    return {"open": result}


def _open(contender: str, place: Any, size: int, keep: Callable[[Any], None]) -> None:
    if contender.startswith("shardpoint.open"):
        import shardpoint

        keep(shardpoint.open(place))
    elif contender == "raw":
        raw.read(place / ".metadata", [memoryview(bytearray(size))])
    else:
        keep(library(contender.partition(",")[0]).FileSystemReader(place).read_metadata())


def _check_metadata(ranks: int, tensors: int, metadata: Any) -> None:
    """Look at every chunk and at its place."""
    found: set[Chunk] = set()
    for key, entry in metadata.state_dict_metadata.items():
        if key == "step":
            continue
        if entry.properties.dtype != torch.bfloat16:
            raise ValueError(f"key {key!r}: another dtype came back than was saved")
        found.update((key, tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks)
    places = {(place.relative_path, place.offset) for place in metadata.storage_data.values()}
    expected = chunks(ranks, tensors)
    if found != expected or len(places) != len(expected) + 1:
        raise ValueError("other chunks came back than were saved, or not all of their places")


def _check_index(ranks: int, tensors: int, index: Any) -> None:
    expected = index_of_many(ranks, tensors)
    for name in ("tensor", "offsets", "sizes", "record_offset", "record_length", "file"):
        if not np.array_equal(getattr(index.chunks, name), getattr(expected.chunks, name)):
            raise ValueError(f"another {name} came back than was saved")
    if list(index.tensors.keys) != list(expected.tensors.keys):
        raise ValueError("other keys came back than were saved")
    if list(index.files) != list(expected.files):
        raise ValueError("other files came back than were saved")


_OURS = ("shardpoint", "shardpoint, with index", "shardpoint.open, with index")


def _case(ranks: int) -> Case:
    is_large = ranks > _TORCH_RANKS
    return Case(
        f"open-{ranks}",
        f"metadata of {ranks:,} ranks opened",
        ("torch, extrapolated" if is_large else "torch", *_OURS, "raw"),
        partial(_run, ranks=ranks),
        partial(_prepare, ranks=ranks),
        most_rounds=1 if is_large else None,
    )


CASES = [_case(64), _case(512), _case(4096)]
