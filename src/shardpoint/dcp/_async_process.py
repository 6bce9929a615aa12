"""Saves in a process of their own, which never holds up the training's interpreter.

One process is started for each process that saves this way, at its first such save, and ends
with it. It gets the staged state through shared memory, and plans, writes and commits. It has
no process group and opens no port: when ranks have to exchange something, this side does that
for it, in the thread that waits for it.
"""

from __future__ import annotations

import json
import logging
import multiprocessing.spawn
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from shardpoint.coordination import Coordinator, portable
from shardpoint.dcp import _pending
from shardpoint.dcp._metadata_view import metadata_of
from shardpoint.dcp._saver_channel import (
    Channel,
    LostPeerError,
    dump_state,
    is_in_shared_memory,
    load_state,
)
from shardpoint.dcp._slabs import Slab
from shardpoint.dcp._stage_state import StateStager, memory_of
from shardpoint.dcp.filesystem import _StorageInfo
from shardpoint.dcp.metadata import Metadata
from shardpoint.errors import (
    NotSupportedError,
    PlanError,
    ShardpointError,
)
from shardpoint.index import CheckpointIndex

__all__ = ["save_in_process", "start_process"]

logger = logging.getLogger(__name__)

_SECONDS_TO_END = 5.0  # before a process that was told to end is killed
_CHILD_MARK = "SHARDPOINT_SAVER_PROCESS"
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from shardpoint.dcp._saver_process import main; main()"
)


class _Process:
    """The process that saves for this one; one thread at a time has it save."""

    def __init__(self) -> None:
        if os.environ.get(_CHILD_MARK) == "1":
            raise NotSupportedError(
                "the main script saves while the saving process imports it: put what it does "
                "under `if __name__ == '__main__':`"
            )
        self._main = _remembered_main()
        here, there = socket.socketpair()
        try:
            with there:
                arguments = [str(there.fileno()), str(os.getpid()), json.dumps(sys.path)]
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, *arguments],
                    pass_fds=[there.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, _CHILD_MARK: "1"},
                )
        except OSError as error:
            here.close()
            raise ShardpointError(f"the saving process could not be started: {error}") from error
        except BaseException:
            here.close()
            raise
        process = self._process
        self.channel = Channel(here, lambda: process.poll() is None)
        self._turn = threading.Lock()
        self._is_closed = False
        self._sent: set[int] = set()

    @property
    def is_usable(self) -> bool:
        return not self._is_closed and self._process.poll() is None

    def save(self, request: Any, state: dict[str, Any], coordinator: Coordinator) -> Metadata:
        """Have a state in shared memory saved."""
        message, slabs = _dumped(request, state)
        with self._turn:
            try:
                is_done, value = self._save(message, slabs, coordinator)
            except LostPeerError:
                raise self._death() from None
            except BaseException:
                # Half-way through an exchange: what came next would not be understood.
                self._end()
                raise
        if not is_done:
            raise value
        if isinstance(value, CheckpointIndex):
            return metadata_of(value, _StorageInfo)
        metadata: Metadata = value
        return metadata

    def _save(
        self, message: bytes, slabs: Mapping[int, Slab], coordinator: Coordinator
    ) -> tuple[bool, Any]:
        new = [(number, slab) for number, slab in slabs.items() if number not in self._sent]
        header = {
            "kept": list(slabs),
            "new": [(number, slab.size) for number, slab in new],
            "main": self._main,
            "folder": _folder(),
            "rank": coordinator.rank,
            "world_size": coordinator.world_size,
            "coordinator_rank": coordinator.coordinator_rank,
            "group": getattr(getattr(coordinator, "group", None), "name", ""),
            "log_level": logging.getLogger("shardpoint").getEffectiveLevel(),
        }
        self.channel.send(pickle.dumps(header))
        for _, slab in new:
            assert slab.file is not None
            self.channel.send_file(slab.file)
        self.channel.send(message)
        for _, slab in new:
            slab.map_pages()  # the next copy will want them
        is_done, value = self._serve(coordinator)
        # a save that failed may have failed at mapping them
        self._sent = set(slabs) if is_done else set()
        return is_done, value

    def _serve(self, coordinator: Coordinator) -> tuple[bool, Any]:
        """Do what the saving process asks for until it is done or has failed."""
        while True:
            kind, value = load_state(self.channel.receive(), None)
            if kind == "exchange":
                self.channel.send(pickle.dumps(_exchange(coordinator, *value)))
            elif kind == "log":
                logging.getLogger(value["name"]).handle(logging.makeLogRecord(value))
            else:
                return kind == "done", value

    def _death(self) -> ShardpointError:
        self._end()
        code = self._process.returncode
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return ShardpointError(
            f"the saving process {self._process.pid} ended {how} before the save was done; the "
            f"next save starts a new one"
        )

    def close(self) -> None:
        """End the process, which has nothing left to do."""
        with self._turn:
            self._end()

    def _end(self) -> None:
        self._is_closed = True
        self.channel.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """Let go of it in a forked process, to which it does not belong."""
        self.channel.forget()
        self._process.returncode = 0  # nothing that this process could wait for


