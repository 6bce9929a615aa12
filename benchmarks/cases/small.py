"""Many small tensors and scalars: what the steps of an optimizer look like."""

from __future__ import annotations

import struct
from typing import Any

from contenders import LIBRARIES, load, save, warm_up
from measuring import Measurement, evict, measure
from raw import read, write
from states import buffers_of, check_equal, empty_like, small

from cases import Case, Job

__all__ = ["CASES"]


def _run(job: Job) -> dict[str, Measurement]:
    tensors, scalars = small(job.settings.small)
    place = job.folder / "checkpoint"
    warm_up(job.contender, job.folder / "tiny")
    state: dict[str, Any] = {**tensors, **scalars}
    target = empty_like(state)
    needed = sum(t.nbytes for t in tensors.values()) + 8 * len(scalars)
    if job.contender in LIBRARIES:
        saving = measure(lambda: save(job.contender, state, place, sync=False))
        loading = measure(
            lambda: load(job.contender, target, place),
            needed_bytes=needed,
            before=lambda: evict(place) if job.settings.cold else None,
        )
    else:
        place.mkdir()
        saving = measure(lambda: _raw_save(tensors, scalars, place / "raw"))
        loading = measure(lambda: _raw_load(target, place / "raw"), needed_bytes=needed)
    check_equal(target, state)
    return {"save": saving, "load": loading}


def _raw_save(tensors: dict[str, Any], scalars: dict[str, float], path: Any) -> None:
    """Write the tensors' bytes, then the scalars as doubles."""
    packed = memoryview(struct.pack(f"<{len(scalars)}d", *scalars.values()))
    write(path, [*buffers_of(tensors), packed], sync=False)


def _raw_load(target: dict[str, Any], path: Any) -> None:
    keys = [key for key, value in target.items() if isinstance(value, float)]
    packed = memoryview(bytearray(8 * len(keys)))
    tensors = {key: value for key, value in target.items() if not isinstance(value, float)}
    read(path, [*buffers_of(tensors), packed])
    target.update(zip(keys, struct.unpack(f"<{len(keys)}d", packed), strict=True))


CASES = [
    Case(
        "small",
        "small tensors (4 KiB) and scalars, no sync",
        ("torch", "shardpoint", "raw"),
        _run,
    )
]
