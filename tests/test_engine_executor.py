"""The executor: bounded, first failure first, nothing left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from shardpoint.engine.executor import run_tasks


def _threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_task_runs_once(threads: int, count: int) -> None:
    done: list[int] = []
    run_tasks((lambda i=i: done.append(i) for i in range(count)), threads=threads, name="t")
    assert sorted(done) == list(range(count))
    assert not _threads_named("t_")


def test_no_more_than_the_given_number_run_at_once() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def task() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1

    run_tasks([task] * 30, threads=3, name="bounded")
    assert most == 3


def test_one_thread_or_one_task_runs_in_the_calling_thread() -> None:
    where: list[threading.Thread] = []

    def task() -> None:
        where.append(threading.current_thread())

    run_tasks([task, task, task], threads=1, name="inline")
    run_tasks([task], threads=8, name="inline")
    assert where == [threading.current_thread()] * 4


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="sends a signal to a thread")
def test_an_interrupt_is_raised_only_when_all_threads_have_ended() -> None:
    here = threading.get_ident()
    may_end, waits = threading.Event(), threading.Event()
    ended: list[bool] = []
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    def task() -> None:
        if threading.get_ident() == here:
            waits.wait(30)  # the other thread has begun: next is to wait until it ends
            return
        waits.set()
        while not _is_in(here, "_join"):
            time.sleep(0.001)
        for number in range(1, 4):
            signal.pthread_kill(here, signal.SIGINT)
            while len(interrupts) < number:
                time.sleep(0.001)
        ended.append(may_end.wait(0.05))

    with _on_interrupt(interrupt), pytest.raises(KeyboardInterrupt):
        run_tasks([task, task], threads=2, name="interrupted")
    assert ended == [False]
    assert not _threads_named("interrupted")


@contextmanager
def _on_interrupt(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Have interrupts handled so; shells may have them ignored."""
    usual = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _is_in(thread: int, function: str) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


def test_calling_thread_is_one_of_those_that_work() -> None:
    where: set[threading.Thread] = set()
    together = threading.Barrier(3)

    def task() -> None:
        where.add(threading.current_thread())
        together.wait(5)

    run_tasks([task] * 3, threads=3, name="joined")
    assert len(where) == 3
    assert threading.current_thread() in where


@pytest.mark.parametrize("threads", [1, 4])
def test_first_failure_cancels_the_rest_and_keeps_its_traceback(threads: int) -> None:
    done: list[int] = []

    def failing_step() -> None:
        raise ZeroDivisionError("the first")

    def task(i: int) -> None:
        if i == 5:
            failing_step()
        time.sleep(0.002)
        done.append(i)

    tasks = [lambda i=i: task(i) for i in range(1000)]
    with pytest.raises(ZeroDivisionError, match="the first") as caught:
        run_tasks(tasks, threads=threads, name="failing")
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-2:] == ["task", "failing_step"]
    assert len(done) < 20
    assert not _threads_named("failing")


def test_failure_waits_for_the_tasks_that_had_begun() -> None:
    """A caller may free its buffers once the call is over, so nobody may still use them."""
    begun, ended = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.05)
        ended.set()

    def failing() -> None:
        begun.wait(5)
        raise ValueError("now")

    with pytest.raises(ValueError, match="now"):
        run_tasks([slow, failing], threads=2, name="waiting")
    assert ended.is_set()


def test_only_the_first_of_several_failures_is_raised() -> None:
    gate = threading.Event()

    def first() -> None:
        try:
            raise ValueError("first")
        finally:
            threading.Timer(0.02, gate.set).start()

    def second() -> None:
        gate.wait(5)
        raise KeyError("second")

    with pytest.raises(ValueError, match="first"):
        run_tasks([second, first], threads=2, name="both")


def test_failure_of_the_iterable_is_raised() -> None:
    def tasks() -> Iterator[Callable[[], None]]:
        for _ in range(10):
            yield lambda: None
        raise LookupError("no more")

    for threads in (1, 3):
        with pytest.raises(LookupError, match="no more"):
            run_tasks(tasks(), threads=threads, name="iterable")
    assert not _threads_named("iterable")


def test_tasks_are_taken_late() -> None:
    """A generator of many tasks is never far ahead of what is done."""
    made, done, ahead = 0, 0, 0
    lock = threading.Lock()

    def task() -> None:
        nonlocal done
        with lock:
            done += 1

    def tasks() -> Iterator[Callable[[], None]]:
        nonlocal made, ahead
        for _ in range(500):
            made += 1
            ahead = max(ahead, made - done)
            yield task

    run_tasks(tasks(), threads=2, name="late")
    assert done == 500
    assert ahead <= 4


def test_interrupt_in_a_task_ends_the_operation() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks([interrupted] + [lambda: None] * 50, threads=3, name="interrupt")
    assert not _threads_named("interrupt")


def test_interrupt_while_others_are_waited_for_leaves_none_at_work() -> None:
    both = threading.Barrier(2)
    main = threading.current_thread()
    ended: list[bool] = []

    def work() -> None:
        both.wait()
        if threading.current_thread() is not main:
            time.sleep(0.05)  # the calling thread has found no more tasks by now
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            ended.append(True)

    with _on_interrupt(signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        run_tasks([work, work], threads=2, name="waited")
    assert ended == [True]
    assert not _threads_named("waited")


def test_there_are_no_more_threads_than_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    start = threading.Thread.start

    def note(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note)
    done: list[int] = []
    tasks = [lambda i=i: (time.sleep(0.01), done.append(i)) for i in range(3)]
    run_tasks(iter(tasks), threads=1000, name="few")  # type: ignore[arg-type]
    assert sorted(done) == [0, 1, 2]
    assert len([name for name in started if name.startswith("few")]) <= 3
