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
    payload = b"" if failure is None else _pack(failure)
    _raise_failures(step, dict(enumerate(map(_unpack, coordinator.all_gather(payload)))), failure)
    return cast(Result, result)


def broadcast_result(coordinator: Coordinator, step: str, function: Callable[[], Result]) -> Result:
    """Run `function` on the coordinator and return its result on every rank."""
    payload: bytes | None = None
    failure: _Failure | None = None
    result: object = None
    if coordinator.is_coordinator:
        result, failure = _attempt(function)
        payload = _pack(result if failure is None else failure)
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
    mine, failure = _attempt(local)
    gathered = coordinator.gather(_pack(mine if failure is None else failure))
    answers: list[bytes] | None = None
    if gathered is not None:
        received = [
            mine if rank == coordinator.rank and failure is None else _unpack(payload)
            for rank, payload in enumerate(gathered)
        ]
        failures: dict[int, object] = {
            rank: value for rank, value in enumerate(received) if isinstance(value, _Failure)
        }
        combined: Sequence[Result] = ()
        if not failures:
            value, combine_failure = _attempt(lambda: combine(cast(list[Local], received)))
            if combine_failure is None:
                combined = cast(Sequence[Result], value)
            else:
                failures = {coordinator.rank: combine_failure}
        if failures:
            answers = [_pack(_Failures(failures))] * coordinator.world_size
        else:
            answers = [_pack(answer) for answer in combined]
    answer = _unpack(coordinator.scatter(answers))
    if isinstance(answer, _Failures):
        _raise_failures(step, answer.by_rank, failure)
    return cast(Result, answer)


@dataclass(frozen=True, slots=True)
class _Failures:
    """What the coordinator sends when a step failed somewhere."""

    by_rank: dict[int, object]


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, _Failure | None]:
    try:
        return function(), None
    except BaseException as error:  # noqa: BLE001  every rank has to hear of it
        frames = traceback.extract_tb(error.__traceback__)
        stack = tuple((f.filename, f.lineno or 0, f.name, f.line or "") for f in frames)
        return None, _Failure(error, stack)


def _pack(value: object) -> bytes:
    """Pickle a value; an exception that cannot be pickled goes as its text."""
    try:
        packed = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        if isinstance(value, _Failure):
            pickle.loads(packed)  # noqa: S301  many exceptions pickle but do not come back
    except Exception as error:  # noqa: BLE001
        failure = value if isinstance(value, _Failure) else _Failure(error, ())
        cause, stack = failure.cause, failure.stack
        stand_in = ShardpointError(f"{type(cause).__name__}: {cause}")
        packed = pickle.dumps(_Failure(stand_in, stack), protocol=pickle.HIGHEST_PROTOCOL)
    return packed


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
