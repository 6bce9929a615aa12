"""Programs on several ranks that do the same with torch's package and with this one."""

from __future__ import annotations

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
