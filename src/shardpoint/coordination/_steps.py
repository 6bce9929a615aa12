"""How a step of a save or load runs: every rank does its part, and all hear how it went."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from shardpoint.coordination._protocol import Coordinator
from shardpoint.coordination._wire import Shared, WireReader, WireWriter
from shardpoint.errors import RankFailedError, RankLostError, ShardpointError

__all__ = ["agree", "broadcast_result", "gather_scatter", "portable"]

Local = TypeVar("Local")
Result = TypeVar("Result")
Message = TypeVar("Message")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a failed rank sends in place of its result.

    The stack is plain data: file, line number, function, text.
    """

    cause: BaseException
    stack: tuple[tuple[str, int, str, str], ...]


@dataclass(frozen=True, slots=True)
class _Failures:
    """What the coordinator sends when a step failed somewhere."""

    by_rank: Mapping[int, _Failure]


def agree(coordinator: Coordinator, step: str, function: Callable[[], Result]) -> Result:
    """Run `function` on every rank; return its result only if all ranks succeeded.

    Raises
    ------
    RankFailedError
        On every rank, if any rank raised or is gone; names all of them.
    """
    coordinator.begin(step)
    result, failure = _attempt(function)
    _vote(coordinator, step, failure)
    return cast(Result, result)


def _vote(coordinator: Coordinator, step: str, failure: _Failure | None) -> None:
    """Raise on every rank if any has a failure or is gone."""
    payload = b"" if failure is None else pickle.dumps(_portable(failure))
    try:
        gathered = coordinator.gather(payload)
        if gathered is None:
            verdict = coordinator.scatter(None)
        else:
            failures = _failures_in(map(_plain, gathered))
            verdict = pickle.dumps(_Failures(failures)) if failures else b""
            _tell(coordinator.scatter, [verdict] * len(gathered), is_failure=bool(verdict))
    except RankLostError as lost:
        raise _contact_lost(step, lost, coordinator.rank, failure) from lost
    if verdict:
        by_rank = cast(_Failures, _plain(verdict)).by_rank
        _raise_failures(step, by_rank, failure, coordinator.world_size)


def broadcast_result(coordinator: Coordinator, step: str, function: Callable[[], Result]) -> Result:
    """Run `function` on the coordinator and return its result on every rank.

    Raises
    ------
    RankFailedError
        On every rank, if `function` raised, or if a rank is gone; then the function has run.
    """
    coordinator.begin(step)
    payload: bytes | None = None
    failure: _Failure | None = None
    result: object = None
    if coordinator.is_coordinator:
        result, failure = _attempt(function)
        alone = coordinator.world_size == 1 and failure is None
        payload, failure = (b"", None) if alone else _packed(result, failure, pickle.dumps)
    try:
        received = coordinator.broadcast(payload)
        if payload is None:
            result = _plain(received)  # where the coordinator failed, its vote says so too
    except RankLostError as lost:
        if lost.is_final or coordinator.coordinator_rank in lost.ranks:
            raise _contact_lost(step, lost, coordinator.rank, None) from lost
        failure = failure or _Failure(lost, ())
    _vote(coordinator, step, failure)
    return cast(Result, result)


def gather_scatter(
    coordinator: Coordinator,
    step: str,
    local: Callable[[], Local],
    combine: Callable[[list[Local]], Sequence[Result]],
) -> Result:
    """Run `local` on every rank, `combine` all results on the coordinator, scatter its list.

    What crosses ranks is pickled: it comes from this job's own processes, never from a
    checkpoint. `Shared` values in it travel once; see `Shared`.

    Raises
    ------
    RankFailedError
        On every rank, if `local` raised anywhere, `combine` on the coordinator, or a rank is
        gone.
    """
    if coordinator.world_size == 1:
        return agree(coordinator, step, lambda: combine([local()])[0])
    coordinator.begin(step)
    mine, failure = _attempt(local)
    payload, writer = b"", WireWriter()
    if failure is not None or not coordinator.is_coordinator:
        payload, failure = _packed(mine, failure, writer.pack)
    try:
        gathered = coordinator.gather(payload)
        if gathered is None:
            answer, _ = WireReader(writer.values).unpack(coordinator.scatter(None))
        else:
            own = _Own(coordinator.rank, mine, failure)
            answer, answers = _combined(own, gathered, combine)
            failure = own.failure
            _tell(coordinator.scatter, answers, is_failure=isinstance(answer, _Failures))
    except RankLostError as lost:
        raise _contact_lost(step, lost, coordinator.rank, failure) from lost
    if isinstance(answer, _Failures):
        _raise_failures(step, answer.by_rank, failure, coordinator.world_size)
    return cast(Result, answer)


@dataclass(slots=True)
class _Own:
    """The coordinator's own part of a step."""

    rank: int
    result: object
    failure: _Failure | None


