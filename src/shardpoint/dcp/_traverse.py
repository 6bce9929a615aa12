"""Walking through nested state dicts, by the names that programs import from torch's package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from shardpoint.dcp.metadata import STATE_DICT_TYPE
from shardpoint.tree import flatten

__all__ = ["get_element", "print_tensor", "set_element", "traverse_state_dict"]

OBJ_PATH: TypeAlias = tuple[str | int, ...]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def traverse_state_dict(
    state_dict: STATE_DICT_TYPE,
    visitor: Callable[[OBJ_PATH, Any], None],
    keep_traversing: Callable[[Any], bool] = _is_tensor,
) -> None:
    """Call a function with the path and the value of everything that has a flat key.

    Parameters
    ----------
    keep_traversing
        Which values open the list that they are in; it is asked of one value of each type.
    """
    flat, paths = flatten(state_dict, is_tensor=keep_traversing)
    for key, value in flat.items():
        visitor(paths[key], value)


def set_element(root_dict: STATE_DICT_TYPE, path: OBJ_PATH, value: Any) -> None:
    """Put a value where a path leads; containers that are missing are made on the way."""
    container: Any = root_dict
    for part, following in pairwise(path):
        inside = container[part] if _has(container, part) else None
        if inside is None:
            inside = [] if type(following) is int else {}
            _put(container, part, inside)
        container = inside
    _put(container, path[-1], value)


def get_element(root_dict: STATE_DICT_TYPE, path: OBJ_PATH, default_value: Any = None) -> Any:
    """Return the value to which a path leads, or another where there is none."""
    value: Any = root_dict
    for part in path:
        if not _has(value, part):
            return default_value
        value = value[part]
    return value


def _has(container: Any, part: str | int) -> bool:
    if isinstance(part, int):
        return isinstance(container, list) and part < len(container)
    return isinstance(container, Mapping) and part in container


def _put(container: Any, part: str | int, value: Any) -> None:
    if isinstance(part, int):
        container.extend([None] * (part + 1 - len(container)))
    container[part] = value


def print_tensor(path: OBJ_PATH, value: Any, print_fun: Callable[[str], None] = print) -> None:
    """Print what lies at a path; for `traverse_state_dict`."""
    shown = f"tensor of shape {tuple(value.shape)}" if _is_tensor(value) else f"{type(value)}"
    print_fun(f"{path} {shown}")
