"""Boxes as values and as columns."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.errors import PlanError
from shardpoint.region import MAX_VOLUME, Region, contains, ends, volumes

INT64 = st.integers(-(2**63), 2**63 - 1)
NUMBER = st.integers(-3, 8) | INT64


def test_region_refuses_different_numbers_of_axes() -> None:
    with pytest.raises(PlanError, match="offsets"):
        Region((0, 1), (2,))


@pytest.mark.parametrize(("offsets", "sizes"), [((-1,), (2,)), ((1,), (-2,))])
def test_region_refuses_negative_numbers(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="negative"):
        Region(offsets, sizes)


def test_region_of_no_axes_is_allowed() -> None:
    assert Region((), ()) == Region((), ())


def test_ends_are_sums() -> None:
    assert ends(np.array([[1, 2]]), np.array([[3, 0]])).tolist() == [[4, 2]]
    assert ends(np.zeros((2, 0), np.int64), np.zeros((2, 0), np.int64)).shape == (2, 0)


@pytest.mark.parametrize(("offset", "size"), [(-1, 5), (5, -1), (2**62, 2**62), (2**63 - 1, 1)])
def test_ends_refuse_what_is_no_box(offset: int, size: int) -> None:
    with pytest.raises(PlanError, match="64 bits"):
        ends(np.array([[0, offset]]), np.array([[1, size]]))


def test_ends_refuse_columns_of_different_shape() -> None:
    with pytest.raises(PlanError, match=r"\(1, 2\)"):
        ends(np.zeros((1, 2), np.int64), np.zeros((2, 2), np.int64))


@given(st.lists(st.tuples(*[st.lists(NUMBER, min_size=2, max_size=2)] * 3), max_size=4))
def test_contains_is_exact_for_any_numbers(rows: list[tuple[list[int], ...]]) -> None:
    rows = [([max(s, 0) for s in shape], offsets, sizes) for shape, offsets, sizes in rows]
    columns = np.array(rows, np.int64).reshape(-1, 3, 2)
    expected = [
        all(o >= 0 and s >= 0 and o + s <= n for n, o, s in zip(*row, strict=True)) for row in rows
    ]
    assert contains(columns[:, 0], columns[:, 1], columns[:, 2]).tolist() == expected


@given(st.lists(st.lists(NUMBER | st.integers(0, 2**31), min_size=3, max_size=3), max_size=4))
def test_volumes_never_overflow(rows: list[list[int]]) -> None:
    found, right = volumes(np.array(rows, np.int64).reshape(-1, 3))
    for row, volume, fits in zip(rows, found.tolist(), right.tolist(), strict=True):
        exact = math.prod(row)
        if min(row) < 0:
            assert not fits
        elif abs(exact - MAX_VOLUME) > 2**20:  # the limit itself is a rounded comparison
            assert fits == (exact < MAX_VOLUME)
        assert volume == (exact if fits else 0)


def test_volumes_of_wrapping_product_do_not_fit() -> None:
    sizes = np.array([[2**60, 16], [2**60, 3], [2**40, 2**40], [2**62, 0], [2**61, 1]])
    found, right = volumes(sizes)
    assert right.tolist() == [False, True, False, True, True]
    assert found.tolist() == [0, 3 * 2**60, 0, 0, 2**61]


def test_volume_of_no_axes_is_one() -> None:
    found, right = volumes(np.zeros((2, 0), np.int64))
    assert found.tolist() == [1, 1]
    assert right.all()
