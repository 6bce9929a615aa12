"""Many rows of opcodes assembled at once are what one after another would be."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.formats._pickle_columns import assemble, integers, looked_up
from shardpoint.formats._pickle_memo import Memo
from shardpoint.formats._pickle_writing import integer, joined_texts, text

EDGES = [sign * (1 << bits) + by for bits in range(64) for sign in (-1, 1) for by in (-1, 0, 1)]
int64s = st.one_of(
    st.sampled_from([value for value in EDGES if -(2**63) <= value < 2**63]),
    st.integers(-(2**63), 2**63 - 1),
)


def test_every_edge_is_the_int_that_is_written_alone() -> None:
    values = sorted({value for value in EDGES if -(2**63) <= value < 2**63})
    data, ends = assemble(b"12345678", [integers(np.array(values, np.int64))], len(values))
    expected = [b"12345678" + integer(value) for value in values]
    assert bytes(data) == b"".join(expected)
    assert ends.tolist() == np.cumsum([len(row) for row in expected]).tolist()


@given(
    st.lists(
        st.tuples(int64s, st.booleans(), st.integers(0, 3), int64s, st.integers(0, 2)), max_size=9
    )
)
def test_rows_of_any_parts_follow_one_another(
    rows: list[tuple[int, bool, int, int, int]],
) -> None:
    short, long = [b"", b"h\x07", b"j\x01\x02\x03\x04", b"("], [b"ub", b"x" * 40, b"y" * 16]
    numbers = np.array([row[0] for row in rows], np.int64)
    shown = np.array([row[1] for row in rows], np.bool_)
    others = np.array([row[3] for row in rows], np.int64)
    parts = [
        integers(numbers, shown),
        b"constant of some length",
        looked_up(short, np.array([row[2] for row in rows], np.int64)),
        integers(others),
        b"e",
        looked_up(long, np.array([row[4] for row in rows], np.int64)),
    ]
    data, _ = assemble(b"start....", parts, len(rows))
    assert bytes(data) == b"".join(
        b"start...."
        + (integer(number) if show else b"")
        + b"constant of some length"
        + short[which]
        + integer(other)
        + b"e"
        + long[end]
        for number, show, which, other, end in rows
    )


def test_short_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="begin with 3 bytes"):
        assemble(b"abc", [], 1)


@pytest.mark.parametrize("longest", [0, 255, 256, 70_000])
def test_many_texts_are_each_as_written_alone(longest: int) -> None:
    values = ["a", "", "\udc80", "\u00e9" * 127, "x" * longest]
    assert joined_texts(values, b"\x940") == b"".join(text(value) + b"\x940" for value in values)


@pytest.mark.parametrize("before", [0, 200, 300])
def test_the_memo_gives_back_what_was_put_in(before: int) -> None:
    output: list[bytes] = []
    memo = Memo(output)
    fetches = {str(number): memo.text(str(number)) for number in range(before)}
    many = [f"key.{number // 2}" for number in range(300)]
    fetches |= {value: memo.texts(many)[value] for value in many}
    fetches["collections.deque"] = memo.name("collections", "deque")
    assert memo.text("key.7") == fetches["key.7"] == memo.texts([])["key.7"]
    data = b"".join([b"\x80\x04(", *output, *fetches.values(), b"t."])
    loaded = pickle.loads(data)
    assert [part if isinstance(part, str) else "collections.deque" for part in loaded] == [*fetches]
