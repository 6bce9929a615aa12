"""torch.save files to distributed checkpoints and back, beside torch's own conversion."""

from __future__ import annotations

import runpy
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
import torch.distributed.checkpoint.format_utils as theirs
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import shardpoint.dcp as dcp
from dcp_states import differences
from ranks import RankPool
from shardpoint.dcp import format_utils as ours
from shardpoint.dcp.state_dict_loader import _load_state_dict_from_keys
from shardpoint.errors import ForbiddenContentError, PlanError


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "model": {
            "weight": torch.randn(6, 5, generator=generator),
            "transposed": torch.randn(6, 5, generator=generator).t(),
            "half": torch.randn(7, generator=generator).to(torch.bfloat16),
            "unsigned": torch.tensor([1, 65535], dtype=torch.int32).to(torch.uint16),
            "small": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
            "flags": torch.tensor([True, False]),
            "complex": torch.tensor([1 + 2j]),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(2.5),
        },
        "optimizer": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}],
        "step": 1 << 40,
        "nothing": None,
        "text": "größe",
        "bytes": b"\x00\xff",
        "torch": (torch.Size([1, 2]), torch.float16, torch.device("cpu"), torch.strided),
        "inside": (torch.ones(2), torch.nn.Parameter(torch.zeros(2), requires_grad=False)),
        "ordered": OrderedDict(b=1, a=2),
        "set": {1, 2},
        "number": 1j,
    }


