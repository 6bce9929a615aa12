"""Problems that an index shows, against counting elements one by one."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.dtypes import dtype_named
from shardpoint.errors import Problem
from shardpoint.index import (
    CheckpointIndex,
    ChunkEntry,
    Container,
    ObjectEntry,
    TensorEntry,
    build_index,
)
from shardpoint.planning import _coverage
from shardpoint.planning.validate import find_problems

Box = tuple[tuple[int, ...], tuple[int, ...]]
BYTE = dtype_named("uint8")
FLOAT = dtype_named("float32")


def index_of(
    tensors: dict[str, tuple[tuple[int, ...], list[Box]]],
    objects: tuple[ObjectEntry, ...] = (),
    dtype: Any = BYTE,
    **chunk_fields: Any,
) -> CheckpointIndex:
    fields = {"file": "data", "record_offset": 0, "record_length": 10, **chunk_fields}
    entries = [
        TensorEntry(key, dtype, shape, [ChunkEntry(*box, **fields) for box in boxes])
        for key, (shape, boxes) in tensors.items()
    ]
    return build_index(
        entries,
        objects,
        key_order=[*tensors, *(o.key for o in objects)],
        paths=None,
        storage_meta=None,
        version=None,
        source="dcp",
        metadata_files=[],
    )


def problems_of(shape: tuple[int, ...], boxes: list[Box], **options: Any) -> list[Problem]:
    index = index_of({"key": (shape, boxes)})
    return find_problems(index, rows=None, file_sizes=None, **options)


def texts(problems: list[Problem]) -> str:
    return "\n".join(str(problem) for problem in problems)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """Small tensors with boxes inside: often a tiling, with boxes lost, doubled or added."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1)) if shape else 0
        cut = draw(st.integers(0, sizes[axis])) if shape else 0
        for shift, size in ((0, cut), (cut, sizes[axis] - cut)) if shape else ((0, 0),):
            moved, resized = list(offsets), list(sizes)
            if shape:
                moved[axis] += shift
                resized[axis] = size
            boxes.append((tuple(moved), tuple(resized)))
    if draw(st.booleans()) and boxes:
        boxes.pop(draw(st.integers(0, len(boxes) - 1)))
    if draw(st.booleans()):
        offsets = tuple(draw(st.integers(0, size)) for size in shape)
        sizes = tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
        boxes.append((offsets, sizes))
    return shape, boxes


