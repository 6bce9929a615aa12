"""Nested state to flat keys, and back.

The rules are those of ``torch.distributed.checkpoint``'s default planner, as observed by
running releases 2.3 and 2.13 on many inputs:

* A flat key is the path's parts joined with ``"."``. Dictionary keys become ``str``; list
  positions stay ``int`` in the path, so that a list comes back as a list.
* A list is opened when it holds a tensor (or, from 2.4 on, a mapping) at any depth of
  lists; otherwise it is one value, also when it is empty.
* From 2.4 on every mapping is opened, so an empty one vanishes. In 2.3 a mapping is opened
  only when it holds a tensor at any depth; otherwise it is one value.
* Nothing else is opened: tuples, sets, named tuples and deques are values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from shardpoint.errors import FormatError, LimitExceededError, PlanError, Problem

__all__ = ["MAX_DEPTH", "MAX_HOLES", "MAX_NODES", "Path", "Rules", "flatten", "unflatten"]

Path: TypeAlias = tuple[str | int, ...]
Rules: TypeAlias = Literal["2.3", "2.4"]

MAX_DEPTH = 200
"""Containers inside containers; real state has fewer than ten."""

MAX_NODES = 20_000_000
"""Values and containers met on all ways from the root. A few shared references can make
exponentially many ways, so this is checked before the ways are walked."""

MAX_HOLES = 1_000_000
"""List positions without a value, in all lists of one tree."""

_SHOWN_PROBLEMS = 20


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def flatten(
    nested: Any,
    *,
    rules: Rules = "2.4",
    is_tensor: Callable[[Any], bool] = _is_array,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Turn nested state into flat keys.

    Parameters
    ----------
    nested
        A mapping; a list is accepted as well (its keys are ``"0"``, ``"1"``, ...). Any other
        value is a single leaf with key ``""`` and path ``()``.
    rules
        ``"2.4"``: torch 2.4 and later. ``"2.3"``: torch 2.3.
    is_tensor
        Which values count as tensors for opening lists (and, in 2.3, mappings). It is asked
        about one value of each type, and must not be true for lists and mappings.

    Returns
    -------
    flat, paths
        Values by flat key, and the path of every key; both in the order of the state.

    Raises
    ------
    PlanError
        If two values get the same flat key (all such keys are named), or a container
        holds itself.
    LimitExceededError
        If it is deeper than `MAX_DEPTH` or larger than `MAX_NODES`.

    Examples
    --------
    >>> flat, paths = flatten({"model": {"fc.weight": np.ones(2)}, "steps": [1, 2]})
    >>> list(flat), paths["model.fc.weight"]
    (['model.fc.weight', 'steps'], ('model', 'fc.weight'))
    """
    survey = _Surveyor(rules == "2.4", is_tensor)
    survey.check_root(nested)
    if not isinstance(nested, (Mapping, list)):
        return {"": nested}, {"": ()}
    leaves = _Leaves(survey)
    leaves.collect(nested, (), "")
    if leaves.problems:
        raise PlanError("flat keys of the state are not unique", leaves.problems)
    return leaves.flat, leaves.paths


