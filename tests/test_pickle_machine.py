"""The pickle machine: the same values as the standard library's, and nothing else."""

from __future__ import annotations

import pickle
import struct
import time
from collections import OrderedDict, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpoint.errors import (
    ForbiddenContentError,
    FormatError,
    LimitExceededError,
    ShardpointError,
)
from shardpoint.formats._pickle_guards import Limits, describe, measure
from shardpoint.formats.pickle_machine import DEFAULT_LIMITS, run_pickle


class RecordingResolver:
    """Knows one name, `good.call`, whose result is its arguments; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_global(self, module: str, name: str) -> Any:
        self.asked.append(f"{module}.{name}")
        if (module, name) == ("good", "call"):
            return "TOKEN"
        raise ForbiddenContentError(f"refused {module}.{name}", qualified_name=f"{module}.{name}")

    def reduce(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        assert function == "TOKEN"
        return ("called", *arguments)

    def new_object(self, cls: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        assert cls == "TOKEN"
        return ["new", arguments, keywords]

    def build(self, instance: Any, state: Any) -> Any:
        instance.append(state)
        return instance

    def persistent_load(self, identifier: Any) -> Any:
        return ("persistent", identifier)


def run(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Any:
    return run_pickle(data, RecordingResolver(), source="here", limits=limits)[0]


keys = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(), st.binary(), st.tuples(st.integers())
)
scalars = st.one_of(keys, st.floats(allow_nan=False))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(keys, inner),
        st.tuples(inner),
        st.tuples(inner, inner),
        st.tuples(inner, inner, inner),
    ),
    max_leaves=30,
)


def same(left: Any, right: Any) -> bool:
    """Equal, and of equal types everywhere (True is no 1)."""
    return repr(left) == repr(right)


@given(value=values, protocol=st.integers(3, 5))
def test_plain_values_come_out_as_they_went_in(value: Any, protocol: int) -> None:
    assert same(run(pickle.dumps(value, protocol)), value)


@given(value=values.filter(lambda v: "b'" not in repr(v) and 'b"' not in repr(v)))
@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_old_protocols_give_the_same_values(value: Any, protocol: int) -> None:
    assert same(run(pickle.dumps(value, protocol)), value)


@given(value=st.frozensets(st.integers()) | st.sets(st.text()))
def test_sets_of_protocol_4(value: Any) -> None:
    assert run(pickle.dumps(value, 4)) == value


def test_pure_python_pickler_and_large_values() -> None:
    value = {"numbers": list(range(5000)), "text": "x" * 100_000, "bytes": b"y" * 70_000}
    assert run(pickle._dumps(value, 4)) == value  # type: ignore[attr-defined]
    assert run(pickle.dumps(bytearray(b"abc"), 5)) == bytearray(b"abc")


def test_shared_parts_stay_shared() -> None:
    part = [1]
    result = run(pickle.dumps([part, part], 4))
    assert result[0] is result[1]


def test_position_after_the_pickle_is_given() -> None:
    first = pickle.dumps({"a": 1}, 2)
    value, position = run_pickle(memoryview(first + b"rest"), RecordingResolver(), source="here")
    assert (value, position) == ({"a": 1}, len(first))


def test_calls_and_instances_go_to_the_resolver() -> None:
    assert run(b"cgood\ncall\n(K\x01K\x02tR.") == ("called", 1, 2)
    assert run(b"\x80\x04\x8c\x04good\x8c\x04call\x93)\x81K\x05b.") == ["new", (), {}, 5]
    assert run(b"\x80\x04\x8c\x04good\x8c\x04call\x93)}X\x01\x00\x00\x00aK\x01s\x92.") == [
        "new",
        (),
        {"a": 1},
    ]
    assert run(b"K\x07Q.") == ("persistent", 7)


def test_steps_taken_together_fill_the_memo_as_single_ones_do() -> None:
    name = b"\x80\x04\x8c\x04good\x8c\x04call\x93\x94"  # memo 0
    call = name + b"K\x01K\x02\x86\x94\x85\x94R\x94"  # memo 1, 2, 3
    assert run(call + b"h\x01h\x02h\x03\x87\x86.") == (
        ("called", (1, 2)),
        ((1, 2), ((1, 2),), ("called", (1, 2))),
    )
    make = name + b")\x81\x94}\x94(K\x01K\x02ub"  # memo 1: instance, 2: its fields
    assert run(make + b"h\x01h\x02\x87.")[2] == {1: 2}
    made, again, fields = run(make + b"h\x01h\x02\x87.")
    assert made is again
    assert made[3] is fields


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"N(S'touch PWNED'\nios\nsystem\n.", "INST"),
        (b"N(cgood\ncall\no.", "OBJ"),
        (b"NPid\n.", "PERSID"),
        (b"N\x82\x01.", "EXT1"),
        (b"N\x83\x01\x00.", "EXT2"),
        (b"N\x84\x01\x00\x00\x00.", "EXT4"),
        (b"N\x97.", "NEXT_BUFFER"),
        (b"N\x98.", "READONLY_BUFFER"),
    ],
)
def test_instructions_that_no_checkpoint_needs_are_refused(data: bytes, name: str) -> None:
    with pytest.raises(ForbiddenContentError, match=rf"here, byte \d+: .*{name}"):
        run(data)


def test_names_are_only_ever_asked_of_the_resolver() -> None:
    resolver = RecordingResolver()
    with pytest.raises(ForbiddenContentError):
        run_pickle(b"\x80\x04\x8c\x02os\x8c\x06system\x93.", resolver, source="here")
    assert resolver.asked == ["os.system"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x8d" + struct.pack("<Q", 1 << 40) + b"abc.",
        b"\x8e" + struct.pack("<Q", 1 << 63) + b"abc.",
        b"\x96" + struct.pack("<Q", 1 << 40) + b"abc.",
        b"X" + struct.pack("<I", 0xFFFFFFFF) + b"abc.",
        b"\x8b" + struct.pack("<I", 0xFFFFFFFF) + b"abc.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
    ],
)
def test_claimed_lengths_are_not_believed(data: bytes) -> None:
    with pytest.raises(FormatError, match="here"):
        run(data)


@pytest.mark.parametrize("data", [b"Nr\xff\xff\xff\x3f.", b"Np1073741823\n.", b"Np-1\n."])
def test_memo_does_not_grow_to_a_claimed_index(data: bytes) -> None:
    with pytest.raises(LimitExceededError, match="memo index"):
        run(data)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda n: b"N" + b"\x85" * n + b".",
        lambda n: b"]" * n + b"a" * (n - 1) + b".",
        lambda n: b"(" * n + b"t" * n + b".",
    ],
)
def test_depth_is_limited(wrap: Any) -> None:
    run(wrap(150))
    with pytest.raises(LimitExceededError, match="nested deeper"):
        run(wrap(100_000))


def test_deep_key_is_refused_before_it_is_hashed() -> None:
    deep = b"N" + b"\x85" * 1_000_000  # hashing this would overflow the C stack
    with pytest.raises(LimitExceededError, match="key"):
        run(b"}" + deep + b"Ns.", Limits(max_depth=None))


def test_doubling_key_is_refused_before_it_is_hashed() -> None:
    doubled = b"N" + b"2\x86" * 60
    started = time.monotonic()
    with pytest.raises(LimitExceededError):
        run(b"}" + doubled + b"Ns.")
    with pytest.raises(LimitExceededError):
        run(b"\x8f(" + doubled + b"\x90.")
    assert time.monotonic() - started < 2


def test_doubling_value_is_refused_without_walking_it() -> None:
    started = time.monotonic()
    with pytest.raises(LimitExceededError, match="written out"):
        run(b"N" + b"2\x86" * 60 + b".")
    assert time.monotonic() - started < 2


def test_value_that_contains_itself_is_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(FormatError, match="contains itself"):
        run(pickle.dumps(cycle, 4))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b".",
        b"K\x01",
        b"h\x05.",
        b"K\x01K\x02.",
        b"(.",
        b"u.",
        b"\x86.",
        b"K\x01K\x02a.",
        b"}K\x01a.",
        b"](K\x01u.",
        b"}(K\x01u.",
        b"}]Ns.",
        b"\x80\x09N.",
        b"X\x02\x00\x00\x00\xff\xff.",
        b"Iabc\n.",
        b"L" + b"9" * 5000 + b"L\n.",
        b"Fx\n.",
        b"S'abc\n.",
        b"g7\n.",
        b"K\x01\x93.",
        b"N\x81.",
        b"NNR.",
        b"K\x01(K\x02\x860t.",
        b"\x8f]\x90.",
        b"\xfe.",
    ],
)
def test_damage_is_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError, match="here"):
        run(data)


_SAMPLE = pickle.dumps(
    {"a": [1, 2.5, "x", None, True, b"y"], "b": ({1, 2}, frozenset({3}), 1 << 70)}, 4
)


@settings(max_examples=300)
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda position, byte: _SAMPLE[:position] + bytes([byte]) + _SAMPLE[position + 1 :],
            st.integers(0, len(_SAMPLE) - 1),
            st.integers(0, 255),
        ),
        st.integers(0, len(_SAMPLE) - 1).map(lambda end: _SAMPLE[:end]),
        st.lists(
            st.sampled_from(b"(]})N.K\x01u\x85\x86\x94h\x00t2a0s1\x8f\x90\x91e"), max_size=40
        ).map(bytes),
    )
)
def test_any_bytes_give_a_value_or_a_format_error(data: bytes) -> None:
    class Refusing(RecordingResolver):
        def reduce(self, function: Any, arguments: tuple[Any, ...]) -> Any:
            raise FormatError("here")

        def new_object(self, cls: Any, arguments: Any, keywords: Any) -> Any:
            raise FormatError("here")

        def build(self, instance: Any, state: Any) -> Any:
            raise FormatError("here")

    try:
        run_pickle(data, Refusing(), source="here")
    except FormatError:
        pass
    except ShardpointError as error:
        pytest.fail(repr(error))


def test_measure_counts_shared_parts_at_every_place() -> None:
    part = list(range(9))
    value = [part] * 10
    measure(value, source="here", limits=Limits(max_values=10 * 10 + 1))
    with pytest.raises(LimitExceededError):
        measure(value, source="here", limits=Limits(max_values=10 * 10 - 1))


def test_measure_looks_into_every_kind_of_container() -> None:
    deep: Any = 0
    for _ in range(60):
        deep = OrderedDict(a=deque([{"b": (deep,)}]))
    with pytest.raises(LimitExceededError):
        measure(deep, source="here", limits=Limits())
    measure(deep, source="here", limits=Limits(max_depth=300))


def test_measure_finds_depth_through_shared_parts() -> None:
    inner: Any = []
    for _ in range(120):
        inner = [inner]
    outer: Any = inner
    for _ in range(120):
        outer = [outer]
    with pytest.raises(LimitExceededError, match="nested deeper"):
        measure([inner, outer], source="here", limits=Limits())


def test_describe_is_short_whatever_it_is_given() -> None:
    assert describe("x" * 10_000).endswith("(10000 characters)")
    assert describe(1 << 100_000) == "a huge int"
    assert describe(7) == "7 (int)"
    assert describe([1, 2]) == "a list"


@pytest.mark.parametrize(
    "data", [b"\x80\x04he.", b"\x80\x02j\x65\x00\x00\x00.", b"\x80\x02g101\n."]
)
def test_a_memo_entry_that_is_missing_is_called_that(data: bytes) -> None:
    with pytest.raises(FormatError, match="memo entry 101, which nothing has set"):
        run(data)
