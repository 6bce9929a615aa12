"""Planners, readers and metadata of a program's own, as programs for torch have them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import default_planner as their_planner
from torch.distributed.checkpoint import filesystem as their_filesystem

import shardpoint.dcp as dcp
from dcp_states import differences
from ranks import RankPool
from shardpoint.dcp import default_planner, filesystem
from shardpoint.dcp.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from shardpoint.dcp.planner import WriteItemType


def state(fill: float = 1.0) -> dict[str, Any]:
    return {"model": {"weight": torch.full((3, 4), fill), "rate": fill}, "step": fill}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("package", [dcp, torch_dcp], ids=["shardpoint", "torch"])
def test_a_planner_may_rename_what_is_described_and_ask_for_what_is_stored(
    tmp_path: Path, package: Any
) -> None:
    class Renaming(package.DefaultLoadPlanner):  # type: ignore[misc]
        def set_up_planner(
            self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
        ) -> None:
            described = metadata.state_dict_metadata
            for key in list(described):
                described[key.replace("model.", "net.")] = described.pop(key)
            super().set_up_planner(state_dict, metadata, is_coordinator)

        def create_local_plan(self) -> Any:
            plan = super().create_local_plan()
            items = []
            for item in plan.items:
                key = item.storage_index.fqn.replace("net.", "model.")
                index = dataclasses.replace(item.storage_index, fqn=key)
                items.append(dataclasses.replace(item, storage_index=index))
            return dataclasses.replace(plan, items=items)

    package.save(state(), checkpoint_id=tmp_path)
    target = {"net": state(0.0)["model"]}
    package.load(target, checkpoint_id=tmp_path, planner=Renaming())
    assert differences(target, {"net": state()["model"]}) == []


class Misleading(dcp.DefaultLoadPlanner):
    """Describes an object under another key, but does not say where that one lies."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        described = metadata.state_dict_metadata
        described["other"] = described.pop("step")
        super().set_up_planner(state_dict, metadata, is_coordinator)


def test_an_object_that_is_only_described_is_an_error(tmp_path: Path) -> None:
    dcp.save(state(), checkpoint_id=tmp_path)
    target = {"other": 5}
    with pytest.raises(dcp.CheckpointException, match="no object 'other'"):
        dcp.load(target, checkpoint_id=tmp_path, planner=Misleading())
    assert target == {"other": 5}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("of", [filesystem, their_filesystem], ids=["shardpoint", "torch"])
def test_a_reader_may_look_at_and_set_its_storage_data(tmp_path: Path, of: Any) -> None:
    package = dcp if of is filesystem else torch_dcp
    package.save(state(1.0), checkpoint_id=tmp_path / "one")
    seen: list[str] = []

    class Exchanging(of.FileSystemReader):  # type: ignore[misc]
        def set_up_storage_reader(self, metadata: Any, is_coordinator: bool, **kwargs: Any) -> None:
            assert self.storage_data == {} or of is filesystem
            super().set_up_storage_reader(metadata, is_coordinator)
            seen.extend(sorted(index.fqn for index in self.storage_data))
            places = {index.fqn: info for index, info in self.storage_data.items()}
            first, second = (places[key] for key in ("first", "second"))
            self.storage_data = {
                index: second if info is first else first
                for index, info in self.storage_data.items()
            }

    pair = {"first": torch.zeros(2), "second": torch.ones(2)}
    package.save(pair, checkpoint_id=tmp_path / "two")
    target = {"first": torch.full((2,), 7.0), "second": torch.full((2,), 7.0)}
    package.load(target, storage_reader=Exchanging(tmp_path / "two"))
    assert seen == ["first", "second"]
    assert differences(target, {"first": torch.ones(2), "second": torch.zeros(2)}) == []


