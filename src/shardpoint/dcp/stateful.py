"""Objects that bring their own state dict."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

__all__ = ["Stateful", "StatefulT"]


@runtime_checkable
class Stateful(Protocol):
    """An object that `save` asks for its state, and that `load` hands its state back to."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is to be saved; it should hold references, not copies."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a loaded state dict of the form that `state_dict` returns."""
        ...


StatefulT = TypeVar("StatefulT", bound=Stateful)
