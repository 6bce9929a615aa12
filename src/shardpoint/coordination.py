"""How the ranks of one save or load speak: bytes, and every step's success or failure.

`Coordinator` has one implementation here, for a single process; the one over a torch
process group lives in the torch face. The functions below are how steps run: a rank that
fails still takes part in the exchange, so nobody waits for it, and all ranks raise the
same `RankFailedError`.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from shardpoint.errors import RankFailedError, ShardpointError

__all__ = ["Coordinator", "SingleProcess", "agree", "broadcast_result", "gather_scatter"]

Local = TypeVar("Local")
Result = TypeVar("Result")


class Coordinator(Protocol):
    """Exchanges bytes between ranks. Every method is called by all ranks in the same order.

    A rank that is gone or does not come within the timeout makes the others raise.
    """

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        ...

    @property
    def world_size(self) -> int: ...

    @property
    def coordinator_rank(self) -> int:
        """The rank that does the shared work."""
        ...

    @property
    def is_coordinator(self) -> bool:
        """Whether that is this rank."""
        ...

    def gather(self, payload: bytes) -> list[bytes] | None:
        """Return every rank's payload on the coordinator, None elsewhere."""
        ...

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Return every rank's payload on every rank."""
        ...

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        """Give rank ``i`` the coordinator's ``payloads[i]``."""
        ...

    def broadcast(self, payload: bytes | None) -> bytes:
        """Give every rank the coordinator's payload."""
        ...


class SingleProcess:
    """The coordinator of a process that works alone."""

    rank = 0
    world_size = 1
    coordinator_rank = 0
    is_coordinator = True

    def gather(self, payload: bytes) -> list[bytes] | None:
        return [payload]

    def all_gather(self, payload: bytes) -> list[bytes]:
        return [payload]

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        assert payloads is not None
        return payloads[0]

    def broadcast(self, payload: bytes | None) -> bytes:
        assert payload is not None
        return payload


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a failed rank sends in place of its result.

    The stack is plain data: file, line number, function, text.
    """

    cause: BaseException
    stack: tuple[tuple[str, int, str, str], ...]


def agree(coordinator: Coordinator, step: str, function: Callable[[], Result]) -> Result:
    """Run `function` on every rank; return its result only if all ranks succeeded.

    Raises
    ------
    RankFailedError
        On every rank, if any rank raised; names all of them.
    """
    result, failure = _attempt(function)
    payload = b"" if failure is None else pickle.dumps(_portable(failure))
    _raise_failures(step, dict(enumerate(map(_unpack, coordinator.all_gather(payload)))), failure)
    return cast(Result, result)


def broadcast_result(coordinator: Coordinator, step: str, function: Callable[[], Result]) -> Result:
    """Run `function` on the coordinator and return its result on every rank."""
    payload: bytes | None = None
    failure: _Failure | None = None
    result: object = None
    if coordinator.is_coordinator:
        result, failure = _attempt(function)
        payload, failure = _packed(result, failure)
    received = coordinator.broadcast(payload)
    if not coordinator.is_coordinator:
        result = _unpack(received)
        failure = result if isinstance(result, _Failure) else None
    if failure is not None:
        own = failure if coordinator.is_coordinator else None
        _raise_failures(step, {coordinator.coordinator_rank: failure}, own)
    return cast(Result, result)


def gather_scatter(
    coordinator: Coordinator,
    step: str,
    local: Callable[[], Local],
    combine: Callable[[list[Local]], Sequence[Result]],
) -> Result:
    """Run `local` on every rank, `combine` all results on the coordinator, scatter its list.

    What crosses ranks is pickled: it comes from this job's own processes, never from a
    checkpoint.

    Raises
    ------
    RankFailedError
        On every rank, if `local` raised anywhere or `combine` on the coordinator.
    """
    if coordinator.world_size == 1:
        return agree(coordinator, step, lambda: combine([local()])[0])
    mine, failure = _attempt(local)
    payload = b""
    if failure is not None or not coordinator.is_coordinator:
        payload, failure = _packed(mine, failure)
    gathered = coordinator.gather(payload)
    answers: list[bytes] | None = None
    if gathered is not None:
        received = [
            mine if rank == coordinator.rank and failure is None else _unpack(sent)
            for rank, sent in enumerate(gathered)
        ]
        failures = {rank: value for rank, value in enumerate(received) if _is_failure(value)}
        if not failures:
            answers, own = _combined(lambda: combine(cast(list[Local], received)))
            if own is not None:
                failure, failures = own, {coordinator.rank: _portable(own)}
        if failures:
            answers = [pickle.dumps(_Failures(failures))] * coordinator.world_size
    answer = _unpack(coordinator.scatter(answers))
    if isinstance(answer, _Failures):
        _raise_failures(step, answer.by_rank, failure)
    return cast(Result, answer)


@dataclass(frozen=True, slots=True)
class _Failures:
    """What the coordinator sends when a step failed somewhere."""

    by_rank: Mapping[int, object]


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, _Failure | None]:
    try:
        return function(), None
    except BaseException as error:  # noqa: BLE001  every rank has to hear of it
        frames = traceback.extract_tb(error.__traceback__)
        stack = tuple((f.filename, f.lineno or 0, f.name, f.line or "") for f in frames)
        return None, _Failure(error, stack)


def _is_failure(value: object) -> bool:
    return isinstance(value, _Failure)


def _combined(
    combine: Callable[[], Sequence[object]],
) -> tuple[list[bytes] | None, _Failure | None]:
    """Return the answers for all ranks, ready to be sent, or why there are none."""
    answers, failure = _attempt(lambda: [pickle.dumps(answer) for answer in combine()])
    return answers, failure


def _packed(result: object, failure: _Failure | None) -> tuple[bytes, _Failure | None]:
    """Pickle a result or a failure; a result that cannot be sent is a failure."""
    if failure is None:
        payload, failure = _attempt(lambda: pickle.dumps(result))
        if payload is not None:
            return payload, None
    assert failure is not None
    return pickle.dumps(_portable(failure)), failure


def _portable(failure: _Failure) -> _Failure:
    """Return the failure, with a stand-in for an exception that does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(failure))  # noqa: S301  many pickle but do not come back
    except Exception:  # noqa: BLE001
        cause = failure.cause
        return _Failure(ShardpointError(f"{type(cause).__name__}: {cause}"), failure.stack)
    return failure


def _unpack(payload: bytes) -> object:
    return pickle.loads(payload) if payload else None  # noqa: S301  from our own ranks


def _raise_failures(step: str, results: Mapping[int, object], mine: _Failure | None) -> None:
    failures = {r: value for r, value in results.items() if isinstance(value, _Failure)}
    if mine is not None and not isinstance(mine.cause, Exception):
        raise mine.cause  # an interrupt or exit goes on, now that the others know of it
    if failures:
        causes = {rank: failure.cause for rank, failure in failures.items()}
        stacks = {
            rank: traceback.StackSummary.from_list(list(failure.stack))
            for rank, failure in failures.items()
        }
        raise RankFailedError(step, causes, stacks) from (
            mine.cause if mine is not None else next(iter(causes.values()))
        )
