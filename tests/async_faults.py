"""Asynchronous saves whose process is killed, or whose storage fails, at one call each.

The functions run in workers of the rank pool, which are the training processes here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import gc
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch.distributed as dist

import shardpoint.dcp as dcp
from crash_support import (
    LOOKS,
    STATES,
    Call,
    Failer,
    Killer,
    Through,
    Trace,
    files_of,
    interposed,
    named_files,
    save,
    state_at,
)
from shardpoint.dcp import _async_process, _saver_process
from shardpoint.dcp.state_dict_saver import AsyncCheckpointerType

__all__ = [
    "Fault",
    "FaultyPlanner",
    "Outcome",
    "fail_everywhere",
    "forked_savers",
    "held",
    "kill_saver_of_two",
    "kill_savers",
    "kill_training",
    "more_than",
    "odd_moments",
]

PROCESS = AsyncCheckpointerType.PROCESS
_LIMIT = 60.0  # seconds after which something hangs
_CHANGES_ONLY = LOOKS | {"close"}


@dataclass(frozen=True)
class Fault:
    """What happens at one call of the storage, in the process that saves.

    Attributes
    ----------
    kind
        ``"kill"``, ``"kill the training"``, or a mode of `Failer`.
    at
        The number of the call.
    notes
        A file for the kinds of the calls; those that failed with a mark.
    torn, skip
        See `Killer`.
    """

    kind: str
    at: int
    notes: str
    torn: bool = False
    skip: frozenset[str] = frozenset()

    def through(self) -> Through:
        inner: Through
        if self.kind == "kill":
            inner = Killer(self.at, torn=self.torn, skip=self.skip)
        elif self.kind == "kill the training":
            inner = _Orphan(self.at)
        else:
            inner = Failer(self.at, self.kind, skip=self.skip)

        def through(call: Call, do: Callable[[], Any]) -> Any:
            if call.kind not in self.skip:
                self._note(call.kind)
            try:
                return inner(call, do)
            except OSError:
                if inner is not None and call in getattr(inner, "all_failed", ()):
                    self._note(f"!{call.kind}")
                raise

        return through

    def _note(self, text: str) -> None:
        with open(self.notes, "a") as file:
            file.write(f"{text}\n")

    def calls(self) -> list[str]:
        """Return the kinds of the calls that were made."""
        path = Path(self.notes)
        return path.read_text().splitlines() if path.exists() else []


class _Orphan:
    """Kills the parent of the process right before one call, and goes on."""

    def __init__(self, at: int) -> None:
        self._count = itertools.count()
        self._at = at

    def __call__(self, call: Call, do: Callable[[], Any]) -> Any:
        if next(self._count) == self._at:
            parent = os.getppid()
            os.kill(parent, signal.SIGKILL)
            while os.getppid() == parent:
                time.sleep(0.001)
        return do()


_armed = contextlib.ExitStack()


def _arm(through: Through) -> dcp.DefaultSavePlanner:
    _armed.close()
    _armed.enter_context(interposed(through))
    return dcp.DefaultSavePlanner()


def _arm_with(fault: Fault | None) -> dcp.DefaultSavePlanner:
    return _arm(Trace() if fault is None else fault.through())


class FaultyPlanner(dcp.DefaultSavePlanner):
    """Becomes a plain one, and interposes, in the process that unpickles it: the one that saves."""

    def __init__(self, fault: Fault | None) -> None:
        super().__init__()
        self._fault = fault

    def __reduce__(self) -> Any:
        return _arm_with, (self._fault,)


class _Forked:
    """Stands in for `subprocess.Popen`: the saving process is a fork, which has torch already."""

    ends: Any = threading.local()

    def __init__(self, command: Sequence[str], *, env: dict[str, str], **_: Any) -> None:
        self.returncode: int | None = None
        self._lock = threading.Lock()
        other_end = _Forked.ends.last
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, in newer Pythons
            self.pid = os.fork()
        if self.pid:
            return
        try:
            gc.freeze()
            gc.disable()  # what a save holds it has to let go by itself
            os.close(other_end)  # as a new program would
            os.environ.update(env)
            sys.argv = ["-c", *command[3:]]
            _saver_process.main()
            os._exit(0)
        except BaseException:
            logging.getLogger(__name__).exception("the saving process failed")
            os._exit(3)

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                child, status = os.waitpid(self.pid, os.WNOHANG)
                if child:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float = _LIMIT) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("saver", timeout)
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@contextlib.contextmanager
def forked_savers(wanted: bool = True) -> Iterator[None]:
    """Have saving processes start as forks, in milliseconds instead of seconds."""
    if not wanted:
        yield
        return

    def socketpair() -> Any:
        here, there = real.socketpair()
        _Forked.ends.last = here.fileno()
        return here, there

    real = _async_process.socket
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    with (
        patch.object(_async_process, "subprocess", SimpleNamespace(Popen=_Forked, **names)),
        patch.object(_async_process, "socket", SimpleNamespace(socketpair=socketpair)),
    ):
        yield


def begin(place: Path, state: dict[str, Any], planner: Any = None, **options: Any) -> Any:
    """Begin a save in the saving process."""
    options = {"no_dist": True, "async_checkpointer_type": PROCESS, **options}
    return dcp.async_save(state, checkpoint_id=place, planner=planner, **options)


def error_of(action: Callable[[], Any]) -> str:
    """Return the message of the exception that is raised, or nothing."""
    try:
        action()
    except dcp.CheckpointException as error:
        return str(error)
    return ""


def ended(future: Any) -> None:
    """Wait for a future without asking it, as a program that forgets it."""
    _, waiting = concurrent.futures.wait([future], _LIMIT)
    assert not waiting, "the save hangs"


def close_saver() -> None:
    """End this process's saving process."""
    process = _async_process._process
    if process is not None:
        process.close()


