"""Sharding specs: what torch's do, and what they leave undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._shard import sharding_spec as theirs
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharding_spec import api as their_api

from ranks import RankPool
from shardpoint.dcp import sharding_spec as ours
from shardpoint.errors import NotSupportedError, PlanError

PROPERTIES = TensorProperties()


def places(count: int) -> list[str]:
    return [f"rank:{rank}/cpu" for rank in range(count)]


def shards_of(metadata: Any) -> list[Any]:
    return [(s.shard_offsets, s.shard_sizes, str(s.placement)) for s in metadata.shards_metadata]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=3).flatmap(
        lambda shape: st.tuples(st.just(shape), st.integers(-len(shape), len(shape) - 1))
    ),
    st.integers(1, 6),
)
def test_chunks_are_placed_as_torch_places_them(shape_and_dim: Any, count: int) -> None:
    shape, dim = shape_and_dim
    size = torch.Size(shape)
    mine = ours.ChunkShardingSpec(dim, places(count)).build_metadata(size, PROPERTIES)
    torchs = theirs.ChunkShardingSpec(dim, places(count)).build_metadata(size, PROPERTIES)
    for found, wanted in zip(shards_of(mine), shards_of(torchs), strict=True):
        assert found[1:] == wanted[1:]
        # torch puts pieces without elements past the end of the axis, where its own ShardedTensor
        # then refuses them; here they are at its end
        assert found[0] == [min(o, n) for o, n in zip(wanted[0], shape, strict=True)]
    assert (mine.size, mine.tensor_properties) == (torchs.size, torchs.tensor_properties)


@settings(max_examples=60)
@given(st.data())
def test_inferred_specs_are_those_that_torch_infers(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    kind = data.draw(st.sampled_from(["chunk", "uneven", "grid", "unplaced"]))
    if kind == "uneven":
        lengths = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
        starts = [sum(lengths[:i]) for i in range(count)]
        boxes = [([start, 0], [n, 2]) for start, n in zip(starts, lengths, strict=True)]
    elif kind == "grid":
        boxes = [([i, 2 * j], [1, 2]) for i in range(2) for j in range(count)]
    else:
        length = data.draw(st.integers(1, 3))
        boxes = [([0, length * i], [3, length]) for i in range(count)]
    shards = [
        ours.ShardMetadata(offsets, sizes, None if kind == "unplaced" else f"rank:{rank}/cpu")
        for rank, (offsets, sizes) in enumerate(boxes)
    ]
    shards = data.draw(st.permutations(shards))
    mine = ours._infer_sharding_spec_from_shards_metadata(shards)
    if kind == "uneven":
        # torch 2.13 orders pieces of one offset by chance; what both lay out must be the same
        total = torch.Size((sum(lengths), 2))
        built = mine.build_metadata(total, PROPERTIES).shards_metadata
        assert sorted(map(str, built)) == sorted(map(str, shards))
        return
    if kind == "unplaced":  # torch 2.13 raises a TypeError for several of them
        assert isinstance(mine, ours.EnumerableShardingSpec)
        return
    torchs = theirs._infer_sharding_spec_from_shards_metadata(shards)
    assert type(mine).__name__ == type(torchs).__name__
    if isinstance(mine, ours.ChunkShardingSpec):
        assert (mine.dim, mine.placements) == (torchs.dim, torchs.placements)
    else:
        assert mine.shards == torchs.shards


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: ours.ChunkShardingSpec("N", places(1)), NotSupportedError, "not the name 'N'"),
        (lambda: ours.ChunkShardingSpec(None, places(1)), PlanError, "found None"),
        (lambda: ours.ChunkShardingSpec(1.5, places(1)), PlanError, "found 1.5"),
        (lambda: ours.ChunkShardingSpec(0, ["random:0"]), ValueError, "random:0"),
        (lambda: ours.EnumerableShardingSpec([]), PlanError, "at least one"),
        (
            lambda: ours.ChunkShardingSpec(2, places(1)).build_metadata(
                torch.Size((3, 5)), PROPERTIES
            ),
            PlanError,
            r"\(3, 5\) has no axis 2",
        ),
        (
            lambda: ours.ChunkShardingSpec(0, []).build_metadata(torch.Size((3,)), PROPERTIES),
            PlanError,
            "without placements",
        ),
        (
            lambda: ours.ChunkShardingSpec(0, places(1)).shard(torch.zeros(3)),
            PlanError,
            "init_process_group",
        ),
        (
            lambda: ours.get_chunk_sharding_params(10, 2, ours.ChunkShardingSpec(0, places(2)), 5),
            PlanError,
            "none on rank 5",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_every_overlap_and_gap_is_named() -> None:
    shards = [
        ours.ShardMetadata([0, 0], [3, 5], "rank:0/cpu"),
        ours.ShardMetadata([2, 0], [2, 5], "rank:1/cpu"),
        ours.ShardMetadata([3, 4], [3, 1], "rank:1/cpu"),
    ]
    with pytest.raises(PlanError) as caught:
        ours.EnumerableShardingSpec(shards)
    assert [problem.message for problem in caught.value.problems] == [
        "boxes 0 at [0:3, 0:5] and 1 at [2:4, 0:5] overlap",
        "boxes 1 at [2:4, 0:5] and 2 at [3:6, 4:5] overlap",
    ]
    spec = ours.EnumerableShardingSpec([shards[0], shards[2]])
    with pytest.raises(PlanError) as caught:
        spec.build_metadata(torch.Size((6, 5)), PROPERTIES)
    assert [problem.message for problem in caught.value.problems] == ["no box covers [3:6, 0:4]"]


def test_specs_and_placements_are_kinds_of_torchs() -> None:
    spec = ours.ChunkShardingSpec(0, places(2))
    assert isinstance(spec, theirs.ShardingSpec)
    assert isinstance(spec, ours.ShardingSpec)
    assert spec == ours.ChunkShardingSpec(0, places(2))
    assert str(ours.DevicePlacementSpec("rank:1/cpu").device) == "rank:1/cpu"
    assert isinstance(ours.DevicePlacementSpec("cpu"), theirs.PlacementSpec)
    assert ours.get_split_size(10, 3) == their_api.get_split_size(10, 3) == 4
    assert [ours.get_chunked_dim_size(10, 4, i) for i in range(4)] == [4, 4, 2, 0]
    assert ours.get_chunk_sharding_params(10, 2, spec, 1) == (5, 5)


class OwnSpec(ours.ShardingSpec):
    def build_metadata(self, tensor_sizes: torch.Size, tensor_properties: Any) -> Any:
        return ours.ChunkShardingSpec(0, places(1)).build_metadata(tensor_sizes, tensor_properties)

    def shard(self, tensor: torch.Tensor, src_rank: int = 0, process_group: Any = None) -> Any:
        raise NotImplementedError


def test_custom_operations_are_found_by_kind_of_spec() -> None:
    spec = OwnSpec()
    assert not ours._has_custom_op(spec, torch.add)
    with pytest.raises(NotSupportedError, match=r"add.*OwnSpec"):
        ours._dispatch_custom_op(spec, torch.add, (), (), {}, None)

    @ours.custom_sharding_spec_op(OwnSpec, torch.add)
    def added(types: Any, args: Any, kwargs: Any, process_group: Any) -> Any:
        return types, args, kwargs, process_group

    try:
        assert ours._has_custom_op(spec, torch.add)
        assert their_api._has_custom_op(spec, torch.add)
        found = ours._dispatch_custom_op(spec, torch.add, (int,), (1,), {"x": 2}, None)
        assert found == ((int,), (1,), {"x": 2}, None)
    finally:
        del their_api._CUSTOM_SHARDING_SPEC_OPS["OwnSpec"]


def _sharded(folder: str) -> list[Any]:
    import shardpoint.dcp as dcp

    rank = dist.get_rank()
    whole = torch.arange(35.0).reshape(7, 5)
    mine = whole if rank == 1 else torch.full((7, 5), -1.0)
    chunked = ours.ChunkShardingSpec(1, ["rank:2/cpu", "rank:0/cpu", "rank:1/cpu"])
    tiles = ours.EnumerableShardingSpec(
        [
            ours.ShardMetadata([0, 0], [4, 5], "rank:1/cpu"),
            ours.ShardMetadata([4, 0], [3, 2], "rank:0/cpu"),
            ours.ShardMetadata([4, 2], [3, 3], "rank:0/cpu"),
        ]
    )
    found = []
    for spec in (chunked, tiles):
        tensor = spec.shard(mine.clone().requires_grad_(), src_rank=1)
        assert tensor.sharding_spec() is spec
        for shard in tensor.local_shards():
            assert shard.tensor.requires_grad
            box = tuple(
                slice(o, o + n)
                for o, n in zip(
                    shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True
                )
            )
            assert torch.equal(shard.tensor, whole[box])
        found.append(
            [(s.metadata.shard_offsets, s.metadata.shard_sizes) for s in tensor.local_shards()]
        )
        dcp.save({"w": tensor}, checkpoint_id=f"{folder}/{type(spec).__name__}")
    try:
        ours.ChunkShardingSpec(0, ["rank:7/cpu"]).shard(mine)
    except ValueError as error:
        found.append("7" in str(error))
    return found


def test_both_specs_distribute_a_tensor(pool: RankPool, tmp_path: Any) -> None:
    import shardpoint

    results = pool.run(3, _sharded, str(tmp_path))
    assert results[0] == [[([0, 2], [7, 2])], [([4, 0], [3, 2]), ([4, 2], [3, 3])], True]
    assert results[1] == [[([0, 4], [7, 1])], [([0, 0], [4, 5])], True]
    assert results[2] == [[([0, 0], [7, 2])], [], True]
    layouts = {}
    for name in ("ChunkShardingSpec", "EnumerableShardingSpec"):
        with shardpoint.open(tmp_path / name) as checkpoint:
            assert checkpoint["w"].tolist() == torch.arange(35.0).reshape(7, 5).tolist()
            layouts[name] = str(checkpoint.info("w").layout)
    assert layouts == {
        "ChunkShardingSpec": "Shard(1) over 3",
        "EnumerableShardingSpec": "3 boxes: [4:7, 0:2], [4:7, 2:5], [0:4, 0:5]",
    }
