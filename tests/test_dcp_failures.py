"""One rank of four fails at each step in turn: all raise, naming it, and the old state stays."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

import shardpoint.dcp as dcp
from crash_support import named_files
from dcp_states import blank, build, differences
from ranks import RankPool
from shardpoint.storage.local import LocalStorage

WORLD_SIZE = 4
SECONDS = 30  # half the process group's timeout: nobody has waited for that


class Stumble(Exception):
    """What the failing rank raises."""


# the step's name in the error, what is patched, whether only the coordinator comes there
SAVE_STEPS = [
    ("plan", dcp.DefaultSavePlanner, "set_up_planner", False),
    ("plan", dcp.DefaultSavePlanner, "create_local_plan", False),
    ("plan", dcp.FileSystemWriter, "set_up_storage_writer", False),
    ("plan", dcp.FileSystemWriter, "prepare_local_plan", False),
    ("plan", LocalStorage, "prepare", False),
    ("plan", dcp.DefaultSavePlanner, "create_global_plan", True),
    ("plan", dcp.FileSystemWriter, "prepare_global_plan", True),
    ("write", dcp.DefaultSavePlanner, "finish_plan", False),
    ("write", dcp.DefaultSavePlanner, "resolve_data", False),
    ("write", dcp.FileSystemWriter, "write_data", False),
    ("write", LocalStorage, "create", False),
    ("write", LocalStorage, "sync", False),
    ("commit", dcp.FileSystemWriter, "finish", True),
    ("commit", LocalStorage, "replace", True),
]

LOAD_STEPS = [
    ("plan", dcp.FileSystemReader, "read_metadata", False),
    ("plan", dcp.DefaultLoadPlanner, "set_up_planner", False),
    ("plan", dcp.FileSystemReader, "set_up_storage_reader", False),
    ("plan", dcp.DefaultLoadPlanner, "create_local_plan", False),
    ("plan", dcp.FileSystemReader, "prepare_local_plan", False),
    ("read", dcp.DefaultLoadPlanner, "finish_plan", False),
    ("read", dcp.FileSystemReader, "read_data", False),
    ("read", dcp.DefaultLoadPlanner, "resolve_tensor", False),
    ("read", dcp.DefaultLoadPlanner, "commit_tensor", False),
    ("read", dcp.DefaultLoadPlanner, "load_bytes", False),
]


def _identifier(value: Any) -> str | None:
    return value.__name__ if isinstance(value, type) else None


def _fails(owner: type, method: str, rank: int, action: Any) -> tuple[str, dict[int, str], float]:
    """Run a save or load in which one rank stumbles; return what this rank raised."""

    def stumble(*_: Any, **__: Any) -> None:
        raise Stumble(f"{owner.__name__}.{method} stumbled")

    started = time.perf_counter()
    failing = patch.object(owner, method, stumble) if dist.get_rank() == rank else None
    try:
        if failing is not None:
            failing.start()
        action()
    except dcp.CheckpointException as error:
        causes = {r: str(cause) for r, (cause, _) in error.failures.items()}
        return str(error), causes, time.perf_counter() - started
    finally:
        if failing is not None:
            failing.stop()
    raise AssertionError(f"rank {dist.get_rank()} did not raise")


def _save_fails(folder: str, owner: type, method: str, rank: int) -> Any:
    old = build("dtensor_1d")
    dcp.save(old, checkpoint_id=folder)
    new = build("fsdp2")
    raised = _fails(owner, method, rank, lambda: dcp.save(new, checkpoint_id=folder))
    dist.barrier()
    target = blank("dtensor_1d")
    dcp.load(target, checkpoint_id=folder)
    return raised, differences(old, target)


@pytest.mark.parametrize(("step", "owner", "method", "coordinator"), SAVE_STEPS, ids=_identifier)
def test_a_failing_save_raises_everywhere_and_keeps_the_old_checkpoint(
    pool: RankPool, tmp_path: Path, step: str, owner: type, method: str, coordinator: bool
) -> None:
    rank = 0 if coordinator else 2
    folder = tmp_path / "ckpt"
    answers = pool.run(WORLD_SIZE, _save_fails, str(folder), owner, method, rank)
    for (message, causes, seconds), changed in answers:
        assert f"{step} failed on rank {rank}" in message
        assert causes == {rank: f"{owner.__name__}.{method} stumbled"}
        assert seconds < SECONDS
        assert changed == []
    assert {file.name for file in folder.iterdir()} == named_files(folder)


def _load_fails(folder: str, owner: type, method: str, rank: int) -> Any:
    state = build("dtensor_1d")
    dcp.save(state, checkpoint_id=folder)
    target = blank("dtensor_1d")
    raised = _fails(owner, method, rank, lambda: dcp.load(target, checkpoint_id=folder))
    dcp.load(target, checkpoint_id=folder)
    return raised, differences(state, target)


@pytest.mark.parametrize(("step", "owner", "method", "coordinator"), LOAD_STEPS, ids=_identifier)
def test_a_failing_load_raises_everywhere(
    pool: RankPool, tmp_path: Path, step: str, owner: type, method: str, coordinator: bool
) -> None:
    answers = pool.run(WORLD_SIZE, _load_fails, str(tmp_path / "ckpt"), owner, method, 2)
    for (message, causes, seconds), changed in answers:
        assert f"{step} failed on rank 2" in message
        assert causes == {2: f"{owner.__name__}.{method} stumbled"}
        assert seconds < SECONDS
        assert changed == []


class Reluctant:
    """A `Stateful` that fails on one rank."""

    def __init__(self, method: str, rank: int) -> None:
        self.method, self.rank = method, rank

    def _maybe(self, method: str) -> None:
        if method == self.method and dist.get_rank() == self.rank:
            raise Stumble(f"Reluctant.{method} stumbled")

    def state_dict(self) -> dict[str, Any]:
        self._maybe("state_dict")
        return {"value": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._maybe("load_state_dict")


def _stateful_fails(folder: str, method: str) -> list[dict[int, str]]:
    raised = []
    dcp.save({"part": Reluctant("", 0)}, checkpoint_id=folder)
    for action in (dcp.save, dcp.load):
        try:
            action({"part": Reluctant(method, 1)}, checkpoint_id=folder)
        except dcp.CheckpointException as error:
            raised.append({r: str(cause) for r, (cause, _) in error.failures.items()})
    return raised


@pytest.mark.parametrize(("method", "count"), [("state_dict", 2), ("load_state_dict", 1)])
def test_a_failing_stateful_is_named(
    pool: RankPool, tmp_path: Path, method: str, count: int
) -> None:
    answers = pool.run(WORLD_SIZE, _stateful_fails, str(tmp_path / "ckpt"), method)
    assert answers == [[{1: f"Reluctant.{method} stumbled"}] * count] * WORLD_SIZE


class Interrupted(dcp.DefaultSavePlanner):
    """Is interrupted on rank 1, as by Ctrl-C or a handler that exits."""

    def create_local_plan(self) -> dcp.SavePlan:
        if dist.get_rank() == 1:
            raise KeyboardInterrupt
        return super().create_local_plan()


def _interrupted(folder: str) -> str:
    try:
        dcp.save({"a": 1}, checkpoint_id=folder, planner=Interrupted())
    except (dcp.CheckpointException, KeyboardInterrupt) as error:
        dist.barrier()  # the group is still in step
        return type(error).__name__ + ": " + str(error)
    raise AssertionError("nothing was raised")


def test_an_interrupt_on_one_rank_stops_the_others_too(pool: RankPool, tmp_path: Path) -> None:
    answers = pool.run(3, _interrupted, str(tmp_path / "ckpt"))
    assert answers[1].startswith("KeyboardInterrupt")
    for rank in (0, 2):
        assert "plan failed on rank 1" in answers[rank]
        assert "KeyboardInterrupt" in answers[rank]


class Unsendable(Exception):
    """Pickles, but does not come back."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class Unsending(dcp.DefaultSavePlanner):
    """Fails, or gives a result, on the coordinator that cannot be sent to the others."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        if self.way == "error":
            raise Unsendable("does not", "come back")
        if self.way == "interrupt":
            raise KeyboardInterrupt
        plans[1] = dataclasses.replace(plans[1], planner_data=lambda: None)
        return plans, metadata


def _unsent(folder: str, way: str) -> str:
    try:
        dcp.save({"a": 1}, checkpoint_id=folder, planner=Unsending(way))
    except (dcp.CheckpointException, KeyboardInterrupt) as error:
        dist.barrier()
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("way", ["error", "interrupt", "result"])
def test_what_the_coordinator_cannot_send_is_a_failure_everywhere(
    pool: RankPool, tmp_path: Path, way: str
) -> None:
    answers = pool.run(2, _unsent, str(tmp_path / "ckpt"), way)
    said = {"error": "does not come back", "interrupt": "KeyboardInterrupt", "result": "pickle"}
    for rank, answer in enumerate(answers):
        assert said[way] in answer
        if way == "interrupt" and rank == 0:
            assert answer.startswith("KeyboardInterrupt")
        else:
            assert "plan failed on rank 0" in answer
