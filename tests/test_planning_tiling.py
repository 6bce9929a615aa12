"""Proofs that chunks make up a tensor, against looking at every element."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.planning._tiling import is_grid

Box = tuple[tuple[int, int], ...]


def _spans(extent: int) -> st.SearchStrategy[tuple[int, int]]:
    borders = st.tuples(st.integers(0, extent), st.integers(0, extent))
    return borders.map(lambda pair: (min(pair), max(pair)))


@st.composite
def _tensors(draw: st.DrawFn) -> list[tuple[tuple[int, ...], list[Box]]]:
    """Tensors of two axes, cut into grids, of which some have been changed a little."""
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
        cuts = [
            sorted({0, extent, *draw(st.lists(st.integers(0, extent), max_size=2))})
            for extent in shape
        ]
        boxes = list(itertools.product(*(list(itertools.pairwise(edges)) for edges in cuts)))
        if boxes and draw(st.booleans()):
            boxes[draw(st.integers(0, len(boxes) - 1))] = draw(st.tuples(*map(_spans, shape)))
        if draw(st.booleans()):
            boxes = draw(st.permutations(boxes))
        if boxes and draw(st.booleans()):
            boxes.append(draw(st.sampled_from(boxes)))
        tensors.append((shape, boxes))
    return tensors


def _proved(tensors: list[tuple[tuple[int, ...], list[Box]]]) -> list[bool]:
    rows = [(number, box) for number, (_, boxes) in enumerate(tensors) for box in boxes]
    spans = np.array([box for _, box in rows], np.int64).reshape(-1, 2, 2)
    found: list[bool] = is_grid(
        np.array([shape for shape, _ in tensors], np.int64),
        np.array([number for number, _ in rows], np.int64),
        spans[:, :, 0],
        spans[:, :, 1] - spans[:, :, 0],
    ).tolist()
    return found


@given(_tensors())
def test_what_is_proved_covers_every_element_once(
    tensors: list[tuple[tuple[int, ...], list[Box]]],
) -> None:
    for (shape, boxes), proved in zip(tensors, _proved(tensors), strict=True):
        count = np.zeros(shape, np.int64)
        for (top, bottom), (left, right) in boxes:
            count[top:bottom, left:right] += 1
        assert not proved or (count == 1).all()


def test_the_layouts_of_training_are_proved() -> None:
    rows = [((0, 3), (0, 5)), ((3, 6), (0, 5)), ((6, 7), (0, 5)), ((7, 7), (0, 5))]
    columns = [((0, 7), (0, 2)), ((0, 7), (2, 5))]
    grid = [((a, b), (c, d)) for c, d in ((0, 4), (4, 5)) for a, b in ((0, 2), (2, 4), (4, 7))]
    whole = [((0, 7), (0, 5))]
    tensors = [((7, 5), boxes) for boxes in (rows, columns, grid, whole)]
    assert _proved([*tensors, ((0, 5), [])]) == [True] * 5


def test_gaps_overlaps_and_copies_are_not_proved() -> None:
    gap = [((0, 3), (0, 5)), ((4, 7), (0, 5))]
    late = [((1, 7), (0, 5))]
    early = [((0, 6), (0, 5))]
    overlap = [((0, 4), (0, 5)), ((3, 7), (0, 5))]
    twice = [((0, 7), (0, 5))] * 2
    hole = [((0, 3), (0, 2)), ((0, 3), (2, 5)), ((3, 7), (0, 2))]
    # as many boxes as the grid has cells, but one cell twice and another never
    other = [*hole, ((0, 3), (0, 2))]
    wrong = [gap, late, early, overlap, twice, hole, other, []]
    assert _proved([((7, 5), boxes) for boxes in wrong]) == [False] * len(wrong)
