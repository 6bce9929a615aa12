"""Places that this process is still writing a checkpoint to, in the background.

Who opens such a place gets what will be there, not what a moment ago was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardpoint.errors import StorageError
from shardpoint.storage.places import path_text, same_spelling

__all__ = ["is_writer", "register", "wait_until_written"]

_waits: list[Callable[[str], None]] = []
_this_thread = threading.local()


def register(wait: Callable[[str], None]) -> None:
    """Have a function called with each place, spelled in one way, before it is opened.

    It returns when what this process is writing there is complete.
    """
    _waits.append(wait)


@contextmanager
def is_writer() -> Iterator[None]:
    """Let this thread, for a block, open places without waiting: it would wait for itself."""
    _this_thread.is_writer = True
    try:
        yield
    finally:
        _this_thread.is_writer = False


def wait_until_written(place: object) -> None:
    """Wait while this process is writing to a place; of no concern to what is no path or URL."""
    if not _waits or getattr(_this_thread, "is_writer", False):
        return
    text = path_text(place)
    if not text:
        return
    try:
        spelled = same_spelling(text)
    except StorageError:  # what cannot be a path: opening it says so
        return
    for wait in _waits:
        wait(spelled)
