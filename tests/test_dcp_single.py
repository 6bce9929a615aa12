"""Saving and loading in one process: what happens, and what is said when it does not fit."""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch import nn
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint import planner as torch_planner

import shardpoint
import shardpoint.dcp as dcp
from dcp_states import blank, build, differences
from fixture_support import PUBLIC
from shardpoint.dcp import _reading, _records
from shardpoint.dcp.state_dict_loader import _load_state_dict_from_keys
from shardpoint.errors import (
    CheckpointExistsError,
    ForbiddenContentError,
    NarrowingWarning,
    PlanError,
)


def small(value: float = 1.0) -> dict[str, Any]:
    return {"a": torch.full((3, 4), value), "b": {"c": torch.full((5,), value), "n": value}}


def cause(caught: pytest.ExceptionInfo[dcp.CheckpointException]) -> BaseException:
    return caught.value.failures[0][0]


def test_save_returns_the_metadata_and_load_a_report(tmp_path: Path) -> None:
    metadata = dcp.save(small(), checkpoint_id=tmp_path)
    assert set(metadata.state_dict_metadata) == {"a", "b.c", "b.n"}
    assert metadata.planner_data == {"a": ("a",), "b.c": ("b", "c"), "b.n": ("b", "n")}
    target = small(0.0)
    a = target["a"]
    report = dcp.load(target, checkpoint_id=tmp_path)
    assert differences(target, small()) == []
    assert target["a"] is a
    assert report.missing == report.unexpected == ()
    assert report.bytes_read >= 3 * 4 * 4 + 5 * 4
    assert report.seconds > 0


def test_an_overwrite_replaces_the_files_and_touches_no_others(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "__0_0.distcp.bak").write_text("mine too")
    dcp.save(small(1.0), checkpoint_id=tmp_path)
    first = {file.name for file in tmp_path.iterdir()}
    dcp.save(small(2.0), checkpoint_id=tmp_path)
    second = {file.name for file in tmp_path.iterdir()}
    kept = {".metadata", "notes.txt", "__0_0.distcp.bak"}
    assert first & second == kept
    assert len(second) == len(kept) + 2  # data and index
    target = small(0.0)
    dcp.load(target, checkpoint_id=tmp_path)
    assert differences(target, small(2.0)) == []
    theirs = small(0.0)
    with pytest.warns(UserWarning, match="single process"):
        torch_dcp.load(theirs, checkpoint_id=tmp_path)
    assert differences(theirs, small(2.0)) == []


def test_the_old_checkpoint_is_readable_until_the_new_one_counts(tmp_path: Path) -> None:
    dcp.save(small(1.0), checkpoint_id=tmp_path)
    seen = []
    write_data = dcp.FileSystemWriter.write_data

    def spy(self: Any, plan: Any, planner: Any) -> Any:
        future = write_data(self, plan, planner)
        target = small(0.0)
        dcp.load(target, checkpoint_id=tmp_path)
        seen.append(differences(target, small(1.0)))
        return future

    with patch.object(dcp.FileSystemWriter, "write_data", spy):
        dcp.save(small(2.0), checkpoint_id=tmp_path)
    assert seen == [[]]


