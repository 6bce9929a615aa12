"""Saved by 4 ranks, loaded by 2: row slices to row slices, and to column slices."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from contenders import LIBRARIES, load, save
from measuring import Measurement, evict, measure
from states import check_equal, large, tensor_bytes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from cases import Case, Job

__all__ = ["CASES"]


def _start(job: Job) -> Any:
    store = f"file://{job.folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=job.rank, world_size=job.world_size)
    return init_device_mesh("cpu", (job.world_size,))


def _parts(job: Job, axis: int) -> dict[str, torch.Tensor]:
    return {
        key: tensor.chunk(job.world_size, axis)[job.rank].contiguous()
        for key, tensor in large(job.settings.size_mb).items()
    }


def _sharded(mesh: Any, parts: dict[str, torch.Tensor], axis: int) -> dict[str, Any]:
    return {
        key: DTensor.from_local(part, mesh, [Shard(axis)], run_check=False)
        for key, part in parts.items()
    }


def _prepare(job: Job) -> None:
    mesh = _start(job)
    state = _sharded(mesh, _parts(job, 0), 0)
    for contender in LIBRARIES:
        save(contender, state, job.folder / contender, sync=False)
        dist.barrier()
    dist.destroy_process_group()


def _run(job: Job, *, axis: int) -> dict[str, Measurement]:
    mesh = _start(job)
    saved = _parts(job, axis)
    target = {key: torch.zeros_like(part) for key, part in saved.items()}
    state = _sharded(mesh, target, axis)
    place = job.prepared / job.contender
    tiny = _sharded(mesh, {"tensor": torch.ones(2, 2)}, axis)
    save(job.contender, tiny, job.folder / "tiny", sync=False)
    load(job.contender, tiny, job.folder / "tiny")

    def begin() -> None:
        if job.settings.cold and job.rank == 0:
            evict(place)
        dist.barrier()

    result = measure(
        lambda: load(job.contender, state, place), needed_bytes=tensor_bytes(target), before=begin
    )
    dist.barrier()  # those that are done first must not take the processors from the others
    check_equal(target, saved)
    dist.barrier()
    dist.destroy_process_group()
    return {"load": result}


CASES = [
    Case(
        name,
        f"rows of 4 ranks loaded as {kind} of 2",
        LIBRARIES,
        partial(_run, axis=axis),
        _prepare,
        world_size=2,
        prepare_world_size=4,
    )
    for axis, (name, kind) in enumerate([("reshard-rows", "rows"), ("reshard-columns", "columns")])
]
