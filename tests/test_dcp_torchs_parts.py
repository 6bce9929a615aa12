"""Planners and storage that extend torch's own classes, given to `shardpoint.dcp`."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint import planner as torch_planner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.futures import Future

import shardpoint.dcp as dcp
from dcp_states import differences
from ranks import RankPool
from shardpoint.dcp import metadata as our_metadata
from shardpoint.dcp import planner as our_planner
from shardpoint.dcp.state_dict_saver import AsyncCheckpointerType

pytestmark = pytest.mark.filterwarnings(
    r"ignore:.*:UserWarning:torch\..*", "ignore:Detected an existing checkpoint:UserWarning"
)

PACKAGES = {"torch": torch_dcp, "shardpoint": dcp}
MIXES = list(itertools.product(PACKAGES, repeat=2))


def state(factor: float) -> dict[str, Any]:
    return {
        "weight": torch.arange(12.0).view(3, 4) * factor,
        "nested": {"list": [torch.ones(2) * factor, "text"], "number": 3 * factor},
        "object": {"key": (1, 2)},
    }


@pytest.mark.parametrize(("planner", "storage"), MIXES)
def test_save_takes_parts_of_either_package(tmp_path: Path, planner: str, storage: str) -> None:
    for factor in (1, 2):
        metadata = dcp.save(
            state(factor),
            planner=PACKAGES[planner].DefaultSavePlanner(enable_plan_caching=True),
            storage_writer=PACKAGES[storage].FileSystemWriter(tmp_path),
        )
    assert isinstance(metadata, dcp.Metadata)
    assert isinstance(metadata.state_dict_metadata["weight"], dcp.TensorStorageMetadata)
    assert dcp.metadata.MetadataIndex("weight", (0, 0)) in metadata.storage_data
    for package in PACKAGES.values():
        target = state(0)
        package.load(target, checkpoint_id=tmp_path)
        assert differences(target, state(2)) == []


@pytest.mark.parametrize(("planner", "storage"), MIXES)
def test_load_takes_parts_of_either_package(tmp_path: Path, planner: str, storage: str) -> None:
    dcp.save(state(2), checkpoint_id=tmp_path)
    target = state(0)
    dcp.load(
        target,
        planner=PACKAGES[planner].DefaultLoadPlanner(),
        storage_reader=PACKAGES[storage].FileSystemReader(tmp_path),
    )
    assert differences(target, state(2)) == []


def finished(value: Any) -> Any:
    future: Any = Future()
    future.set_result(value)
    return future


def strict_parts(package: ModuleType, metadata: ModuleType, planner: ModuleType) -> dict[str, Any]:
    """Return parts that extend a package's interfaces and demand its classes everywhere."""
    stored: dict[str, Any] = {}

    def check(plan: Any, kind: type, item_kind: type) -> Any:
        assert type(plan) is kind
        assert isinstance(plan.items, list)
        assert all(type(item) is item_kind for item in plan.items)
        assert all(type(item.type).__module__ == planner.__name__ for item in plan.items)
        return plan

    def check_metadata(found: Any) -> None:
        assert type(found) is metadata.Metadata
        for value in found.state_dict_metadata.values():
            assert isinstance(value, metadata.TensorStorageMetadata | metadata.BytesStorageMetadata)
            if isinstance(value, metadata.TensorStorageMetadata):
                assert type(value.properties) is metadata.TensorProperties
                assert {type(chunk) for chunk in value.chunks} == {metadata.ChunkStorageMetadata}

    class Writer(package.StorageWriter):
        def reset(self, checkpoint_id: Any = None) -> None:
            stored.clear()

        def set_up_storage_writer(self, is_coordinator: bool) -> None:  # as in older programs
            assert is_coordinator

        def storage_meta(self) -> Any:
            return metadata.StorageMeta(checkpoint_id="here", save_id="this")

        def prepare_local_plan(self, plan: Any) -> Any:
            check(plan, planner.SavePlan, planner.WriteItem)
            return dataclasses.replace(plan, storage_data={"mark": 1})

        def prepare_global_plan(self, plans: Any) -> Any:
            assert [plan.storage_data for plan in plans] == [{"mark": 1}]
            return plans

        def write_data(self, plan: Any, asked: Any) -> Any:
            check(plan, planner.SavePlan, planner.WriteItem)
            assert plan.storage_data == {"mark": 1}
            results = []
            for item in plan.items:
                data = asked.resolve_data(item)
                if item.type is planner.WriteItemType.BYTE_IO:
                    stored[item.index.fqn] = data.getvalue()
                else:
                    assert tuple(data.shape) == tuple(item.tensor_data.chunk.sizes)
                    stored[item.index.fqn] = data.clone()
                results.append(package.storage.WriteResult(item.index, 1, item.index.fqn))
            return finished(results)

        def finish(self, found: Any, results: Any) -> None:
            check_metadata(found)
            found.storage_data = {one.index: one.storage_data for one in results[0]}
            stored[".metadata"] = found

        @classmethod
        def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
            return True

    class Reader(package.StorageReader):
        def reset(self, checkpoint_id: Any = None) -> None:
            pass

        def read_metadata(self) -> Any:
            return stored[".metadata"]

        def set_up_storage_reader(self, found: Any, is_coordinator: bool) -> None:
            check_metadata(found)
            self.places = found.storage_data

        def prepare_local_plan(self, plan: Any) -> Any:
            return check(plan, planner.LoadPlan, planner.ReadItem)

        def prepare_global_plan(self, plans: Any) -> Any:
            return [check(plan, planner.LoadPlan, planner.ReadItem) for plan in plans]

        def read_data(self, plan: Any, asked: Any) -> Any:
            for item in check(plan, planner.LoadPlan, planner.ReadItem).items:
                value = stored[self.places[item.storage_index]]
                if item.type is planner.LoadItemType.BYTE_IO:
                    asked.load_bytes(item, io.BytesIO(value))
                    continue
                target = asked.resolve_tensor(item)
                target.copy_(value)
                asked.commit_tensor(item, target)
            return finished(None)

        @classmethod
        def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
            return True

    class Save(package.DefaultSavePlanner):
        def set_up_planner(
            self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
        ) -> None:
            assert type(storage_meta) is metadata.StorageMeta
            super().set_up_planner(state_dict, storage_meta, is_coordinator)

        def create_local_plan(self) -> Any:
            return check(super().create_local_plan(), planner.SavePlan, planner.WriteItem)

        def create_global_plan(self, all_plans: Any) -> Any:
            for plan in all_plans:
                check(plan, planner.SavePlan, planner.WriteItem)
            return super().create_global_plan(all_plans)

        def finish_plan(self, new_plan: Any) -> Any:
            return super().finish_plan(check(new_plan, planner.SavePlan, planner.WriteItem))

        def lookup_object(self, index: Any) -> Any:
            assert type(index) is metadata.MetadataIndex
            return super().lookup_object(index)

        def transform_object(self, write_item: Any, object: Any) -> Any:
            assert type(write_item) is planner.WriteItem
            return super().transform_object(write_item, object)

    class Load(package.DefaultLoadPlanner):
        committed = 0

        def set_up_planner(
            self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
        ) -> None:
            check_metadata(metadata)
            super().set_up_planner(state_dict, metadata, is_coordinator)

        def create_global_plan(self, global_plan: Any) -> Any:
            for plan in global_plan:
                check(plan, planner.LoadPlan, planner.ReadItem)
            return super().create_global_plan(global_plan)

        def finish_plan(self, new_plan: Any) -> Any:
            return super().finish_plan(check(new_plan, planner.LoadPlan, planner.ReadItem))

        def load_bytes(self, read_item: Any, value: Any) -> None:
            assert type(read_item) is planner.ReadItem
            super().load_bytes(read_item, value)

        def lookup_tensor(self, index: Any) -> Any:
            assert type(index) is metadata.MetadataIndex
            return super().lookup_tensor(index)

        def commit_tensor(self, read_item: Any, tensor: Any) -> None:
            assert type(read_item) is planner.ReadItem
            self.committed += 1

    return {"Writer": Writer, "Reader": Reader, "Save": Save, "Load": Load}


