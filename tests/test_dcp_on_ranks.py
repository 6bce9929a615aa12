"""Programs on several ranks that do the same with torch's package and with this one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import shardpoint.dcp as dcp
from ranks import RankPool

PACKAGES = {"shardpoint": dcp, "torch": torch_dcp}


def _each_rank_by_itself(folder: str, package: str) -> tuple[list[float], str]:
    mesh = init_device_mesh("cpu", (2,))
    mine = f"{folder}/{dist.get_rank()}"
    value = distribute_tensor(torch.arange(5.0), mesh, [Shard(0)])
    PACKAGES[package].save({"w": value}, checkpoint_id=mine, no_dist=True)
    loaded = distribute_tensor(torch.zeros(5), mesh, [Shard(0)])
    dcp.load({"w": loaded}, checkpoint_id=mine, no_dist=True)
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load({"w": torch.zeros(5)}, checkpoint_id=mine, no_dist=True)
    return loaded.to_local().tolist(), str(caught.value)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_rank_that_saved_alone_gets_its_own_part_back(
    own_pool: RankPool, tmp_path: Path, package: str
) -> None:
    found: list[Any] = own_pool.run(2, _each_rank_by_itself, str(tmp_path), package)
    assert [values for values, _ in found] == [[0.0, 1.0, 2.0], [3.0, 4.0]]
    assert "no chunk covers 2 of 5 elements, among them those at [3:5]" in found[0][1]


def _on_disks_of_their_own(folder: str) -> tuple[list[list[str]], float]:
    """Save thrice to a place that is another folder on every rank; return what was there."""
    rank = dist.get_rank()
    os.makedirs(f"{folder}/{rank}/ckpt")
    if rank == 1:  # from a save of which the first rank's disk has nothing any more
        Path(f"{folder}/1/ckpt/__1_0.distcp").write_bytes(b"old")
    before = os.getcwd()
    os.chdir(f"{folder}/{rank}")
    found = []
    try:
        for number in range(3):
            state = {f"own{rank}": torch.full((3,), float(number)), "shared": torch.ones(2)}
            if number == 2:
                dcp.async_save(state, checkpoint_id="/proc/self/cwd/ckpt").result()
            else:
                dcp.save(state, checkpoint_id="/proc/self/cwd/ckpt")
            found.append(sorted(os.listdir("ckpt")))
        metadata = [Path("ckpt/.metadata").read_bytes() if rank == 0 else b""]
        dist.broadcast_object_list(metadata)
        Path("ckpt/.metadata").write_bytes(metadata[0])
        target = {f"own{rank}": torch.zeros(3)}
        dcp.load(target, checkpoint_id="ckpt", no_dist=True)
    finally:
        os.chdir(before)
    return found, target[f"own{rank}"].mean().item()


def test_disks_that_are_not_shared_do_not_fill_up(own_pool: RankPool, tmp_path: Path) -> None:
    first, second = own_pool.run(2, _on_disks_of_their_own, str(tmp_path))
    assert (first[1], second[1]) == (2.0, 2.0)
    for files in first[0]:
        assert len(files) == 3  # the metadata, the index and the data
    for files in second[0]:
        assert len(files) == 1
        assert files[0].startswith("__1_")
    assert len({files[0] for files in second[0]}) == 3
