"""A training job of several processes on this machine: started, listened to, killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["DemoError", "Job"]

_TRAINING = Path(__file__).with_name("training.py")


class DemoError(Exception):
    """Something did not come out as it must; the message says what."""


class Job:
    """The ranks of one job: processes of one process group, with rank 0's events.

    Parameters
    ----------
    folder
        A new folder for the job's own files: one log a rank, and the file the ranks meet in.
    world_size
        How many ranks.
    arguments
        For `training.py`.
    seconds
        After this time the job is killed, and `events` ends with an error.
    """

    def __init__(
        self, folder: Path, *, world_size: int, arguments: list[str], seconds: float
    ) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._processes: list[subprocess.Popen[str]] = []
        self._overdue = threading.Timer(seconds, self._kill_group)
        self._seconds = seconds
        self._timed_out = False
        rendezvous = ["--rendezvous", str(folder / "rendezvous")]
        try:
            for rank in range(world_size):
                self._start(rank, world_size, [*rendezvous, *arguments])
        except BaseException:
            self._end()
            raise
        self._overdue.start()

    def _start(self, rank: int, world_size: int, arguments: list[str]) -> None:
        with self._log(rank).open("w") as log:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, str(_TRAINING), *arguments],
                    env=_environment(rank, world_size),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=log,
                    text=True,
                    # the first rank leads the group, the others join it
                    process_group=self._processes[0].pid if self._processes else 0,
                )
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield rank 0's events until it ends.

        Raises
        ------
        DemoError
            If a rank fails, or the job takes too long.
        """
        stream = self._processes[0].stdout
        assert stream is not None
        for line in stream:
            yield json.loads(line)
        codes = [process.wait() for process in self._processes]
        if self._timed_out:
            raise DemoError(f"the job was not done after {self._seconds:.0f} s{self._logs()}")
        if any(codes):
            raise DemoError(f"ranks ended with exit codes {codes}{self._logs()}")

    def kill(self) -> list[int]:
        """Kill the whole process group, as a power cut would; return the exit codes."""
        running = [rank for rank, process in enumerate(self._processes) if process.poll() is None]
        if len(running) < len(self._processes):
            raise DemoError(f"only ranks {running} were still there to be killed{self._logs()}")
        os.killpg(self._processes[0].pid, signal.SIGKILL)
        return [process.wait() for process in self._processes]

    def _kill_group(self) -> None:
        self._timed_out = True
        self._kill_all()

    def _kill_all(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def _end(self) -> None:
        self._overdue.cancel()
        self._kill_all()
        for process in self._processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"

    def _logs(self) -> str:
        """Quote the end of what each rank had to say."""
        quoted = []
        for rank in range(len(self._processes)):
            lines = self._log(rank).read_text(errors="replace").splitlines()[-15:]
            quoted += [f"rank {rank}: {line}" for line in lines]
        return "".join(f"\n  {line}" for line in quoted)


def _environment(rank: int, world_size: int) -> dict[str, str]:
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    # All ranks are here: they need no network, nor a host name that can be looked up.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return environment | {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else environment
