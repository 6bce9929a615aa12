"""Calling programs' own planners and storage with what their methods take.

torch has added parameters over the releases; older programs do not have them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["accepted", "takes"]


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function can be given a keyword of that name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def accepted(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Return those keywords that the function can be given."""
    return {name: value for name, value in keywords.items() if takes(function, name)}
