"""Interposes on every system call of a save: kills, fails, shortens and records at any of them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import random
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import shardpoint.dcp as dcp
from shardpoint.errors import CheckpointNotFoundError

__all__ = [
    "Call",
    "Failer",
    "Killer",
    "Outcome",
    "PowerLoss",
    "Trace",
    "blank",
    "files_of",
    "interposed",
    "kill_everywhere",
    "kill_one_of_two",
    "make_state",
    "named_files",
    "save",
    "short_transfers",
    "state_at",
]

NOTHING = "nothing"
_SPACE = frozenset({"make folder", "create", "reserve", "write"})
_LOOKS = frozenset({"stat", "list", "open folder", "open", "read"})


@dataclass(frozen=True)
class Call:
    """One system call of the storage: what, on which path, to which other path, with what."""

    kind: str
    path: str
    target: str = ""
    arguments: tuple[Any, ...] = ()


Through = Callable[[Call, Callable[[], Any]], Any]
"""Given a call and what does it: does it, or something else."""


class _System:
    """Stands in for the module `os` in the storage."""

    def __init__(self, through: Through) -> None:
        self._through = through
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        kind = "create" if flags & os.O_CREAT else "open"
        if flags & os.O_DIRECTORY:
            kind = "open folder"
        descriptor = self._through(Call(kind, path), lambda: os.open(path, flags, mode))
        self._paths[descriptor] = path
        return int(descriptor)

    def close(self, descriptor: int) -> None:
        path = self._paths.pop(descriptor, "")
        self._through(Call("close", path), lambda: os.close(descriptor))

    def fsync(self, descriptor: int) -> None:
        # Durability shows in no test that only kills a process; real syncs would be its time.
        kind = "sync folder" if os.path.isdir(self._paths[descriptor]) else "sync"
        self._through(Call(kind, self._paths[descriptor]), lambda: None)

    def pwritev(self, descriptor: int, buffers: Any, offset: int) -> int:
        call = Call("write", self._paths[descriptor], "", (descriptor, buffers, offset))
        return int(self._through(call, lambda: os.pwritev(descriptor, buffers, offset)))

    def preadv(self, descriptor: int, buffers: Any, offset: int) -> int:
        call = Call("read", self._paths[descriptor], "", (descriptor, buffers, offset))
        return int(self._through(call, lambda: os.preadv(descriptor, buffers, offset)))

    def posix_fallocate(self, descriptor: int, offset: int, size: int) -> None:
        call = Call("reserve", self._paths[descriptor])
        self._through(call, lambda: os.posix_fallocate(descriptor, offset, size))

    def replace(self, path: str, target: str) -> None:
        self._through(Call("rename", path, target), lambda: os.replace(path, target))

    def unlink(self, path: str) -> None:
        self._through(Call("remove", path), lambda: os.unlink(path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._through(Call("make folder", path), lambda: os.makedirs(path, exist_ok=exist_ok))

    def scandir(self, path: str) -> Any:
        return self._through(Call("list", path), lambda: os.scandir(path))

    def stat(self, path: str, *, follow_symlinks: bool = True) -> Any:
        return self._through(
            Call("stat", path), lambda: os.stat(path, follow_symlinks=follow_symlinks)
        )


@contextlib.contextmanager
def interposed(through: Through) -> Iterator[None]:
    """Have every system call of the local storage pass `through`."""
    system = _System(through)
    with (
        patch("shardpoint.storage.local.os", system),
        patch("shardpoint.storage._files.os", system),
    ):
        yield


class _Counted:
    """Numbers the calls, in whatever order threads make them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def number(self) -> int:
        with self._lock:
            self._count += 1
            return self._count - 1


