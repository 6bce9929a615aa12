"""Many small values: what an optimizer has beside its large tensors."""

from __future__ import annotations

import struct
from functools import partial
from typing import Any

import torch
from contenders import LIBRARIES, given, load, save, warm_up
from measuring import Measurement, evict, measure
from raw import read, write
from states import check_equal, empty_like, small, tensor_bytes

from cases import Case, Job

__all__ = ["CASES"]


def _tensors(job: Job) -> dict[str, Any]:
    """As many tensors of 4 KiB and 0-d tensors, AdamW's steps."""
    tensors, scalars = small(job.settings.small)
    return {**tensors, **{key: torch.tensor(value) for key, value in scalars.items()}}


def _objects(job: Job) -> dict[str, Any]:
    """Python's own numbers, stored as objects."""
    return dict(small(job.settings.small // 4)[1])


def _run(job: Job, *, tensors: bool) -> dict[str, Measurement]:
    state = _tensors(job) if tensors else _objects(job)
    place = job.folder / "checkpoint"
    warm_up(job.contender, job.folder / "tiny")
    target = empty_like(state)
    needed = tensor_bytes(state) if tensors else 8 * len(state)
    if job.contender == "raw" and not tensors:
        place.mkdir()
        saving: Any = partial(_raw_save, state, place / "raw")
        loading: Any = partial(_raw_load, target, place / "raw")
    else:
        saving = partial(save, job.contender, given(job.contender, state), place, sync=False)
        loading = partial(load, job.contender, given(job.contender, target), place)
    saved = measure(saving)
    loaded = measure(
        loading,
        needed_bytes=needed,
        before=lambda: evict(place) if job.settings.cold else None,
    )
    check_equal(target, state)
    return {"save": saved, "load": loaded}


def _raw_save(scalars: dict[str, float], path: Any) -> None:
    """Write the numbers as doubles."""
    write(path, [memoryview(struct.pack(f"<{len(scalars)}d", *scalars.values()))], sync=False)


def _raw_load(target: dict[str, Any], path: Any) -> None:
    packed = memoryview(bytearray(8 * len(target)))
    read(path, [packed])
    target.update(zip(list(target), struct.unpack(f"<{len(target)}d", packed), strict=True))


CASES = [
    Case(
        "small",
        "small tensors (4 KiB) and as many 0-d ones, no sync",
        ("torch", "torch_checkpointing", "shardpoint", "safetensors", "raw"),
        partial(_run, tensors=True),
    ),
    Case(
        "objects",
        "Python numbers, no sync",
        (*LIBRARIES, "raw"),
        partial(_run, tensors=False),
    ),
]
