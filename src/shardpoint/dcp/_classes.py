"""Who saves objects that loading will refuse, or ask for a class for, is told so."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping, Sequence

from shardpoint.dcp._objects import read_object
from shardpoint.dcp._safe_globals import with_safe_globals
from shardpoint.engine.writing import RecordSource
from shardpoint.errors import ForbiddenContentError, NotSupportedError
from shardpoint.formats.object_names import likely_names, unlisted_names

__all__ = ["tell_of_classes"]

logger = logging.getLogger(__name__)

_SHOWN = 5
_MOST_FINE = 1000
_told: set[str] = set()
_fine: set[frozenset[tuple[bytes, bytes]]] = set()


def tell_of_classes(objects: Iterable[tuple[str, RecordSource]]) -> None:
    """Log one warning about keys whose objects load only with ``allowed``, or not at all.

    Each class, and each other reason, is named once in a process: jobs save over and over.
    """
    allowed = with_safe_globals(None)
    classes: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for key, source in objects:
        record = bytes(source.head)
        names = unlisted_names(record)
        for name in names:
            if name not in allowed:
                classes.setdefault(name, []).append(key)
        likely = frozenset() if names else likely_names(record)
        # No class of the program's is made then; and what is alike is tried once.
        if likely and likely not in _fine:
            reason = _refusal(record)
            if reason:
                reasons.setdefault(reason, []).append(key)
            elif len(_fine) < _MOST_FINE:
                _fine.add(likely)
    parts = []
    if new := _new(classes):
        parts.append(
            "loading has to be given these classes, by load's allowed= or "
            f"torch.serialization.add_safe_globals: {_shown(new)}"
        )
    if new := _new(reasons):
        parts.append(f"shardpoint cannot load these back, though torch can: {_shown(new)}")
    if parts:
        logger.warning("objects are saved as they are, but %s", "; ".join(parts))


def _refusal(record: bytes) -> str:
    """Return why the decoder refuses a record of names that it knows; empty where it does not."""
    try:
        read_object(io.BytesIO(record), key="", allowed={})
    except (ForbiddenContentError, NotSupportedError) as error:
        return str(error).rpartition("key '': ")[2]
    except Exception:  # noqa: BLE001  a record of a program's own: its planner reads it
        return ""
    return ""


def _new(keys: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    new = {name: by for name, by in keys.items() if name not in _told}
    _told.update(new)
    return new


def _shown(keys: Mapping[str, Sequence[str]]) -> str:
    shown = "; ".join(f"{name} in {_listed(by)}" for name, by in list(keys.items())[:_SHOWN])
    return shown + (f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(repr, keys[:_SHOWN])) + more
