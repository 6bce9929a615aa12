"""Large tensors saved and loaded, by one rank and by two."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from contenders import SEVERAL_FILES, given, load, save, warm_up
from measuring import Measurement, evict, measure
from states import check_equal, empty_like, large, tensor_bytes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from cases import Case, Job

__all__ = ["CASES"]


def _one_rank(job: Job, *, sync: bool) -> dict[str, Measurement]:
    state = large(job.settings.size_mb)
    needed = tensor_bytes(state)
    warm_up(job.contender, job.folder / "tiny")
    place = job.folder / "checkpoint"
    saving = given(job.contender, state)
    results = {"save": measure(lambda: save(job.contender, saving, place, sync=sync))}
    if sync:
        return results
    target = empty_like(state)
    loading = given(job.contender, target)
    results["load"] = measure(
        lambda: load(job.contender, loading, place),
        needed_bytes=needed,
        before=lambda: evict(place) if job.settings.cold else None,
    )
    check_equal(target, state)
    return results


def _two_ranks(job: Job) -> dict[str, Measurement]:
    """Each rank has one half of the rows of every tensor."""
    store = f"file://{job.folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=job.rank, world_size=job.world_size)
    mesh = init_device_mesh("cpu", (job.world_size,))
    local = large(job.settings.size_mb // job.world_size, seed=job.rank)
    target = empty_like(local)
    state, into = (_state_of(job, mesh, tensors) for tensors in (local, target))
    _warm_up_together(job, mesh)
    place = job.folder / "checkpoint"

    results = {
        "save": measure(
            lambda: save(job.contender, state, place, sync=False, rank=job.rank),
            before=dist.barrier,
        )
    }
    dist.barrier()  # those that are done first must not take the processors from the others
    results["load"] = measure(
        lambda: load(job.contender, into, place, rank=job.rank),
        needed_bytes=tensor_bytes(local),
        before=lambda: _evict_together(job, place),
    )
    dist.barrier()
    check_equal(target, local)
    dist.barrier()
    dist.destroy_process_group()
    return results


def _state_of(job: Job, mesh: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if job.contender == "raw":
        return given(job.contender, tensors)
    return {
        key: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)
        for key, tensor in tensors.items()
    }


def _warm_up_together(job: Job, mesh: Any) -> None:
    tiny = _state_of(job, mesh, {"tensor": torch.ones(2, 2)})
    save(job.contender, tiny, job.folder / "tiny", sync=False, rank=job.rank)
    dist.barrier()
    load(job.contender, tiny, job.folder / "tiny", rank=job.rank)


def _evict_together(job: Job, place: Any) -> None:
    if job.settings.cold and job.rank == 0:
        evict(place)
    dist.barrier()


_SYNCED = ("torch", "shardpoint", "safetensors", "raw")
_ALL = ("torch", "torch_checkpointing", "shardpoint", "safetensors", "raw", *SEVERAL_FILES)

CASES = [
    Case("large", "large tensors, 1 rank, no sync", _ALL, partial(_one_rank, sync=False)),
    Case("large-sync", "large tensors, 1 rank, fsync", _SYNCED, partial(_one_rank, sync=True)),
    Case(
        "large-2",
        "large tensors, 2 ranks (gloo), no sync",
        ("torch", "torch_checkpointing", "shardpoint", "raw"),
        _two_ranks,
        world_size=2,
    ),
]