def prepare(place: Path, overwrite: bool) -> None:
    """Lay an old checkpoint there; it is copied, so that making it takes no time."""
    if not overwrite:
        return
    model = place.parent / "old"
    if not model.exists():
        with interposed(Trace()):
            save(model, STATES["old"])
    shutil.copytree(model, place)


def garbage(place: Path) -> tuple[str, ...]:
    """Return the files that belong to no checkpoint."""
    return tuple(sorted(files_of(place).keys() - named_files(place)))


@dataclass(frozen=True)
class Outcome:
    """What one fault led to.

    Attributes
    ----------
    calls
        The kinds of calls until then.
    saver
        The number of the saving process.
    told, told_next
        What the future raised, and the save after it.
    found, found_next
        See `state_at`: after it, and after one more save.
    garbage
        Files beyond those of the checkpoint, after that save.
    left
        What the saver held more than before, or how it ended.
    untouched
        Whether all files are as they were before.
    """

    calls: list[str]
    saver: int
    told: str
    told_next: str
    found: str
    found_next: str
    garbage: tuple[str, ...]
    left: Any = None
    untouched: bool = False


def kill_savers(
    folder: str, overwrite: bool, torn: bool, stride: int, anew: bool
) -> tuple[list[Outcome], dict[str, int]]:
    """Kill the saving process before every `stride`-th call of a save.

    Nobody asks the future before the next save. Also return what this process holds more in the
    end.
    """
    outcomes: list[Outcome] = []
    before: dict[str, int] = {}
    with forked_savers(not anew):
        for number in itertools.count(0, stride):
            place = Path(folder, str(number))
            prepare(place, overwrite)
            fault = Fault("kill", number, f"{place}.calls", torn=torn)
            future = begin(place, STATES["new"], FaultyPlanner(fault))
            ended(future)
            saver = _async_process._process._process.pid  # type: ignore[union-attr]
            found = state_at(place, STATES)
            again = partial(begin, place, STATES["next"], FaultyPlanner(None))
            told_next = error_of(lambda a=again: a().result(_LIMIT))
            told = error_of(future.result)
            if told:
                again().result(_LIMIT)
            outcomes.append(
                Outcome(
                    calls=fault.calls(),
                    saver=saver,
                    told=told,
                    told_next=told_next,
                    found=found,
                    found_next=state_at(place, STATES),
                    garbage=garbage(place),
                    left=Path("/proc", str(saver)).exists() if told else None,
                )
            )
            shutil.rmtree(place)
            before = before or held()
            if not told:
                more = more_than(before)
                close_saver()
                return outcomes, more
    raise AssertionError("not reached")


