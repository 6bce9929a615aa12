"""One bounded set of threads for one operation; the first failure ends it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

__all__ = ["default_threads", "run_tasks"]

_MOST_THREADS = 8


def default_threads() -> int:
    """Return how many threads one process moves bytes with.

    The processors that it may use, shared with the other ranks on this host where the launcher
    says how many there are (``LOCAL_WORLD_SIZE``, as torchrun sets it), and at most 8: a few
    threads fill any one store.
    """
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        processors = os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, min(_MOST_THREADS, processors // max(1, int(ranks) if ranks.isdigit() else 1)))


def run_tasks(tasks: Iterable[Callable[[], None]], *, threads: int, name: str) -> None:
    """Run all tasks, at most `threads` side by side, and return when all are done.

    Tasks are taken from the iterable one for each thread, then one at a time, when a thread is
    free for the next, so a generator may make them as late as it likes; it is never entered by
    two threads at once.

    The first exception (of a task or of the iterable) keeps the tasks that have not begun
    from beginning. It is raised here, with the traceback it came with, once those that had
    begun are done. Later exceptions of those are dropped. No thread is left in any case.

    Parameters
    ----------
    tasks
        What to run; each is called once, in some thread.
    threads
        How many may run at once, at least one; there are never more than tasks. The calling
        thread is one of them: with one thread, or one task, it runs all.
    name
        Prefix of the other threads' names.
    """
    iterator = iter(tasks)
    if threads <= 1:
        for task in iterator:
            task()
        return
    first = list(islice(iterator, threads))
    if len(first) < 2:
        for task in first:
            task()
        return
    _Run(first, iterator).run(len(first), name)


class _Run:
    """The state that the threads of one operation share."""

    def __init__(self, first: list[Callable[[], None]], rest: Iterator[Callable[[], None]]) -> None:
        self._first = deque(first)
        self._rest = rest
        self._changed = threading.Condition(threading.Lock())
        self._helpers = 0  # threads that work, the calling one not among them
        self._stopped = False
        self._failure: BaseException | None = None

    def run(self, threads: int, name: str) -> None:
        pool = ThreadPoolExecutor(threads - 1, thread_name_prefix=name)
        try:
            for _ in range(threads - 1):
                pool.submit(self._help)
            self._work()  # to wait for a thread to begin would be the longer part of short work
        except BaseException:
            self._stopped = True  # no thread could be started: the others are to end
            raise
        finally:
            self._join(pool)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            try:
                raise failure
            finally:
                del failure  # the traceback holds this frame: no cycle through it

    def _join(self, pool: ThreadPoolExecutor) -> None:
        """Wait until no thread is left, also if this is interrupted (Ctrl-C) meanwhile.

        They would otherwise go on to move bytes from or to memory that the caller has back.
        Threads themselves are no help: before Python 3.13 one whose ``join`` was interrupted is
        taken for ended, and one whose beginning was is not known to the pool.
        """
        while True:
            try:
                with self._changed:
                    self._stopped = True
                    while self._helpers:
                        self._changed.wait()
                pool.shutdown()
            except BaseException as error:  # noqa: BLE001  raised when they have ended
                if self._failure is None:
                    self._failure = error
            else:
                return

    def _help(self) -> None:
        """Work in another thread; one that comes late has nothing to do."""
        with self._changed:
            if self._stopped:
                return
            self._helpers += 1
        try:
            self._work()
        finally:
            with self._changed:
                self._helpers -= 1
                self._changed.notify_all()

    def _work(self) -> None:
        """Take tasks until there are none or one has failed."""
        try:
            while (task := self._take()) is not None:
                task()
        except BaseException as error:  # noqa: BLE001  raised in the calling thread
            with self._changed:
                self._stopped = True
                if self._failure is None:
                    self._failure = error

    def _take(self) -> Callable[[], None] | None:
        with self._changed:
            if self._stopped:
                return None
            if self._first:
                return self._first.popleft()
            try:
                return next(self._rest)
            except StopIteration:
                self._stopped = True
                return None
