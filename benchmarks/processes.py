"""A fresh process for every turn.

The processes are forked from a server that has imported the libraries and done nothing else:
imports are paid once, and no turn sees what an earlier one has allocated or cached.
"""

from __future__ import annotations

import multiprocessing
import shutil
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from cases import Job, all_cases
from measuring import Measurement
from settings import Settings

__all__ = ["Listed", "TurnError", "prepare", "run_turn"]

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
    found = receiver.recv()
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
    return Measurement(
        max(r.seconds for r in results),
        sum(r.processor_seconds for r in results),
        max(peaks) if peaks else None,
        sum(read) if read else None,
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
    try:
        return [_received(connection) for connection in connections]
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _received(connection: Connection) -> dict[str, Measurement]:
    if not connection.poll(_LIMIT_SECONDS):
        raise TurnError(f"no answer in {_LIMIT_SECONDS} seconds")
    try:
        outcome = connection.recv()
    except EOFError:
        raise TurnError("the process died") from None
    if isinstance(outcome, str):
        raise TurnError(outcome)
    return outcome


def _guarded(connection: Connection, target: object, *arguments: object) -> None:
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
