"""Ranks that were given different things by mistake: an error that shows the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import shardpoint.dcp as dcp
from ranks import RankPool


def _raised(action: Any) -> str:
    try:
        action()
    except dcp.CheckpointException as error:
        return str(error)
    return "nothing was raised"


def _different_places(folder: str) -> str:
    place = "one" if dist.get_rank() == 1 else "other"
    return _raised(lambda: dcp.save({"a": torch.ones(2)}, checkpoint_id=f"{folder}/{place}"))


def test_different_places_are_named(pool: RankPool, tmp_path: Path) -> None:
    for message in pool.run(3, _different_places, str(tmp_path)):
        assert f"ranks 0, 2 to '{tmp_path}/other'" in message
        assert f"rank 1 to '{tmp_path}/one'" in message
    assert not list(tmp_path.rglob("*.distcp"))


def _different_tensors(folder: str) -> str:
    rank = dist.get_rank()
    dtype = torch.float64 if rank == 2 else torch.float32
    state = {"a": torch.ones(2 + rank % 2), "b": torch.ones(2, dtype=dtype)}
    return _raised(lambda: dcp.save(state, checkpoint_id=folder))


def test_different_shapes_and_dtypes_are_named(pool: RankPool, tmp_path: Path) -> None:
    for message in pool.run(3, _different_tensors, str(tmp_path / "ckpt")):
        assert "'a'" in message
        assert "shape (2,) on rank 0" in message
        assert "shape (3,) on rank 1" in message
        assert "'b'" in message
        assert "float64 tensor of shape (2,) on rank 2" in message


def _different_meshes(folder: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (2,))
    if dist.get_rank() == 0:
        placements, local = [Replicate()], torch.ones(4)
    else:
        placements, local = [Shard(0)], torch.ones(2)
    value = DTensor.from_local(local, mesh, placements, run_check=False)
    return _raised(lambda: dcp.save({"weight": value}, checkpoint_id=folder))


def test_layouts_that_do_not_fit_are_named(pool: RankPool, tmp_path: Path) -> None:
    for message in pool.run(2, _different_meshes, str(tmp_path / "ckpt")):
        assert "'weight'" in message
        assert "the chunks at [0:4] and at [2:4] overlap" in message
        assert "ranks 0, 1" in message


def _save_against_load(folder: str) -> str:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=folder)
    action = dcp.load if dist.get_rank() == 1 else dcp.save
    return _raised(lambda: action({"a": torch.ones(2)}, checkpoint_id=folder, timeout=20))


def test_ranks_that_do_different_things_hear_of_it(pool: RankPool, tmp_path: Path) -> None:
    for message in pool.run(3, _save_against_load, str(tmp_path / "ckpt")):
        assert "rank 1 is in step 1, 'load: plan'" in message
        assert "rank 0 in step 1, 'save: plan'" in message


def _different_coordinators(folder: str) -> str:
    from shardpoint.dcp._process_group import ProcessGroupCoordinator

    original = ProcessGroupCoordinator.__init__

    def other(self: Any, group: Any, coordinator_rank: int, **options: Any) -> None:
        original(self, group, coordinator_rank=dist.get_rank(), **options)

    with patch.object(ProcessGroupCoordinator, "__init__", other):
        return _raised(lambda: dcp.save({}, checkpoint_id=folder, timeout=0.5))


def test_ranks_that_take_different_ones_for_the_coordinator_are_named(
    pool: RankPool, tmp_path: Path
) -> None:
    answers = pool.run_to_the_end(2, _different_coordinators, str(tmp_path / "ckpt"))
    assert any("for the coordinator, not" in message for message in answers)


class ByRank(dcp.DefaultLoadPlanner):
    """A planner that wants to see all plans."""

    def create_global_plan(self, global_plan: Any) -> Any:
        return super().create_global_plan(global_plan)


def _different_planners(folder: str) -> float:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=folder)
    target = {"a": torch.zeros(2)}
    planner = ByRank() if dist.get_rank() == 1 else None
    dcp.load(target, checkpoint_id=folder, planner=planner)
    return float(target["a"].sum())


def test_ranks_may_load_with_different_planners(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(2, _different_planners, str(tmp_path / "ckpt")) == [2.0, 2.0]


def _replaced_meanwhile(folder: str) -> str:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=folder)
    original = dcp.FileSystemReader.read_metadata

    def read_metadata(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if dist.get_rank() == 1:
            dist.barrier()
        metadata = original(self, *arguments, **keywords)
        if dist.get_rank() == 0:
            dcp.save({"a": torch.zeros(2)}, checkpoint_id=folder, no_dist=True)
            dist.barrier()
        return metadata

    with patch.object(dcp.FileSystemReader, "read_metadata", read_metadata):
        return _raised(lambda: dcp.load({"a": torch.ones(2)}, checkpoint_id=folder))


def test_a_checkpoint_replaced_while_ranks_open_it_is_no_mixture(
    pool: RankPool, tmp_path: Path
) -> None:
    for message in pool.run(2, _replaced_meanwhile, str(tmp_path / "ckpt")):
        assert "was replaced meanwhile" in message


@pytest.mark.parametrize("rank", [2, -1])
def test_a_coordinator_outside_the_group_is_refused(
    pool: RankPool, tmp_path: Path, rank: int
) -> None:
    assert pool.run(2, _outside, rank) == [f"coordinator_rank is {rank}"] * 2


def _outside(rank: int) -> str:
    from shardpoint.dcp._process_group import coordinator_for
    from shardpoint.errors import PlanError

    with pytest.raises(PlanError) as caught:
        coordinator_for(None, rank, False)
    return str(caught.value).partition(",")[0]