@pytest.mark.parametrize(("planner", "storage"), MIXES)
def test_each_part_sees_objects_of_its_own_package(planner: str, storage: str) -> None:
    parts = {
        "torch": strict_parts(torch_dcp, torch_metadata, torch_planner),
        "shardpoint": strict_parts(dcp, our_metadata, our_planner),
    }
    writer = parts[storage]["Writer"]()
    dcp.save(state(2), planner=parts[planner]["Save"](), storage_writer=writer)
    target = state(0)
    load = parts[planner]["Load"]()
    dcp.load(target, planner=load, storage_reader=parts[storage]["Reader"]())
    assert differences(target, state(2)) == []
    assert load.committed == 2


@pytest.mark.parametrize("package", PACKAGES)
def test_a_failing_part_of_either_package_is_named(tmp_path: Path, package: str) -> None:
    class Failing(PACKAGES[package].FileSystemReader):  # type: ignore[name-defined,misc]
        def read_data(self, plan: Any, planner: Any) -> Any:
            raise OSError("the cable is out")

    dcp.save(state(2), checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match="the cable is out"):
        dcp.load(state(0), storage_reader=Failing(tmp_path))


def test_torchs_hugging_face_storage_works_with_our_planners(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    dcp.save(tensors, storage_writer=torch_dcp.HuggingFaceStorageWriter(str(tmp_path)))
    target = {key: torch.zeros_like(value) for key, value in tensors.items()}
    dcp.load(target, storage_reader=torch_dcp.HuggingFaceStorageReader(str(tmp_path)))
    assert differences(target, tensors) == []


def _on_two_ranks(folder: str) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(24.0).view(6, 4)

    def sharded(factor: float, axis: int) -> dict[str, Any]:
        split = distribute_tensor(full * factor, mesh, [Shard(axis)])
        return {"split": split, "whole": torch.ones(3) * factor, "number": factor, f"of{rank}": 0}

    for number, names in enumerate(zip(MIXES, reversed(MIXES), strict=True)):
        save, write, load, read = (PACKAGES[name] for pair in names for name in pair)
        place = os.path.join(folder, str(number))
        dcp.save(
            sharded(2.0, 0),
            planner=save.DefaultSavePlanner(),
            storage_writer=write.FileSystemWriter(place),
        )
        target = sharded(0.0, 1)
        dcp.load(
            target,
            planner=load.DefaultLoadPlanner(),
            storage_reader=read.FileSystemReader(place),
        )
        assert differences(target, sharded(2.0, 1)) == [], names
    place = os.path.join(folder, "async")
    writer = torch_dcp.FileSystemWriter(place)
    state_dict = sharded(3.0, 0)
    future: Any = dcp.async_save(
        state_dict, storage_writer=writer, async_checkpointer_type=AsyncCheckpointerType.THREAD
    )
    state_dict["whole"].zero_()
    future.result()
    target = sharded(0.0, 1)
    dcp.load(target, checkpoint_id=place)
    assert differences(target, sharded(3.0, 1)) == []


def test_parts_of_both_packages_work_together_on_two_ranks(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, _on_two_ranks, str(tmp_path))


def test_names_of_either_package_mean_the_same() -> None:
    for kind, torchs in [
        (our_planner.WriteItemType, torch_planner.WriteItemType),
        (our_planner.LoadItemType, torch_planner.LoadItemType),
    ]:
        for name in ("TENSOR", "BYTE_IO"):
            assert kind[name] == torchs[name]
            assert torchs[name] == kind[name]
            assert {kind[name]: 1}[torchs[name]] == 1
        assert kind.TENSOR != torchs.BYTE_IO
        assert torchs.TENSOR != kind.BYTE_IO
    assert our_planner.WriteItemType.TENSOR != torch_planner.LoadItemType.TENSOR
    assert our_planner.WriteItemType.TENSOR != our_planner.LoadItemType.TENSOR
    for arguments in [("key",), ("key", (1, 2))]:
        ours = our_metadata.MetadataIndex(*arguments, index=1)
        torchs_index = torch_metadata.MetadataIndex(*arguments, index=2)
        assert ours == torchs_index
        assert torchs_index == ours
        assert {ours: 1}[torchs_index] == {torchs_index: 1}[ours] == 1
    assert our_metadata.MetadataIndex("key", (1,)) != torch_metadata.MetadataIndex("key", (2,))
    assert our_metadata.MetadataIndex("key") != "key"


class Seeing(dcp.DefaultSavePlanner):
    """A planner of ours that torch's save calls."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        plan.items.sort(key=lambda item: item.index.fqn)
        return plan


def test_our_planners_and_writer_serve_torchs_save_and_load(tmp_path: Path) -> None:
    """And what is written then names no class of ours."""
    for number, given in enumerate(
        [
            {"planner": dcp.DefaultSavePlanner()},
            {"planner": Seeing(flatten_state_dict=True)},
            {"storage_writer": dcp.FileSystemWriter(tmp_path / "2")},
            {"planner": Seeing(), "storage_writer": dcp.FileSystemWriter(tmp_path / "3")},
        ]
    ):
        place = tmp_path / str(number)
        torch_dcp.save(state(2), **given, checkpoint_id=place, no_dist=True)
        assert b"shardpoint" not in (place / ".metadata").read_bytes()
        for planner in (None, dcp.DefaultLoadPlanner()):
            target = state(0)
            torch_dcp.load(target, checkpoint_id=place, planner=planner, no_dist=True)
            assert differences(target, state(2)) == []
        target = state(0)
        dcp.load(target, checkpoint_id=place)
        assert differences(target, state(2)) == []
