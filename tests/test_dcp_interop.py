"""What shardpoint saves torch loads, and the other way round, for every kind of state."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import shardpoint.dcp as dcp
from dcp_states import KINDS, blank, build, differences, values
from ranks import RankPool
from shardpoint.formats.payload_shift import PAGE, PAGED_FROM

PACKAGES = {"torch": torch_dcp, "shardpoint": dcp}


def _save_and_load(kind: str, folder: str, saver: str, loader: str) -> list[str]:
    state = build(kind)
    PACKAGES[saver].save(state, checkpoint_id=folder)
    target = blank(kind)
    PACKAGES[loader].load(target, checkpoint_id=folder)
    if loader == "torch" and kind == "objects":
        # torch puts what it loads for the integer key 0 under "0", beside it
        assert target["int_keys"].pop("0") == "zero"
        assert target["int_keys"].pop("1") == {"x": 1}
        target["int_keys"] = state["int_keys"]
    return differences(state, target)


@pytest.mark.parametrize(
    ("saver", "loader"),
    [("shardpoint", "torch"), ("torch", "shardpoint"), ("shardpoint", "shardpoint")],
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_values_survive(
    pool: RankPool, tmp_path: Path, kind: str, world_size: int, saver: str, loader: str
) -> None:
    found = pool.run(world_size, _save_and_load, kind, str(tmp_path / "ckpt"), saver, loader)
    assert found == [[]] * world_size


def _save_both(kind: str, folder: str) -> None:
    state = build(kind)
    for name, package in PACKAGES.items():
        package.save(state, checkpoint_id=f"{folder}/{name}")


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_metadata_is_what_torch_writes(
    pool: RankPool, tmp_path: Path, kind: str, world_size: int
) -> None:
    pool.run(world_size, _save_both, kind, str(tmp_path))
    theirs, ours = (_unpickled(tmp_path / name / ".metadata") for name in ("torch", "shardpoint"))
    assert set(ours.state_dict_metadata) == set(theirs.state_dict_metadata)
    for key, wanted in theirs.state_dict_metadata.items():
        found = ours.state_dict_metadata[key]
        assert type(found) is type(wanted)
        if hasattr(wanted, "chunks"):
            assert (found.properties, found.size) == (wanted.properties, wanted.size)
            assert _boxes(found) == _boxes(wanted)
    assert ours.planner_data == theirs.planner_data
    assert set(ours.storage_data) == set(theirs.storage_data)
    for item, wanted in theirs.storage_data.items():
        assert type(ours.storage_data[item]) is type(wanted)
        # The payloads of large records are aligned in their file, by padding before them.
        padding = ours.storage_data[item].length - wanted.length
        alignment = PAGE if wanted.length > PAGED_FROM else 64
        assert 0 <= padding < (alignment if wanted.length > 256 << 10 else 1)
    assert ours.version == theirs.version
    assert vars(ours.storage_meta).keys() == vars(theirs.storage_meta).keys()
    assert type(ours.storage_meta.checkpoint_id) is type(theirs.storage_meta.checkpoint_id)


def _boxes(tensor: Any) -> list[tuple[Any, Any]]:
    return sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks)


def _unpickled(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def _bytes_read(folder: str, saved_axis: int, loaded_axis: int) -> tuple[list[str], int, int]:
    """Save in one layout, load in another; return differences, bytes read, bytes held."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = values("resharded", 1024, 512)
    dcp.save({"t": distribute_tensor(whole, mesh, [Shard(saved_axis)])}, checkpoint_id=folder)
    target = distribute_tensor(torch.zeros_like(whole), mesh, [Shard(loaded_axis)])
    report = dcp.load({"t": target}, checkpoint_id=folder)
    wanted = distribute_tensor(whole, mesh, [Shard(loaded_axis)])
    held = target.to_local().numel() * target.element_size()
    return differences({"t": target}, {"t": wanted}), report.bytes_read, held


@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_a_rank_reads_its_own_bytes_and_no_more(
    pool: RankPool, tmp_path: Path, axes: tuple[int, int]
) -> None:
    for wrong, read, held in pool.run(4, _bytes_read, str(tmp_path / "ckpt"), *axes):
        assert wrong == []
        headers = 4 * 4096  # of the four stored chunks
        assert held <= read <= 1.05 * held + headers
