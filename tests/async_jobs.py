"""What the ranks do in the tests of asynchronous saves; functions that workers can be given."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import shardpoint.dcp as dcp
from async_faults import held, more_than
from dcp_states import blank, build, differences, values
from shardpoint.dcp import _async_process
from shardpoint.dcp.staging import DefaultStager, StagingOptions
from shardpoint.dcp.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from shardpoint.storage.local import LocalStorage

FORMS = THREAD, PROCESS = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS


class Trouble(Exception):
    """What a failing rank raises."""


def scramble(value: Any) -> None:
    """Change every tensor and every object that can be changed, in place."""
    if isinstance(value, dict):
        for item in value.values():
            scramble(item)
        for key in list(value):
            value[key] = "changed"
    elif isinstance(value, list | tuple):
        for item in value:
            scramble(item)
        if isinstance(value, list):
            value.append("changed")
    elif isinstance(value, set):
        value.clear()
    elif isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            scramble(shard.tensor)
    elif isinstance(value, DTensor):
        scramble(value._local_tensor)
    elif isinstance(value, torch.Tensor) and value.numel():
        with torch.no_grad():
            storage = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
            storage.bitwise_not_()


def save_scramble_load(folder: str, kind: str, form: str, stager: str) -> list[str]:
    """Save a state, change it at once, load: what is not as it was when saved."""
    state, started = build(kind), {}
    if stager == "shared":
        stages: Any = DefaultStager()
        response = dcp.async_save(
            state,
            checkpoint_id=folder,
            async_checkpointer_type=AsyncCheckpointerType(form),
            async_stager=stages,
        )
        assert isinstance(response, AsyncSaveResponse)
        response.staging_completion.result(60)
        future: Future[Any] = response.upload_completion
    else:
        if stager == "writer":
            started["storage_writer"] = dcp.FileSystemWriter(folder, cache_staged_state_dict=True)
        future = dcp.async_save(
            state,
            checkpoint_id=folder,
            async_checkpointer_type=AsyncCheckpointerType(form),
            **started,
        )
    scramble(state)
    loaded = blank(kind)
    dcp.load(loaded, checkpoint_id=folder)  # waits for the save
    assert future.done()
    future.result()
    if stager == "shared":
        stages.close()
    return differences(loaded, build(kind))


def all_kinds(folder: str, cases: list[tuple[str, str, str]]) -> dict[str, list[str]]:
    """Return the differences of each kind of state, form and stager."""
    return {
        f"{kind} {form} {stager}": save_scramble_load(f"{folder}/{number}", kind, form, stager)
        for number, (kind, form, stager) in enumerate(cases)
    }


Layout = tuple[tuple[int, ...], str, tuple[int, ...], tuple[int | None, ...]]
"""Shape, dtype, shape of the mesh, and for each of its axes the axis it splits, if any."""


def drawn_state(layouts: list[Layout], *, is_blank: bool) -> dict[str, Any]:
    """Build DTensors of these layouts, with values that depend on their keys alone or with none."""
    state: dict[str, Any] = {"rank": {str(dist.get_rank()): [dist.get_rank(), "own"]}}
    for number, (shape, dtype, mesh_shape, axes) in enumerate(layouts):
        whole = values(f"drawn {number}", *shape, dtype=getattr(torch, dtype))
        mesh = dist.device_mesh.init_device_mesh("cpu", mesh_shape)
        placements = [Replicate() if axis is None else Shard(axis) for axis in axes]
        tensor = distribute_tensor(torch.zeros_like(whole) if is_blank else whole, mesh, placements)
        state[f"tensor {number}"] = tensor
        state[f"whole {number}"] = torch.zeros_like(whole) if is_blank else whole.clone()
    if is_blank:
        state["rank"] = {str(dist.get_rank()): None}
    return state


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """A tensor's shape and dtype, and how four ranks share it."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    mesh = draw(st.sampled_from([(4,), (2, 2)]))
    axis = st.none() | st.integers(0, len(shape) - 1)
    dtype = draw(st.sampled_from(["float32", "bfloat16", "int64", "uint8", "complex64"]))
    return shape, dtype, mesh, tuple(draw(axis) for _ in mesh)


def any_states(folder: str) -> list[str]:
    """Save drawn states, change all of each at once, load: what is not as it was.

    Every rank draws the same states, because they follow from this function's code, and none
    stops at a failure, which would keep the others waiting.
    """
    found: list[str] = []

    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn=st.lists(layouts(), min_size=1, max_size=6), form=st.sampled_from(FORMS))
    def check(drawn: list[Layout], form: AsyncCheckpointerType) -> None:
        state = drawn_state(drawn, is_blank=False)
        future = dcp.async_save(state, checkpoint_id=folder, async_checkpointer_type=form)
        scramble(state)
        future.result()
        loaded = drawn_state(drawn, is_blank=True)
        dcp.load(loaded, checkpoint_id=folder)
        found.extend(differences(loaded, drawn_state(drawn, is_blank=False)))

    check()
    return found


def caught(action: Callable[[], Any]) -> str:
    """Return the message of the exception that the action raises, or nothing."""
    try:
        action()
    except dcp.CheckpointException as error:
        return str(error)
    return ""


def failing_write(folder: str, form: str, bad_rank: int, ask: bool) -> list[str]:
    """One rank cannot write: return what the future, and the two saves after that, raise."""
    kind = AsyncCheckpointerType(form)
    place = Path(folder, "bad")
    if dist.get_rank() == bad_rank:
        planner: Any = FailingPlanner()
    else:
        planner = dcp.DefaultSavePlanner()
    state = {f"x{dist.get_rank()}": torch.ones(3)}
    future = dcp.async_save(
        state, checkpoint_id=place, planner=planner, async_checkpointer_type=kind
    )
    first = caught(future.result) if ask else ""

    def again() -> None:
        dcp.async_save(state, checkpoint_id=f"{folder}/good").result()

    found = [first, caught(again), caught(again)]
    target = {"x0": torch.zeros(3), "x1": torch.zeros(3)}
    dcp.load(target, checkpoint_id=f"{folder}/good")
    assert all(tensor.sum() == 3 for tensor in target.values())
    assert not (place / ".metadata").exists()
    return found