def _combined(
    own: _Own,
    gathered: Sequence[bytes | ShardpointError],
    combine: Callable[[list[Local]], Sequence[Result]],
) -> tuple[object, list[bytes]]:
    """Return the coordinator's own answer, and what is sent to each rank."""
    reader = WireReader()
    received: list[object] = []
    known: list[dict[int, Shared]] = []
    for rank, sent in enumerate(gathered):
        value, shared = _received(reader, sent) if rank != own.rank else (own.result, {})
        received.append(own.failure if rank == own.rank and own.failure is not None else value)
        known.append(shared)
    failures = _failures_in(received)
    if not failures:

        def pack() -> tuple[object, list[bytes]]:
            answers = list(combine(cast(list[Local], received)))
            return answers[own.rank], [
                b"" if rank == own.rank else WireWriter(known[rank]).pack(answer)
                for rank, answer in enumerate(answers)
            ]

        packed, own.failure = _attempt(pack)
        if packed is not None:
            return packed
        assert own.failure is not None
        failures = {own.rank: _portable(own.failure)}
    answer = _Failures(failures)
    return answer, [pickle.dumps(answer)] * len(gathered)


def _received(
    reader: WireReader, sent: bytes | ShardpointError
) -> tuple[object, dict[int, Shared]]:
    return (_Failure(sent, ()), {}) if isinstance(sent, ShardpointError) else reader.unpack(sent)


def _tell(send: Callable[[Message], bytes], message: Message, *, is_failure: bool) -> None:
    """Send; what fails already is not made worse by a rank that cannot hear of it."""
    try:
        send(message)
    except RankLostError:
        if not is_failure:
            raise


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, _Failure | None]:
    try:
        return function(), None
    except BaseException as error:  # noqa: BLE001  every rank has to hear of it
        frames = traceback.extract_tb(error.__traceback__)
        stack = tuple((f.filename, f.lineno or 0, f.name, f.line or "") for f in frames)
        return None, _Failure(error, stack)


def _failures_in(results: Iterable[object]) -> dict[int, _Failure]:
    """Return who failed. Whoever could not reach another rank has not failed, that one has."""
    failures: dict[int, _Failure] = {}
    for rank, value in enumerate(results):
        if isinstance(value, _Failure):
            lost = value.cause.ranks if isinstance(value.cause, RankLostError) else [rank]
            for failed in lost:
                failures.setdefault(failed, value)
    return failures


def _packed(
    result: object, failure: _Failure | None, pack: Callable[[object], bytes]
) -> tuple[bytes, _Failure | None]:
    """Pickle a result or a failure; a result that cannot be sent is a failure."""
    if failure is None:
        payload, failure = _attempt(lambda: pack(result))
        if payload is not None:
            return payload, None
    assert failure is not None
    return pickle.dumps(_portable(failure)), failure


def portable(error: BaseException) -> BaseException:
    """Return the error, or a stand-in for one that does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  many pickle but do not come back
    except Exception:  # noqa: BLE001
        return ShardpointError(f"{type(error).__name__}: {error}")
    return error


def _portable(failure: _Failure) -> _Failure:
    return _Failure(portable(failure.cause), failure.stack)


def _plain(payload: bytes | ShardpointError) -> object:
    if isinstance(payload, ShardpointError):
        return _Failure(payload, ())
    return pickle.loads(payload) if payload else None  # noqa: S301  from our own ranks


def _contact_lost(
    step: str, lost: RankLostError, rank: int, mine: _Failure | None
) -> BaseException:
    """Return what a rank raises that cannot go on because others are gone."""
    if mine is not None and not isinstance(mine.cause, Exception):
        return mine.cause
    causes: dict[int, BaseException] = dict.fromkeys(lost.ranks, lost)
    if mine is not None:
        causes[rank] = mine.cause
    error = RankFailedError(step, causes, _stacks({} if mine is None else {rank: mine}))
    error.is_agreed = False
    return error


def _stacks(failures: Mapping[int, _Failure]) -> dict[int, traceback.StackSummary]:
    return {
        rank: traceback.StackSummary.from_list(list(failure.stack))
        for rank, failure in failures.items()
    }


def _same_within(causes: Mapping[int, BaseException], world_size: int) -> RankFailedError | None:
    """Return what all ranks raised because a step inside this one failed, if that is so.

    Each of them has the whole list already; a list of as many lists says no more.
    """
    found = [cause for cause in causes.values() if isinstance(cause, RankFailedError)]
    if len(found) == world_size and len({str(one) for one in found}) == 1 and found[0].is_agreed:
        return found[0]
    return None


def _raise_failures(
    step: str, failures: Mapping[int, _Failure], mine: _Failure | None, world_size: int
) -> None:
    if mine is not None and not isinstance(mine.cause, Exception):
        raise mine.cause  # an interrupt or exit goes on, now that the others know of it
    causes = {rank: failure.cause for rank, failure in failures.items()}
    within = _same_within(causes, world_size)
    if within is not None:
        raise within
    raise RankFailedError(step, causes, _stacks(failures)) from (
        mine.cause if mine is not None else next(iter(causes.values()))
    )
