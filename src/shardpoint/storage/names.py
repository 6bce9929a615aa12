"""Which file names a checkpoint may use."""

from __future__ import annotations

import os

from shardpoint.errors import UnsafePathError

__all__ = ["check_name"]


def check_name(name: str) -> tuple[str, ...]:
    """Return the parts of a name relative to a checkpoint.

    Raises
    ------
    UnsafePathError
        If the name is empty, absolute, climbs (``..``), has an empty part or ``.``, holds a
        NUL, or cannot be spelled in the file system's encoding.
    """
    reason = _reason_against(name)
    if reason is not None:
        raise UnsafePathError(f"file name {name!r} is refused: it {reason}")
    return tuple(name.split("/"))


def _reason_against(name: str) -> str | None:
    if not name:
        return "is empty"
    if name.startswith("/"):
        return "is absolute"
    if "\0" in name:
        return "holds a NUL character"
    parts = name.split("/")
    if ".." in parts:
        return "climbs out of its folder"
    if "" in parts or "." in parts:
        return "has an empty part or '.'"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "cannot be encoded as a file name"
    return None
