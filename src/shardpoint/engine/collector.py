"""Keeps Python's cycle collector out of the way of work that makes many lasting objects."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collection_paused"]

_lock = threading.Lock()
_pauses = 0
_was_enabled = False


@contextmanager
def collection_paused() -> Iterator[None]:
    """Let no automatic collection begin inside the block; what is freed by counting still is.

    The collector looks at all objects of the process whenever a quarter more have come to
    stay. A save of 16,000 tensors makes so many of its own that this happens twice, and each
    look takes a tenth of a second where torch is loaded: half of the save's time, for nothing.

    For work of the processor that is over soon, not for waiting. Blocks may be nested and run
    side by side; a program that turned the collector off itself finds it off.
    """
    global _pauses, _was_enabled
    with _lock:
        if not _pauses:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if not _pauses and _was_enabled:
                gc.enable()
