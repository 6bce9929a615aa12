"""One tensor of a checkpoint that holds much else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import raw
import torch
from contenders import LIBRARIES, given, load, save, warm_up
from measuring import Measurement, evict, measure
from settings import Settings
from states import buffer_of, check_equal, large, small

from cases import Case, Job

__all__ = ["CASES"]


def _states(settings: Settings) -> tuple[dict[str, torch.Tensor], dict[str, float], str]:
    """Return tensors (large, then small), scalars, and the key in the middle of the large."""
    tensors = large(settings.size_mb)
    wanted = list(tensors)[len(tensors) // 2]
    more, scalars = small(settings.small)
    return {**tensors, **more}, scalars, wanted


def _prepare(job: Job) -> None:
    tensors, scalars, _ = _states(job.settings)
    for contender in LIBRARIES:
        save(contender, {**tensors, **scalars}, job.folder / contender, sync=False)
    for contender in ("safetensors", "raw"):
        save(contender, given(contender, tensors), job.folder / contender, sync=False)


def _run(job: Job) -> dict[str, Measurement]:
    warm_up(job.contender.removesuffix(".open"), job.folder / "tiny")
    tensors, _, wanted = _states(job.settings)
    saved = tensors[wanted]
    target = {wanted: torch.zeros_like(saved)}
    start = sum(tensors[key].nbytes for key in list(tensors)[: list(tensors).index(wanted)])
    del tensors
    place = job.prepared / job.contender.removesuffix(".open")
    operations: dict[str, Any] = {
        "shardpoint.open": partial(_open, wanted, target[wanted], place),
        "raw": partial(raw.read, place / "raw0", [buffer_of(target[wanted])], [start]),
    }
    result = measure(
        operations.get(job.contender, partial(load, job.contender, target, place)),
        needed_bytes=saved.nbytes,
        before=lambda: evict(place) if job.settings.cold else None,
    )
    check_equal(target, {wanted: saved})
    return {"load": result}


def _open(key: str, target: torch.Tensor, place: Path) -> None:
    """Read without torch, into a new array; then copy, since others fill the target as well."""
    import shardpoint

    array = shardpoint.open(place)[key]
    target.view(torch.uint8).numpy()[...] = array.view("uint8")


CASES = [
    Case(
        "one-key",
        "one 16 MiB tensor of a large checkpoint",
        (*LIBRARIES, "shardpoint.open", "safetensors", "raw"),
        _run,
        _prepare,
    )
]
