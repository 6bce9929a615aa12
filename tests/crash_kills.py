"""Saves in forked processes, each killed at one system call; run in a worker of the rank pool."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

import shardpoint.dcp as dcp
from crash_support import (
    LOOKS,
    NATIVE,
    Failer,
    Job,
    Killer,
    Through,
    Trace,
    interposed,
)

__all__ = ["RETURNED", "Outcome", "fail_one_of_two", "kill_everywhere", "kill_one_of_two"]


@dataclass(frozen=True)
class Outcome:
    """What a kill left.

    Attributes
    ----------
    call
        The number of the call before which the process was killed.
    killed
        Whether it was killed at all.
    found
        See `state_at`.
    found_next
        The same, after one more save.
    garbage
        Files beyond those of the checkpoint, after that save.
    raised
        Of a rank that was not killed: whether its save raised.
    """

    call: int
    killed: bool
    found: str
    found_next: str
    garbage: tuple[str, ...]
    raised: bool = False


def kill_everywhere(
    folder: str,
    overwrite: bool,
    torn: bool,
    options: dict[str, Any],
    job: Job = NATIVE,
    skip: frozenset[str] = frozenset(),
) -> Any:
    """Run saves that are killed at one call each; return the kinds of calls and the outcomes.

    Runs in a worker process, which forks for every save: torch is imported already. Calls of
    the kinds in `skip` are passed over.
    """
    _leave_group()
    path = Path(folder)
    trace = Trace()
    _prepare(job, path / "traced", overwrite, options)
    with interposed(trace):
        job.save(path / "traced", "new", options)
    kinds = [call.kind for call in trace.calls if call.kind not in skip]
    outcomes = []
    for number in range(len(kinds) + 1):
        place = path / f"{number}"
        _prepare(job, place, overwrite, options)
        killer = Killer(number, torn=torn, skip=skip)
        child = _fork(lambda p=place, k=killer: _save_through(job, p, options, k))
        status = _wait(child)
        outcomes.append(_outcome(job, place, number, _was_killed(status), options))
        shutil.rmtree(place)
    return kinds, outcomes


def _prepare(job: Job, place: Path, overwrite: bool, options: dict[str, Any]) -> None:
    """Lay an old checkpoint there; it is copied, so that making it takes no time."""
    if not overwrite:
        return
    model = place.parent / "old"
    if not model.exists():
        with interposed(Trace()):
            job.save(model, "old", options)
    shutil.copytree(model, place)


def _save_through(job: Job, place: Path, options: dict[str, Any], through: Through) -> None:
    with interposed(through):
        job.save(place, "new", options)


def _outcome(
    job: Job, place: Path, number: int, killed: bool, options: dict[str, Any], raised: bool = False
) -> Outcome:
    found = job.found(place)
    with interposed(Trace()):
        job.save(place, "next", options)
    return Outcome(
        call=number,
        killed=killed,
        found=found,
        found_next=job.found(place),
        garbage=job.garbage(place),
        raised=raised,
    )


_TWO_RANKS_SKIP = LOOKS | {"close"}


def kill_one_of_two(
    folder: str,
    victim: int,
    torn: bool,
    overwrite: bool,
    options: dict[str, Any] | None = None,
    job: Job = NATIVE,
    skip: frozenset[str] = _TWO_RANKS_SKIP,
) -> Any:
    """As `kill_everywhere`, a save by two ranks of which one is killed."""
    _leave_group()
    path = Path(folder)
    outcomes = []
    for number in itertools.count():
        place = path / f"{number}"
        killer = Killer(number, torn=torn, skip=skip)
        statuses = _save_as_two(job, place, overwrite, victim, killer, options or {})
        killed = _was_killed(statuses[victim])
        survivor = os.waitstatus_to_exitcode(statuses[1 - victim])
        assert survivor in (0, _RAISED), survivor
        raised = survivor == _RAISED
        outcomes.append(_outcome(job, place, number, killed, options or {}, raised=raised))
        if not killed:
            return outcomes
    raise AssertionError("not reached")


def fail_one_of_two(
    folder: str,
    victim: int,
    mode: str,
    overwrite: bool,
    options: dict[str, Any] | None = None,
    job: Job = NATIVE,
) -> Any:
    """Run saves by two ranks, of which one fails at one call each.

    Returns
    -------
    For each call: both ranks' exit codes, and what was found then, see `state_at`; the last of
    them is of a save in which nothing failed.
    """
    _leave_group()
    path = Path(folder)
    found = []
    for number in itertools.count():
        place = path / f"{number}"
        failer = Failer(number, mode, skip=_TWO_RANKS_SKIP)
        statuses = _save_as_two(job, place, overwrite, victim, failer, options or {})
        codes = [os.waitstatus_to_exitcode(status) for status in statuses]
        found.append((codes, job.found(place), job.garbage(place)))
        shutil.rmtree(place, ignore_errors=True)
        if codes[victim] == 0:
            return found
    raise AssertionError("not reached")


_RAISED = 3
_LEFT = 4
RETURNED = 5
"""The exit code of a rank whose save returned although a call failed."""


def _save_as_two(
    job: Job, place: Path, overwrite: bool, victim: int, through: Through, options: dict[str, Any]
) -> list[int]:
    """Save from two forked ranks, one of them through `through`; return how they ended."""
    _prepare(job, place, overwrite, options)
    # Either rank may be the one to make the folder: each is to make the same calls every time.
    place.mkdir(exist_ok=True)
    store = place.with_suffix(".store")
    throughs = [through if rank == victim else Trace() for rank in range(2)]
    children = [
        _fork(lambda r=rank: _save_as_rank(job, place, store, r, throughs[r], options))
        for rank in range(2)
    ]
    return [_wait(child) for child in children]


def _save_as_rank(
    job: Job, place: Path, store: Path, rank: int, through: Through, options: dict[str, Any]
) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    threads = set(threading.enumerate())
    code = 0
    try:
        with interposed(through):
            job.save_part(place, "new", rank, options)
    except dcp.CheckpointException:
        code = _RAISED
    else:
        if isinstance(through, Failer) and through.failed is not None:
            code = RETURNED
    if set(threading.enumerate()) != threads or _has_open(place):
        code = _LEFT
    os._exit(code)  # the group is left as it is: the other rank may be gone


def _has_open(place: Path) -> bool:
    """Whether this process has any file of a folder open."""
    folder = Path("/proc/self/fd")
    links = []
    for entry in os.listdir(folder) if folder.is_dir() else []:
        with contextlib.suppress(OSError):
            links.append(os.readlink(folder / entry))
    return any(link.startswith(os.path.realpath(place)) for link in links)


def _leave_group() -> None:
    """End the group of the worker: what is forked is to have no threads of it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _fork(action: Callable[[], None]) -> int:
    with warnings.catch_warnings():
        # Newer Pythons warn of threads; those that may be left here are of libraries, idle.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        logging.disable(logging.CRITICAL)
        action()
        os._exit(0)
    except BaseException:
        logging.disable(logging.NOTSET)
        logging.getLogger(__name__).exception("a forked save failed")
        os._exit(1)


def _wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


def _was_killed(status: int) -> bool:
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL, _RAISED), code
    return code == -signal.SIGKILL
