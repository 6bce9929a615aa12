"""Small public pieces of torch's package, beside torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as their_metadata
from torch.distributed.checkpoint import planner_helpers as their_helpers
from torch.distributed.checkpoint import resharding as their_resharding
from torch.distributed.checkpoint import utils as their_utils

import shardpoint.dcp as dcp
from ranks import RankPool
from shardpoint.dcp import checkpointable, metadata, planner_helpers, resharding, utils
from shardpoint.errors import CheckpointKeyError, PlanError


def boxes(extents: tuple[int, ...]) -> st.SearchStrategy[Any]:
    axes = [
        st.integers(0, n - 1).flatmap(lambda o, n=n: st.tuples(st.just(o), st.integers(1, n - o)))
        for n in extents
    ]
    return st.tuples(*axes).map(
        lambda spans: (torch.Size(o for o, _ in spans), torch.Size(n for _, n in spans))
    )


def key_of(item: Any) -> Any:
    return (
        item.type.name,
        (item.dest_index.fqn, item.dest_index.offset, item.dest_index.index),
        tuple(item.dest_offsets),
        (item.storage_index.fqn, item.storage_index.offset, item.storage_index.index),
        tuple(item.storage_offsets),
        tuple(item.lengths),
    )


def stored(module: Any, chunks: list[Any], size: tuple[int, ...]) -> Any:
    return module.TensorStorageMetadata(
        module.TensorProperties(),
        torch.Size(size),
        [module.ChunkStorageMetadata(*c) for c in chunks],
    )


@given(st.lists(boxes((6, 5)), max_size=5), st.lists(boxes((6, 5)), max_size=3))
def test_read_items_are_those_that_torch_makes(chunks: list[Any], wanted: list[Any]) -> None:
    mine = planner_helpers.create_read_items_for_chunk_list(
        "w", stored(metadata, chunks, (6, 5)), [metadata.ChunkStorageMetadata(*c) for c in wanted]
    )
    torchs = their_helpers.create_read_items_for_chunk_list(
        "w",
        stored(their_metadata, chunks, (6, 5)),
        [their_metadata.ChunkStorageMetadata(*c) for c in wanted],
    )
    assert sorted(map(key_of, mine)) == sorted(map(key_of, torchs))


@given(boxes((6, 5, 2)), boxes((6, 5, 2)))
def test_overlaps_of_two_boxes_are_those_that_torch_finds(first: Any, second: Any) -> None:
    mine = [metadata.ChunkStorageMetadata(*box) for box in (first, second)]
    torchs = [their_metadata.ChunkStorageMetadata(*box) for box in (first, second)]
    touching = resharding._check_shard_metadata_pair_overlap(*mine)
    assert touching == their_resharding._check_shard_metadata_pair_overlap(*torchs)
    if touching:
        assert resharding._shards_get_overlap_region_wrt_saved_tensor(
            *mine
        ) == their_resharding._shards_get_overlap_region_wrt_saved_tensor(*torchs)


def test_items_of_single_values_are_those_that_torch_makes() -> None:
    tensor = torch.zeros(3, 4, requires_grad=True)
    mine = planner_helpers._create_write_item_for_tensor("w", tensor)
    torchs = their_helpers._create_write_item_for_tensor("w", tensor)
    assert mine.type.name == torchs.type.name
    assert vars(mine.tensor_data.chunk) == vars(torchs.tensor_data.chunk)
    assert mine.tensor_data.size == torchs.tensor_data.size
    assert planner_helpers._create_write_item_for_bytesio("o", 3).type.name == "BYTE_IO"
    assert [vars(c) for c in planner_helpers._create_chunk_list(tensor)] == [
        vars(c) for c in their_helpers._create_chunk_list(tensor)
    ]
    objects = planner_helpers._create_read_items("o", metadata.BytesStorageMetadata(), 3)
    their_objects = their_helpers._create_read_items("o", their_metadata.BytesStorageMetadata(), 3)
    assert list(map(key_of, objects)) == list(map(key_of, their_objects))
    with pytest.raises(PlanError, match=r"'w'.*cannot fill a int"):
        planner_helpers._create_read_items("w", stored(metadata, [], (2,)), 3)
    with pytest.raises(PlanError, match="the tensor has 2 axes"):
        planner_helpers.create_read_items_for_chunk_list(
            "w",
            stored(metadata, [(torch.Size([0]), torch.Size([2]))], (2, 2)),
            [],
        )
    nested = {"a": [torch.zeros(2), {"b": (torch.ones(1), 3)}]}
    walked = planner_helpers._iterate_state_dict(nested, None, None, lambda t: t.numel())
    assert walked == {"a": [2, {"b": (1, 3)}]}


def test_values_are_found_by_index() -> None:
    state = {"w": torch.arange(4.0), "n": 7}
    assert utils.find_state_dict_object(state, metadata.MetadataIndex("n")) == 7
    index = metadata.MetadataIndex("w", [0])
    assert utils.find_state_dict_object(state, index) is state["w"]
    assert utils.find_tensor_shard(state["w"], index) is state["w"]
    assert their_utils.find_tensor_shard(state["w"], index) is state["w"]
    with pytest.raises(CheckpointKeyError, match="'missing'"):
        utils.find_state_dict_object(state, metadata.MetadataIndex("missing"))


def test_the_protocol_is_checked_at_run_time() -> None:
    class Whole:
        def __create_write_items__(self, fqn: str, object: object) -> list[Any]:
            return []

        def __create_chunk_list__(self) -> list[Any]:
            return []

        def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
            return torch.zeros(1)

    assert isinstance(Whole(), checkpointable.Checkpointable)
    assert not isinstance(torch.zeros(1), checkpointable.Checkpointable)


def _optimizer_states(folder: str) -> tuple[Any, Any]:
    from shardpoint.dcp.sharding_spec import ChunkShardingSpec

    spec = ChunkShardingSpec(0, ["rank:0/cpu", "rank:1/cpu"])
    model = {"w": spec.shard(torch.arange(10.0).reshape(5, 2)), "b": torch.arange(3.0)}
    optimizer = {
        "state": {
            "w": {
                "exp_avg": spec.shard(torch.arange(10.0).reshape(5, 2) * 2),
                "step": torch.tensor(4.0),
            },
            "b": {"exp_avg": torch.arange(3.0) * 5, "step": torch.tensor(4.0)},
        },
        "param_groups": [{"lr": 0.1, "params": ["w", "b"]}],
    }
    dcp.save({"model": model, "optim": optimizer}, checkpoint_id=folder)
    mine = dcp.load_sharded_optimizer_state_dict(model, "optim", dcp.FileSystemReader(folder))
    torchs = torch_dcp.load_sharded_optimizer_state_dict(
        model, "optim", torch_dcp.FileSystemReader(folder)
    )
    with pytest.raises(CheckpointKeyError, match="'optimizer'"):
        dcp.load_sharded_optimizer_state_dict(model, "optimizer", dcp.FileSystemReader(folder))
    dist.barrier()
    return _plain(mine), _plain(torchs)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if hasattr(value, "local_shards"):
        return [(str(shard.metadata), shard.tensor.tolist()) for shard in value.local_shards()]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_sharded_optimizer_states_load_as_with_torch(pool: RankPool, tmp_path: Any) -> None:
    for mine, torchs in pool.run(2, _optimizer_states, str(tmp_path / "c")):
        assert mine == torchs
        assert mine["optim"]["param_groups"] == [{"lr": 0.1, "params": ["w", "b"]}]