def test_leftovers_of_a_crashed_save_are_removed_by_the_next(tmp_path: Path) -> None:
    dcp.save(small(1.0), checkpoint_id=tmp_path)
    for name in (
        *("__0_0123abcd_0.distcp", "__7_3.distcp", "..metadata.0123456789abcdef.tmp"),
        *(".shardpoint-0123abcd.index", "..shardpoint-0123abcd.index.0123456789abcdef.tmp"),
    ):
        (tmp_path / name).write_bytes(b"half a file")
    dcp.save(small(2.0), checkpoint_id=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_overwriting_can_be_forbidden(tmp_path: Path) -> None:
    dcp.save(small(1.0), checkpoint_id=tmp_path)
    writer = dcp.FileSystemWriter(tmp_path, overwrite=False)
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save(small(2.0), storage_writer=writer)
    assert isinstance(cause(caught), CheckpointExistsError)
    target = small(0.0)
    dcp.load(target, checkpoint_id=tmp_path)
    assert differences(target, small(1.0)) == []


def test_all_misfits_are_named_before_anything_changes(tmp_path: Path) -> None:
    saved = {**small(1.0), "d": torch.ones(2), "e": torch.ones(2)}
    dcp.save(saved, checkpoint_id=tmp_path)
    target = {
        "a": torch.zeros(3, 4),
        "b": {"c": torch.zeros(6), "n": 0.0},
        "d": "an object",
        "gone": torch.zeros(1),
    }
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(target, checkpoint_id=tmp_path)
    error = cause(caught)
    assert isinstance(error, PlanError)
    assert {problem.key for problem in error.problems} == {"b.c", "d", "gone"}
    assert "saved with shape (5,), wanted with shape (6,)" in str(caught.value)
    assert not target["a"].any()


def test_partial_loads_leave_the_rest_alone_and_say_so(tmp_path: Path) -> None:
    dcp.save(small(1.0), checkpoint_id=tmp_path)
    target = {"a": torch.zeros(3, 4), "new": torch.full((2,), 7.0)}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    report = dcp.load(target, checkpoint_id=tmp_path, planner=planner)
    assert report.missing == ("new",)
    assert set(report.unexpected) == {"b.c", "b.n"}
    assert target["a"].eq(1).all()
    assert target["new"].eq(7).all()


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.int64, torch.int32),
        (torch.float32, torch.int64),
        (torch.complex64, torch.float32),
    ],
    ids=str,
)
def test_narrowing_is_said_forbidden_or_allowed(
    tmp_path: Path, saved: torch.dtype, wanted: torch.dtype
) -> None:
    values = torch.tensor([1, 2, 3]).to(saved)
    dcp.save({"t": values}, checkpoint_id=tmp_path)
    target = {"t": torch.zeros(3, dtype=wanted)}
    with pytest.raises(dcp.CheckpointException, match="lose precision"):
        dcp.load(target, checkpoint_id=tmp_path, on_narrowing="raise")
    assert not target["t"].any()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Casting complex")
        with pytest.warns(NarrowingWarning, match="'t' from"):
            dcp.load(target, checkpoint_id=tmp_path)
        assert target["t"].tolist() == [1, 2, 3]
        dcp.load(target, checkpoint_id=tmp_path, on_narrowing="allow")


