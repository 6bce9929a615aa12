"""Saving again with an unchanged layout: a fingerprint travels instead of plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import shardpoint.dcp as dcp
from ranks import RankPool
from shardpoint.dcp._process_group import ProcessGroupCoordinator

WORLD_SIZE = 3


class Traffic:
    """Counts the bytes that this rank sends and receives in each step."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def __enter__(self) -> Traffic:
        counted = self.bytes

        def counting(name: str) -> Any:
            original = getattr(ProcessGroupCoordinator, name)

            def call(self: Any, payload: Any) -> Any:
                result = original(self, payload)
                total = sum(map(len, payload)) if isinstance(payload, list) else len(payload or b"")
                total += sum(map(len, result)) if isinstance(result, list) else len(result or b"")
                counted[self._step] = counted.get(self._step, 0) + total
                return result

            return patch.object(ProcessGroupCoordinator, name, call)

        self._patches = [counting(name) for name in ("gather", "scatter", "broadcast")]
        for one in self._patches:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._patches:
            one.stop()


def _state(step: int, *, tensors: int = 4, changed: str = "") -> dict[str, Any]:
    rank = dist.get_rank()
    state: dict[str, Any] = {
        f"layer.{number}": torch.full((3,), float(step + number)) for number in range(tensors)
    }
    state[f"own{rank}"] = torch.full((5,), float(step + rank))
    state["step"] = step
    if rank == 1 and changed:
        other: dict[str, Any] = {
            "key": {"another": torch.ones(2)},
            "object": {"note": "an object more"},
            "shape": {"own1": torch.ones(6)},
            "dtype": {"own1": torch.ones(5, dtype=torch.float64)},
            "tensor": {"step": torch.tensor(step)},
        }[changed]
        state |= other
    if changed == "tensor":
        state["step"] = torch.tensor(step)
    return state


def _loaded(folder: str, state: dict[str, Any]) -> bool:
    target = {
        key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None
        for key, value in state.items()
    }
    dcp.load(target, checkpoint_id=folder)
    return all(
        value.equal(target[key]) if isinstance(value, torch.Tensor) else value == target[key]
        for key, value in state.items()
    )


def _save_again(folder: str, tensors: int) -> tuple[list[int], bool, int]:
    """Save three times, to two places; return the bytes of planning, and what was found."""
    planning = []
    calls = []
    original = dcp.DefaultSavePlanner.create_global_plan

    def counted(self: Any, all_plans: Any) -> Any:
        calls.append(1)
        return original(self, all_plans)

    for step, name in enumerate(("a", "b", "a")):
        with Traffic() as traffic:
            dcp.save(_state(step, tensors=tensors), checkpoint_id=f"{folder}/{name}")
        planning.append(traffic.bytes["save: plan"])
    good = _loaded(f"{folder}/a", _state(2, tensors=tensors))
    good &= _loaded(f"{folder}/b", _state(1, tensors=tensors))
    with patch.object(dcp.DefaultSavePlanner, "create_global_plan", counted):
        dcp.save(_state(3, tensors=tensors), checkpoint_id=f"{folder}/a", planner=Observing())
        dcp.save(_state(3, tensors=tensors), checkpoint_id=f"{folder}/a", planner=Observing())
    return planning, good, len(calls)


class Observing(dcp.DefaultSavePlanner):
    """A program's planner whose hooks are counted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[str] = []

    def create_local_plan(self) -> dcp.SavePlan:
        self.calls.append("local")
        return super().create_local_plan()

    def create_global_plan(self, all_plans: Any) -> Any:
        self.calls.append("global")
        return super().create_global_plan(all_plans)

    def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
        self.calls.append("finish")
        return super().finish_plan(new_plan)


def test_planning_again_takes_a_constant_number_of_bytes(pool: RankPool, tmp_path: Path) -> None:
    few = pool.run(WORLD_SIZE, _save_again, str(tmp_path / "less"), 4)
    many = pool.run(WORLD_SIZE, _save_again, str(tmp_path / "more"), 200)
    for rank in range(WORLD_SIZE):
        (first, *again), good, calls = few[rank]
        (first_of_many, *again_of_many), good_of_many, _ = many[rank]
        assert good
        assert good_of_many
        assert first_of_many > first
        assert again == again_of_many  # the second and third differ in the names of files
        assert max(again) < (1000 if rank else 1000 * WORLD_SIZE)
        assert calls == (0 if rank else 2)


def _save_changed(folder: str, changed: str) -> bool:
    planner = dcp.DefaultSavePlanner()
    dcp.save(_state(0), checkpoint_id=folder, planner=planner)
    dcp.save(_state(1), checkpoint_id=folder, planner=planner)
    dcp.save(_state(2, changed=changed), checkpoint_id=folder, planner=planner)
    good = _loaded(folder, _state(2, changed=changed))
    dcp.save(_state(3), checkpoint_id=folder, planner=planner)
    return good and _loaded(folder, _state(3))


@pytest.mark.parametrize("changed", ["key", "object", "shape", "dtype", "tensor"])
def test_whatever_changes_on_one_rank_is_planned_anew(
    pool: RankPool, tmp_path: Path, changed: str
) -> None:
    assert all(pool.run(WORLD_SIZE, _save_changed, str(tmp_path / "ckpt"), changed))


def _save_observed(folder: str) -> tuple[list[list[str]], bool]:
    calls = []
    for caching in (False, True):
        planner = Observing(enable_plan_caching=caching)
        for step in range(2):
            dcp.save(_state(step), checkpoint_id=folder, planner=planner)
        calls.append(planner.calls)
    moved = Observing(dedup_save_to_lowest_rank=True, enable_plan_caching=True)
    dcp.save(_state(5), checkpoint_id=folder, planner=moved)
    moved.dedup_save_to_lowest_rank = False
    dcp.save(_state(6), checkpoint_id=folder, planner=moved)
    calls.append(moved.calls)
    return calls, _loaded(folder, _state(6))


def test_a_programs_global_planning_is_called_unless_it_asks_not_to_be(
    pool: RankPool, tmp_path: Path
) -> None:
    answers = pool.run(WORLD_SIZE, _save_observed, str(tmp_path / "ckpt"))
    for rank, (calls, good) in enumerate(answers):
        assert good
        overall = [] if rank else ["global"]
        once = ["local", *overall, "finish"]
        assert calls == [once * 2, [*once, "local", "finish"], once * 2]


def _save_failing(folder: str) -> bool:
    """Fail between planning and committing, then go on with the plan that is known."""
    dcp.save(_state(0), checkpoint_id=folder)
    with (
        patch.object(dcp.FileSystemWriter, "write_data", side_effect=OSError("full")),
        pytest.raises(dcp.CheckpointException, match="full"),
    ):
        dcp.save(_state(1), checkpoint_id=folder)
    good = _loaded(folder, _state(0))
    dcp.save(_state(2), checkpoint_id=folder)
    return good and _loaded(folder, _state(2))


def test_a_known_plan_outlives_a_failed_save(pool: RankPool, tmp_path: Path) -> None:
    assert all(pool.run(WORLD_SIZE, _save_failing, str(tmp_path / "ckpt")))