def kill_saver_of_two(folder: str, victim: int, overwrite: bool, stride: int) -> list[Outcome]:
    """Kill one of two ranks' savers, where it changes something; see `kill_savers`."""
    rank = dist.get_rank()
    new = {part: STATES["new"][part] for part in ("small", "objects", "step")}
    if rank:
        new = {part: STATES["new"][part] for part in ("large", "half", "small")}
    outcomes: list[Outcome] = []
    with forked_savers():
        for number in itertools.count(0, stride):
            place = Path(folder, str(number))
            if rank == 0:
                prepare(place, overwrite)
            dist.barrier()
            place.mkdir(exist_ok=True)
            notes = f"{place}.calls"
            fault = Fault("kill", number, notes, torn=True, skip=_CHANGES_ONLY)
            planner = FaultyPlanner(fault if rank == victim else None)
            future = begin(place, new, planner, no_dist=False)
            ended(future)
            saver = _async_process._process._process.pid  # type: ignore[union-attr]
            dist.barrier()
            found = state_at(place, STATES)
            dist.barrier()
            # The error is every rank's: none of them begins the next save.
            again = partial(begin, place, STATES["next"], FaultyPlanner(None), no_dist=False)
            told_next = error_of(lambda a=again: a().result(_LIMIT))
            told = error_of(future.result)
            if told:
                again().result(_LIMIT)
            found_next, extra = state_at(place, STATES), garbage(place)
            outcomes.append(
                Outcome(fault.calls(), saver, told, told_next, found, found_next, extra)
            )
            dist.barrier()
            if not told:
                close_saver()
                return outcomes
    raise AssertionError("not reached")