def _refuse_own_memory(place: Any) -> None:
    if place is not None and os.fspath(place).startswith("memory://"):
        raise NotSupportedError(
            f"{place}: memory:// is the memory of one process, where nobody would find what the "
            f"saving process put there: save in the thread form"
        )


def _dumped(request: Any, state: dict[str, Any]) -> tuple[bytes, Mapping[int, Slab]]:
    try:
        return dump_state((request, state))
    except ShardpointError:
        raise
    except Exception as error:
        raise PlanError(
            "the planner, the storage writer or an object in the state cannot be pickled, which "
            f"saving in another process needs: {error}"
        ) from error


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed: only whole paths work then, as in this process
        return None


def _main_script() -> dict[str, Any]:
    found: dict[str, Any] = multiprocessing.spawn.get_preparation_data("shardpoint-saver")
    # only where the script is; not the keys and settings of multiprocessing itself
    names = ("init_main_from_name", "init_main_from_path", "sys_path", "sys_argv", "dir")
    main = {name: found[name] for name in names if name in found}
    if not os.path.exists(main.get("init_main_from_path", "")):
        # typed in, or piped to the interpreter: there is nothing that could be imported
        main.pop("init_main_from_path", None)
    return main


def _exchange(coordinator: Coordinator, name: str, payload: Any) -> tuple[str, Any]:
    try:
        return "value", getattr(coordinator, name)(payload)
    except Exception as error:  # noqa: BLE001  raised in the saving process, and comes back
        return "failed", portable(error)


_main: dict[str, Any] = {}


def _remembered_main() -> dict[str, Any]:
    """Return where the main script is, also when it has run to its end while its last save goes on.

    It has no name any more then.
    """
    global _main
    found = _main_script()
    if not _main or {"init_main_from_name", "init_main_from_path"} & found.keys():
        _main = found
    return _main


_process: _Process | None = None
_starting = threading.Lock()


def start_process() -> _Process:
    """Start the saving process if there is none; it takes seconds, which nobody waits for here."""
    global _process
    with _starting:
        if _process is None or not _process.is_usable:
            if _process is not None:
                # waits until the save that it died of, if any, has noticed
                _process.close()
            _process = _Process()
        return _process


def save_in_process(
    request: Any, staged: Callable[[], dict[str, Any]], coordinator: Coordinator
) -> Metadata:
    """Save with the help of the saving process; `coordinator` is guarded."""
    state = staged()
    _refuse_own_memory(request.place)
    process = start_process()
    # what a stager of the program copied to private memory is copied once more, out of the way
    if not all(is_in_shared_memory(t) for t in memory_of(state) if t.nbytes):
        stager = StateStager(shared=True, pinned=False, keep=False, type_check=False)
        state = stager.stage(state, non_blocking=False)
    return process.save(request, state, coordinator)


def _close_at_exit() -> None:
    global _process
    _pending.wait_at_exit()
    with _starting:
        process, _process = _process, None
    if process is not None:
        process.close()


def _forget() -> None:
    """A forked child is not the one that the saving process saves for."""
    global _process, _starting
    _starting = threading.Lock()
    process, _process = _process, None
    if process is not None:
        process.forget()


os.register_at_fork(after_in_child=_forget)
_pending.at_exit(_close_at_exit)
