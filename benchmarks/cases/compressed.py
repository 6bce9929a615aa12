"""zstd on and off, over weights as training leaves them: normal values in bfloat16 and float32."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from contenders import LIBRARIES, library, warm_up
from measuring import Measurement, evict, measure
from states import check_equal, empty_like, tensor_bytes

from cases import Case, Job

__all__ = ["CASES"]


def _weights(size_mb: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number in range(max(1, size_mb // 16)):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        rows = (16 << 20) // 1024 // dtype.itemsize
        values = torch.randn(rows, 1024, generator=generator) * 0.02
        state[f"layers.{number}.weight"] = values.to(dtype)
    return state


def _extensions(job: Job, kind: str) -> list[Any] | None:
    if kind == "off":
        return None
    if job.contender == "torch":
        from torch.distributed.checkpoint._extension import ZStandard

        return [ZStandard()]
    from shardpoint.dcp import extension

    return [extension.ZStandard() if kind == "zstd" else extension.ShuffleZstd()]


def _run(job: Job, *, kind: str) -> dict[str, Measurement]:
    state = _weights(job.settings.size_mb)
    module = library(job.contender)
    warm_up(job.contender, job.folder / "tiny")
    place = job.folder / "checkpoint"
    extensions = _extensions(job, kind)
    writer = module.FileSystemWriter(place, sync_files=False, _extensions=extensions)
    saving = measure(lambda: module.save(state, storage_writer=writer))
    target = empty_like(state)
    loading = measure(
        lambda: module.load(target, checkpoint_id=place),
        needed_bytes=tensor_bytes(state),
        before=lambda: evict(place) if job.settings.cold else None,
    )
    check_equal(target, state)
    return {"save": saving, "load": loading}


CASES = [
    Case("zstd-off", "weights, not compressed", LIBRARIES, partial(_run, kind="off")),
    Case("zstd", "weights, zstd in torch's format", LIBRARIES, partial(_run, kind="zstd")),
    Case(
        "zstd-shuffled",
        "weights, zstd of shuffled bytes",
        ("shardpoint",),
        partial(_run, kind="shuffled"),
    ),
]