def coverage(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray[Any, np.dtype[np.int64]]:
    counts = np.zeros(shape, np.int64)
    for offsets, sizes in boxes:
        counts[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    return counts


@given(st.lists(tensors(), min_size=1, max_size=4))
def test_overlaps_and_gaps_are_those_of_counting(
    several: list[tuple[tuple[int, ...], list[Box]]],
) -> None:
    index = index_of({f"k{number}": tensor for number, tensor in enumerate(several)})
    problems = find_problems(index, rows=None, file_sizes=None)
    for number, (shape, boxes) in enumerate(several):
        own = [problem for problem in problems if problem.key == f"k{number}"]
        counts = coverage(shape, boxes)
        assert any("overlap" in p.message for p in own) == bool((counts > 1).any())
        gaps = [p.message for p in own if "no chunk covers" in p.message]
        missing = int((counts == 0).sum())
        assert len(gaps) == bool(missing)
        if missing:
            assert f"covers {missing} of {counts.size} elements" in gaps[0]
        if missing and shape:
            named = gaps[0].split("[")[1].rstrip("]").split(",")
            gap = counts[tuple(slice(*map(int, span.split(":"))) for span in named)]
            assert gap.size
            assert (gap == 0).all()


def test_sound_checkpoint_has_no_problems() -> None:
    halves: list[Box] = [((0, 0), (2, 4)), ((2, 0), (2, 4)), ((4, 0), (0, 4))]
    index = index_of(
        {
            "a": ((4, 4), halves),
            "b": ((), [((), ())]),
            "c": ((0, 3), []),
            "d": ((3,), [((0,), (3,))]),
        },
        (ObjectEntry("o", "data", 0, 10), ObjectEntry("v", None, value=1)),
    )
    assert find_problems(index, rows=None, file_sizes={"data": 10}) == []


def test_index_of_nothing_has_no_problems() -> None:
    assert find_problems(index_of({}), rows=None, file_sizes={}) == []


def test_scalar_that_is_missing_or_doubled() -> None:
    assert "no chunk covers 1 of 1 elements" in texts(problems_of((), []))
    assert "overlap" in texts(problems_of((), [((), ()), ((), ())]))


def test_gap_is_allowed_where_coverage_is_not_asked_for() -> None:
    boxes: list[Box] = [((0,), (2,))]
    assert problems_of((4,), boxes, check_coverage=False) == []
    assert len(problems_of((4,), boxes)) == 1
    assert len(problems_of((4,), [*boxes, *boxes], check_coverage=False)) == 1


@pytest.mark.parametrize(
    "box",
    [
        ((3, 0), (2, 4)),
        ((-1, 0), (2, 4)),
        ((0, 0), (-2, 4)),
        ((0, 5), (0, 0)),
        ((2**62, 0), (2**62, 4)),
        ((0, 0), (2**63 - 1, 4)),
    ],
)
def test_chunk_outside_its_tensor_is_named(box: Box) -> None:
    problems = problems_of((4, 4), [((0, 0), (4, 4)), box])
    assert len(problems) == 1
    assert problems[0].key == "key"
    assert "not inside the tensor's shape (4, 4)" in problems[0].message
    assert f"{box[0][0]}:{box[0][0] + box[1][0]}" in problems[0].message


def test_tensor_with_a_chunk_outside_is_not_searched_for_gaps() -> None:
    assert len(problems_of((4,), [((3,), (2,))])) == 1


def test_padding_is_not_shown() -> None:
    index = index_of(
        {"deep": ((1, 1, 1), [((0, 0, 0), (1, 1, 1))]), "flat": ((4,), [((3,), (2,))])}
    )
    assert "at [3:5] is not inside the tensor's shape (4,)" in texts(
        find_problems(index, rows=None, file_sizes=None)
    )


@pytest.mark.parametrize("shape", [(1 << 60, 3), (1 << 62,), (2**32, 2**32), (2**20,) * 4])
def test_shape_that_no_memory_holds_is_a_problem(shape: tuple[int, ...]) -> None:
    whole: list[Box] = [((0,) * len(shape), shape)]
    index = index_of({"huge": (shape, whole), "fine": ((2,), [((0,), (2,))])}, dtype=FLOAT)
    problems = find_problems(index, rows=None, file_sizes=None)
    assert [p.key for p in problems] == ["huge"]
    assert "bytes or more" in problems[0].message


def test_large_empty_shape_is_fine_and_negative_one_is_not() -> None:
    assert problems_of((2**62, 0, 2**62), []) == []
    assert "negative" in texts(problems_of((4, -1), []))


def test_large_gap_is_counted_without_allocating() -> None:
    shape = (1 << 30, 1 << 30)
    message = texts(problems_of(shape, [((0, 0), (1 << 30, (1 << 30) - 1))]))
    assert f"covers {1 << 30:,} of {1 << 60:,} elements" in message
    assert f"[0:{1 << 30}, {(1 << 30) - 1}:{1 << 30}]" in message


@pytest.mark.parametrize(
    ("boxes", "count", "gap"),
    [
        ([((0, 0), (2, 4)), ((2, 0), (2, 3))], 2, "[2:4, 3:4]"),
        ([((0, 0), (2, 4)), ((2, 1), (2, 3))], 2, "[2:4, 0:1]"),
        ([((0, 0), (1, 3)), ((1, 0), (3, 4))], 1, "[0:1, 3:4]"),
        ([((0, 0), (1, 4)), ((2, 0), (2, 4))], 4, "[1:2, 0:4]"),
        ([((0, 0), (4, 1)), ((0, 2), (4, 2))], 4, "[0:4, 1:2]"),
        ([((0, 0), (3, 3)), ((2, 2), (2, 2))], 4, "[0:2, 3:4]"),
    ],
)
def test_gap_is_named(boxes: list[Box], count: int, gap: str) -> None:
    message = problems_of((4, 4), boxes)[-1].message
    assert f"covers {count} of 16 elements" in message
    assert message.endswith(f"those at {gap}")


def test_bounded_number_of_overlaps_is_named() -> None:
    problems = problems_of((4,), [((0,), (4,))] * 2000)
    assert len(problems) == 4
    assert "there may be more" in problems[-1].message


def test_bounded_number_of_chunks_outside_is_named() -> None:
    problems = problems_of((4,), [((0,), (4,)), *[((9,), (1,))] * 1000])
    assert len(problems) == 4
    assert "and 996 more" in problems[-1].message


def test_gap_under_many_overlapping_chunks_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[Box] = [((0,), (2,)), ((1,), (2,))]
    assert "no chunk covers 1 of 4" in texts(problems_of((4,), boxes))
    monkeypatch.setattr(_coverage, "_MOST_CELLS", 2)
    assert [p.message.split()[-1] for p in problems_of((4,), boxes)] == ["overlap"]


def test_only_the_rows_asked_for_are_looked_at() -> None:
    index = index_of(
        {name: ((4,), [((0,), (3,))]) for name in "abc"},
        (ObjectEntry("o", "data", 5, 6),),
        record_length=11,
    )
    found = find_problems(index, rows=np.array([1]), file_sizes={"data": 10})
    assert {p.key for p in found} == {"b"}
    assert len(found) == 2
    everything = find_problems(index, rows=None, file_sizes={"data": 10})
    assert [p.key for p in everything] == ["a", "a", "b", "b", "c", "c", "o"]


@pytest.mark.parametrize(
    ("offset", "length", "wrong"),
    [
        (0, 100, False),
        (100, 0, False),
        (1, 100, True),
        (101, 0, True),
        (-1, 10, True),
        (0, -5, True),
        (2**63 - 1, 2**63 - 1, True),
    ],
)
def test_records_outside_their_file(offset: int, length: int, wrong: bool) -> None:
    index = index_of(
        {"t": ((2,), [((0,), (2,))])},
        (ObjectEntry("o", "data", offset, length),),
        record_offset=offset,
        record_length=length,
    )
    found = find_problems(index, rows=None, file_sizes={"data": 100})
    assert [(p.key, p.file, p.offset) for p in found] == (
        [("t", "data", offset), ("o", "data", offset)] if wrong else []
    )
    assert find_problems(index, rows=None, file_sizes=None) == []
    if offset >= 0 and length >= 0:
        assert find_problems(index, rows=None, file_sizes={}) == []  # size not known


def test_missing_file_is_one_problem_that_names_it() -> None:
    boxes: list[Box] = [((0,), (2,)), ((2,), (2,))]
    index = index_of({"a": ((4,), boxes), "b": ((4,), boxes)})
    found = find_problems(index, rows=None, file_sizes={"data": None})
    assert [p.file for p in found] == ["data"]
    assert "missing; it should hold 4 chunks, such as one of key 'a'" in found[0].message


def test_missing_file_of_an_object() -> None:
    index = index_of({}, (ObjectEntry("o", "gone", 0, 1),))
    assert "'o'" in texts(find_problems(index, rows=None, file_sizes={"gone": None}))


def test_what_is_stored_nowhere() -> None:
    index = index_of(
        {"t": ((2,), [((0,), (2,)), ((2,), (0,))])}, (ObjectEntry("o", "data", 0, 1),), file=None
    )
    found = find_problems(index, rows=None, file_sizes={"data": 1})
    assert [p.key for p in found] == ["t"]
    assert "nothing says where the chunk at [0:2] is stored" in found[0].message


RAW = {"container": Container.RAW, "record_offset": 8, "record_length": 48, "payload_offset": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"payload_length": 48}, None),
        ({"payload_length": 48, "strides": (1, 3)}, None),
        ({"payload_length": 16, "strides": (0, 1)}, None),
        ({"payload_length": 48, "strides": (8, 1)}, "needs 80 bytes, but its payload has 48"),
        ({"payload_length": 48, "strides": (-4, 1)}, "impossible"),
        ({"payload_length": 48, "strides": (2**62, 2**62)}, "impossible"),
        ({"payload_length": 47}, "needs 48 bytes, but its payload has 47"),
        ({"payload_length": 60}, "payload of the chunk at [0:3, 0:4] ends at byte 68"),
        ({"payload_length": 60, "transforms": ("stream.zstd/1",)}, None),
        ({"payload_length": 48, "payload_offset": -9}, "byte offset -9"),
    ],
)
def test_payloads_that_are_known(fields: dict[str, Any], message: str | None) -> None:
    index = index_of({"t": ((3, 4), [((0, 0), (3, 4))])}, dtype=FLOAT, **{**RAW, **fields})
    found = find_problems(index, rows=None, file_sizes={"data": 60})
    assert [p.key for p in found] == ([] if message is None else ["t"])
    if message is not None:
        assert message in found[0].message
        assert found[0].file == "data"
        assert found[0].offset == fields.get("payload_offset", 8)
