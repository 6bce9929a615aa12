"""Two jobs at one place: savers that would mix, and readers that are overtaken."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardpoint
import shardpoint.dcp as dcp
from ranks import RankPool
from shardpoint.dcp.api import CheckpointException
from shardpoint.errors import ConcurrentSaveError
from shardpoint.storage import LocalStorage
from shardpoint.storage.base import NoClaim


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((300,), value), "big": torch.full((70_000,), value), "n": value}


def assert_whole(folder: Path, value: float) -> None:
    """The checkpoint is one save's, and nothing else lies there."""
    with shardpoint.open(folder) as checkpoint:
        assert checkpoint["n"] == value
        assert set(checkpoint["w"].tolist()) == set(checkpoint["big"].tolist()) == {value}
        assert checkpoint.verify().ok
        names = {*checkpoint.index.files, ".metadata"}
    rest = {path.name for path in folder.iterdir()} - names
    assert len(rest) == 1
    assert next(iter(rest)).startswith(".shardpoint-")


def wait_for(path: str) -> None:
    deadline = time.monotonic() + 60
    while not os.path.exists(path):
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.005)


class SlowPlanner(dcp.DefaultSavePlanner):
    """Says that the save is under way, and goes on when it is told to."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
        Path(f"{self.folder}-begun").touch()
        wait_for(f"{self.folder}-may-go-on")
        return super().finish_plan(new_plan)


def _save_at_once(folder: str, without_locks: bool) -> str:
    """Rank 0 saves slowly, rank 1 meanwhile; each alone. Return how this rank's save ended."""
    if without_locks:
        LocalStorage.claim = lambda self, *, shared: NoClaim()  # type: ignore[method-assign]
    rank = dist.get_rank()
    try:
        if rank == 0:
            dcp.save(state(1.0), checkpoint_id=folder, planner=SlowPlanner(folder), no_dist=True)
        else:
            wait_for(f"{folder}-begun")
            try:
                dcp.save(state(2.0), checkpoint_id=folder, no_dist=True)
            finally:
                Path(f"{folder}-may-go-on").touch()
    except CheckpointException as error:
        (cause,) = error.causes.values()
        return str(cause)
    finally:
        if without_locks:
            del LocalStorage.claim
    return ""


@pytest.mark.parametrize("first", [None, 5.0], ids=["empty", "overwritten"])
def test_the_second_of_two_savers_is_told(
    pool: RankPool, tmp_path: Path, first: float | None
) -> None:
    folder = tmp_path / "c"
    if first is not None:
        dcp.save(state(first), checkpoint_id=folder)
    won, lost = pool.run(2, _save_at_once, str(folder), False)
    assert won == ""
    assert str(folder) in lost
    assert "another save is writing" in lost
    assert_whole(folder, 1.0)
    dcp.save(state(3.0), checkpoint_id=folder)
    assert_whole(folder, 3.0)


@pytest.mark.parametrize("first", [None, 5.0], ids=["empty", "overwritten"])
def test_where_there_are_no_locks_the_first_to_commit_wins(
    pool: RankPool, tmp_path: Path, first: float | None
) -> None:
    folder = tmp_path / "c"
    if first is not None:
        dcp.save(state(first), checkpoint_id=folder)
    lost, won = pool.run(2, _save_at_once, str(folder), True)
    assert won == ""
    # in an empty place both would have had files of the same names
    assert ("exists already" if first is None else "the other one counts") in lost
    assert_whole(folder, 2.0)


def test_a_failed_save_lets_others_save(tmp_path: Path) -> None:
    class Failing(dcp.DefaultSavePlanner):
        def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
            raise ValueError("no")

    writer = dcp.FileSystemWriter(tmp_path / "c")
    with pytest.raises(CheckpointException, match="no"):
        dcp.save(state(1.0), storage_writer=writer, planner=Failing())
    dcp.save(state(2.0), checkpoint_id=tmp_path / "c")
    assert_whole(tmp_path / "c", 2.0)


