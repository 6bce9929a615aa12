"""Which asynchronous save is under way in this process, and how the last one ended."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from shardpoint.dcp.api import CheckpointException
from shardpoint.dcp.metadata import Metadata
from shardpoint.engine.unfinished import is_writer, register
from shardpoint.errors import RankFailedError, ShardpointError
from shardpoint.storage.places import path_text, same_spelling

__all__ = [
    "PendingSave",
    "SaveFuture",
    "at_exit",
    "begin",
    "let_go",
    "place_of",
    "settle",
    "wait_at_exit",
]


logger = logging.getLogger(__name__)


class SaveFuture(Future[Metadata]):
    """The future of a save; knows whether anyone has been told how it ended."""

    asked = False

    def result(self, timeout: float | None = None) -> Metadata:
        """Return the metadata of the checkpoint, or raise why there is none."""
        found = super().exception(timeout)
        self.asked = True
        if found is not None:
            try:
                raise found
            finally:
                del found  # the traceback holds this frame: no cycle through it
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return why there is no checkpoint, or None."""
        found = super().exception(timeout)
        self.asked = True
        return found


class PendingSave:
    """A save in the background.

    Attributes
    ----------
    place
        Where it saves to, as `place_of` spells it; None where that is not known.
    future
        What the caller gets.
    """

    def __init__(self, place: str | None) -> None:
        self.place = place
        self.future = SaveFuture()
        # from here on it cannot be cancelled: other ranks count on this one
        self.future.set_running_or_notify_cancel()
        self._done = threading.Event()
        self._failure: BaseException | None = None

    def run(self, save: Callable[[], Metadata]) -> None:
        """Run the save in this thread and tell the future how it ended."""
        try:
            with is_writer():
                metadata = save()
        except BaseException as error:  # noqa: BLE001  raised to whoever asks the future
            del save
            let_go(error)
            self._failure = error
            self._done.set()
            self.future.set_exception(error)
        else:
            del save
            self._done.set()
            self.future.set_result(metadata)

    def wait(self) -> None:
        """Wait for its end, whatever that is."""
        self._done.wait()

    def take_failure(self) -> BaseException | None:
        """Return why it failed, once, and only if nobody has heard of it yet."""
        failure, self._failure = self._failure, None
        return None if self.future.asked else failure


_last: PendingSave | None = None
_lock = threading.Lock()


def place_of(checkpoint_id: object) -> str | None:
    """Return one spelling of a place; None where it is no path or URL.

    Storage of a program's own may have keys of any kind.
    """
    text = path_text(checkpoint_id)
    return None if text is None else same_spelling(text)


def begin(place: str | None, save: Callable[[], Metadata]) -> PendingSave:
    """Run a save in a thread of its own, after the one that is under way, if any.

    The interpreter does not exit before it has ended.
    """
    global _last
    pending = PendingSave(place_of(place))
    with _lock:
        before, _last = _last, pending

    returning = threading.Event()

    def run() -> None:
        returning.wait()
        if before is not None:
            before.wait()
        pending.run(save)

    executor = ThreadPoolExecutor(1, thread_name_prefix="shardpoint-async-save")
    try:
        executor.submit(run)
    except BaseException as error:
        _last = before
        pending.future.asked = True
        pending.run(_raising(error))
        raise
    finally:
        executor.shutdown(wait=False)
        # Only now: a thread that begins to compute keeps the caller, who waits for it to have
        # started, from going on for as long as the interpreter lets it, which is 5 ms.
        returning.set()
    return pending


def let_go(error: BaseException) -> None:
    """Let go of what the frames of a failed save hold: the copy of the state, above all."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            traceback.clear_frames(link.__traceback__)
            chain += [link.__cause__, link.__context__]
            if isinstance(link, RankFailedError):
                chain += link.causes.values()


def _raising(error: BaseException) -> Callable[[], Metadata]:
    def save() -> Metadata:
        raise error

    return save


def settle() -> None:
    """Wait for the save that is under way, and raise if it failed and nobody was told.

    Raises
    ------
    CheckpointException
        If it failed; names the ranks and the causes.
    """
    pending = _last
    if pending is None:
        return
    pending.wait()
    failure = pending.take_failure()
    if failure is None:
        return
    place = "" if pending.place is None else f" to {pending.place}"
    step = f"this save was not begun: the asynchronous save{place} before it"
    if isinstance(failure, CheckpointException):
        raise CheckpointException(step, failure.failures) from failure
    raise ShardpointError(f"{step} failed: {failure}") from failure


def _wait_for_place(place: str) -> None:
    """Wait for the save that is under way, if it is one to this place."""
    pending = _last
    if pending is not None and pending.place == place:
        pending.wait()


def wait_at_exit() -> None:
    """Wait for the save that is under way, so that leaving the program does not lose it.

    Nobody can ask its future any more: if it failed, it is said here.
    """
    global _last
    while (pending := _last) is not None:
        try:
            pending.wait()
        except BaseException:
            logger.error(
                "the program was interrupted before the asynchronous save to %s was done: it does "
                "not count",
                pending.place,
            )
            _last = None  # whoever interrupts does not want to wait once more
            raise
        failure = pending.take_failure()
        if failure is not None:
            logger.error("the asynchronous save to %s failed: %s", pending.place, failure)
        if pending is _last:  # no thread of the program has begun another one
            return


def at_exit(function: Callable[[], None]) -> None:
    """Have a function called when the program ends; it may be called twice.

    First when the main thread ends: the functions of `atexit` run when executors take no more
    tasks, and the writing needs some. But the functions that run then are dropped if one of
    them, of whatever package, raises. So once more by `atexit`.
    """
    register: Any = getattr(threading, "_register_atexit")  # noqa: B009
    register(function)
    atexit.register(function)


def _forget() -> None:
    """In a forked child the thread that saves does not exist."""
    global _last, _lock
    _last, _lock = None, threading.Lock()


register(_wait_for_place)
os.register_at_fork(after_in_child=_forget)
at_exit(wait_at_exit)