def test_widening_is_silent(tmp_path: Path) -> None:
    dcp.save({"t": torch.arange(3).bfloat16()}, checkpoint_id=tmp_path)
    target = {"t": torch.zeros(3)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["t"].tolist() == [0, 1, 2]


class Counter:
    """A `Stateful`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "weights": torch.full((2,), float(self.count))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["weights"].tolist() == [state_dict["count"]] * 2
        self.count = state_dict["count"]


def test_statefuls_and_modules_are_saved_and_given_their_state(tmp_path: Path) -> None:
    saved, model = Counter(5), nn.Linear(3, 2)
    dcp.save({"counter": saved, "model": model}, checkpoint_id=tmp_path)
    loaded, fresh = Counter(0), nn.Linear(3, 2)
    dcp.load({"counter": loaded, "model": fresh}, checkpoint_id=tmp_path)
    assert loaded.count == 5
    assert differences(fresh.state_dict(), model.state_dict()) == []


def test_integer_keys_are_replaced_in_place(tmp_path: Path) -> None:
    dcp.save({"state": {0: {"step": 7}, 1: [1, {"x": 2}]}}, checkpoint_id=tmp_path)
    target = {"state": {0: {"step": 0}, 1: [0, {"x": 0}]}}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target == {"state": {0: {"step": 7}, 1: [1, {"x": 2}]}}


@dataclasses.dataclass
class Config:
    """A class of a user's own."""

    width: int


def test_classes_are_refused_until_they_are_allowed(tmp_path: Path) -> None:
    dcp.save({"config": Config(3), "n": 1}, checkpoint_id=tmp_path)
    name = f"{Config.__module__}.{Config.__qualname__}"
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load({"config": None, "n": 0}, checkpoint_id=tmp_path)
    error = cause(caught)
    assert isinstance(error, ForbiddenContentError)
    assert error.qualified_name == name
    target: dict[str, Any] = {"config": None}
    dcp.load(target, checkpoint_id=tmp_path, allowed={name: Config})
    assert target == {"config": Config(3)}
    with shardpoint.open(tmp_path, allowed={name: Config}) as checkpoint:
        assert checkpoint["config"] == Config(3)


@pytest.mark.parametrize(
    "options",
    [
        {"single_file_per_rank": False},
        {"thread_count": 3},
        {"thread_count": 2, "single_file_per_rank": False, "sync_files": False},
    ],
    ids=str,
)
def test_other_file_layouts(tmp_path: Path, options: dict[str, Any]) -> None:
    state = {f"t{i}": torch.arange(i, dtype=torch.int64) for i in range(9)}
    state |= {"text": "x", "nothing": None}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, **options))
    count = 11 if not options.get("single_file_per_rank", True) else options["thread_count"]
    assert len(list(tmp_path.glob("*.distcp"))) == count
    for package in (dcp, torch_dcp):
        target = {k: torch.zeros_like(v) if torch.is_tensor(v) else 0 for k, v in state.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            package.load(target, checkpoint_id=tmp_path)
        assert differences(target, state) == []


class HalfPlanner(dcp.DefaultSavePlanner):
    """Casts to half precision while saving."""

    def create_local_plan(self) -> dcp.SavePlan:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def transform_object(self, write_item: dcp.WriteItem, object: Any) -> Any:
        found = super().transform_object(write_item, object)
        return found if isinstance(found, io.BytesIO) else found.half()


def test_a_planner_may_change_what_is_written(tmp_path: Path) -> None:
    dcp.save(small(1.5), checkpoint_id=tmp_path, planner=HalfPlanner())
    with shardpoint.open(tmp_path) as checkpoint:
        assert checkpoint["a"].dtype == "float16"
        assert checkpoint["b.c"].tolist() == [1.5] * 5
        assert checkpoint["b.n"] == 1.5


class RenamingPlanner(dcp.DefaultSavePlanner):
    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        renamed = {f"old.{key}": value for key, value in state_dict.items()}
        super().set_up_planner(renamed, storage_meta, is_coordinator)


def test_a_planner_may_rename(tmp_path: Path) -> None:
    dcp.save(small(), checkpoint_id=tmp_path, planner=RenamingPlanner())
    assert set(shardpoint.open(tmp_path).keys()) == {"old.a", "old.b.c", "old.b.n"}


class LyingPlanner(dcp.DefaultSavePlanner):
    def transform_object(self, write_item: dcp.WriteItem, object: Any) -> Any:
        found = super().transform_object(write_item, object)
        return found if isinstance(found, io.BytesIO) else found[:1]


def test_data_that_the_plan_did_not_announce_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(dcp.CheckpointException, match=r"resolve_data\s+gave"):
        dcp.save(small(), checkpoint_id=tmp_path, planner=LyingPlanner())
    assert list(tmp_path.iterdir()) == []


def test_tensors_on_the_meta_device_get_memory(tmp_path: Path) -> None:
    dcp.save(small(3.0), checkpoint_id=tmp_path)
    with torch.device("meta"):
        target = {"a": torch.empty(3, 4), "b": {"c": torch.empty(5), "n": 0}}
    dcp.load(target, checkpoint_id=tmp_path)
    assert differences(target, small(3.0)) == []


@pytest.mark.parametrize("kind", ["plain", "objects"])
def test_memory_that_cannot_be_used_directly_goes_through_a_buffer(
    tmp_path: Path, kind: str
) -> None:
    """The way of tensors on an accelerator: no access to their memory from the host."""
    state = build(kind)
    hidden = {value.data_ptr() for value in _tensors(state)} - {0}

    def only_copies(tensor: torch.Tensor) -> Any:
        return None if tensor.data_ptr() in hidden else original(tensor)

    original = _records.host_memory
    with (
        patch.object(_records, "host_memory", only_copies),
        patch.object(torch.Tensor, "cpu", lambda self: self.clone()),
    ):
        dcp.save(state, checkpoint_id=tmp_path)
    target = blank(kind)
    hidden = {value.data_ptr() for value in _tensors(target)} - {0}
    with patch.object(_reading, "host_memory", only_copies):
        dcp.load(target, checkpoint_id=tmp_path)
    assert differences(target, build(kind)) == []


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list) else []


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    state = {"sparse": torch.eye(3).to_sparse(), "fine": torch.ones(2)}
    with pytest.raises(dcp.CheckpointException, match="'sparse'"):
        dcp.save(state, checkpoint_id=tmp_path / "ckpt")
    assert not (tmp_path / "ckpt" / ".metadata").exists()


