"""Boxes of tensors in files that hold the whole tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpoint.engine import boxes
from shardpoint.engine.boxes import write_box
from shardpoint.errors import StorageError
from shardpoint.storage import LocalStorage, SharedStorage


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    ranges = []
    for size in shape:
        first = draw(st.integers(0, size))
        ranges.append((first, draw(st.integers(first, size))))
    return shape, ranges


@settings(max_examples=60)
@given(case=shapes_and_boxes(), piece=st.sampled_from([4, 1 << 20]), transposed=st.booleans())
def test_a_box_lands_at_its_place(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[tuple[int, ...], list[tuple[int, int]]],
    piece: int,
    transposed: bool,
) -> None:
    shape, ranges = case
    whole = np.arange(int(np.prod(shape)), dtype=np.int16).reshape(shape)
    box = whole[tuple(slice(a, b) for a, b in ranges)]
    given_box = np.asfortranarray(box) if transposed else np.ascontiguousarray(box)
    storage = LocalStorage(tmp_path_factory.mktemp("boxes"))
    nbytes = whole.nbytes
    with storage.create("file", size=nbytes + 6) as created:
        created.write_from(0, [memoryview(b"\xff" * (nbytes + 6))])
    assert isinstance(storage, SharedStorage)
    with pytest.MonkeyPatch.context() as patch, storage.reopen("file") as file:
        patch.setattr(boxes, "_PIECE", piece)
        write_box(file, 3, shape, [a for a, _ in ranges], given_box.reshape(box.shape))
    wanted = np.full(shape, -1, np.int16)
    wanted[tuple(slice(a, b) for a, b in ranges)] = box
    assert storage.read("file") == b"\xff" * 3 + wanted.tobytes() + b"\xff" * 3


def test_reopening_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent"):
        LocalStorage(tmp_path).reopen("absent")
