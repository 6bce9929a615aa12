"""Saving again with an unchanged layout: the planning step of 4 ranks, and what it sends.

Tiny tensors, as many as the synthetic checkpoints have, five times over. The first save plans anew;
then comes a save whose planning step is timed, and one whose messages are counted: all bytes that a
rank gives to and gets from the step, of the rank with the most.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from contenders import library
from measuring import Measurement, measure
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from cases import Case, Job

__all__ = ["CASES"]


def _run(job: Job) -> dict[str, Measurement]:
    name = job.contender.partition(",")[0]
    store = f"file://{job.folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=job.rank, world_size=job.world_size)
    mesh = init_device_mesh("cpu", (job.world_size,))
    part = torch.full((1, 8), float(job.rank))
    state = {
        f"layers.{number}.weight": DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
        for number in range(5 * job.settings.tensors)
    }
    module = library(name)
    caching = {"enable_plan_caching": True} if "caching" in job.contender else {}
    planner = module.DefaultSavePlanner(**caching)

    def save(number: int) -> None:
        writer = module.FileSystemWriter(job.folder / f"c{number}", sync_files=False)
        dist.barrier()
        module.save(state, storage_writer=writer, planner=planner)

    timed, counted = _HOOKS[name]
    with timed() as seconds:
        first = measure(lambda: save(0))
    first = replace(first, seconds=seconds[0])
    with timed() as seconds:
        again = measure(lambda: save(1))
    with counted() as sizes:
        save(2)
    again = replace(again, seconds=seconds[0], sent_bytes=sum(sizes))
    loaded = {
        key: DTensor.from_local(torch.zeros(1, 8), mesh, [Shard(0)], run_check=False)
        for key in state
    }
    # All of it, which takes torch's own reader longer than the rest of the turn.
    library("shardpoint").load(loaded, checkpoint_id=job.folder / "c2")
    if not all(torch.equal(value.to_local(), part) for value in loaded.values()):
        raise ValueError("another value came back than was saved again")
    dist.barrier()
    dist.destroy_process_group()
    return {"plan, first time": first, "plan, again": again}


@contextmanager
def _timing(owner: Any, name: str, *, step: str | None) -> Iterator[list[float]]:
    """Note how long each call takes; with `step`, of calls that have it as first argument."""
    found: list[float] = []
    original: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        result = original(*arguments, **keywords)
        if step is None or step in arguments:
            found.append(time.perf_counter() - started)
        return result

    with patch.object(owner, name, call):
        yield found


@contextmanager
def _torch_timed() -> Iterator[list[float]]:
    from torch.distributed.checkpoint.utils import _DistWrapper

    with _timing(_DistWrapper, "reduce_scatter", step="plan") as found:
        yield found


@contextmanager
def _shardpoint_timed() -> Iterator[list[float]]:
    from shardpoint.dcp import state_dict_saver

    with _timing(state_dict_saver, "plan_together", step=None) as found:
        yield found


@contextmanager
def _torch_counted() -> Iterator[list[int]]:
    """Count what torch pickles for its exchanges in the planning step."""
    from torch.distributed.checkpoint.utils import _DistWrapper

    sizes: list[int] = []
    gather, scatter, whole = (
        getattr(_DistWrapper, n) for n in ("gather_object", "scatter_object", "reduce_scatter")
    )
    step: list[str] = []

    def outer(self: Any, name: str, *arguments: Any) -> Any:
        step.append(name)
        try:
            return whole(self, name, *arguments)
        finally:
            step.pop()

    def counted_gather(self: Any, value: Any) -> Any:
        if step == ["plan"]:
            sizes.append(len(pickle.dumps(value)))
        return gather(self, value)

    def counted_scatter(self: Any, values: Any) -> Any:
        result = scatter(self, values)
        if step == ["plan"]:
            sizes.append(len(pickle.dumps(result)))
        return result

    with (
        patch.object(_DistWrapper, "reduce_scatter", outer),
        patch.object(_DistWrapper, "gather_object", counted_gather),
        patch.object(_DistWrapper, "scatter_object", counted_scatter),
    ):
        yield sizes


@contextmanager
def _shardpoint_counted() -> Iterator[list[int]]:
    """Count what goes over the wire: messages are filled up to one size."""
    from shardpoint.dcp import _process_group
    from shardpoint.dcp._process_group import ProcessGroupCoordinator as Group

    def on_wire(payload: bytes) -> int:
        return max(_process_group._FRAME, _process_group._HEADER + len(payload))

    sizes: list[int] = []
    gather, scatter = Group.gather, Group.scatter

    def counted_gather(self: Any, payload: bytes) -> Any:
        if self._step.endswith("plan"):
            sizes.append(on_wire(payload))
        return gather(self, payload)

    def counted_scatter(self: Any, payloads: Any) -> Any:
        result = scatter(self, payloads)
        if self._step.endswith("plan"):
            sizes.append(on_wire(result))
        return result

    with (
        patch.object(Group, "gather", counted_gather),
        patch.object(Group, "scatter", counted_scatter),
    ):
        yield sizes


_HOOKS = {
    "torch": (_torch_timed, _torch_counted),
    "shardpoint": (_shardpoint_timed, _shardpoint_counted),
}

CASES = [
    Case(
        "again",
        "save again, layout unchanged, 4 ranks",
        ("torch", "torch, plan caching", "shardpoint"),
        _run,
        world_size=4,
    )
]
