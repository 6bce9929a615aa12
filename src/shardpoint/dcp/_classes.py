"""Who saves objects of classes that loading will ask for is told so."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from shardpoint.dcp._safe_globals import with_safe_globals
from shardpoint.engine.writing import RecordSource
from shardpoint.formats.object_names import unlisted_names

__all__ = ["tell_of_classes"]

logger = logging.getLogger(__name__)

_SHOWN = 5
_told: set[str] = set()


def tell_of_classes(objects: Iterable[tuple[str, RecordSource]]) -> None:
    """Log one warning about keys whose objects load only with ``allowed``.

    Each class is named once in a process: jobs save over and over.
    """
    keys: dict[str, list[str]] = {}
    for key, record in objects:
        for name in unlisted_names(bytes(record.head)):
            keys.setdefault(name, []).append(key)
    allowed = with_safe_globals(None)
    new = {name: by for name, by in keys.items() if name not in _told and name not in allowed}
    if not new:
        return
    _told.update(new)
    shown = "; ".join(f"{name} in {_listed(by)}" for name, by in list(new.items())[:_SHOWN])
    more = f"; and {len(new) - _SHOWN} classes more" if len(new) > _SHOWN else ""
    logger.warning(
        "objects are saved whose classes loading has to be given, by load's allowed= or "
        "torch.serialization.add_safe_globals: %s%s",
        shown,
        more,
    )


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(repr, keys[:_SHOWN])) + more
