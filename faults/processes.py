"""Processes that may raise, die or hang: what became of each is a result like any other."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Ended", "run_all", "run_one"]


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes
    ----------
    how
        ``"returned"``, ``"raised"``, ``"died"`` or ``"hung"``.
    value
        What it returned; the error's type and message, or what it died of.
    seconds
        How long that took.
    """

    how: str
    value: Any
    seconds: float

    def __str__(self) -> str:
        if self.how == "returned":
            return "returns" if self.value is None else str(self.value)
        if self.how == "raised":
            return f"raises {self.value[0]}"
        if self.how == "died":
            return f"dies ({self.value})"
        return f"hangs: killed after {self.seconds:.0f} s"


def run_one(action: Callable[[], Any], *, limit: float, memory: int | None = None) -> Ended:
    """Run an action in a process of its own; see `run_all`."""
    return run_all([action], limit=limit, memory=memory)[0]


def run_all(
    actions: Sequence[Callable[[], Any]], *, limit: float, memory: int | None = None
) -> list[Ended]:
    """Run actions side by side, each in a forked process, and end those that take too long.

    Parameters
    ----------
    limit
        Seconds until what is left is killed.
    memory
        Bytes of address space that each may use beyond what it has.
    """
    started = time.monotonic()
    children = [_fork(action, memory) for action in actions]
    answers: dict[int, bytes] = {receiver: b"" for _, receiver in children}
    ended_at: dict[int, float] = {}
    while len(ended_at) < len(children):
        left = started + limit - time.monotonic()
        if left <= 0:
            break
        waiting = [receiver for receiver in answers if receiver not in ended_at]
        for receiver in select.select(waiting, [], [], left)[0]:
            data = os.read(receiver, 1 << 16)
            answers[receiver] += data
            if not data:
                ended_at[receiver] = time.monotonic() - started
    results = []
    for child, receiver in children:
        if receiver not in ended_at:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(receiver)
        results.append(_ended(answers[receiver], status, ended_at.get(receiver), limit))
    return results


def _ended(answer: bytes, status: int, seconds: float | None, limit: float) -> Ended:
    if seconds is None:
        return Ended("hung", None, limit)
    if status < 0:
        return Ended("died", signal.Signals(-status).name, seconds)
    if not answer:
        return Ended("died", f"exit code {status}", seconds)
    how, value = pickle.loads(answer)  # from our own child
    return Ended(how, value, seconds)


def _fork(action: Callable[[], Any], memory: int | None) -> tuple[int, int]:
    receiver, sender = os.pipe()
    child = os.fork()
    if child:
        os.close(sender)
        return child, receiver
    try:
        os.close(receiver)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        if not os.environ.get("FAULTS_SHOW_ERRORS"):
            os.dup2(nothing, 2)
        if memory is not None:
            _limit_memory(memory)
        answer = ("returned", action())
    except BaseException as error:  # noqa: BLE001  what came out is the result
        traceback.print_exc()
        answer = (
            "raised",
            (type(error).__name__, "\n".join([str(error), *getattr(error, "__notes__", ())])),
        )
    os.write(sender, pickle.dumps(answer))
    os._exit(0)


def _limit_memory(nbytes: int) -> None:
    """Let a process have only so many bytes of address space more than it has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
