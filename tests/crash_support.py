"""Interposes on every system call of the local storage: to fail, kill, shorten or note any."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch

import shardpoint.dcp as dcp
from shardpoint.errors import CheckpointNotFoundError

__all__ = [
    "LOOKS",
    "NATIVE",
    "NOTHING",
    "STATES",
    "Call",
    "Failer",
    "Job",
    "Killer",
    "Through",
    "Trace",
    "blank",
    "files_of",
    "interposed",
    "named_files",
    "save",
    "short_transfers",
    "state_at",
]

NOTHING = "nothing"
_SPACE = frozenset({"make folder", "create", "reserve", "write"})
LOOKS = frozenset({"stat", "list", "open folder", "open", "read"})


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
        self.all_failed: list[Call] = []

    def __call__(self, call: Call, do: Callable[[], Any]) -> Any:
        if call.kind in self._skip:
            return do()
        number = self.number()
        if number != self._at and not (self._mode == "from then on" and number > self._at):
            return do()
        if number == self._at:
            self.failed = call
        self.all_failed.append(call)
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
    """Return the files of the checkpoint that counts: its metadata, index, and what they name."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    files = {info.relative_path for info in metadata.storage_data.values()}
    if not (folder / ".metadata").exists():
        return {"__0.metadata", *files}
    checksum = zlib.crc32((folder / ".metadata").read_bytes())
    return {".metadata", f".shardpoint-{checksum:08x}.index", *files}


STATES = {"old": make_state(1), "new": make_state(2), "next": make_state(3)}


class Job(Protocol):
    """A kind of save that is killed or fails; its states are called old, new and next."""

    def save(self, place: Path, name: str, options: dict[str, Any]) -> None:
        """Save a state from this process alone."""

    def save_part(self, place: Path, name: str, rank: int, options: dict[str, Any]) -> None:
        """Save what one of two ranks has of a state."""

    def found(self, place: Path) -> str:
        """Return which state is there; see `state_at`."""

    def garbage(self, place: Path) -> tuple[str, ...]:
        """Return the files beyond those of the checkpoint that counts."""


class _Native:
    """Saves of torch's format."""

    def save(self, place: Path, name: str, options: dict[str, Any]) -> None:
        save(place, STATES[name], **options)

    def save_part(self, place: Path, name: str, rank: int, options: dict[str, Any]) -> None:
        state = STATES[name]
        mine = {"small": state["small"], "objects": state["objects"], "step": state["step"]}
        if rank:
            mine = {"large": state["large"], "half": state["half"], "small": state["small"]}
        dcp.save(mine, checkpoint_id=place, **options)

    def found(self, place: Path) -> str:
        return state_at(place, STATES)

    def garbage(self, place: Path) -> tuple[str, ...]:
        files = {file.name for file in place.iterdir()} if place.exists() else set()
        named = named_files(place) if self.found(place) != NOTHING else set()
        return tuple(sorted(files - named))


NATIVE: Job = _Native()


class Left(Protocol):
    """What a fault left: see `state_at` for what was found after it and after one more save."""

    found: str
    found_next: str
    garbage: tuple[str, ...]


def check_turn(outcomes: Sequence[Left], before: str) -> None:
    """Check that the old state was found up to one call, and the new one from there on."""
    found = [outcome.found for outcome in outcomes]
    turn = found.index("new")
    assert 0 < turn < len(found)
    assert found == [before] * turn + ["new"] * (len(found) - turn)
    assert [outcome.found_next for outcome in outcomes] == ["next"] * len(outcomes)
    assert [outcome.garbage for outcome in outcomes] == [()] * len(outcomes)