class FailingPlanner(dcp.DefaultSavePlanner):
    """Fails where data is asked for."""

    def resolve_data(self, write_item: Any) -> Any:
        raise Trouble("no data today")


class DyingPlanner(dcp.DefaultSavePlanner):
    """Ends its process where data is asked for, as the system does when memory is out."""

    def resolve_data(self, write_item: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def dying_process(folder: str, bad_rank: int) -> list[Any]:
    """The saving process of one rank is killed: what the future raises; the next one works.

    Then fork: return also what errors that gave in the child, to which no saver belongs.
    """
    planner = DyingPlanner() if dist.get_rank() == bad_rank else dcp.DefaultSavePlanner()
    state = {f"x{dist.get_rank()}": torch.ones(3)}
    future = dcp.async_save(
        state, checkpoint_id=f"{folder}/bad", planner=planner, async_checkpointer_type=PROCESS
    )
    first = caught(future.result)
    again = dcp.async_save(state, checkpoint_id=f"{folder}/good", async_checkpointer_type=PROCESS)
    second = caught(again.result)
    errors = _errors_in_a_fork(Path(folder, f"{dist.get_rank()}.notes"))
    once_more = dcp.async_save(
        state, checkpoint_id=f"{folder}/good", async_checkpointer_type=PROCESS
    )
    return [first, second, errors, caught(once_more.result)]


def _errors_in_a_fork(notes: Path) -> str:
    ignored: list[Any] = []
    with patch.object(sys, "unraisablehook", lambda what: ignored.append(repr(what))):
        child = os.fork()
        if child == 0:
            ignored += [] if saver_process() is None else ["it is still there"]
            notes.write_text("".join(ignored))
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return notes.read_text()


def failing_stage(folder: str, form: str, bad_rank: int) -> str:
    """One rank cannot copy its state: that call raises, the others' futures name it."""

    class Uncopyable:
        def __deepcopy__(self, memo: object) -> Any:
            raise Trouble("cannot be copied")

        def __reduce__(self) -> Any:
            raise Trouble("cannot be pickled")

    state: dict[str, Any] = {"x": torch.ones(2)}
    if dist.get_rank() == bad_rank:
        state["object"] = Uncopyable()
    try:
        future = dcp.async_save(
            state, checkpoint_id=folder, async_checkpointer_type=AsyncCheckpointerType(form)
        )
    except Exception as error:  # noqa: BLE001
        assert dist.get_rank() == bad_rank
        return f"call: {error}"
    return f"future: {caught(future.result)}"


def mixed_with_training(folder: str, count: int) -> float:
    """Save over and over while the main thread uses the same group; return a sum of sums."""
    total = torch.zeros(())
    for number in range(count):
        dcp.async_save({"x": torch.ones(100) * number}, checkpoint_id=f"{folder}/{number}")
        for _ in range(20):
            value = torch.ones(())
            dist.all_reduce(value)
            total += value
    dist.barrier()
    return float(total)


def group_destroyed(folder: str) -> None:
    """Leave without waiting: the save comes to its end when the group is gone already."""
    hold = threading.Event()
    create = LocalStorage.create

    def late(*arguments: Any, **keywords: Any) -> Any:
        hold.wait(60)
        return create(*arguments, **keywords)

    with patch.object(LocalStorage, "create", late):
        future = dcp.async_save({"x": torch.arange(4.0)}, checkpoint_id=folder)
        dist.barrier()
        dist.destroy_process_group()
        hold.set()
        future.result()


def residue(folder: str, form: str, count: int) -> tuple[dict[str, int], dict[str, int]]:
    """Save many times, every fifth time in vain: rank 1 fails.

    Return what this process holds more in the end, and what its saving process does.
    """
    kind = AsyncCheckpointerType(form)

    def once(number: int) -> None:
        state = {f"t{i}": torch.full((1000,), float(i)) for i in range(20)}
        state["number"] = number  # type: ignore[assignment]
        fails = number % 5 == 4
        is_bad = fails and dist.get_rank() == 1
        planner = FailingPlanner() if is_bad else dcp.DefaultSavePlanner()
        future = dcp.async_save(
            state,
            checkpoint_id=f"{folder}/{number % 3}",
            planner=planner,
            async_checkpointer_type=kind,
        )
        assert ("no data today" in caught(future.result)) == fails

    for number in range(10):
        once(number)
    saver = saver_process()
    before, saver_before = held(), held(saver) if saver else {}
    for number in range(count):
        once(number)
    return more_than(before), more_than(saver_before, saver) if saver else {}


def saver_process() -> int | None:
    """Return the number of this process's saving process."""
    process = _async_process._process
    return None if process is None else process._process.pid


def options() -> StagingOptions:
    return StagingOptions(use_async_staging=False)


def in_different_forms(folder: str) -> tuple[str, str]:
    """Save in the process form on odd ranks and in the thread form on others, then alike."""
    told = []
    for forms in ((THREAD, PROCESS), (THREAD, THREAD)):
        form = forms[dist.get_rank() % 2]
        future = dcp.async_save(
            {"x": torch.ones(2)}, checkpoint_id=folder, async_checkpointer_type=form, timeout=30
        )
        assert isinstance(future, Future)
        told.append(str(future.exception() or ""))
    return told[0], told[1]