def unflatten(flat: Mapping[str, Any], paths: Mapping[str, Path]) -> Any:
    """Rebuild nested state from flat keys and their paths.

    Paths of keys that are not in `flat` are ignored, so a part of a checkpoint can be
    rebuilt. A list position without a value becomes None, as in torch: an empty dictionary
    in a list leaves such a hole, and so does a key that was not selected.

    Returns
    -------
    dict, or list where every path begins with a position
        New dictionaries and lists; the values are not copied.

    Raises
    ------
    FormatError
        If a key has no path, a path is not a tuple of str and int, two keys have the same
        path, a path goes through a value, one container has both names and positions, or a
        position is negative. Names every such key (the first 20).
    LimitExceededError
        If there are more than `MAX_HOLES` empty positions (nothing is allocated for them)
        or a path is longer than `MAX_DEPTH`.

    Examples
    --------
    >>> unflatten({"a.0": 1, "a.1.b": 2}, {"a.0": ("a", 0), "a.1.b": ("a", 1, "b")})
    {'a': [1, {'b': 2}]}
    """
    if not flat:
        return {}
    root = _Node()
    problems: list[Problem] = []
    whole: list[Any] = []
    for key, value in flat.items():
        try:
            path = _checked_path(key, paths)
            if path:
                _place(root, path, key, value)
            else:
                whole.append(value)
        except _MisplacedError as misplaced:
            problems.append(Problem(str(misplaced), key))
    if whole and len(flat) > 1:
        problems.append(Problem("a key has the empty path, but it is not the only key"))
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        more = len(problems) - _SHOWN_PROBLEMS
        tail = f"\n  - and {more} more" if more > 0 else ""
        raise FormatError(f"the paths of the keys do not form a tree:\n{lines}{tail}")
    if whole:
        return whole[0]
    _check_holes(root)
    return _build(root)


@dataclass(frozen=True, slots=True)
class _Survey:
    """What is known of one value: whether it makes containers open, its nodes, its height."""

    holds: bool
    nodes: int
    height: int


_TENSOR = _Survey(holds=True, nodes=1, height=0)
_VALUE = _Survey(holds=False, nodes=1, height=0)


class _Surveyor:
    """Looks at every container once, however many references to it there are."""

    def __init__(self, mappings_open: bool, is_tensor: Callable[[Any], bool]) -> None:
        self._mappings_open = mappings_open
        self._is_tensor = is_tensor
        self._known: dict[int, _Survey | None] = {}  # None: being looked at
        self._alive: list[Any] = []  # an id stays taken only while its object lives
        # By type: whether its values are tensors. Containers have no entry.
        self.leaf_types: dict[type, bool] = {}

    def check_root(self, nested: Any) -> None:
        survey = self._look(nested, 0)
        if survey.height > MAX_DEPTH:
            raise LimitExceededError(f"the state is nested deeper than {MAX_DEPTH} containers")
        if survey.nodes > MAX_NODES:
            raise LimitExceededError(
                f"the state has {survey.nodes} nodes (shared containers count for every "
                f"reference), more than {MAX_NODES}"
            )

    def opens(self, value: Any) -> bool:
        """Whether a value that was looked at is a list or mapping that is opened."""
        survey = self._known.get(id(value))
        return survey is not None and survey.holds

    def _look(self, value: Any, level: int) -> _Survey:
        is_mapping = isinstance(value, Mapping)
        if not is_mapping and not isinstance(value, list):
            is_tensor = self.leaf_types.setdefault(type(value), self._is_tensor(value))
            return _TENSOR if is_tensor else _VALUE
        if id(value) in self._known:
            known = self._known[id(value)]
            if known is None:
                raise PlanError("a container in the state holds itself")
            return known
        if level >= MAX_DEPTH:
            raise LimitExceededError(f"the state is nested deeper than {MAX_DEPTH} containers")
        self._known[id(value)] = None
        self._alive.append(value)
        holds, nodes, height = is_mapping and self._mappings_open, 1, 0
        leaf_types = self.leaf_types
        for child in value.values() if is_mapping else value:
            leaf_is_tensor = leaf_types.get(type(child))
            if leaf_is_tensor is not None:
                holds = holds or leaf_is_tensor
                nodes += 1
                continue
            survey = self._look(child, level + 1)
            holds = holds or survey.holds
            nodes += survey.nodes
            height = max(height, survey.height)
        result = _Survey(holds, nodes if holds else 1, height + 1)
        self._known[id(value)] = result
        return result


