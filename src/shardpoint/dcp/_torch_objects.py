"""Plans, items and metadata as the classes of torch's own package have them, and back.

Parts that were written for ``torch.distributed.checkpoint`` ask for its classes. Where there is
such a part that package is imported already, and is found among the imported modules: nothing
here imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from types import ModuleType
from typing import Any

import torch

from shardpoint.dcp import metadata, planner
from shardpoint.dcp._lazy_list import LazyList

__all__ = ["TORCHS_PACKAGE", "is_torchs_object", "ours", "torchs"]

TORCHS_PACKAGE = "torch.distributed.checkpoint"

_OURS = {"metadata": metadata, "planner": planner}
_NAMES = {
    "metadata": [
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata"),
    ],
    "planner": [
        *("BytesIOWriteData", "LoadItemType", "LoadPlan", "ReadItem", "SavePlan"),
        *("TensorWriteData", "WriteItem", "WriteItemType"),
    ],
}
# What planners and storage add is theirs, and nobody else's to understand.
_OPAQUE = {"Metadata": {"planner_data"}, "SavePlan": {"storage_data", "planner_data"}}
_OPAQUE["LoadPlan"] = _OPAQUE["SavePlan"]

_LEAVES = frozenset(
    [
        *(type(None), bool, int, str, torch.Size),
        *(torch.dtype, torch.layout, torch.memory_format),
    ]
)


def is_torchs_object(value: object) -> bool:
    """Whether a value is of one of torch's classes that are translated."""
    module = type(value).__module__
    return module.startswith(f"{TORCHS_PACKAGE}.") and module.rpartition(".")[2] in _NAMES


def ours(value: Any) -> Any:
    """Return a value, or a list of values, with torch's classes replaced by ours."""
    is_imported = all(f"{TORCHS_PACKAGE}.{name}" in sys.modules for name in _NAMES)
    return _to_ours()(value) if is_imported else value


def torchs(value: Any) -> Any:
    """Return a value, or a list of values, with our classes replaced by torch's."""
    return _to_torchs()(value)


@cache
def _to_ours() -> _Translation:
    return _Translation(_torchs_modules(), _OURS)


@cache
def _to_torchs() -> _Translation:
    return _Translation(_OURS, _torchs_modules())


def _torchs_modules() -> Mapping[str, ModuleType]:
    return {name: sys.modules[f"{TORCHS_PACKAGE}.{name}"] for name in _NAMES}


def _fields_of(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


class _Translation:
    """Makes of one package's dataclasses and enumerations those of the same name in another."""

    def __init__(self, source: Mapping[str, ModuleType], target: Mapping[str, ModuleType]) -> None:
        self._targets: dict[type, Any] = {
            getattr(source[module], name): getattr(target[module], name)
            for module, names in _NAMES.items()
            for name in names
        }
        # Programs put objects of the one package into those of the other.
        self._targets |= {made: made for made in self._targets.values()}
        self._fields = {
            kind: [
                (name, name not in _OPAQUE.get(kind.__name__, ()))
                for name in _fields_of(kind)
                if name in _fields_of(made)  # a release may have more
            ]
            for kind, made in self._targets.items()
            if not issubclass(kind, Enum)
        }

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind in _LEAVES:
            return value
        made = self._targets.get(kind)
        if made is None:
            return self._inside(kind, value)
        named = self._fields.get(kind)
        if named is None:
            return made[value.name]
        return made(
            **{
                name: self(getattr(value, name)) if is_known else getattr(value, name)
                for name, is_known in named
            }
        )

    def _inside(self, kind: type, value: Any) -> Any:
        if kind is list or isinstance(value, LazyList):
            return [self(item) for item in value]
        if isinstance(value, dict):
            return {self(key): self(item) for key, item in value.items()}
        return value
