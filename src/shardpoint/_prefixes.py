"""Keys under a prefix, and their paths below it."""

from __future__ import annotations

from shardpoint.tree import Path

__all__ = ["path_below"]


def path_below(key: str, path: Path, prefix: str) -> Path | None:
    """Return the path of a key below a prefix, None if the key is not under it.

    A path part may hold dots itself (``("model", "fc1.weight")``), so a prefix can end inside
    a part; then the rest of the part is the first name below.
    """
    if not prefix:
        return path
    if key != prefix and not key.startswith(prefix + "."):
        return None
    if not _joins_to(path, key):
        return (key[len(prefix) + 1 :],) if key != prefix else ()
    covered = 0
    for depth, part in enumerate(path):
        end = covered + len(str(part))
        if end == len(prefix):
            return path[depth + 1 :]
        if end > len(prefix):
            return (str(part)[len(prefix) + 1 - covered :], *path[depth + 1 :])
        covered = end + 1
    return ()


def _joins_to(path: Path, key: str) -> bool:
    """Whether the key is its path joined with dots; a damaged one may have any path."""
    try:
        return ".".join(map(str, path)) == key
    except ValueError:  # an integer of thousands of digits
        return False
