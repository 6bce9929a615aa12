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
_QUOTED_LINES = 40


class DemoError(Exception):
    """Something did not come out as it must; the message says what."""


class Job:
    """All processes of one job, which are a process group of their own.

    Parameters
    ----------
    folder
        A new folder for the job's own files: its log, and the file the ranks meet in.
    arguments
        For `training.py`.
    seconds
        After this time the job is killed, and `events` ends with an error.
    """

    def __init__(self, folder: Path, *, arguments: list[str], seconds: float) -> None:
        folder.mkdir(parents=True)
        self._log = folder / "log"
        self._seconds = seconds
        self._timed_out = False
        command = [sys.executable, str(_TRAINING), "--rendezvous", str(folder / "rendezvous")]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *arguments],
                env=_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                process_group=0,
            )
        self._overdue = threading.Timer(seconds, self._time_out)
        self._overdue.daemon = True
        self._overdue.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._overdue.cancel()
        self._kill_group()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what the job tells until it ends by itself.

        Raises
        ------
        DemoError
            If a rank fails, or the job takes too long.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)
        code = self._process.wait()
        if self._timed_out:
            raise DemoError(f"a job was not done after {self._seconds:.0f} s{self._quoted_log()}")
        if code:
            raise DemoError(f"a job ended with exit code {code}{self._quoted_log()}")

    def kill(self) -> list[dict[str, Any]]:
        """Send SIGKILL to all processes of the job at once, and wait until all are dead.

        Returns
        -------
        list
            What the job had still told in the meantime.

        Raises
        ------
        DemoError
            If it had ended already, or did not die of this.
        """
        assert self._process.stdout is not None
        if self._process.poll() is not None:
            raise DemoError(f"the job ended before it could be killed{self._quoted_log()}")
        self._kill_group()
        # Each process holds this pipe open: it ends when the last of them is gone.
        last_words = self._process.stdout.read()
        code = self._process.wait()
        if self._timed_out or code != -signal.SIGKILL:
            raise DemoError(f"the job was to be killed, but ended with exit code {code}")
        return [json.loads(line) for line in last_words.splitlines(True) if line.endswith("\n")]

    def _time_out(self) -> None:
        self._timed_out = True
        self._kill_group()

    def _kill_group(self) -> None:
        # once it has been waited for, its number may belong to somebody else
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _quoted_log(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_QUOTED_LINES:]
        return "".join(f"\n  | {line}" for line in lines)


def _environment(folder: Path) -> dict[str, str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TMPDIR": str(folder),  # what a killed process leaves lies where it is cleaned up
    }
    # All ranks are here: they need no network, nor a host name that can be looked up.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return environment | {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else environment
