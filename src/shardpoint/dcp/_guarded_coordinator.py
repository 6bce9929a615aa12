"""Ranks that save in processes of their own, of which any may end at any moment."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress

from shardpoint.coordination import Coordinator, portable
from shardpoint.dcp.api import CheckpointException, checkpoint_exceptions
from shardpoint.dcp.metadata import Metadata
from shardpoint.errors import RankFailedError, RankLostError, ShardpointError

__all__ = ["GuardedCoordinator", "save_guarded"]


class GuardedCoordinator:
    """A coordinator with which a rank can give up between any two exchanges.

    A saving process may end at any moment, and then nobody knows what its rank would have
    sent next. So before every exchange the ranks ask whether all are still there.
    """

    def __init__(self, inner: Coordinator) -> None:
        self._inner = inner
        self._is_over = inner.world_size == 1
        self._step = ""
        self.group = getattr(inner, "group", None)
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.coordinator_rank = inner.coordinator_rank
        self.is_coordinator = inner.is_coordinator

    def begin(self, step: str) -> None:
        self._step = step

    def gather(self, payload: bytes) -> list[bytes | ShardpointError] | None:
        self._check()
        return self._inner.gather(payload)

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        self._check()
        return self._inner.scatter(payloads)

    def broadcast(self, payload: bytes | None) -> bytes:
        self._check()
        return self._inner.broadcast(payload)

    def give_up(self, error: BaseException) -> None:
        """Tell the other ranks that this one is out."""
        if not self._is_over:
            self._vote(error)

    def end(self) -> None:
        """Leave together with the other ranks.

        Raises
        ------
        RankFailedError
            If another one gave up.
        """
        self._check()
        self._is_over = True

    def _check(self) -> None:
        """Raise if a rank is out, and say which step comes next otherwise."""
        if not self._is_over:
            failures = self._vote(None)
            if failures:
                raise RankFailedError("save", failures)
        self._inner.begin(self._step)

    def _vote(self, own: BaseException | None) -> dict[int, BaseException]:
        inner = self._inner
        inner.begin("all there")
        gathered = inner.gather(b"" if own is None else pickle.dumps(portable(own)))
        if gathered is None:
            verdict = inner.broadcast(None)
        else:
            votes: dict[int, BaseException] = {
                rank: vote if isinstance(vote, ShardpointError) else pickle.loads(vote)  # noqa: S301
                for rank, vote in enumerate(gathered)
                if vote
            }
            verdict = pickle.dumps(votes) if votes else b""
            try:
                inner.broadcast(verdict)
            except RankLostError:
                if not votes:
                    raise
        failures: dict[int, BaseException] = pickle.loads(verdict) if verdict else {}  # noqa: S301
        self._is_over = bool(failures)
        return failures


def save_guarded(coordinator: GuardedCoordinator, save: Callable[[], Metadata]) -> Metadata:
    """Run a save and leave together with the other ranks, or tell them why not."""
    with checkpoint_exceptions():
        try:
            metadata = save()
        except CheckpointException as error:
            if error.is_agreed:  # all ranks have it
                with suppress(RankFailedError, RankLostError):
                    coordinator.end()
            raise
        except RankLostError as lost:
            raise _failed(dict.fromkeys(lost.ranks, lost)) from lost
        except BaseException as error:
            with suppress(RankLostError):
                coordinator.give_up(error)
            if not isinstance(error, Exception):
                raise
            raise _failed({coordinator.rank: error}) from error
        try:
            coordinator.end()
        except RankLostError as lost:
            raise _failed(dict.fromkeys(lost.ranks, lost)) from lost
    return metadata


def _failed(causes: dict[int, BaseException]) -> RankFailedError:
    return RankFailedError("save", causes)
