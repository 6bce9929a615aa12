"""What crosses ranks: nothing twice, and the same on both sides."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from shardpoint.coordination._wire import WireReader, WireWriter
from shardpoint.errors import PlanError, RankFailedError, StorageError
from shardpoint.planning.save import WriteColumns, deduplicate, merge, plan_writes
from test_planning_save import an_object, columns, rows_shard, whole

RANKS = 4


def _of_rank(rank: int, *, tensors: int = 50) -> WriteColumns:
    rows = [rows_shard(f"layer.{n}.weight", rank, RANKS, 64, 3) for n in range(tensors)]
    return columns([*rows, whole("scalar"), whole("replica", 300), an_object("step")])


def _same(one: WriteColumns, other: WriteColumns) -> bool:
    arrays = [
        field.name for field in dataclasses.fields(one) if field.name not in ("keys", "_origin")
    ]
    return list(one.keys) == list(other.keys) and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in arrays
    )


def test_columns_arrive_as_they_were_sent_and_alike_ranks_share() -> None:
    sent = [_of_rank(rank) for rank in range(RANKS)]
    reader = WireReader()
    received = [reader.unpack(WireWriter().pack(rows))[0] for rows in sent]
    assert all(map(_same, sent, received))
    assert all(rows.keys is received[0].keys for rows in received)
    assert all(rows.shape is received[0].shape for rows in received)
    again = WireReader().unpack(WireWriter().pack([sent[0], sent[0]]))[0]
    assert again[0] is again[1]


@pytest.mark.parametrize("count", [50, 800])
def test_an_answer_says_only_what_its_receiver_does_not_know(count: int) -> None:
    sent = [_of_rank(rank, tensors=count) for rank in range(RANKS)]
    writers = [WireWriter() for _ in sent]
    payloads = [writer.pack(rows) for writer, rows in zip(writers, sent, strict=True)]
    reader = WireReader()
    unpacked = [reader.unpack(payload) for payload in payloads]
    plan = plan_writes([rows for rows, _ in unpacked], lowest_rank=False, check_coverage=True)
    for rank, (rows, known) in enumerate(unpacked):
        answer = rows.with_hint(plan.hints[rank]).take(plan.kept[rank])
        payload = WireWriter(known).pack([answer, rows])
        assert b"layer." not in payload
        assert len(payload) < 500 + 4 * count
        (mine, whole_rows), _ = WireReader(writers[rank].values).unpack(payload)
        assert whole_rows is sent[rank]
        assert _same(mine, answer)


def test_numbers_of_every_width_arrive() -> None:
    rows = columns([("a", 1, (2**40, 2), (offset, 0), (1, 2)) for offset in (0, 300, 2**17, 2**33)])
    assert _same(rows, WireReader().unpack(WireWriter().pack(rows))[0])
    empty = columns([])
    assert _same(empty, WireReader().unpack(WireWriter().pack(empty))[0])


def test_planning_in_one_pass_is_deduplication_and_merging() -> None:
    ranks = [_of_rank(rank) for rank in range(RANKS)]
    ranks[1], ranks[2] = ranks[2], ranks[1]  # boxes that do not ascend with the ranks
    plan = plan_writes(ranks, lowest_rank=False, check_coverage=True)
    kept = deduplicate(ranks, lowest_rank=False)
    hints, index = merge(
        [rows.take(keep) for rows, keep in zip(ranks, kept, strict=True)], check_coverage=True
    )
    for rank in range(RANKS):
        assert np.array_equal(plan.kept[rank], kept[rank])
        assert np.array_equal(plan.hints[rank][kept[rank]], hints[rank])
    assert sorted(plan.index.tensors.keys) == sorted(index.tensors.keys)
    assert sum(int(keep.sum()) for keep in kept) == RANKS * 50 + 3


def test_what_failed_alike_on_many_ranks_is_said_once() -> None:
    alike = {rank: PlanError("key 'a' is missing") for rank in (*range(512), 600, 601)}
    error = RankFailedError("plan", {**alike, 7: StorageError("no space")})
    assert str(error).splitlines() == [
        "plan failed on ranks 0 to 511, 600, 601",
        "  ranks 0 to 6, 8 to 511, 600, 601: PlanError: key 'a' is missing",
        "  rank 7: StorageError: no space",
    ]
    assert len(error.causes) == 514
