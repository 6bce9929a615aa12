"""Layouts: cutting axes, recognising cuts, and naming what is wrong with them."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.errors import PlanError
from shardpoint.region import Region
from shardpoint.sharding import (
    chunk_length,
    chunk_spans,
    gaps,
    layout_of,
    overlaps,
    split_length,
    tiling_problems,
)


def grid(shape: tuple[int, ...], pieces: tuple[int, ...]) -> list[Region]:
    axes = [chunk_spans(extent, n) for extent, n in zip(shape, pieces, strict=True)]
    return [
        Region(tuple(o for o, _ in spans), tuple(n for _, n in spans))
        for spans in itertools.product(*axes)
    ]


def described(shape: tuple[int, ...], boxes: list[Region]) -> str:
    offsets = np.array([box.offsets for box in boxes], np.int64).reshape(len(boxes), len(shape))
    sizes = np.array([box.sizes for box in boxes], np.int64).reshape(len(boxes), len(shape))
    return str(layout_of(shape, offsets, sizes))


@given(st.integers(0, 40), st.integers(1, 9))
def test_spans_of_an_axis_follow_each_other_to_its_end(extent: int, pieces: int) -> None:
    spans = chunk_spans(extent, pieces)
    assert len(spans) == pieces
    assert [offset for offset, _ in spans] == [sum(n for _, n in spans[:i]) for i in range(pieces)]
    assert sum(n for _, n in spans) == extent
    length = split_length(extent, pieces)
    assert [n for _, n in spans] == [chunk_length(extent, length, i) for i in range(pieces)]


@pytest.mark.parametrize(("extent", "pieces"), [(-1, 2), (4, 0), (4, -3)])
def test_impossible_cuts_are_refused(extent: int, pieces: int) -> None:
    with pytest.raises(PlanError, match=rf"{extent} elements into {pieces} pieces"):
        chunk_spans(extent, pieces)


@pytest.mark.parametrize(
    ("shape", "boxes", "text"),
    [
        ((4, 6), grid((4, 6), (1, 1)), "whole"),
        ((), [Region((), ())], "whole"),
        ((0, 3), [Region((0, 0), (0, 3))], "whole"),
        ((16, 3), grid((16, 3), (8, 1)), "Shard(0) over 8"),
        ((10, 3), grid((10, 3), (4, 1))[::-1], "Shard(0) over 4"),
        ((5, 9), grid((5, 9), (1, 4)), "Shard(1) over 4"),
        ((2, 3), grid((2, 3), (4, 1)), "Shard(0) over 4"),
        ((2, 3), grid((2, 3), (4, 1))[:2], "Shard(0) over 2"),
        ((4, 8), grid((4, 8), (2, 4)), "grid 2 x 4"),
        ((4, 8, 2), grid((4, 8, 2), (2, 1, 2)), "grid 2 x 1 x 2"),
        ((5,), [Region((0,), (1,)), Region((1,), (4,))], "grid 2, uneven"),
        ((5,), [Region((0,), (3,))], "1 box: [0:3]"),
        ((5,), [], "0 boxes"),
        (
            (2, 2),
            [Region((0, 0), (1, 2)), Region((1, 0), (1, 1)), Region((1, 1), (1, 1))],
            "3 boxes: [0:1, 0:2], [1:2, 0:1], [1:2, 1:2]",
        ),
        ((9,), [Region((i,), (1,)) for i in range(0, 9, 2)],
         "5 boxes: [0:1], [2:3], [4:5], [6:7] and 1 more"),
    ],
)  # fmt: skip
def test_layouts_are_recognised(shape: tuple[int, ...], boxes: list[Region], text: str) -> None:
    assert described(shape, boxes) == text


@given(st.data())
def test_every_even_cut_of_one_axis_is_recognised(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    pieces = data.draw(st.integers(2, 12))
    boxes = grid(shape, tuple(pieces if i == axis else 1 for i in range(len(shape))))
    if shape[axis] == 1:
        assert described(shape, boxes).startswith("whole")
    else:
        assert described(shape, data.draw(st.permutations(boxes))) == f"Shard({axis}) over {pieces}"


shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@given(st.data())
def test_overlaps_and_gaps_are_all_found(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    boxes = []
    for _ in range(data.draw(st.integers(0, 6))):
        begins = [data.draw(st.integers(0, extent)) for extent in shape]
        stops = [data.draw(st.integers(b, n)) for b, n in zip(begins, shape, strict=True)]
        sizes = tuple(e - b for b, e in zip(begins, stops, strict=True))
        boxes.append(Region(tuple(begins), sizes))
    cells = [set(_cells(box)) for box in boxes]
    assert overlaps(boxes) == [
        (a, b) for a, b in itertools.combinations(range(len(boxes)), 2) if cells[a] & cells[b]
    ]
    missing = set(itertools.product(*map(range, shape))) - set().union(*cells)
    found = gaps(boxes, shape)
    assert {cell for gap in found for cell in _cells(gap)} == missing
    assert sum(prod(gap.sizes) for gap in found) == len(missing)
    sound = not missing and not overlaps(boxes)
    assert (tiling_problems(boxes, shape) == []) == sound


def _cells(box: Region) -> itertools.product[tuple[int, ...]]:
    return itertools.product(
        *(range(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
    )


def test_problems_name_the_boxes() -> None:
    boxes = [Region((0, 0), (2, 4)), Region((1, 1), (1, 1)), Region((3, 0), (1, 4))]
    assert [str(problem) for problem in tiling_problems(boxes, (4, 4), key="w")] == [
        "key 'w': boxes 0 at [0:2, 0:4] and 1 at [1:2, 1:2] overlap",
        "key 'w': no box covers [2:3, 0:4]",
    ]
    assert [str(problem) for problem in tiling_problems(boxes, (3, 4))] == [
        "box 2 at [3:4, 0:4] is not inside (3, 4)"
    ]
    assert [str(problem) for problem in tiling_problems(boxes, (4,))] == [
        f"box {i} has 2 axes, wanted 1" for i in range(3)
    ]
    assert [str(problem) for problem in tiling_problems([], (4,))] == ["there are no boxes"]