@pytest.mark.parametrize("count", [10, 100_000])
def test_freed_memory_is_named_and_not_touched(tmp_path: Path, count: int) -> None:
    freed = torch.ones(count)
    freed.untyped_storage().resize_(0)
    with pytest.raises(dcp.CheckpointException, match=r"'freed'.*storage has been freed"):
        dcp.save({"kept": torch.ones(3), "freed": freed}, checkpoint_id=tmp_path)
    dcp.save({"freed": torch.ones(count)}, checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match=r"'freed'.*storage has been freed"):
        dcp.load({"freed": freed}, checkpoint_id=tmp_path)


def test_nothing_to_save_to_or_load_from(tmp_path: Path) -> None:
    with pytest.raises(dcp.CheckpointException, match="checkpoint_id or a storage_writer"):
        dcp.save({})
    with pytest.raises(dcp.CheckpointException, match="checkpoint_id or a storage_reader"):
        dcp.load({})
    with pytest.raises(dcp.CheckpointException, match="no checkpoint at"):
        dcp.load({}, checkpoint_id=tmp_path)


def test_an_empty_state(tmp_path: Path) -> None:
    dcp.save({}, checkpoint_id=tmp_path)
    assert dcp.load({}, checkpoint_id=tmp_path).unexpected == ()


def test_without_flattening_objects_are_loaded_back(tmp_path: Path) -> None:
    state = {"w": torch.ones(3), "nested": {"a": torch.ones(2), "n": 1}, "s": "text"}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    assert dcp.save(state, checkpoint_id=tmp_path, planner=planner).planner_data is None
    target = {"w": torch.zeros(3), "nested": None, "s": ""}
    load_planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(target, checkpoint_id=tmp_path, planner=load_planner)
    assert differences(target, state) == []


def test_loading_everything_into_an_empty_dict(tmp_path: Path) -> None:
    dcp.save(small(4.0), checkpoint_id=tmp_path)
    assert differences(_load_state_dict_from_keys(checkpoint_id=tmp_path), small(4.0)) == []
    part = _load_state_dict_from_keys("b", checkpoint_id=tmp_path)
    assert differences(part, {"b": small(4.0)["b"]}) == []


class StatefulDict(dict[str, Any]):
    """A `Stateful` that is a dict as well."""

    def state_dict(self) -> dict[str, Any]:
        return {"x": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.update(state_dict)


def test_a_stateful_may_be_a_container_too(tmp_path: Path) -> None:
    dcp.save({"s": StatefulDict()}, checkpoint_id=tmp_path)
    assert list(shardpoint.open(tmp_path).keys()) == ["s.x"]
    loaded = StatefulDict()
    dcp.load({"s": loaded}, checkpoint_id=tmp_path)
    assert loaded == {"x": 1}


def test_autograd_sees_that_a_tensor_was_loaded_into(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    dcp.save({"w": torch.full((3,), 5.0)}, checkpoint_id=tmp_path)
    loss = (weight * weight).sum()
    dcp.load({"w": weight}, checkpoint_id=tmp_path)
    assert weight.tolist() == [5.0] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_expanded_tensors_cannot_be_filled(tmp_path: Path) -> None:
    dcp.save({"t": torch.arange(6).view(2, 3)}, checkpoint_id=tmp_path)
    target = {"t": torch.zeros(2, 1, dtype=torch.int64).expand(2, 3)}
    with pytest.raises(dcp.CheckpointException, match="expanded"):
        dcp.load(target, checkpoint_id=tmp_path)


def test_a_refused_object_is_found_before_tensors_change(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2), "config": Config(3)}, checkpoint_id=tmp_path)
    target = {"a": torch.zeros(2), "config": None}
    with pytest.raises(dcp.CheckpointException, match="Config"):
        dcp.load(target, checkpoint_id=tmp_path)
    assert target["a"].tolist() == [0, 0]


