"""A fresh process for every turn.

The processes are forked from a server that has imported the libraries and done nothing else:
imports are paid once, and no turn sees what an earlier one has allocated or cached.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cases import Job, all_cases
from measuring import Measurement
from settings import Settings

__all__ = ["Listed", "TurnError", "list_cases", "prepare", "run_turn"]

_LIMIT_SECONDS = 900
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch.distributed.checkpoint",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "safetensors.torch",
        "shardpoint.dcp",
        "torch_checkpointing.checkpoint_manager",
    ]
)

Outcome = dict[str, Measurement] | list[str] | str


class TurnError(Exception):
    """A turn failed, or what it loaded was wrong."""


@dataclass(frozen=True)
class Listed:
    """What is known of a case without importing torch; see `Case`."""

    name: str
    title: str
    contenders: tuple[str, ...]
    is_prepared: bool
    world_size: int
    prepare_world_size: int
    most_rounds: int | None


def list_cases() -> list[Listed]:
    """Return all cases, in order."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_send_cases, args=(sender,))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        raise TurnError("the cases cannot be listed; what the process says is above") from None
    process.join()
    return found


def _send_cases(connection: Connection) -> None:
    warnings.simplefilter("ignore")
    connection.send(
        [
            Listed(
                case.name,
                case.title,
                case.contenders,
                case.prepare is not None,
                case.world_size,
                case.prepare_world_size,
                case.most_rounds,
            )
            for case in all_cases().values()
        ]
    )


def prepare(case: str, settings: Settings, folder: Path, world_size: int) -> None:
    """Make what the turns of a case read, in as many processes as the case says."""
    folder.mkdir(parents=True)
    jobs = [Job("", settings, folder, folder, rank, world_size) for rank in range(world_size)]
    _run_all(_prepare, [(case, job) for job in jobs])


def run_turn(case: str, job: Job) -> dict[str, Measurement]:
    """Run one turn; of several processes the slowest and the largest count.

    Raises
    ------
    TurnError
        If a process fails; with its traceback.
    """
    job.folder.mkdir(parents=True)
    try:
        outcomes = _run_all(
            _turn, [(case, replace(job, rank=rank)) for rank in range(job.world_size)]
        )
    finally:
        shutil.rmtree(job.folder, ignore_errors=True)
    return {name: _worst([outcome[name] for outcome in outcomes]) for name in outcomes[0]}


def _worst(results: Sequence[Measurement]) -> Measurement:
    peaks = [r.peak_bytes for r in results if r.peak_bytes is not None]
    read = [r.read_bytes for r in results if r.read_bytes is not None]
    needed = [r.needed_bytes for r in results if r.needed_bytes is not None]
    sent = [r.sent_bytes for r in results if r.sent_bytes is not None]
    disk = [r.disk_bytes for r in results if r.disk_bytes is not None]
    return Measurement(
        max(r.seconds for r in results),
        sum(r.processor_seconds for r in results),
        max(peaks) if peaks else None,
        sum(read) if read else None,
        sum(disk) if disk else None,
        sum(needed) if needed else None,
        max(sent) if sent else None,
    )


def _run_all(
    target: object, arguments: Sequence[tuple[object, ...]]
) -> list[dict[str, Measurement]]:
    processes, connections = [], []
    for given in arguments:
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_guarded, args=(sender, target, *given))
        process.start()
        sender.close()
        processes.append(process)
        connections.append(receiver)
    patience = 0.0
    try:
        outcomes = _received(connections, processes)
        patience = 10.0
        return outcomes
    finally:
        for process in processes:
            process.join(patience)  # after a failure the others may wait for it for long
            if process.is_alive():
                process.kill()
                process.join()


def _received(
    connections: Sequence[Connection], processes: Sequence[Any]
) -> list[dict[str, Measurement]]:
    """Return what all processes answer, in order; raise with the first that fails."""
    found: dict[int, dict[str, Measurement]] = {}
    deadline = time.monotonic() + _LIMIT_SECONDS
    while len(found) < len(connections):
        waiting = [c for number, c in enumerate(connections) if number not in found]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TurnError(f"no answer in {_LIMIT_SECONDS} seconds")
        for connection in ready:
            number = connections.index(connection)
            try:
                outcome = connection.recv()
            except EOFError:
                processes[number].join(1)
                code = processes[number].exitcode
                raise TurnError(f"the process of rank {number} died, exit code {code}") from None
            if isinstance(outcome, str):
                raise TurnError(outcome)
            found[number] = outcome
    return [found[number] for number in range(len(connections))]


def _guarded(connection: Connection, target: object, *arguments: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and ends this
    warnings.simplefilter("ignore")  # torch's, about running without a process group
    try:
        outcome: object = target(*arguments)  # type: ignore[operator]
    except Exception:  # noqa: BLE001 - the parent raises it
        outcome = traceback.format_exc()
    connection.send(outcome)


def _prepare(case: str, job: Job) -> dict[str, Measurement]:
    make = all_cases()[case].prepare
    if make is not None:
        make(job)
    return {}


def _turn(case: str, job: Job) -> dict[str, Measurement]:
    return all_cases()[case].run(job)