def kill_training(folder: str, overwrite: bool, stride: int, anew: bool) -> list[Outcome]:
    """Kill the training process before every `stride`-th call of the save that goes on."""
    _adopt_orphans()
    if dist.is_initialized():
        dist.destroy_process_group()  # what is forked is to have no threads of it
    outcomes: list[Outcome] = []
    for number in itertools.count(0, stride):
        place = Path(folder, str(number))
        prepare(place, overwrite)
        fault = Fault("kill the training", number, f"{place}.calls")
        pids = place.with_suffix(".saver")
        training = os.fork()
        if training == 0:
            _train(place, fault, pids, anew)
        code = os.waitstatus_to_exitcode(os.waitpid(training, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        saver = int(pids.read_text())
        left = _end_of(saver) if code else None
        found = state_at(place, STATES)
        with interposed(Trace()):
            save(place, STATES["next"])
        told = f"killed by signal {-code}" if code else ""
        found_next, extra = state_at(place, STATES), garbage(place)
        outcomes.append(Outcome(fault.calls(), saver, told, "", found, found_next, extra, left))
        shutil.rmtree(place)
        if not code:
            return outcomes
    raise AssertionError("not reached")


def _train(place: Path, fault: Fault, pids: Path, anew: bool) -> None:
    try:
        with forked_savers(not anew):
            process = _async_process.start_process()
            pids.write_text(str(process._process.pid))
            begin(place, STATES["new"], FaultyPlanner(fault)).result(_LIMIT)
            close_saver()
            os._exit(0)
    except BaseException:
        logging.getLogger(__name__).exception("the training failed")
        os._exit(3)


def _adopt_orphans() -> None:
    """Become the parent of processes whose parent dies, to hear of their end."""
    adopt = 36  # PR_SET_CHILD_SUBREAPER
    assert ctypes.CDLL(None).prctl(adopt, 1, 0, 0, 0) == 0


def _end_of(child: int) -> int:
    """Wait for a child; return its exit code."""
    deadline = time.monotonic() + _LIMIT
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    raise AssertionError(f"the saving process {child} lingers")


def fail_everywhere(
    folder: str, form: str, mode: str, overwrite: bool, stride: int
) -> tuple[list[Outcome], dict[str, int]]:
    """Fail every `stride`-th call of a save; nobody asks the future before the next save."""
    kind = AsyncCheckpointerType(form)
    outcomes: list[Outcome] = []
    before: dict[str, int] = {}
    with forked_savers():
        for number in itertools.count(0, stride):
            place = Path(folder, str(number))
            prepare(place, overwrite)
            files = files_of(place)
            fault = Fault(mode, number, f"{place}.calls")
            saver = 0
            if kind is PROCESS:
                future = begin(place, STATES["new"], FaultyPlanner(fault))
                ended(future)
                saver = _async_process._process._process.pid  # type: ignore[union-attr]
                usual = outcomes[0].left if outcomes else None
                left = _settled(lambda n=saver: _held_by(n), usual)
            else:
                with interposed(fault.through()):
                    future = begin(place, STATES["new"], async_checkpointer_type=kind)
                    ended(future)
                left = None
            after_it = files_of(place)
            found = state_at(place, STATES)
            planner = FaultyPlanner(None) if kind is PROCESS else None

            def again(p: Path = place, planner: Any = planner) -> Any:
                with interposed(Trace()):
                    future = begin(p, STATES["next"], planner, async_checkpointer_type=kind)
                    return future.result(_LIMIT)

            told_next = error_of(again)
            told = error_of(future.result)
            if told:
                again()
            outcomes.append(
                Outcome(
                    calls=fault.calls(),
                    saver=saver,
                    told=told,
                    told_next=told_next,
                    found=found,
                    found_next=state_at(place, STATES),
                    garbage=garbage(place),
                    left=left,
                    untouched=after_it == files,
                )
            )
            shutil.rmtree(place)
            _settle_threads()
            before = before or held()
            if not any(call.startswith("!") for call in fault.calls()):
                more = more_than(before)
                close_saver()
                return outcomes, more
    raise AssertionError("not reached")


class _Signalled(dcp.DefaultSavePlanner):
    """Sends the saving process what schedulers send to all processes of a job."""

    def create_local_plan(self) -> Any:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), name)
        return super().create_local_plan()


class _Talkative(dcp.DefaultSavePlanner):
    """Logs from several threads while the save goes on."""

    def finish_plan(self, new_plan: Any) -> Any:
        def talk() -> None:
            for _ in range(200):
                logging.getLogger("shardpoint.tests").warning("x" * 5000)

        threads = [threading.Thread(target=talk) for _ in range(4)]
        for thread in threads:
            thread.start()
        self._threads = threads
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item: Any) -> Any:
        for thread in self._threads:
            thread.join()
        return super().resolve_data(write_item)


