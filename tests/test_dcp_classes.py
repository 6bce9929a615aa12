"""Objects of classes that are not on the closed list: told at saving, allowed at loading."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.serialization import add_safe_globals, get_safe_globals, safe_globals

import shardpoint
import shardpoint.dcp as dcp
from shardpoint.dcp import _classes
from shardpoint.dcp.format_utils import dcp_to_torch_save, torch_save_to_dcp
from shardpoint.errors import ForbiddenContentError, ShardpointError
from shardpoint.formats.object_names import unlisted_names


@dataclasses.dataclass
class Settings:
    """A class of a program's own."""

    width: int


class Point(NamedTuple):
    """Another one."""

    x: int


class Runner:
    """What a checkpoint must not get at."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


SETTINGS = f"{__name__}.Settings"


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_classes, "_told", set())
    monkeypatch.setattr(_classes, "_fine", set())


def test_what_torch_was_told_is_safe_loads(tmp_path: Path) -> None:
    dcp.save({"one": Settings(3), "more": [Point(1)]}, checkpoint_id=tmp_path)
    target: dict[str, Any] = {"one": None, "more": [None]}
    with pytest.raises(dcp.CheckpointException, match=r"Settings"):
        dcp.load(target, checkpoint_id=tmp_path)
    with safe_globals([Settings, Point]):
        dcp.load(target, checkpoint_id=tmp_path)
        dcp_to_torch_save(tmp_path, "whole.pt")
        torch_save_to_dcp("whole.pt", "again")
    assert target == {"one": Settings(3), "more": [Point(1)]}
    with safe_globals([(Settings, SETTINGS), Point]):
        again = {"one": None, "more": [None]}
        dcp.load(again, checkpoint_id="again", planner=ItemByItem())
    assert again == target
    with pytest.raises(dcp.CheckpointException, match=r"Settings"):
        dcp.load(target, checkpoint_id=tmp_path)


class ItemByItem(dcp.DefaultLoadPlanner):
    """Has a hook of its own, so that items are read one by one."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        super().load_bytes(read_item, value)


def test_what_is_allowed_here_counts_more_than_what_torch_was_told(tmp_path: Path) -> None:
    dcp.save({"one": Settings(3)}, checkpoint_id=tmp_path)
    target: dict[str, Any] = {"one": None}
    with safe_globals([(Point, SETTINGS)]):
        dcp.load(target, checkpoint_id=tmp_path, allowed={SETTINGS: Settings})
    assert target == {"one": Settings(3)}


def test_torchs_safe_classes_do_not_replace_the_closed_list(tmp_path: Path) -> None:
    """Names that the decoder has ways of its own for stay with those; torch's own stay out."""
    assert get_safe_globals()  # torch has put its own there
    dcp.save({"array": np.arange(3)}, checkpoint_id=tmp_path)

    def never(*arguments: Any) -> Any:
        raise AssertionError("was called")

    names = ["numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"]
    target: dict[str, Any] = {"array": None}
    with safe_globals([(never, name) for name in names]):
        dcp.load(target, checkpoint_id=tmp_path)
    assert target["array"].tolist() == [0, 1, 2]
    mesh = torch.distributed.tensor.placement_types.Shard(0)
    assert type(mesh) in get_safe_globals()
    dcp.save({"placement": mesh}, checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match="Shard"):
        dcp.load({"placement": None}, checkpoint_id=tmp_path)


def test_only_what_is_named_is_called(tmp_path: Path) -> None:
    dcp.save({"one": Runner()}, checkpoint_id=tmp_path)
    with safe_globals([Settings]), pytest.raises(dcp.CheckpointException) as caught:
        dcp.load({"one": None}, checkpoint_id=tmp_path)
    assert isinstance(caught.value.causes[0], ForbiddenContentError)
    assert not Path("pwned").exists()
    with safe_globals([Settings]), pytest.raises(ShardpointError), shardpoint.open(tmp_path) as one:
        one["one"]


def test_a_save_tells_which_classes_loading_will_ask_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {
        "a": Settings(1),
        "deep": {"b": (Settings(2), torch.ones(50_000))},
        "point": Point(1),
        "weight": torch.ones(3),
        "plain": [1, {"x": {2}}, collections.OrderedDict(z=1), np.float32(2), torch.Size([1])],
        "text": "cat\ndog\n" * 9,
    }
    with caplog.at_level(logging.WARNING):
        dcp.save(state, checkpoint_id=tmp_path)
    assert [record.name for record in caplog.records] == ["shardpoint.dcp._classes"]
    told = caplog.records[0].getMessage()
    assert "allowed=" in told
    assert f"{SETTINGS} in 'a', 'deep.b'" in told
    assert f"{__name__}.Point in 'point'" in told
    caplog.clear()
    dcp.save(state, checkpoint_id=tmp_path)
    assert not caplog.records  # once in a process


def test_nothing_is_told_of_what_loads_anyway(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), safe_globals([Settings]):
        dcp.save({"a": Settings(1), "b": "cat\ndog\n", "c": {1}}, checkpoint_id=tmp_path)
        dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path)
    assert not caplog.records


def test_planners_with_records_of_their_own_are_told_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrapping(dcp.DefaultSavePlanner):
        def lookup_object(self, index: Any) -> Any:
            found = super().lookup_object(index)
            return found if isinstance(found, torch.Tensor) else Settings(found)

    dcp.save({"n": 1, "w": torch.ones(2)}, checkpoint_id=tmp_path, planner=Wrapping())
    assert [SETTINGS in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("data", [b"", b"cmy.module\nName\n", b"PK\x03\x04" + bytes(60)])
def test_what_is_no_record_names_nothing(data: bytes) -> None:
    assert unlisted_names(data) == []


def test_added_globals_hold_for_the_process(tmp_path: Path) -> None:
    dcp.save({"one": Point(4)}, checkpoint_id=tmp_path)
    target: dict[str, Any] = {"one": None}
    before = get_safe_globals()
    add_safe_globals([Point])
    try:
        dcp.load(target, checkpoint_id=tmp_path)
    finally:
        torch.serialization.clear_safe_globals()
        add_safe_globals(before)
    assert target == {"one": Point(4)}


def test_a_save_tells_what_will_not_load_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {
        "type": np.dtype("f4"),
        "class": [int],
        "sparse": (torch.eye(2).to_sparse(),),
        "fine": (np.float32(1), torch.ones(2), collections.deque([1])),
    }
    with caplog.at_level(logging.WARNING):
        dcp.save(state, checkpoint_id=tmp_path)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "cannot load these back" in told
    assert "a numpy dtype as a value is not supported in 'type'" in told
    assert "'fine'" not in told
    for key in ("type", "class", "sparse"):
        assert repr(key) in told
        with pytest.raises(dcp.CheckpointException):
            dcp.load({key: None}, checkpoint_id=tmp_path)
    dcp.load({"fine": None}, checkpoint_id=tmp_path)
