"""Nested state dicts to flat keys, and back, by the names that programs know from torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from shardpoint.dcp._state import flatten_state
from shardpoint.dcp._traverse import OBJ_PATH
from shardpoint.dcp.metadata import STATE_DICT_TYPE
from shardpoint.tree import unflatten

__all__ = ["FLATTEN_MAPPING", "flatten_state_dict", "unflatten_state_dict"]

FLATTEN_MAPPING: TypeAlias = dict[str, OBJ_PATH]


def flatten_state_dict(state_dict: STATE_DICT_TYPE) -> tuple[STATE_DICT_TYPE, FLATTEN_MAPPING]:
    """Return values and paths by flat key; see `shardpoint.tree.flatten`."""
    return flatten_state(state_dict)


def unflatten_state_dict(
    state_dict: STATE_DICT_TYPE, mapping: Mapping[str, OBJ_PATH]
) -> STATE_DICT_TYPE:
    """Return the nested state dict; see `shardpoint.tree.unflatten`."""
    nested: dict[str, Any] = unflatten(state_dict, mapping)
    return nested