def odd_moments(folder: str) -> dict[str, Any]:
    """Save under circumstances that are rare; return what came of each."""
    found: dict[str, Any] = {}

    def attempt(planner: Any, name: str = "odd") -> str:
        return error_of(lambda: begin(Path(folder, name), STATES["new"], planner).result(_LIMIT))

    with forked_savers():
        found["signals"] = attempt(_Signalled())
        heard = _Heard()
        logging.getLogger("shardpoint.tests").addHandler(heard)
        found["records"] = (attempt(_Talkative()), heard.count)
        logging.getLogger("shardpoint.tests").removeHandler(heard)
        logger = logging.getLogger("shardpoint.dcp.state_dict_saver")
        logger.setLevel(logging.INFO)
        logging.getLogger("shardpoint").setLevel(logging.INFO)
        logger.addFilter(_refuse)
        found["half-way"] = attempt(None)
        logger.removeFilter(_refuse)
        logging.getLogger("shardpoint").setLevel(logging.NOTSET)
        found["after that"] = attempt(None, "after")
        found["state"] = state_at(Path(folder, "after"), STATES)
        process = _async_process._process
        assert process is not None
        os.kill(process._process.pid, signal.SIGKILL)
        process._process.wait()
        barrier = threading.Barrier(8)

        def start() -> Any:
            barrier.wait(_LIMIT)
            return _async_process.start_process()

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            started = [pool.submit(start) for _ in range(8)]
        found["started"] = len({id(future.result()) for future in started})
        found["children"] = held()["children"]
        close_saver()
    return found


class _Heard(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        assert record.getMessage() == "x" * 5000
        self.count += 1


def _refuse(record: logging.LogRecord) -> bool:
    raise ValueError("a filter of the program fails")


def _settle_threads() -> None:
    """Wait for threads of saves that are done: a future is told before its thread ends."""
    for thread in threading.enumerate():
        if thread.name.startswith("shardpoint-async-save"):
            thread.join(_LIMIT)


def _held_by(process: int) -> tuple[list[str], int]:
    """Return what a process's open descriptors lead to, and how many threads it has."""
    place = Path("/proc", str(process))
    links = []
    for entry in os.listdir(place / "fd"):
        with contextlib.suppress(OSError):  # the one with which they are listed
            links.append(os.readlink(place / "fd" / entry))
    return sorted(links), len(os.listdir(place / "task"))


_T = TypeVar("_T")


def _settled(look: Callable[[], _T], wanted: _T | None) -> _T:
    """Look until what is wanted is found, or for some seconds.

    The system still lists a thread for a moment when Python has seen its end.
    """
    found = look()
    for _ in range(200):
        if found == wanted:
            break
        before = found
        time.sleep(0.02)
        found = look()
        if wanted is None and found == before:
            break
    return found


def more_than(before: dict[str, int], process: int | None = None) -> dict[str, int]:
    """Return how much more than before a process holds, when its threads have ended."""

    def look() -> dict[str, int]:
        return {name: count - before[name] for name, count in held(process).items()}

    def counts() -> list[int]:
        return [max(0, count) for name, count in look().items() if name != "kilobytes"]

    _settled(counts, [0] * (len(before) - 1))
    return look()


def held(process: int | None = None) -> dict[str, int]:
    """Return how much this process, or another, holds of whatever could leak."""
    if process is None:
        _settle_threads()
        gc.collect()
    place = Path("/proc", str(process or os.getpid()))
    links, threads = _held_by(process or os.getpid())
    tasks = (place / "task").iterdir()
    children = [(task / "children").read_text().split() for task in tasks]
    pages = int((place / "statm").read_text().split()[1])
    return {
        "descriptors": len(links),
        "memory files": sum("shardpoint-staging" in link for link in links),
        "shared mappings": sum(
            "/dev/shm/" in line or "/memfd:" in line
            for line in (place / "maps").read_text().splitlines()
        ),
        "TCP sockets": len(_tcp_sockets() & set(links)),
        "threads": threads,
        "children": sum(map(len, children)),
        "kilobytes": pages * (os.sysconf("SC_PAGE_SIZE") // 1024),
    }


def _tcp_sockets() -> set[str]:
    """Return all of the system, as descriptors name them."""
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net", table)
        if path.exists():
            for line in path.read_text().splitlines()[1:]:
                found.add(f"socket:[{line.split()[9]}]")
    return found