class _Leaves:
    """Collects the values of a state by their flat keys."""

    def __init__(self, survey: _Surveyor) -> None:
        self._survey = survey
        self.flat: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}
        self.problems: list[Problem] = []

    def collect(self, container: Any, path: Path, prefix: str) -> None:
        """Take all values of a container that is opened; `prefix` begins their keys."""
        flat, paths = self.flat, self.paths
        opens, leaf_types = self._survey.opens, self._survey.leaf_types
        is_mapping = isinstance(container, Mapping)
        for name, child in container.items() if is_mapping else enumerate(container):
            part = str(name) if is_mapping and type(name) is not str else name
            key = f"{prefix}{part}"
            if type(child) not in leaf_types and opens(child):
                self.collect(child, (*path, part), key + ".")
            elif key in flat:
                message = f"the paths {paths[key]!r} and {(*path, part)!r} both give this flat key"
                self.problems.append(Problem(message, key))
            else:
                flat[key] = child
                paths[key] = (*path, part)


class _MisplacedError(Exception):
    """Why one key has no place in the tree; collected, never seen outside."""


@dataclass(slots=True)
class _Node:
    """A container being rebuilt; what it is follows from its first child's name."""

    children: dict[str | int, Any] = field(default_factory=dict)

    @property
    def is_list(self) -> bool:
        return isinstance(next(iter(self.children), None), int)


def _checked_path(key: str, paths: Mapping[str, Path]) -> Path:
    path = paths.get(key)
    if path is None:
        raise _MisplacedError("there is no path for it")
    if not isinstance(path, tuple):
        raise _MisplacedError(f"its path is a {type(path).__name__}, not a tuple")
    if len(path) > MAX_DEPTH:
        raise LimitExceededError(
            f"key {key!r}: its path has {len(path)} parts, more than {MAX_DEPTH}"
        )
    for part in path:
        if type(part) is not str and type(part) is not int:
            raise _MisplacedError(f"its path {path!r} has a part that is neither str nor int")
        if isinstance(part, int) and not 0 <= part < 1 << 63:
            raise _MisplacedError("its path has a list position that is negative or past 64 bits")
    return path


def _place(root: _Node, path: Path, key: str, value: Any) -> None:
    node = root
    last = len(path) - 1
    for depth, part in enumerate(path):
        if node.children and node.is_list != isinstance(part, int):
            raise _MisplacedError(f"at {path[:depth]!r} there are both names and list positions")
        child = node.children.get(part)
        if depth == last:
            if child is not None:
                kind = "other keys go on from" if isinstance(child, _Node) else "another key has"
                raise _MisplacedError(f"{kind} its path {path!r}")
            node.children[part] = _Leaf(key, value)
            return
        if child is None:
            child = node.children[part] = _Node()
        elif isinstance(child, _Leaf):
            raise _MisplacedError(f"its path {path!r} goes through a value at {path[: depth + 1]}")
        node = child


@dataclass(frozen=True, slots=True)
class _Leaf:
    key: str
    value: Any


def _check_holes(root: _Node) -> None:
    holes = 0
    waiting = [root]
    while waiting:
        node = waiting.pop()
        waiting.extend(child for child in node.children.values() if isinstance(child, _Node))
        if node.is_list:
            highest = max(position for position in node.children if isinstance(position, int))
            holes += highest + 1 - len(node.children)
            if holes > MAX_HOLES:
                raise LimitExceededError(
                    f"key {_first_key(node.children[highest])!r}: list position {highest} in its "
                    f"path leaves more than {MAX_HOLES} positions empty"
                )


def _first_key(child: Any) -> str:
    while isinstance(child, _Node):
        child = next(iter(child.children.values()))
    key: str = child.key
    return key


def _build(child: Any) -> Any:
    if isinstance(child, _Leaf):
        return child.value
    if not child.is_list:
        return {name: _build(grandchild) for name, grandchild in child.children.items()}
    rebuilt: list[Any] = [None] * (max(child.children) + 1)
    for position, grandchild in child.children.items():
        rebuilt[position] = _build(grandchild)
    return rebuilt