def test_saves_without_collectives_go_side_by_side(pool: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    pool.run(2, _save_without_collectives, folder)
    with shardpoint.open(folder) as checkpoint:
        assert checkpoint["w0"].tolist() == [0.0]
        assert checkpoint["w1"].tolist() == [1.0]


def _save_without_collectives(folder: str) -> None:
    rank = dist.get_rank()
    dcp.save(
        {f"w{rank}": torch.full((1,), float(rank))}, checkpoint_id=folder, use_collectives=False
    )


def test_a_reader_that_is_overtaken_is_told(tmp_path: Path) -> None:
    dcp.save(state(1.0), checkpoint_id=tmp_path)
    checkpoint = shardpoint.open(tmp_path)
    dcp.save(state(2.0), checkpoint_id=tmp_path)
    with pytest.raises(ConcurrentSaveError, match="open it again"):
        checkpoint["w"]
    with pytest.raises(ConcurrentSaveError, match="open it again"):
        checkpoint["n"]
    assert shardpoint.open(tmp_path)["n"] == 2.0


def test_a_reader_whose_checkpoint_is_removed_is_told(tmp_path: Path) -> None:
    dcp.save(state(1.0), checkpoint_id=tmp_path)
    checkpoint = shardpoint.open(tmp_path)
    for file in list(tmp_path.iterdir()):
        file.unlink()
    with pytest.raises(ConcurrentSaveError, match="was removed while it was read"):
        checkpoint["w"]


class OvertakenReader(dcp.FileSystemReader):
    """Another job saves between this load's planning and its reading."""

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        dcp.save(state(2.0), checkpoint_id=self.path)
        return super().prepare_local_plan(plan)


def test_a_load_that_is_overtaken_says_so(tmp_path: Path) -> None:
    dcp.save(state(1.0), checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException, match="was replaced by another save") as caught:
        dcp.load(state(0.0), storage_reader=OvertakenReader(tmp_path))
    assert isinstance(caught.value.causes[0], ConcurrentSaveError)
    target = state(0.0)
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["n"] == 2.0


def _overwrite_again_and_again(folder: str, times: int) -> int:
    """Rank 0 saves, rank 1 reads all the while; return how many reads succeeded."""
    rank = dist.get_rank()
    if rank == 0:
        for number in range(times):
            dcp.save(state(float(number)), checkpoint_id=folder, no_dist=True)
        Path(f"{folder}-done").touch()
        return 0
    good = 0
    while not os.path.exists(f"{folder}-done"):
        try:
            with shardpoint.open(folder) as checkpoint:
                values = {checkpoint["n"], *checkpoint["w"].tolist(), *checkpoint["big"].tolist()}
        except (ConcurrentSaveError, shardpoint.CheckpointNotFoundError):
            continue
        assert len(values) == 1, f"a mixture: {values}"
        good += 1
    return good


def test_reading_while_another_overwrites_gives_one_save_or_an_error(
    pool: RankPool, tmp_path: Path
) -> None:
    folder = str(tmp_path / "c")
    dcp.save(state(-1.0), checkpoint_id=folder)
    _, good = pool.run(2, _overwrite_again_and_again, folder, 25)
    assert good


class Config:
    def __init__(self, width: int) -> None:
        self.width = width

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (self.width,)


def test_classes_are_allowed_for_a_block(tmp_path: Path) -> None:
    name = f"{Config.__module__}.{Config.__qualname__}"
    dcp.save({"config": Config(7)}, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException, match="Config"):
        dcp.load({"config": None}, checkpoint_id=tmp_path)
    with shardpoint.allowing({name: Config}):
        target: dict[str, Any] = {"config": None}
        dcp.load(target, checkpoint_id=tmp_path)
        assert target["config"].width == 7
        with shardpoint.allowing({"other.Thing": dict}):
            assert shardpoint.open(tmp_path)["config"].width == 7
    with pytest.raises(shardpoint.ForbiddenContentError, match="Config"):
        shardpoint.open(tmp_path)["config"]
    with pytest.raises(TypeError, match="qualified names"), shardpoint.allowing({"x": 3}):  # type: ignore[dict-item]
        pass