def test_an_object_replaces_a_tensor(tmp_path: Path) -> None:
    dcp.save({"step": 7}, checkpoint_id=tmp_path)
    target = {"step": torch.tensor(0)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target == {"step": 7}


class ListPlanner(dcp.DefaultSavePlanner):
    """Treats the items of a plan as the list that they are in torch."""

    def create_local_plan(self) -> dcp.SavePlan:
        plan = super().create_local_plan()
        plan.items.sort(key=lambda item: item.index.fqn, reverse=True)
        dropped = plan.items.pop()
        plan.items.append(dropped)
        plan.items[0] = plan.items[0]
        return plan


def test_items_may_be_changed_like_a_list(tmp_path: Path) -> None:
    state = small(2.0)
    dcp.save(state, checkpoint_id=tmp_path, planner=ListPlanner())
    assert list(shardpoint.open(tmp_path).keys()) == ["b.n", "b.c", "a"]


class NotingPlanner(dcp.DefaultSavePlanner):
    """Stores data of its own beside the paths, in the three ways that programs use."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        if self.way == "in place":
            metadata.planner_data["note"] = {"step": 5}
        elif self.way == "list":
            metadata = dataclasses.replace(metadata, planner_data=["of rank 0"])
        else:
            metadata = dataclasses.replace(metadata, planner_data=None)
        return plans, metadata


@pytest.mark.parametrize("way", ["in place", "list", "none"])
def test_planners_may_store_data_of_their_own(tmp_path: Path, way: str) -> None:
    returned = dcp.save(small(), checkpoint_id=tmp_path, planner=NotingPlanner(way))
    stored = torch_dcp.FileSystemReader(tmp_path).read_metadata().planner_data
    ours = dcp.FileSystemReader(tmp_path).read_metadata().planner_data
    assert stored == ours == returned.planner_data
    if way == "in place":
        assert stored["note"] == {"step": 5}
    target = small(0.0)
    dcp.load(target, checkpoint_id=tmp_path)
    assert differences(target, small()) == []


class RenamingReader(dcp.FileSystemReader):
    """Changes the metadata that it has read."""

    def read_metadata(self) -> dcp.Metadata:
        metadata = super().read_metadata()
        entries = metadata.state_dict_metadata
        entries["new"] = entries.pop("a")
        moved = {i: info for i, info in metadata.storage_data.items() if i.fqn == "a"}
        for item, info in moved.items():
            del metadata.storage_data[item]
            metadata.storage_data[dataclasses.replace(item, fqn="new")] = info
        return metadata


def test_a_reader_may_change_the_metadata(tmp_path: Path) -> None:
    dcp.save(small(), checkpoint_id=tmp_path)
    target = {"new": torch.zeros(3, 4)}
    dcp.load(target, storage_reader=RenamingReader(tmp_path))
    assert target["new"].eq(1).all()


@pytest.mark.parametrize("fixture", ["2.13.0/hf_full_w1", "2.13.0/safetensors_fmt_w2"])
def test_looking_at_the_metadata_changes_nothing(fixture: str) -> None:
    class LookingReader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
            metadata = super().read_metadata(*args, **kwargs)
            assert dict(metadata.storage_data)
            assert dict(metadata.state_dict_metadata)
            return metadata

    folder = PUBLIC / fixture / "ckpt"
    state = _load_state_dict_from_keys(storage_reader=LookingReader(folder))
    assert differences(state, _load_state_dict_from_keys(checkpoint_id=folder)) == []


def test_a_wrong_option_is_an_error() -> None:
    with pytest.raises(PlanError, match="on_narrowing"):
        dcp.DefaultLoadPlanner(on_narrowing="rais")  # type: ignore[arg-type]


def test_an_object_that_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    with pytest.raises(dcp.CheckpointException, match="while saving key 'f'"):
        dcp.save({"f": lambda: 1}, checkpoint_id=tmp_path)


class Tiles(torch.Tensor):
    """A tensor subclass whose rows are chunks of their own (torch's checkpointable protocol)."""

    @staticmethod
    def __new__(cls, rows: list[torch.Tensor]) -> Tiles:
        shape = (len(rows), len(rows[0]))
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=rows[0].dtype)
        made.rows = rows
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{function} on tiles")

    def __create_write_items__(self, fqn: str, object: Any) -> list[dcp.WriteItem]:
        size = torch.Size((1, self.shape[1]))
        return [
            torch_planner.WriteItem(
                index=torch_metadata.MetadataIndex(fqn, torch.Size((row, 0))),
                type=torch_planner.WriteItemType.SHARD,
                tensor_data=torch_planner.TensorWriteData(
                    chunk=torch_metadata.ChunkStorageMetadata(torch.Size((row, 0)), size),
                    properties=torch_metadata.TensorProperties(dtype=self.dtype),
                    size=self.shape,
                ),
            )
            for row in range(len(self.rows))
        ]

    def __create_chunk_list__(self) -> list[Any]:
        size = torch.Size((1, self.shape[1]))
        return [
            dcp.ChunkStorageMetadata(torch.Size((row, 0)), size) for row in range(len(self.rows))
        ]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        return self.rows[index.offset[0]].unsqueeze(0)


def test_tensors_that_bring_their_own_chunks(tmp_path: Path) -> None:
    dcp.save({"t": Tiles([torch.ones(3), torch.full((3,), 2.0)])}, checkpoint_id=tmp_path)
    assert shardpoint.open(tmp_path)["t"].tolist() == [[1] * 3, [2] * 3]
    target = Tiles([torch.zeros(3), torch.zeros(3)])
    dcp.load({"t": target}, checkpoint_id=tmp_path)
    assert [row.tolist() for row in target.rows] == [[1] * 3, [2] * 3]


class UnpicklablePlanner(dcp.DefaultSavePlanner):
    """Hands itself something that could not be sent anywhere: alone it need not be."""

    def create_local_plan(self) -> dcp.SavePlan:
        return dataclasses.replace(super().create_local_plan(), usable=lambda: True)


def test_a_process_alone_sends_nothing(tmp_path: Path) -> None:
    dcp.save(small(), checkpoint_id=tmp_path, planner=UnpicklablePlanner())
    assert len(shardpoint.open(tmp_path)) == 3


class ForeignMetadataReader(dcp.FileSystemReader):
    """Brings the metadata from elsewhere."""

    def __init__(self, path: Path, metadata: dcp.Metadata) -> None:
        super().__init__(path)
        self.given = metadata

    def read_metadata(self) -> dcp.Metadata:
        return self.given


def test_a_reader_may_bring_metadata_from_elsewhere(tmp_path: Path) -> None:
    metadata = dcp.save(small(), checkpoint_id=tmp_path)
    target = small(0.0)
    dcp.load(target, storage_reader=ForeignMetadataReader(tmp_path, metadata))
    assert differences(target, small()) == []


def test_saves_and_loads_log_their_times_and_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="shardpoint")
    dcp.save({"a": torch.ones(1000)}, checkpoint_id=tmp_path / "ckpt")
    dcp.load({"a": torch.zeros(1000)}, checkpoint_id=tmp_path / "ckpt")
    saved, loaded = (r.getMessage() for r in caplog.records if r.name.startswith("shardpoint.dcp"))
    assert re.match(r"saved 5\d{3} bytes .*plan [\d.]+ s, write [\d.]+ s, commit [\d.]+ s", saved)
    assert re.match(r"loaded 4000 bytes .*plan [\d.]+ s, read [\d.]+ s", loaded)
