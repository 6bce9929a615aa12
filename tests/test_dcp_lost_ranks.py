"""A rank dies or hangs at each step in turn: the others raise in time, naming it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import shardpoint.dcp as dcp
from ranks import RankPool
from shardpoint.dcp._process_group import ProcessGroupCoordinator
from shardpoint.errors import PlanError

WORLD_SIZE = 3
LONG = 30.0  # half the group's timeout: nobody has waited for that
SHORT = 1.0

DEATHS: dict[str, Callable[[], Any]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "os._exit": lambda: os._exit(7),
    "sys.exit": lambda: sys.exit(3),
    "hang": lambda: time.sleep(3600),
}

STEPS = {
    ("save", "plan"): (dcp.DefaultSavePlanner, "create_local_plan"),
    ("save", "write"): (dcp.FileSystemWriter, "write_data"),
    ("save", "commit"): (ProcessGroupCoordinator, "broadcast"),
    ("load", "plan"): (dcp.DefaultLoadPlanner, "create_local_plan"),
    ("load", "read"): (dcp.FileSystemReader, "read_data"),
}


def _state(factor: float) -> dict[str, Any]:
    rank = dist.get_rank()
    return {"all": torch.arange(6) * factor, f"own{rank}": torch.ones(5) * factor, "n": factor}


def _lose(folder: str, what: str, step: str, death: str, victim: int, timeout: float) -> Any:
    """Save; then save or load while the victim is lost at one step; return what was raised."""
    dcp.save(_state(1.0), checkpoint_id=folder)
    owner, method = STEPS[what, step]

    def die(*_: Any, **__: Any) -> None:
        DEATHS[death]()

    failing = patch.object(owner, method, die) if dist.get_rank() == victim else None
    if failing is not None:
        failing.start()
    started = time.perf_counter()
    try:
        action = dcp.save if what == "save" else dcp.load
        action(_state(2.0), checkpoint_id=folder, timeout=timeout)
    except dcp.CheckpointException as error:
        return sorted(error.failures), str(error), time.perf_counter() - started
    return "nothing was raised"


def _check(answers: list[Any], step: str, victim: int, seconds: float) -> None:
    for rank, answer in enumerate(answers):
        if rank == victim:
            continue
        failed, message, waited = answer
        assert failed == [victim], message
        assert f"{step} failed on rank {victim}" in message
        assert waited < seconds


def _old_or_new(folder: Path) -> float:
    """Load what is there, all of it; return the factor by which it was saved."""
    target = {"all": torch.zeros(6, dtype=torch.float32), "n": 0.0}
    target |= {f"own{rank}": torch.zeros(5) for rank in range(WORLD_SIZE)}
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    factor = float(target["n"])
    assert target["all"].equal(torch.arange(6) * factor)
    for rank in range(WORLD_SIZE):
        assert target[f"own{rank}"].equal(torch.ones(5) * factor)
    return factor


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize(("what", "step"), STEPS, ids=lambda text: text)
def test_a_killed_rank_is_named_at_once(
    pool: RankPool, tmp_path: Path, what: str, step: str, victim: int
) -> None:
    folder = tmp_path / "ckpt"
    answers = pool.run_to_the_end(
        WORLD_SIZE, _lose, str(folder), what, step, "SIGKILL", victim, LONG
    )
    assert answers[victim] == -signal.SIGKILL
    _check(answers, step, victim, LONG)
    assert _old_or_new(folder) == (2.0 if step == "commit" else 1.0)


@pytest.mark.parametrize(("death", "code"), [("os._exit", 7), ("sys.exit", None)])
def test_a_rank_that_exits_is_named(
    pool: RankPool, tmp_path: Path, death: str, code: int | None
) -> None:
    folder = tmp_path / "ckpt"
    answers = pool.run_to_the_end(WORLD_SIZE, _lose, str(folder), "save", "write", death, 1, LONG)
    assert answers[1] == code if code is not None else "SystemExit: 3" in answers[1]
    _check(answers, "write", 1, LONG)
    assert _old_or_new(folder) == 1.0


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("what", "step"), [("save", "write"), ("save", "commit"), ("load", "read")]
)
def test_a_rank_that_hangs_is_named_within_the_timeout(
    pool: RankPool, tmp_path: Path, what: str, step: str, victim: int
) -> None:
    folder = tmp_path / "ckpt"
    answers = pool.run_to_the_end(
        WORLD_SIZE, _lose, str(folder), what, step, "hang", victim, SHORT, hanging=victim
    )
    _check(answers, step, victim, LONG)
    assert _old_or_new(folder) == (2.0 if step == "commit" else 1.0)


def test_the_rank_that_keeps_the_store_is_named_too(pool: RankPool, tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    answers = pool.run_to_the_end(
        WORLD_SIZE,
        *(_lose, str(tmp_path / "ckpt"), "save", "write", "SIGKILL", 0, LONG),
        store=f"tcp://localhost:{port}",
    )
    _check(answers, "write", 0, LONG)


def _lose_in_a_part(folder: str) -> Any:
    """Lose the second rank of a group that the first rank of all has no part in."""
    part = dist.new_group([1, 2])
    rank = dist.get_rank()
    if rank == 0:
        return None
    victim = patch.object(dcp.FileSystemWriter, "write_data", lambda *_: DEATHS["SIGKILL"]())
    if rank == 2:
        victim.start()
    try:
        dcp.save({"a": 1}, checkpoint_id=folder, process_group=part, timeout=LONG)
    except dcp.CheckpointException as error:
        return sorted(error.failures)
    return "nothing was raised"


def test_in_a_part_of_the_ranks_its_own_numbers_are_named(pool: RankPool, tmp_path: Path) -> None:
    answers = pool.run_to_the_end(WORLD_SIZE, _lose_in_a_part, str(tmp_path / "ckpt"))
    assert answers == [None, [1], -signal.SIGKILL]


def test_a_timeout_is_more_than_nothing() -> None:
    with pytest.raises(PlanError, match="timeout must be more than 0"):
        dcp.save({}, checkpoint_id="nowhere", timeout=0)