class Trace:
    """Does every call and notes it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, call: Call, do: Callable[[], Any]) -> Any:
        self.calls.append(call)
        return do()


class Killer(_Counted):
    """Kills the process right before one call; with `torn`, in the middle of it if it writes.

    With `skip`, calls of those kinds are not counted.
    """

    def __init__(self, at: int, *, torn: bool = False, skip: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._at = at
        self._torn = torn
        self._skip = skip

    def __call__(self, call: Call, do: Callable[[], Any]) -> Any:
        if call.kind not in self._skip and self.number() == self._at:
            if self._torn and call.kind == "write":
                _transfer_part(os.pwritev, call, 0.5)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return do()


class Failer(_Counted):
    """Fails one call: before it is done, after it was done, or it and all that follow.

    A close always happens, as in Linux, where the descriptor is gone also on an error. Only
    calls without a result fail after they were done: one that made a descriptor and did
    not hand it out would leave it, whatever the caller does. With `skip`, calls of those
    kinds are not counted and never fail.
    """

    MODES = ("before", "after", "from then on")
    _AFTER = frozenset(
        {"make folder", "reserve", "write", "sync", "sync folder", "rename", "remove", "close"}
    )

    def __init__(self, at: int, mode: str, *, skip: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._skip = skip
        self._at = at
        self._mode = mode
        self.failed: Call | None = None

    def __call__(self, call: Call, do: Callable[[], Any]) -> Any:
        if call.kind in self._skip:
            return do()
        number = self.number()
        if number != self._at and not (self._mode == "from then on" and number > self._at):
            return do()
        if number == self._at:
            self.failed = call
        if call.kind == "close" or (self._mode == "after" and call.kind in self._AFTER):
            do()
        code = errno.ENOSPC if call.kind in _SPACE else errno.EIO
        raise OSError(code, os.strerror(code), call.path)


def short_transfers(seed: int, most: int) -> Through:
    """Let every read and write move only some of the bytes, at most `most` of them."""
    chance = random.Random(seed)
    lock = threading.Lock()

    def through(call: Call, do: Callable[[], Any]) -> Any:
        if call.kind not in ("read", "write"):
            return do()
        total = sum(map(len, call.arguments[1]))
        with lock:
            count = chance.randint(1, min(most, total))
        function = os.pwritev if call.kind == "write" else os.preadv
        return _transfer_part(function, call, count / total)

    return through


def _transfer_part(function: Callable[..., int], call: Call, share: float) -> int:
    descriptor, buffers, offset = call.arguments
    left = max(1, round(share * sum(map(len, buffers))))
    some = []
    for buffer in buffers:
        some.append(buffer[:left])
        left -= len(some[-1])
        if not left:
            break
    return function(descriptor, some, offset)


def make_state(seed: int) -> dict[str, Any]:
    """Return a state whose every value depends on the seed: also a large and a few small ones."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.rand(150_000, generator=generator, dtype=torch.float64),
        "small": {f"{n}": torch.rand(n, 3, generator=generator) for n in range(5)},
        "half": torch.rand(7, generator=generator).bfloat16(),
        "step": torch.tensor(seed),
        "objects": {"seed": seed, "list": [seed, "x", None], "text": "s" * seed},
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def blank(value: Any) -> Any:
    """Return the same state with nothing in it, to load into."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: blank(part) for key, part in value.items()}
    return None


def save(folder: Path, state: dict[str, Any], **options: Any) -> None:
    """Save from this process alone; `options` are the writer's, and ``use_collectives``."""
    use_collectives = options.pop("use_collectives", True)
    writer = dcp.FileSystemWriter(folder, **options)
    dcp.save(state, storage_writer=writer, no_dist=True, use_collectives=use_collectives)


def state_at(folder: Path, states: dict[str, dict[str, Any]]) -> str:
    """Return which of the states is there, `NOTHING`, or what else was found."""
    target = blank(next(iter(states.values())))
    try:
        dcp.load(target, checkpoint_id=folder, no_dist=True)
    except dcp.CheckpointException as error:
        if isinstance(error.causes[0], CheckpointNotFoundError):
            return NOTHING
        return f"broken: {error}"
    for name, state in states.items():
        if _equal(state, target):
            return name
    return "a mixture"


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file; empty where there is no folder."""
    if not folder.exists():
        return {}
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def named_files(folder: Path) -> set[str]:
    """Return the files of the checkpoint that counts: its metadata and what that names."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    name = ".metadata" if (folder / ".metadata").exists() else "__0.metadata"
    return {name, *(info.relative_path for info in metadata.storage_data.values())}


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


STATES = {"old": make_state(1), "new": make_state(2), "next": make_state(3)}


def kill_everywhere(folder: str, overwrite: bool, torn: bool, options: dict[str, Any]) -> Any:
    """Run saves that are killed at one call each; return the kinds of calls and the outcomes.

    Runs in a worker process, which forks for every save: torch is imported already.
    """
    _leave_group()
    path = Path(folder)
    trace = Trace()
    _prepare(path / "traced", overwrite, options)
    with interposed(trace):
        save(path / "traced", STATES["new"], **options)
    outcomes = []
    for number in range(len(trace.calls) + 1):
        place = path / f"{number}"
        _prepare(place, overwrite, options)
        killer = Killer(number, torn=torn)
        child = _fork(lambda p=place, k=killer: _save_through(p, STATES["new"], options, k))
        status = _wait(child)
        outcomes.append(_outcome(place, number, _was_killed(status), options))
        shutil.rmtree(place)
    return [call.kind for call in trace.calls], outcomes


def _prepare(place: Path, overwrite: bool, options: dict[str, Any]) -> None:
    """Lay an old checkpoint there; it is copied, so that making it takes no time."""
    if not overwrite:
        return
    model = place.parent / "old"
    if not model.exists():
        with interposed(Trace()):
            save(model, STATES["old"], **options)
    shutil.copytree(model, place)


def _save_through(
    place: Path, state: dict[str, Any], options: dict[str, Any], through: Through
) -> None:
    with interposed(through):
        save(place, state, **options)


