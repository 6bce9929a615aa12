"""Views of freed storages: an error that names the key, not the end of the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardpoint.dcp as dcp
from shardpoint.dcp._saver_channel import dump_state
from shardpoint.errors import PlanError

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda whole: whole,
    "part": lambda whole: whole[3:],
    "transposed": lambda whole: whole.t(),
    "with gaps": lambda whole: whole[1::2, ::3],
    "parameter": lambda whole: torch.nn.Parameter(whole),
}
MESSAGE = r"key 'model\.lost': a tensor of shape .* storage has been freed"


def _lost(view: str) -> torch.Tensor:
    whole = torch.ones(20, 600)
    found = VIEWS[view](whole)
    whole.untyped_storage().resize_(0)
    return found


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("save", [dcp.save, lambda *a, **k: dcp.async_save(*a, **k).result()])
def test_a_save_names_the_tensor(tmp_path: Path, save: Any, view: str) -> None:
    state = {"model": {"lost": _lost(view), "good": torch.ones(3)}}
    with pytest.raises(dcp.CheckpointException, match=MESSAGE):
        save(state, checkpoint_id=tmp_path / "ckpt")
    assert not any((tmp_path / "ckpt").iterdir())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_a_load_names_the_tensor(tmp_path: Path, saved: torch.dtype, view: str) -> None:
    lost = _lost(view)
    good = torch.ones(lost.shape, dtype=saved)
    dcp.save({"model": {"lost": good, "good": torch.ones(3)}}, checkpoint_id=tmp_path)
    target = {"model": {"lost": lost, "good": torch.zeros(3)}}
    with pytest.raises(dcp.CheckpointException, match=MESSAGE):
        dcp.load(target, checkpoint_id=tmp_path)


def test_safetensors_name_the_tensor(tmp_path: Path) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path))
    with pytest.raises(dcp.CheckpointException, match="key 'lost': a tensor of shape"):
        dcp.save({"lost": _lost("part")}, storage_writer=writer)


@pytest.mark.parametrize("view", VIEWS)
def test_the_saving_process_is_not_given_what_is_lost(view: str) -> None:
    with pytest.raises(PlanError, match="storage has been freed"):
        dump_state({"lost": _lost(view)})


def test_tensors_without_elements_are_saved(tmp_path: Path) -> None:
    empty = torch.empty(0, 3)
    empty.untyped_storage().resize_(0)
    dcp.save({"empty": empty}, checkpoint_id=tmp_path)
    dcp.load({"empty": empty}, checkpoint_id=tmp_path)
