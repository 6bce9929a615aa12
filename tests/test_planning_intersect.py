"""The join of boxes, against looking at every pair."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpoint.errors import PlanError
from shardpoint.planning import _join, _sweep
from shardpoint.planning._join import Boxes, overlapping_pairs
from shardpoint.planning.intersect import intersect

Int64Array = npt.NDArray[np.int64]
Columns = tuple[Int64Array, Int64Array, Int64Array]


def grid(shape: tuple[int, ...], parts: tuple[int, ...]) -> tuple[Int64Array, Int64Array]:
    """Cut a tensor into a grid of boxes, as even as integers allow."""
    edges = [np.linspace(0, n, p + 1).astype(np.int64) for n, p in zip(shape, parts, strict=True)]
    begins = np.meshgrid(*[edge[:-1] for edge in edges], indexing="ij")
    sizes = np.meshgrid(*[np.diff(edge) for edge in edges], indexing="ij")
    return np.stack([b.ravel() for b in begins], 1), np.stack([s.ravel() for s in sizes], 1)


def irregular(shape: tuple[int, ...], count: int, seed: int) -> tuple[Int64Array, Int64Array]:
    """Cut a tensor into boxes by random cuts, always of the largest box."""
    generator = np.random.default_rng(seed)
    boxes = [([0] * len(shape), list(shape))]
    while len(boxes) < count:
        position = max(range(len(boxes)), key=lambda i: np.prod(boxes[i][1]))
        offsets, sizes = boxes.pop(position)
        axis = int(generator.choice([a for a, s in enumerate(sizes) if s > 1]))
        cut = int(generator.integers(1, sizes[axis]))
        for shift, size in ((0, cut), (cut, sizes[axis] - cut)):
            moved, resized = list(offsets), list(sizes)
            moved[axis] += shift
            resized[axis] = size
            boxes.append((moved, resized))
    order = generator.permutation(count)
    columns = np.array(boxes, np.int64)[order]
    return columns[:, 0], columns[:, 1]


def brute_force(a: Columns, b: Columns) -> list[tuple[int, int, list[int], list[int]]]:
    low = np.maximum(a[1][:, np.newaxis], b[1])
    size = np.minimum((a[1] + a[2])[:, np.newaxis], b[1] + b[2]) - low
    meet = (a[0][:, np.newaxis] == b[0]) & (size > 0).all(axis=2)
    return [(i, j, low[i, j].tolist(), size[i, j].tolist()) for i, j in np.argwhere(meet).tolist()]


def found(a: Columns, b: Columns) -> list[tuple[int, int, list[int], list[int]]]:
    result = intersect(*a, *b)
    return list(zip(*(column.tolist() for column in result), strict=True))


@st.composite
def columns(draw: st.DrawFn, axes: int, *, most: int = 14) -> Columns:
    count = draw(st.integers(0, most))
    box = st.lists(st.integers(0, 6), min_size=axes, max_size=axes)
    numbers = draw(st.lists(st.tuples(box, box), min_size=count, max_size=count))
    group = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    # Far apart coordinates exercise the ranks that stand in for large numbers.
    scale = draw(st.sampled_from([1, 2**58]))
    boxes = np.array(numbers, np.int64).reshape(count, 2, axes) * scale
    return np.array(group, np.int64), boxes[:, 0], boxes[:, 1]


two_sides = st.integers(0, 3).flatmap(lambda axes: st.tuples(columns(axes), columns(axes)))


@given(two_sides)
def test_intersect_is_what_every_pair_says(sides: tuple[Columns, Columns]) -> None:
    assert found(*sides) == brute_force(*sides)


@given(two_sides)
@settings(max_examples=300)
def test_intersect_cuts_and_blocks_change_nothing(sides: tuple[Columns, Columns]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_join, "_CHEAP", 0.5)  # cut as often as possible
        patch.setattr(_sweep, "_BLOCK", 5)
        assert found(*sides) == brute_force(*sides)


@given(st.integers(0, 3).flatmap(columns))
@settings(max_examples=300)
def test_overlaps_of_a_set_with_itself_come_once(boxes: Columns) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_join, "_CHEAP", 0.5)
        patch.setattr(_sweep, "_BLOCK", 5)
        sides = Boxes(boxes[0], boxes[1], boxes[1] + boxes[2])
        blocks = list(overlapping_pairs(sides, None, closed=None))
    pairs = [pair for a, b in blocks for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert sorted(pairs) == [(a, b) for a, b, *_ in brute_force(boxes, boxes) if a < b]


TILINGS = {
    "rows": grid((4000,), (400,)),
    "grid": grid((300, 300), (20, 19)),
    "cube": grid((40, 40, 40), (8, 7, 8)),
    "irregular": irregular((500, 500), 400, 1),
    "irregular_3d": irregular((60, 60, 60), 400, 2),
}
OTHERS = {
    "rows": grid((4000,), (333,)),
    "grid": irregular((300, 300), 300, 3),
    "cube": grid((40, 40, 40), (5, 9, 9)),
    "irregular": grid((500, 500), (1, 350)),
    "irregular_3d": irregular((60, 60, 60), 300, 4),
}


@pytest.mark.parametrize("name", TILINGS)
def test_two_tilings_of_a_tensor_meet_in_all_of_it(name: str) -> None:
    a, b = (
        (np.zeros(len(offsets), np.int64), offsets, sizes)
        for offsets, sizes in (TILINGS[name], OTHERS[name])
    )
    result = intersect(*a, *b)
    assert np.prod(result.sizes, axis=1).sum() == np.prod(a[2], axis=1).sum()
    assert found(a, b) == brute_force(a, b)


@pytest.mark.parametrize("name", TILINGS)
def test_tiling_has_no_overlap_and_a_moved_box_is_found(name: str) -> None:
    offsets, sizes = TILINGS[name]
    group = np.zeros(len(offsets), np.int64)
    assert not list_pairs(Boxes(group, offsets, offsets + sizes))
    moved = offsets.copy()
    position = int(np.flatnonzero(offsets[:, -1] > 0)[0])
    moved[position, -1] -= 1
    expected = brute_force((group, moved, sizes), (group, moved, sizes))
    assert expected
    assert list_pairs(Boxes(group, moved, moved + sizes)) == [
        (a, b) for a, b, *_ in expected if a < b
    ]


def list_pairs(boxes: Boxes) -> list[tuple[int, int]]:
    blocks = overlapping_pairs(boxes, None, closed=None)
    return sorted(pair for a, b in blocks for pair in zip(a.tolist(), b.tolist(), strict=True))


def test_grid_looks_at_few_more_pairs_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0
    blocks = _sweep._blocks

    def counting(*arguments: object) -> object:
        nonlocal looked_at
        for block in blocks(*arguments):  # type: ignore[arg-type]
            looked_at += len(block[0])
            yield block

    monkeypatch.setattr(_sweep, "_blocks", counting)
    offsets, sizes = grid((128 * 8, 125 * 8), (128, 125))
    list_pairs(Boxes(np.zeros(len(offsets), np.int64), offsets, offsets + sizes))
    assert 16_000 <= looked_at < 16_000 * 40


def test_closed_groups_stop_coming() -> None:
    count = 3000
    group = np.repeat([0, 1], count)
    boxes = Boxes(group, np.zeros((2 * count, 2), np.int64), np.ones((2 * count, 2), np.int64))
    closed = np.zeros(2, np.bool_)
    pairs = np.zeros(2, np.int64)
    for a, _ in overlapping_pairs(boxes, None, closed=closed):
        pairs += np.bincount(group[a], minlength=2)
        closed |= pairs > 0
    assert (pairs > 0).all()
    assert pairs.sum() < 200_000  # of nine million


@pytest.mark.parametrize("block", [1, 3, 7, 64])
def test_groups_after_closed_ones_lose_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sweep, "_BLOCK", block)
    crowd = [(0, 0, 9)] * 20
    last = [(group, start, start + 2) for group in range(1, 9) for start in (0, 1)]
    rows = np.array([*crowd, *last], np.int64)
    boxes = Boxes(rows[:, 0], rows[:, 1:2], rows[:, 2:3])
    closed = np.zeros(9, np.bool_)
    pairs = []
    for a, b in overlapping_pairs(boxes, None, closed=closed):
        pairs += list(zip(a.tolist(), b.tolist(), strict=True))
        closed[boxes.group[a]] = True
    assert [pair for pair in pairs if pair[0] >= 20] == [(20 + 2 * i, 21 + 2 * i) for i in range(8)]


def test_intersect_refuses_negative_and_overflowing_boxes() -> None:
    good = (np.zeros(1, np.int64), np.array([[0]]), np.array([[1]]))
    for offset, size in ((-1, 2), (1, -2), (2**62, 2**62)):
        bad = (np.zeros(1, np.int64), np.array([[offset]]), np.array([[size]]))
        with pytest.raises(PlanError, match="64 bits"):
            intersect(*good, *bad)
        with pytest.raises(PlanError, match="64 bits"):
            intersect(*bad, *good)


def test_coordinates_up_to_the_last_one_work() -> None:
    group = np.array([0, 1], np.int64)
    offsets, sizes = np.array([[2**63 - 2], [0]]), np.array([[1], [2**63 - 1]])
    result = intersect(group, offsets, sizes, np.array([1, 0]), offsets, sizes)
    assert result.a.tolist() == [0, 1]
    assert result.offsets.tolist() == [[2**63 - 2], [2**63 - 2]]
    assert result.sizes.tolist() == [[1], [1]]
