"""Byte runs of boxes, against numpy's own indexing."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.planning.runs import byte_runs, coalesce


def covered(starts: "np.ndarray[tuple[int], np.dtype[np.int64]]", lengths: object) -> set[int]:
    spans = zip(starts.tolist(), np.asarray(lengths).tolist(), strict=True)
    return {byte for start, length in spans for byte in range(start, start + length)}


def bytes_of_box(
    strides: list[int], itemsize: int, offsets: list[int], sizes: list[int]
) -> set[int]:
    """Say which bytes numpy would touch."""
    length = 1 + sum((o + s) * step for o, s, step in zip(offsets, sizes, strides, strict=True))
    positions = np.lib.stride_tricks.as_strided(
        np.arange(length),
        [o + s for o, s in zip(offsets, sizes, strict=True)],
        [step * 8 for step in strides],
    )
    box = positions[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
    return {int(p) * itemsize + byte for p in box.ravel() for byte in range(itemsize)}


@st.composite
def dense_layouts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Shapes with strides of a dense payload: any axis order, some axes expanded."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    strides = [0] * len(shape)
    step = 1
    for axis in draw(st.permutations(range(len(shape)))):
        if draw(st.integers(0, 4)):  # one axis in five has stride 0
            strides[axis] = step
            step *= shape[axis]
    return shape, strides


any_layouts = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), max_size=4).map(
    lambda axes: ([size for size, _ in axes], [stride for _, stride in axes])
)


@given(st.data(), dense_layouts() | any_layouts, st.sampled_from([1, 2, 4, 8, 16]))
def test_runs_are_the_bytes_of_the_box_and_the_fewest(
    data: st.DataObject, layout: tuple[list[int], list[int]], itemsize: int
) -> None:
    shape, strides = layout
    offsets = [data.draw(st.integers(0, size)) for size in shape]
    sizes = [data.draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True)]
    runs = byte_runs(strides, itemsize, offsets, sizes)
    expected = set() if 0 in sizes else bytes_of_box(strides, itemsize, offsets, sizes)
    assert covered(*runs) == expected
    assert (runs.lengths > 0).all()
    assert (runs.starts[1:] > (runs.starts + runs.lengths)[:-1]).all()  # ascending, apart


def test_whole_rows_are_one_run_and_columns_one_for_each_row() -> None:
    assert byte_runs([100, 1], 4, [10, 0], [5, 100])[0].tolist() == [4000]
    runs = byte_runs([100, 1], 4, [10, 20], [3, 7])
    assert runs.starts.tolist() == [4080, 4480, 4880]
    assert runs.lengths.tolist() == [28, 28, 28]


def test_transposed_payload_swaps_rows_and_columns() -> None:
    runs = byte_runs([1, 10], 2, [0, 3], [10, 4])
    assert (runs.starts.tolist(), runs.lengths.tolist()) == ([60], [80])


def test_expanded_axis_costs_nothing() -> None:
    runs = byte_runs([0, 1], 4, [0, 2], [1 << 40, 3])
    assert (runs.starts.tolist(), runs.lengths.tolist()) == ([8], [12])


def test_huge_contiguous_box_allocates_nothing() -> None:
    runs = byte_runs([1 << 40, 1], 1, [0, 0], [1 << 20, 1 << 40])
    assert runs.lengths.tolist() == [1 << 60]


def test_scalar_is_one_item() -> None:
    runs = byte_runs([], 8, [], [])
    assert (runs.starts.tolist(), runs.lengths.tolist()) == ([0], [8])


run_lists = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 12)), max_size=12).map(sorted)


@given(run_lists, st.integers(0, 120))
def test_coalesce_stays_within_budget_and_keeps_every_byte(
    spans: list[tuple[int, int]], budget: int
) -> None:
    starts = np.array([start for start, _ in spans], np.int64)
    lengths = np.array([length for _, length in spans], np.int64)
    runs = coalesce(starts, lengths, gap_budget_bytes=budget)
    wanted, read = covered(starts, lengths), covered(*runs)
    assert wanted <= read
    assert len(read) - len(wanted) <= budget
    gaps = (runs.starts[1:] - (runs.starts + runs.lengths)[:-1]).tolist()
    assert all(gap > 0 for gap in gaps)
    # No gap that is left would have fitted into what is left of the budget.
    assert all(gap > budget - (len(read) - len(wanted)) for gap in gaps)


def test_coalesce_bridges_the_smallest_gaps() -> None:
    starts, lengths = np.array([0, 20, 25, 60]), np.array([10, 4, 10, 10])
    # The gaps are 10, 1 and 25 bytes.
    assert coalesce(starts, lengths, gap_budget_bytes=10).starts.tolist() == [0, 20, 60]
    assert coalesce(starts, lengths, gap_budget_bytes=11).starts.tolist() == [0, 60]
    assert coalesce(starts, lengths, gap_budget_bytes=36).lengths.tolist() == [70]


@pytest.mark.parametrize("budget", [0, 100])
def test_coalesce_of_nothing_is_nothing(budget: int) -> None:
    none = np.zeros(0, np.int64)
    assert len(coalesce(none, none, gap_budget_bytes=budget).starts) == 0


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3))
def test_whole_dense_payload_is_one_run(shape: list[int], itemsize: int) -> None:
    strides = (np.array(np.empty(shape, np.int8).strides)).tolist()
    runs = byte_runs(strides, itemsize, [0] * len(shape), shape)
    assert runs.lengths.tolist() == [math.prod(shape) * itemsize]
