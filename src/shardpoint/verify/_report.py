"""What a verification found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from shardpoint.errors import Problem, ShardpointError
from shardpoint.storage import Storage

__all__ = ["Progress", "VerifyReport", "file_sizes", "problem_of"]

Progress: TypeAlias = Callable[[int, int], None]
"""Told, in the calling thread, how many bytes have been looked at, and of how many."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `Checkpoint.verify` found.

    Attributes
    ----------
    problems
        Everything that is wrong, with key, file and offset where they are known.
    tensors, chunks, objects
        How many the index names.
    chunks_read
        How many chunks were read and compared with their checksum where there is one. Chunks
        of tensors whose index entries are wrong are not read, and none in a quick look.
    bytes_read
        Bytes of tensor data and record headers that were read.
    seconds
        How long it took.
    notes
        What is worth knowing and no damage, such as that other software has saved here since
        an index was written.
    """

    problems: tuple[Problem, ...]
    tensors: int
    chunks: int
    objects: int
    chunks_read: int
    bytes_read: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        lines = [
            f"{self.tensors:,} tensors in {self.chunks:,} chunks ({self.chunks_read:,} read, "
            f"{self.bytes_read:,} bytes) and {self.objects:,} objects: "
            + (f"{len(self.problems):,} problems" if self.problems else "no problems")
        ]
        lines += [f"  - {problem}" for problem in self.problems]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def file_sizes(
    storage: Storage, names: Iterable[str]
) -> tuple[dict[str, int | None], list[Problem]]:
    """Return the size of every file in bytes (None where it is missing or refused).

    A file that is refused (a link that leads outside, no right to read) gives a problem; one
    that is missing does not.
    """
    sizes: dict[str, int | None] = {}
    problems = []
    for name in names:
        try:
            sizes[name] = storage.size(name)
        except ShardpointError as error:
            sizes[name] = None
            problems.append(Problem(str(error), file=name))
    return sizes, problems


def problem_of(
    error: ShardpointError, key: str | None, file: str | None, offset: int | None
) -> Problem:
    """Return an error as a problem; a place that its message begins with is not said twice."""
    message = str(error)
    about_file = rf"file {re.escape(repr(file))}"
    about = about_file if key is None else rf"key {re.escape(repr(key))}(?:, {about_file})?"
    place = re.compile(rf"{about}(?:, byte (\d+))?: ")
    while found := place.match(message):
        message = message[found.end() :]
        if found[1] is not None and file is not None:
            offset = int(found[1])
    return Problem(message, key=key, file=file, offset=offset)
