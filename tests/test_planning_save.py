"""The coordinator's planning, at sizes no test could start processes for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.dtypes import BY_NAME
from shardpoint.errors import PlanError
from shardpoint.index import NO_FILE
from shardpoint.planning.placing import Written, attach_storage
from shardpoint.planning.save import (
    OBJECT,
    SHARD,
    TENSOR,
    WriteColumns,
    deduplicate,
    merge,
)

Row = tuple[str, int, Sequence[int], Sequence[int], Sequence[int]]


def columns(rows: Sequence[Row], dtype: str = "float32") -> WriteColumns:
    """Rows of (key, kind, shape, offsets, sizes)."""
    axes = max((len(shape) for _, _, shape, _, _ in rows), default=0)

    def padded(position: int, fill: int) -> np.ndarray:
        table = np.full((len(rows), axes), fill, np.int64)
        for number, row in enumerate(rows):
            table[number, : len(row[position])] = row[position]
        return table

    count = len(rows)
    return WriteColumns(
        keys=[row[0] for row in rows],
        kind=np.array([row[1] for row in rows], np.uint8),
        dtype=np.array([0 if row[1] == OBJECT else BY_NAME[dtype].code for row in rows], np.uint8),
        ndim=np.array([len(row[2]) for row in rows], np.int16),
        shape=padded(2, 1),
        offsets=padded(3, 0),
        sizes=padded(4, 1),
        requires_grad=np.zeros(count, np.bool_),
        pin_memory=np.zeros(count, np.bool_),
        memory_format=np.zeros(count, np.uint8),
        hint=np.full(count, -1, np.int64),
    )


def whole(key: str, *shape: int) -> Row:
    return key, TENSOR, shape, (0,) * len(shape), shape


def an_object(key: str) -> Row:
    return key, OBJECT, (), (), ()


def rows_shard(key: str, rank: int, world_size: int, rows: int, width: int) -> Row:
    """The rank's share of torch's Shard(0)."""
    share = -(-rows // world_size)
    start = min(rank * share, rows)
    return key, SHARD, (rows, width), (start, 0), (min(share, rows - start), width)


def test_replicas_are_written_once_and_balanced_by_local_bytes() -> None:
    # rank 0 holds a large shard of its own; the replicas of 100 kB each go elsewhere
    ranks = [
        columns(
            [
                ("big", SHARD, (200_000,), (100_000 * rank,), (100_000,)),
                *(whole(f"r{i}", 25_000) for i in range(4)),
            ]
            if rank < 2
            else [whole(f"r{i}", 25_000) for i in range(4)]
        )
        for rank in range(4)
    ]
    kept = deduplicate(ranks, lowest_rank=False)
    by_rank = [int(rows.nbytes[keep].sum()) for rows, keep in zip(ranks, kept, strict=True)]
    assert by_rank == [400_000, 400_000, 200_000, 200_000]
    lowest = deduplicate(ranks, lowest_rank=True)
    assert [int(keep.sum()) for keep in lowest] == [5, 1, 0, 0]


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), min_size=1, max_size=5),
)
def test_every_chunk_has_one_owner_and_a_place(
    world_size: int, shapes: list[tuple[int, int]]
) -> None:
    ranks = [
        columns(
            [rows_shard(f"t{i}", rank, world_size, *shape) for i, shape in enumerate(shapes)]
            + [an_object("step"), an_object(f"only{rank}"), whole("scalar")]
        )
        for rank in range(world_size)
    ]
    kept = deduplicate(ranks, lowest_rank=False)
    kept_rows = [rows.take(keep) for rows, keep in zip(ranks, kept, strict=True)]
    hints, index = merge(kept_rows, check_coverage=True)
    assert sorted(index.objects.keys) == sorted(["step", *(f"only{r}" for r in range(world_size))])
    for number, (rows, _) in enumerate(shapes):
        row = list(index.tensors.keys).index(f"t{number}")
        span = slice(index.tensors.first_chunk[row], index.tensors.first_chunk[row + 1])
        assert index.chunks.sizes[span, 0].sum() == rows
    written = Written(
        keys=[key for rows in kept_rows for key in rows.keys],
        is_object=np.concatenate([rows.kind == OBJECT for rows in kept_rows]),
        ndim=np.concatenate([rows.ndim for rows in kept_rows]),
        offsets=np.concatenate([rows.offsets for rows in kept_rows]),
        file=[f"__{rank}_0" for rank, rows in enumerate(kept_rows) for _ in rows.keys],
        offset=np.concatenate([np.arange(len(rows)) for rows in kept_rows]),
        length=np.concatenate([np.full(len(rows), 7) for rows in kept_rows]),
        transforms=[() for rows in kept_rows for _ in rows.keys],
    )
    placed = attach_storage(index, written)
    assert (placed.chunks.file != NO_FILE).all()
    assert (placed.objects.file != NO_FILE).all()
    for rank, (rows, hint) in enumerate(zip(kept_rows, hints, strict=True)):
        for position, key in enumerate(rows.keys):
            if rows.kind[position] == OBJECT:
                found = placed.objects.keys.index(key)
                assert placed.files[placed.objects.file[found]] == f"__{rank}_0"
                assert placed.objects.record_offset[found] == position
            else:
                row = list(placed.tensors.keys).index(key)
                chunk = placed.tensors.first_chunk[row] + hint[position]
                assert placed.files[placed.chunks.file[chunk]] == f"__{rank}_0"
                assert placed.chunks.record_offset[chunk] == position
                assert (placed.chunks.offsets[chunk] == rows.offsets[position]).all()


def test_ranks_that_disagree_are_all_named() -> None:
    ranks = [
        columns([whole("a", 2), whole("b", 2), an_object("c"), whole("d", 2)]),
        columns([whole("a", 3), whole("b", 2), whole("c", 1), whole("d", 2)]),
    ]
    with pytest.raises(PlanError) as caught:
        deduplicate(ranks, lowest_rank=False)
    assert [problem.key for problem in caught.value.problems] == ["a", "c"]
    assert "shape (2,) on rank 0" in str(caught.value)
    assert "shape (3,) on rank 1" in str(caught.value)
    assert "an object on rank 0" in str(caught.value)


def test_overlaps_and_gaps_are_named() -> None:
    overlapping = [
        columns([("t", SHARD, (4,), (0,), (3,))]),
        columns([("t", SHARD, (4,), (2,), (2,))]),
    ]
    with pytest.raises(PlanError, match="overlap"):
        merge(overlapping, check_coverage=True)
    hole = [columns([("t", SHARD, (4,), (0,), (2,))])]
    with pytest.raises(PlanError, match="'t'"):
        merge(hole, check_coverage=True)
    merge(hole, check_coverage=False)
    with pytest.raises(PlanError, match=r"its chunks are on ranks 0, 2 of 3"):
        merge([*hole, columns([whole("u", 1)]), *overlapping[:1]], check_coverage=True)


def test_what_was_not_written_has_no_file() -> None:
    _, index = merge([columns([whole("a", 2), an_object("b")])], check_coverage=True)
    nothing = Written(
        keys=[],
        is_object=np.zeros(0, np.bool_),
        ndim=np.zeros(0, np.int16),
        offsets=np.zeros((0, 0), np.int64),
        file=[],
        offset=np.zeros(0, np.int64),
        length=np.zeros(0, np.int64),
        transforms=[],
    )
    placed = attach_storage(index, nothing)
    assert placed.chunks.file.tolist() == [NO_FILE]
    assert placed.objects.file.tolist() == [NO_FILE]


def test_no_items_at_all() -> None:
    empty = [columns([]), columns([])]
    assert [keep.tolist() for keep in deduplicate(empty, lowest_rank=False)] == [[], []]
    _, index = merge(empty, check_coverage=True)
    assert list(index.key_order) == []
