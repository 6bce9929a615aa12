"""Flat keys and nested state: torch's rules, and what no checkpoint may do to us."""

from __future__ import annotations

import collections
import doctest
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixture_support import public_fixtures
from shardpoint import tree
from shardpoint.errors import FormatError, LimitExceededError, PlanError
from shardpoint.tree import MAX_DEPTH, MAX_HOLES, flatten, unflatten


class Tensor:
    """Stands for a tensor; equal to itself only."""


T = Tensor()


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def flatten_24(nested: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return flatten(nested, is_tensor=is_tensor)


def flatten_23(nested: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return flatten(nested, rules="2.3", is_tensor=is_tensor)


class CustomList(list):  # type: ignore[type-arg]
    pass


Pair = collections.namedtuple("Pair", "first second")

EXAMPLES: dict[str, dict[Any, Any]] = {
    "nothing": {},
    "empty containers": {"a": {}, "b": [], "c": (), "d": set()},
    "list of numbers is one value": {"a": [1, 2]},
    "list with a tensor is opened": {"a": [T, 2]},
    "lists open one by one": {"a": [[1, 2], [T], []]},
    "list of dictionaries is opened": {"a": [{"x": 1}, {"y": 2}]},
    "empty dictionary in a list leaves a hole": {"a": [{}, T]},
    "only empty dictionaries": {"a": [{}]},
    "tuples are values": {"a": (T, {"x": T}), "b": [(1, 2), (T,)], "c": Pair(T, 1)},
    "deep lists": {"a": [[[[T]]]], "b": [[[[1]]]]},
    "names become str": {"a": {0: 1, None: T, 1.5: 2, True: 3, (1, 2): 4, b"x": 5}, 7: T},
    "other mappings": {
        "a": collections.OrderedDict(b=1),
        "b": collections.defaultdict(int, {"q": 2}),
        "c": types.MappingProxyType({"q": T}),
        "d": collections.UserDict({"q": T}),
    },
    "other sequences": {"a": CustomList([1]), "b": CustomList([T]), "c": collections.deque([T])},
    "dots in names": {"a.b": {"c.d": 1}, "": {"": T}},
    "mixed": {"a": [1, [2, [T]], [3, 4], {"q": [5]}], "b": {"c": [1, [2, {"d": 3}]]}},
    "optimizer": {
        "param_groups": [{"params": [0, 1], "betas": (0.9, 0.99)}],
        "state": {0: {"m": T}},
    },
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("rules", ["2.4", "2.3"])
def test_same_keys_paths_and_tree_as_torch(
    name: str, rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_with_torch(EXAMPLES[name], rules, monkeypatch)


names = st.one_of(st.text("ab.0", max_size=3), st.integers(0, 2), st.none())
state = st.recursive(
    st.one_of(st.just(T), st.integers(), st.tuples(st.just(T))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=12,
)


@pytest.mark.parametrize("rules", ["2.4", "2.3"])
def test_same_as_torch_for_any_state(rules: Any) -> None:
    pytest.importorskip("torch")

    @settings(max_examples=200, deadline=None)
    @given(st.dictionaries(names, state, max_size=4))
    def check(nested: dict[Any, Any]) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            compare_with_torch(nested, rules, monkeypatch)

    check()


def compare_with_torch(nested: Any, rules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run both on the same state; torch's module variable selects its 2.3 rules."""
    torch = pytest.importorskip("torch")
    from torch.distributed.checkpoint import _nested_dict, _version

    if rules == "2.3":
        monkeypatch.setattr(_version, "_derived_version", "2_3")
    real = torch.zeros(1)
    try:
        expected_flat, expected_paths = _nested_dict.flatten_state_dict(replace(nested, real))
    except ValueError:
        with pytest.raises(PlanError, match="not unique"):
            flatten(nested, rules=rules, is_tensor=is_tensor)
        return
    flat, paths = flatten(nested, rules=rules, is_tensor=is_tensor)
    assert list(flat) == list(expected_flat)
    assert paths == expected_paths
    same(replace(flat, real), expected_flat)
    if not forms_a_tree(list(paths.values())):
        with pytest.raises(FormatError, match="do not form a tree"):
            unflatten(flat, paths)
        return
    expected_tree = _nested_dict.unflatten_state_dict(expected_flat, expected_paths)
    same(replace(unflatten(flat, paths), real), expected_tree)


def forms_a_tree(paths: list[tuple[str | int, ...]]) -> bool:
    """Whether no path goes on from another, and no container has names and positions."""
    children: dict[tuple[str | int, ...], set[type]] = {}
    for path in paths:
        for depth, part in enumerate(path):
            children.setdefault(path[:depth], set()).add(type(part))
    return all(len(kinds) == 1 for kinds in children.values()) and not set(paths) & set(children)


def replace(value: Any, tensor: Any) -> Any:
    """Copy state with `tensor` in place of every stand-in, keeping container types."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, Pair):
        return Pair(*(replace(item, tensor) for item in value))
    if isinstance(value, collections.defaultdict):
        return collections.defaultdict(
            value.default_factory, {k: replace(v, tensor) for k, v in value.items()}
        )
    if isinstance(value, dict | types.MappingProxyType | collections.UserDict):
        copied = {k: replace(v, tensor) for k, v in value.items()}
        return copied if type(value) is dict else type(value)(copied)  # type: ignore[call-arg]
    if isinstance(value, list | tuple | collections.deque):
        return type(value)(replace(item, tensor) for item in value)  # type: ignore[call-arg]
    return value


def same(found: Any, expected: Any) -> None:
    """Compare containers, with tensors by identity."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for left, right in zip(found, expected, strict=True):
            same(left, right)
    elif "Tensor" in type(expected).__name__:
        assert found is expected
    elif not isinstance(expected, collections.deque | collections.UserDict):
        assert found == expected


def test_rules_of_23_keep_mappings_without_tensors_whole() -> None:
    nested = {
        "extra": {"lr": 0.1, "names": ["a", {"b": 1}]},
        "empty": {},
        "model": {"w": T, "n": {}},
    }
    flat, paths = flatten_23(nested)
    assert flat == {"extra": nested["extra"], "empty": {}, "model.w": T, "model.n": {}}
    assert paths["model.n"] == ("model", "n")
    assert list(flatten_24(nested)[0]) == [
        "extra.lr",
        "extra.names.0",
        "extra.names.1.b",
        "model.w",
    ]


def test_arrays_are_tensors_by_default() -> None:
    array = np.zeros(2)
    assert list(flatten({"a": [array, 1]})[0]) == ["a.0", "a.1"]
    assert list(flatten({"a": [1, 2]})[0]) == ["a"]


def test_roots_that_are_no_mapping() -> None:
    assert flatten([1, {"a": 2}]) == ({"0": 1, "1.a": 2}, {"0": (0,), "1.a": (1, "a")})
    assert unflatten(*flatten([1, {"a": 2}])) == [1, {"a": 2}]
    assert flatten(3) == ({"": 3}, {"": ()})
    assert unflatten(*flatten(3)) == 3


def test_every_key_that_is_not_unique_is_named() -> None:
    with pytest.raises(PlanError) as caught:
        flatten({"a.b": 1, "a": {"b": 2, "c": 3}, "a.c": 4})
    assert [problem.key for problem in caught.value.problems] == ["a.b", "a.c"]
    assert "('a', 'b')" in str(caught.value)


def test_a_container_that_holds_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = [loop]
    with pytest.raises(PlanError, match="holds itself"):
        flatten(loop)


def test_depth_is_limited_and_the_limit_itself_works() -> None:
    nested: Any = 1
    for _ in range(MAX_DEPTH):
        nested = {"a": nested}
    assert unflatten(*flatten(nested)) == nested
    with pytest.raises(LimitExceededError, match="deeper"):
        flatten({"a": nested})


def test_depth_is_limited_through_shared_containers() -> None:
    low: Any = {"t": T}
    for _ in range(MAX_DEPTH - 10):
        low = {"a": low}
    high: Any = low
    for _ in range(20):
        high = {"a": high}
    with pytest.raises(LimitExceededError, match="deeper"):
        flatten_24({"first": low, "then": high})


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_exponentially_many_ways_are_refused_at_once(kind: str) -> None:
    nested: Any = {"t": T}
    for _ in range(100):
        nested = {"a": nested, "b": nested} if kind == "dict" else [nested, nested]
    with pytest.raises(LimitExceededError, match="nodes"):
        flatten_24({"root": nested})


def test_shared_lists_without_tensors_are_looked_at_once() -> None:
    nested: Any = [1]
    for _ in range(100):
        nested = [nested, nested]
    flat, _ = flatten_24({"root": nested})
    assert flat["root"] is nested


def test_a_part_of_the_keys_leaves_none_in_lists() -> None:
    paths = {"a.0": ("a", 0), "a.2.x": ("a", 2, "x"), "b": ("b",)}
    assert unflatten({"a.2.x": 1}, paths) == {"a": [None, None, {"x": 1}]}
    assert unflatten({}, paths) == {}


def test_huge_positions_are_refused_without_allocating() -> None:
    with pytest.raises(LimitExceededError, match=str(1 << 40)):
        unflatten({"a": 1}, {"a": ("a", 1 << 40)})
    with pytest.raises(LimitExceededError, match="key 'far'"):
        unflatten({"near": 1, "far": 2}, {"near": ("a", 0), "far": ("a", 1 << 40, "x")})
    with pytest.raises(FormatError, match="64 bits"):
        unflatten({"a": 1}, {"a": ("a", 10**5000)})
    many = {f"{i}": (str(i), MAX_HOLES // 2) for i in range(3)}
    with pytest.raises(LimitExceededError):
        unflatten(dict.fromkeys(many), many)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"x": ("a",), "y": ("a",)}, "another key has its path"),
        ({"x": ("a",), "y": ("a", "b")}, "goes through a value at"),
        ({"x": ("a", "b"), "y": ("a",)}, "other keys go on from its path"),
        ({"x": ("a", 0), "y": ("a", "b")}, "both names and list positions"),
        ({"x": (0,), "y": ("b",)}, "both names and list positions"),
        ({"x": ("a", -1)}, "negative"),
        ({"x": ("a", True)}, "neither str nor int"),
        ({"x": ("a", 1.5)}, "neither str nor int"),
        ({"x": ["a"]}, "not a tuple"),
        ({"x": (), "y": ("a",)}, "empty path"),
        ({"x": ("a",) * (MAX_DEPTH + 1)}, "parts"),
    ],
)
def test_paths_that_form_no_tree_are_refused(paths: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        unflatten(dict.fromkeys(paths, 1), paths)


def test_the_examples_of_the_docstrings_hold() -> None:
    done = doctest.testmod(tree)
    assert done.attempted > 0
    assert done.failed == 0


def test_a_key_without_a_path_is_refused() -> None:
    with pytest.raises(FormatError, match=r"'y'.*no path"):
        unflatten({"x": 1, "y": 2}, {"x": ("x",)})


def test_values_that_are_containers_stay_what_they_are() -> None:
    value = {"inner": [1]}
    rebuilt = unflatten({"a.b": value}, {"a.b": ("a", "b")})
    assert rebuilt == {"a": {"b": {"inner": [1]}}}
    assert rebuilt["a"]["b"] is value


FLATTENED = [f for f in public_fixtures() if f.is_dcp and not f.planner_data_is_none]


@pytest.mark.parametrize("fixture", FLATTENED, ids=str)
def test_paths_of_real_checkpoints_form_a_tree_that_flattens_to_the_same_keys(fixture: Any) -> None:
    paths = {
        key: tuple(entry["path"])
        for kind in ("tensors", "objects")
        for key, entry in fixture.expected[kind].items()
    }
    values = {key: T if key in fixture.expected["tensors"] else ("object", key) for key in paths}
    nested = unflatten(values, paths)
    rules: Any = "2.3" if fixture.release.startswith("2.3") else "2.4"
    flat, flat_paths = flatten(nested, rules=rules, is_tensor=is_tensor)
    missing = {key for key, value in flat.items() if value is None}  # holes of ranks' own keys
    assert {k: v for k, v in flat.items() if k not in missing} == values
    assert {k: v for k, v in flat_paths.items() if k not in missing} == paths
