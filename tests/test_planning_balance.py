"""Who keeps a replica."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.planning import balance
from shardpoint.planning.balance import choose_owners, spread_rows

WORLD = 5


@st.composite
def replicas(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Rows of (group, rank, bytes); all copies of a group have the same bytes."""
    rows = []
    for group in range(draw(st.integers(0, 8))):
        nbytes = draw(st.integers(0, 100))
        holders = draw(st.sets(st.integers(0, WORLD - 1), min_size=1))
        rows += [(group, rank, nbytes) for rank in sorted(holders)]
    return draw(st.permutations(rows))


def choose(rows: list[tuple[int, int, int]], *, lowest_rank: bool = False) -> list[bool]:
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    keep: list[bool] = choose_owners(
        columns[0], columns[1], columns[2], WORLD, lowest_rank=lowest_rank
    ).tolist()
    return keep


def kept(rows: list[tuple[int, int, int]], **options: bool) -> set[tuple[int, int, int]]:
    return {row for row, keep in zip(rows, choose(rows, **options), strict=True) if keep}


def loads(rows: set[tuple[int, int, int]]) -> list[int]:
    return [sum(nbytes for _, rank, nbytes in rows if rank == r) for r in range(WORLD)]


@given(replicas(), st.booleans(), st.sampled_from([1, 48]))
def test_each_group_has_one_keeper(
    rows: list[tuple[int, int, int]], lowest: bool, many: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "_MANY", many)  # both ways to find the least loaded rank
        chosen = kept(rows, lowest_rank=lowest)
    assert sorted(group for group, _, _ in chosen) == sorted({group for group, _, _ in rows})


@given(replicas(), st.randoms())
def test_order_of_rows_changes_nothing(rows: list[tuple[int, int, int]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert kept(rows) == kept(shuffled)


@given(replicas())
def test_both_searches_agree(rows: list[tuple[int, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "_MANY", 1)
        other = kept(rows)
    assert kept(rows) == other


@given(replicas())
def test_lowest_rank_keeps(rows: list[tuple[int, int, int]]) -> None:
    for group, rank, _ in kept(rows, lowest_rank=True):
        assert rank == min(r for g, r, _ in rows if g == group)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20))
def test_fully_replicated_state_is_balanced(sizes: list[int]) -> None:
    rows = [(group, rank, n) for group, n in enumerate(sizes) for rank in range(WORLD)]
    found = loads(kept(rows))
    # The rank that ends up fullest was the least loaded before its last piece.
    assert max(found) <= sum(sizes) / WORLD + (1 - 1 / WORLD) * max(sizes)


def test_bytes_that_are_not_replicated_count() -> None:
    rows = [(0, 0, 90), (1, 1, 10), (2, 0, 50), (2, 1, 50), (3, 0, 20), (3, 1, 20)]
    assert kept(rows) == {(0, 0, 90), (1, 1, 10), (2, 1, 50), (3, 1, 20)}


def test_largest_pieces_are_given_out_first() -> None:
    rows = [(group, rank, n) for group, n in enumerate([1, 1, 2]) for rank in (0, 1)]
    assert loads(kept(rows))[:2] == [2, 2]


def test_equal_loads_go_to_the_lowest_rank() -> None:
    assert kept([(7, 3, 8), (7, 1, 8), (7, 2, 8)]) == {(7, 1, 8)}


def test_nothing_is_nothing() -> None:
    assert choose([]) == []


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_files_get_alike_bytes_and_every_row_once(count: int) -> None:
    objects, tensors = np.arange(0, 20, 2), np.arange(1, 20, 2)
    nbytes = np.array([900, 1, 1, 300, 1, 300, 300, 1, 5, 1])
    files = spread_rows(objects, tensors, nbytes, count)
    assert sorted(np.concatenate(files).tolist()) == list(range(20))
    assert len(files) == min(count, len(objects))
    size = dict(zip(tensors.tolist(), nbytes.tolist(), strict=True))
    loads = [sum(size.get(row, 0) for row in rows.tolist()) for rows in files]
    assert max(loads) <= max(900, sum(loads) / count + 300)
    for rows in files:
        odd = rows % 2
        assert (np.diff(odd) >= 0).all()  # objects first


def test_no_rows_make_no_files() -> None:
    nothing = np.zeros(0, np.int64)
    assert spread_rows(nothing, nothing, nothing, 1) == []
    assert spread_rows(nothing, nothing, nothing, 3) == []
