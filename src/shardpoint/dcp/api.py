"""The exception that every rank raises when a save or load fails anywhere."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from shardpoint.errors import RankFailedError

__all__ = ["CheckpointException"]

WRAPPED_EXCEPTION: TypeAlias = tuple[BaseException, traceback.StackSummary]


class CheckpointException(RankFailedError):
    """One or more ranks failed while saving or loading.

    Unlike torch's class of that name it derives from `Exception`, so ``except Exception``
    around a training loop sees it.

    Parameters
    ----------
    msg
        The step that failed.
    failures
        Rank to the exception raised there and its stack.
    """

    def __init__(self, msg: str, failures: Mapping[int, WRAPPED_EXCEPTION]) -> None:
        super().__init__(
            msg,
            {rank: cause for rank, (cause, _) in failures.items()},
            {rank: stack for rank, (_, stack) in failures.items()},
        )
        self._failures = dict(failures)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.step, self._failures)

    @property
    def failures(self) -> dict[int, WRAPPED_EXCEPTION]:
        """Rank to the exception raised there and its stack."""
        return self._failures


@contextmanager
def checkpoint_exceptions() -> Iterator[None]:
    """Turn the engine's `RankFailedError` into the `CheckpointException` of this API."""
    try:
        yield
    except CheckpointException:
        raise
    except RankFailedError as error:
        failures = {
            rank: (cause, error.stacks.get(rank, traceback.StackSummary()))
            for rank, cause in error.causes.items()
        }
        raised = CheckpointException(error.step, failures)
        raised.is_agreed = error.is_agreed
        raise raised from error.__cause__