def their(function: Any, *arguments: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(*arguments)


def test_checkpoint_to_file_gives_what_torchs_conversion_gives(tmp_path: Path) -> None:
    dcp.save(state(), checkpoint_id=tmp_path / "ckpt")
    their(theirs.dcp_to_torch_save, str(tmp_path / "ckpt"), str(tmp_path / "theirs.pt"))
    ours.dcp_to_torch_save(tmp_path / "ckpt", tmp_path / "ours.pt")
    wanted = torch.load(tmp_path / "theirs.pt", weights_only=False)
    found = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert differences(wanted, found) == []
    assert list(found) == list(wanted)
    assert isinstance(found["inside"][1], torch.nn.Parameter)
    assert not found["inside"][1].requires_grad
    assert torch.load(tmp_path / "ours.pt", weights_only=True, mmap=True)["step"] == 1 << 40


def test_file_to_checkpoint_gives_what_torchs_conversion_gives(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "state.pt")
    their(theirs.torch_save_to_dcp, str(tmp_path / "state.pt"), str(tmp_path / "theirs"))
    ours.torch_save_to_dcp(tmp_path / "state.pt", tmp_path / "ours")
    metadata = [
        torch_dcp.FileSystemReader(tmp_path / name).read_metadata() for name in ("ours", "theirs")
    ]
    assert metadata[0].state_dict_metadata == metadata[1].state_dict_metadata
    assert metadata[0].planner_data == metadata[1].planner_data
    wanted = _load_state_dict_from_keys(checkpoint_id=tmp_path / "theirs")
    found = _load_state_dict_from_keys(checkpoint_id=tmp_path / "ours")
    assert differences(wanted, found) == []
    # torch reads it too
    their(theirs.dcp_to_torch_save, str(tmp_path / "ours"), str(tmp_path / "again.pt"))
    assert differences(wanted, torch.load(tmp_path / "again.pt", weights_only=False)) == []


class Config:
    def __init__(self) -> None:
        self.width = 3


def test_classes_are_converted_only_where_they_are_allowed(tmp_path: Path) -> None:
    torch.save({"config": Config(), "a": torch.ones(1)}, tmp_path / "state.pt")
    with pytest.raises(ForbiddenContentError, match="Config"):
        ours.torch_save_to_dcp(tmp_path / "state.pt", tmp_path / "ckpt")
    allowed = {f"{Config.__module__}.Config": Config}
    ours.torch_save_to_dcp(tmp_path / "state.pt", tmp_path / "ckpt", allowed=allowed)
    ours.dcp_to_torch_save(tmp_path / "ckpt", tmp_path / "again.pt", allowed=allowed)
    with torch.serialization.safe_globals([Config]):
        assert torch.load(tmp_path / "again.pt", weights_only=True)["config"].width == 3


def test_runs_as_a_command(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["format_utils", *arguments])
        runpy.run_path(str(ours.__file__), run_name="__main__")

    torch.save({"a": torch.arange(3)}, tmp_path / "state.pt")
    run("torch_to_dcp", str(tmp_path / "state.pt"), str(tmp_path / "ckpt"))
    run("dcp_to_torch", str(tmp_path / "ckpt"), str(tmp_path / "again.pt"))
    assert torch.load(tmp_path / "again.pt", weights_only=True)["a"].tolist() == [0, 1, 2]
    assert "again.pt" in capsys.readouterr().out


def _load_by_broadcast(path: str, name: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    package, formats = (torch_dcp, theirs) if name == "torch" else (dcp, ours)
    target = {
        "sharded": distribute_tensor(torch.zeros(7, 4), mesh, [Shard(0)]),
        "whole": torch.zeros(3, dtype=torch.float64),
    }
    if name == "torch":  # gives every rank the first rows (torch 2.13)
        target = {"sharded": torch.zeros(7, 4), "whole": torch.zeros(3)}  # nor does it convert
    package.load(
        target,
        checkpoint_id=path,
        storage_reader=formats.BroadcastingTorchSaveReader(),
        planner=formats.DynamicMetaLoadPlanner(),
    )
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in target.items()}


def _fail_to_load(path: str) -> list[str]:
    messages = []
    smaller = torch.zeros(2 + (dist.get_rank() == 0))  # of the right size on one rank
    targets: list[dict[str, Any]] = [
        {"missing": torch.zeros(2)},
        {"whole": torch.zeros(4)},
        {"whole": smaller},
        {"whole": 3},
    ]
    for target in targets:
        try:
            dcp.load(
                target,
                checkpoint_id=path,
                storage_reader=ours.BroadcastingTorchSaveReader(),
                planner=ours.DynamicMetaLoadPlanner(),
            )
        except dcp.CheckpointException as error:
            messages.append(str(error))
    return messages


def test_one_rank_reads_for_all(pool: RankPool, tmp_path: Path) -> None:
    saved = {"sharded": torch.arange(28.0).reshape(7, 4), "whole": torch.arange(3.0)}
    torch.save({**saved, "other": 1}, tmp_path / "state.pt")
    for name in ("torch", "shardpoint"):
        for loaded in pool.run(2, _load_by_broadcast, str(tmp_path / "state.pt"), name):
            assert torch.equal(loaded["sharded"], saved["sharded"])
            assert torch.equal(loaded["whole"].float(), saved["whole"])
    for messages in pool.run(2, _fail_to_load, str(tmp_path / "state.pt")):
        assert len(messages) == 4
        assert messages[0].count("no such tensor") == 1  # once, not once for every rank
        assert "has shape (3,) in the file, and (4,) in the state dict on rank 0" in messages[1]
        assert "has shape (3,) in the file, and (2,) in the state dict on rank 1" in messages[2]
        assert "no tensor but int" in messages[3]


def test_broadcasting_works_in_one_process_too(tmp_path: Path) -> None:
    torch.save({"a": {"b": torch.arange(4)}}, tmp_path / "state.pt")
    target = {"a": {"b": torch.zeros(4, dtype=torch.int64)}}
    reader = ours.BroadcastingTorchSaveReader(tmp_path / "state.pt")
    dcp.load(target, storage_reader=reader, planner=ours.DynamicMetaLoadPlanner(), no_dist=True)
    assert target["a"]["b"].tolist() == [0, 1, 2, 3]


def test_dynamic_planner_refuses_objects() -> None:
    with pytest.raises(PlanError, match="'b'"):
        ours.DynamicMetaLoadPlanner().set_up_planner({"a": torch.zeros(1), "b": 3})
