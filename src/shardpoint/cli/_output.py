"""The one interface that the commands write their results to."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from shardpoint.cli._facts import Listing, ObjectFacts, Overview, TensorFacts
from shardpoint.verify import Progress, VerifyReport

__all__ = ["Output"]


class Output(Protocol):
    """Writes results to standard output, one a run; keeps nothing.

    Names and messages come from the checkpoint and may hold any characters: what is written
    must be harmless wherever it is shown. Errors of the output stream pass through.
    """

    def listing(self, listing: Listing) -> None:
        """Write what ``ls`` found."""
        ...

    def overview(self, overview: Overview) -> None:
        """Write what ``info`` found about a checkpoint."""
        ...

    def key(self, facts: TensorFacts | ObjectFacts) -> None:
        """Write what ``info`` found about a key."""
        ...

    def report(self, path: str, report: VerifyReport, *, quick: bool) -> None:
        """Write what ``verify`` found."""
        ...

    def converted(self, path: str, target: str, form: str) -> None:
        """Write what ``convert`` has done."""
        ...

    def progress(self) -> AbstractContextManager[Progress | None]:
        """Show how far a verification is, on standard error, where someone may be watching."""
        ...
