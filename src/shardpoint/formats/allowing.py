"""Classes that objects may hold beyond the closed list, for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

__all__ = ["allowing", "check_allowed", "with_allowed"]

_NOTHING: Mapping[str, Callable[..., Any]] = MappingProxyType({})
_allowed: ContextVar[Mapping[str, Callable[..., Any]]] = ContextVar(
    "shardpoint_allowed", default=_NOTHING
)


@contextmanager
def allowing(classes: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Let objects that are read in a block be made of some classes more.

    For code that cannot be handed ``allowed``. Holds in this thread (or task) alone, and only
    until the block is left; blocks inside each other add up.

    Parameters
    ----------
    classes
        Qualified name in the checkpoint to the class or function that stands for it. These are
        really called, with what the checkpoint says.

    Raises
    ------
    TypeError
        If something else is given.

    Examples
    --------
    >>> import shardpoint
    >>> with shardpoint.allowing({"my_package.Config": dict}):
    ...     pass  # shardpoint.open(...), dcp.load(...)
    """
    check_allowed(classes)
    token = _allowed.set({**_allowed.get(), **classes})
    try:
        yield
    finally:
        _allowed.reset(token)


def with_allowed(allowed: Mapping[str, Callable[..., Any]]) -> Mapping[str, Callable[..., Any]]:
    """Return what a caller allows together with what the blocks around it do."""
    around = _allowed.get()
    return {**around, **allowed} if around else allowed


def check_allowed(allowed: object) -> None:
    """Raise TypeError unless this maps names to classes or functions."""
    if not isinstance(allowed, Mapping):
        raise TypeError(
            "allowed must map qualified names to classes or functions, it is "
            f"{type(allowed).__name__}"
        )
    for name, what in allowed.items():
        if not isinstance(name, str) or not callable(what):
            raise TypeError(
                f"allowed must map qualified names to classes or functions, not {name!r} to "
                f"{type(what).__name__}"
            )
