"""Classes that the program has told torch to be safe to load, beside those it allows here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from shardpoint.formats.object_names import is_listed

__all__ = ["with_safe_globals"]

_TORCHS = "torch."


def with_safe_globals(
    allowed: Mapping[str, Callable[..., Any]] | None,
) -> Mapping[str, Callable[..., Any]]:
    """Return what is allowed together with what ``torch.serialization`` was told is safe.

    That is ``add_safe_globals`` and, for a block, ``safe_globals``. Left out is what torch adds
    by itself when its modules are imported, for nobody has asked for that, and what the decoder
    has safe ways for.
    """
    found: dict[str, Callable[..., Any]] = {}
    for entry in torch.serialization.get_safe_globals():
        target, name = entry if isinstance(entry, tuple) else (entry, _name(entry))
        if name and not name.startswith(_TORCHS) and not is_listed(name) and callable(target):
            found[name] = target
    return {**found, **(allowed or {})}


def _name(target: Any) -> str | None:
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    return f"{module}.{name}" if module and name else None