class Counting(dcp.DefaultSavePlanner):
    """Casts, and counts how often it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def transform_object(self, write_item: dcp.WriteItem, object: Any) -> Any:
        self.asked.append(write_item.index.fqn)
        found = super().transform_object(write_item, object)
        return found if write_item.type is WriteItemType.BYTE_IO else found * 2


@pytest.mark.parametrize(
    "options", [{}, {"thread_count": 2}, {"single_file_per_rank": False}], ids=str
)
def test_a_planner_is_asked_for_each_item_once(tmp_path: Path, options: dict[str, Any]) -> None:
    planner = Counting()
    writer = dcp.FileSystemWriter(tmp_path, **options)
    dcp.save(state(), storage_writer=writer, planner=planner)
    assert sorted(planner.asked) == ["model.rate", "model.weight", "step"]
    target = state(0.0)
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["model"]["weight"].eq(2).all()


class Plain(dcp.DefaultSavePlanner):
    """Makes the metadata by hand."""

    def create_global_plan(self, all_plans: list[dcp.SavePlan]) -> Any:
        described: dict[str, Any] = {}
        for item in all_plans[0].items:
            data = item.tensor_data
            described[item.index.fqn] = (
                BytesStorageMetadata()
                if data is None
                else TensorStorageMetadata(data.properties, data.size, [data.chunk])
            )
        return all_plans, Metadata(described)


def test_metadata_made_by_hand_get_an_index_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "shardpoint"):
        dcp.save(state(), checkpoint_id=tmp_path, planner=Plain())
    assert caplog.messages == []


def test_keys_at_the_top_may_be_numbers_and_text(tmp_path: Path) -> None:
    dcp.save({1: torch.ones(2), "a": torch.ones(3), 10: 4}, checkpoint_id=tmp_path)
    target = {"a": torch.zeros(3), 10: 0, 1: torch.zeros(2)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert differences(target, {"a": torch.ones(3), 10: 4, 1: torch.ones(2)}) == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_by_name(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(dcp.CheckpointException, match="key 'pair': a nested tensor"):
        dcp.save({"pair": nested}, checkpoint_id=tmp_path)


def _local_metadata() -> list[Any]:
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])  # type: ignore[list-item]
    values = {"n": 3, "s": sharded_tensor.zeros(spec, 4, 2), "w": torch.ones(2, 3)}
    return [
        (
            list(found.state_dict_metadata),
            [repr(value) for value in found.state_dict_metadata.values()],
            (found.planner_data, found.storage_data, found.storage_meta, found.version),
        )
        for found in (
            module._create_default_local_metadata(dict(values))
            for module in (default_planner, their_planner)
        )
    ]


def test_metadata_of_this_rank_alone_are_those_of_torch(pool: RankPool) -> None:
    for ours, theirs in pool.run(2, _local_metadata):
        assert ours == theirs


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("package", [dcp, torch_dcp], ids=["shardpoint", "torch"])
def test_a_planner_may_fill_two_keys_from_what_is_stored_once(tmp_path: Path, package: Any) -> None:
    class Copying(package.DefaultLoadPlanner):  # type: ignore[misc]
        def create_local_plan(self) -> Any:
            wanted = dict(self.state_dict)
            self.state_dict = {k: v for k, v in wanted.items() if not k.startswith("teacher.")}
            plan = super().create_local_plan()
            self.state_dict = wanted
            items = [
                dataclasses.replace(
                    item,
                    dest_index=dataclasses.replace(
                        item.dest_index, fqn=item.dest_index.fqn.replace("model.", "teacher.")
                    ),
                )
                for item in plan.items
                if item.dest_index.fqn.startswith("model.")
            ]
            return dataclasses.replace(plan, items=[*plan.items, *items])

    package.save(state(3.0), checkpoint_id=tmp_path)
    target = {**state(0.0), "teacher": state(0.0)["model"]}
    package.load(target, checkpoint_id=tmp_path, planner=Copying())
    assert differences(target, {**state(3.0), "teacher": state(3.0)["model"]}) == []