def _outcome(
    place: Path, number: int, killed: bool, options: dict[str, Any], raised: bool = False
) -> Outcome:
    found = state_at(place, STATES)
    with interposed(Trace()):
        save(place, STATES["next"], **options)
    return Outcome(
        call=number,
        killed=killed,
        found=found,
        found_next=state_at(place, STATES),
        garbage=tuple(sorted({file.name for file in place.iterdir()} - named_files(place))),
        raised=raised,
    )


_TWO_RANKS_SKIP = _LOOKS | {"close"}


def kill_one_of_two(folder: str, victim: int, torn: bool) -> Any:
    """As `kill_everywhere`, an overwrite by two ranks of which one is killed."""
    _leave_group()
    path = Path(folder)
    outcomes = []
    for number in itertools.count():
        place = path / f"{number}"
        _prepare(place, True, {})
        store = path / f"{number}.store"
        children = [
            _fork(
                lambda r=rank, s=store, p=place, n=number: _save_as_rank(
                    p, s, r, Killer(n if r == victim else -1, torn=torn, skip=_TWO_RANKS_SKIP)
                )
            )
            for rank in range(2)
        ]
        statuses = [_wait(child) for child in children]
        killed = _was_killed(statuses[victim])
        survivor = os.waitstatus_to_exitcode(statuses[1 - victim])
        assert survivor in (0, _RAISED), survivor
        outcomes.append(_outcome(place, number, killed, {}, raised=survivor == _RAISED))
        if not killed:
            return outcomes
    raise AssertionError("not reached")


_RAISED = 3


def _save_as_rank(place: Path, store: Path, rank: int, killer: Killer) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    state = STATES["new"]
    mine = {"small": state["small"], "objects": state["objects"], "step": state["step"]}
    if rank:
        mine = {"large": state["large"], "half": state["half"], "small": state["small"]}
    try:
        with interposed(killer):
            dcp.save(mine, checkpoint_id=place)
    except dcp.CheckpointException:
        os._exit(_RAISED)
    except Exception as error:
        if "lost contact" in str(error):
            os._exit(_RAISED)
        raise
    os._exit(0)  # the group is left as it is: the other rank may be gone


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


class PowerLoss:
    """Models what a disk may hold if the power goes: only what was synced is sure to be there.

    Between two syncs of a folder any of its changes may have become durable without the
    others; of a file that was not synced, all or nothing may be there. After each call
    `states` has what may be found: names with contents.

    Parameters
    ----------
    folder
        The checkpoint; what it holds now is durable.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.realpath(folder)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._synced: dict[int, bytes] = {}
        self._durable: dict[str, int] = {}
        for name, content in files_of(folder).items():
            number = next(self._numbers)
            self._durable[name] = number
            self._synced[number] = content
        self._names = dict(self._durable)
        self._pending: list[Call] = []
        self._numbers_of: list[int] = []
        self._folder_pending = False
        self.states: dict[frozenset[tuple[str, bytes]], str] = {}
        self.last: list[dict[str, bytes]] = []
        self.calls = 0

    @property
    def folder_is_durable(self) -> bool:
        """Whether the folder's own name is sure to be there."""
        return not self._folder_pending

    def __call__(self, call: Call, do: Callable[[], Any]) -> Any:
        with self._lock:
            result = do()
            self._note(call)
            if call.kind not in _LOOKS:
                self.calls += 1
                self.last = list(self._possible())
                for state in self.last:
                    self.states.setdefault(frozenset(state.items()), f"{call.kind} {call.path}")
            return result

    def _note(self, call: Call) -> None:
        name = os.path.basename(call.path)
        if call.kind == "make folder":
            self._folder_pending = True
        elif call.kind == "sync folder":
            if call.path == os.path.dirname(self._folder):
                self._folder_pending = False
            elif call.path == self._folder:
                self._durable = dict(self._names)
                self._pending, self._numbers_of = [], []
        elif call.kind == "sync":
            self._synced[self._names[name]] = Path(call.path).read_bytes()
        elif call.kind in ("create", "rename", "remove"):
            if call.kind == "create":
                number = self._names[name] = next(self._numbers)
            else:
                number = self._names.pop(name)
            if call.kind == "rename":
                self._names[os.path.basename(call.target)] = number
            self._pending.append(call)
            self._numbers_of.append(number)

    def _possible(self) -> Iterator[dict[str, bytes]]:
        size = len(self._pending)
        for chosen in itertools.product((False, True), repeat=size):
            names = dict(self._durable)
            for call, number, done in zip(self._pending, self._numbers_of, chosen, strict=True):
                if not done:
                    continue
                name = os.path.basename(call.path)
                names.pop(name, None)
                if call.kind == "create":
                    names[name] = number
                elif call.kind == "rename":
                    names[os.path.basename(call.target)] = number
            for kept in (False, True):
                yield {name: self._content(number, kept) for name, number in names.items()}

    def _content(self, number: int, kept: bool) -> bytes:
        if number in self._synced:
            return self._synced[number]
        if kept:
            for name, other in self._names.items():
                if other == number:
                    return Path(self._folder, name).read_bytes()
        return b""
