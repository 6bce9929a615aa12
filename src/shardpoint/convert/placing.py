"""Where files are written until they are complete."""

from __future__ import annotations

import secrets

from shardpoint.errors import ShardpointError
from shardpoint.storage import Storage

__all__ = ["place_name", "remove_quietly"]


def place_name(storage: Storage, name: str) -> str:
    """Return where a file is written that is to be called `name` when it is complete.

    A store in which renaming copies gets it there at once, unless one is there already.
    """
    if storage.rename_copies and not storage.has(name):
        return name
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}.{base}.{secrets.token_hex(8)}.tmp"


def remove_quietly(storage: Storage, name: str) -> None:
    """Remove what a failed step left; the step's own error is the one that counts."""
    try:
        storage.remove(name)
    except ShardpointError:
        return
