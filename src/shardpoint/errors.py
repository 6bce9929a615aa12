"""Every error shardpoint raises.

::

    ShardpointError
    ├── CheckpointNotFoundError      (FileNotFoundError)  nothing to open at that place
    ├── CheckpointExistsError        (FileExistsError)    overwriting was not allowed
    ├── FormatError                  (ValueError)         bytes are not what their format says
    │   ├── ForbiddenContentError                         a class or instruction off the closed list
    │   ├── UnsafePathError                               a file name that leaves the checkpoint
    │   └── LimitExceededError                            deeper or larger than any real one
    ├── CorruptionError              (ValueError)         bytes are missing or changed
    ├── CheckpointKeyError           (KeyError)           no such key
    ├── PlanError                    (ValueError)         wanted and stored do not fit together
    │   └── DamagedCheckpointError   (CorruptionError)    the index and the files do not
    ├── NotSupportedError            (NotImplementedError) known, not done
    │   └── UnknownExtensionError    (ValueError)         an extension that nobody registered
    ├── StorageError                 (OSError)            the store refused
    ├── ConcurrentSaveError          (RuntimeError)       another save writes there, or did
    ├── RankLostError                (RuntimeError)       a rank is gone, or does not answer
    └── RankFailedError              (RuntimeError)       one or more ranks failed; names them all

An error that can have several reasons carries all of them as ``problems``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from traceback import StackSummary

__all__ = [
    "CheckpointExistsError",
    "CheckpointKeyError",
    "CheckpointNotFoundError",
    "ConcurrentSaveError",
    "CorruptionError",
    "DamagedCheckpointError",
    "ForbiddenContentError",
    "FormatError",
    "LimitExceededError",
    "NarrowingWarning",
    "NotSupportedError",
    "PlanError",
    "Problem",
    "RankFailedError",
    "RankLostError",
    "ShardpointError",
    "ShardpointWarning",
    "StorageError",
    "UnknownExtensionError",
    "UnsafePathError",
]


class ShardpointError(Exception):
    """The root of every error that shardpoint raises on purpose."""


class CheckpointNotFoundError(ShardpointError, FileNotFoundError):
    """There is no checkpoint at the given place."""


class CheckpointExistsError(ShardpointError, FileExistsError):
    """There is a checkpoint already, and the caller did not allow replacing it."""


class FormatError(ShardpointError, ValueError):
    """Bytes do not follow the format they claim."""


class ForbiddenContentError(FormatError):
    """A pickle names a class, function or instruction outside the closed list.

    Attributes
    ----------
    qualified_name
        The dotted name that was refused, or None where it was an instruction.
    """

    def __init__(self, message: str, *, qualified_name: str | None = None) -> None:
        super().__init__(message)
        self.qualified_name = qualified_name


class UnsafePathError(FormatError):
    """A file name in a checkpoint is absolute, climbs out, or resolves outside."""


class LimitExceededError(FormatError):
    """A count, size or nesting depth is past the limit that protects the reader."""


class CorruptionError(ShardpointError, ValueError):
    """Bytes are missing, or differ from their checksum."""


class CheckpointKeyError(ShardpointError, KeyError):
    """The checkpoint has no such key."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint or with what is asked of it.

    Attributes
    ----------
    message
        What is wrong, wanted against found.
    key
        The flat key it concerns, if any.
    file
        The file's name relative to the checkpoint, if any.
    offset
        Byte offset in `file`, if any.
    """

    message: str
    key: str | None = None
    file: str | None = None
    offset: int | None = None

    def __str__(self) -> str:
        where = []
        if self.key is not None:
            where.append(f"key {self.key!r}")
        if self.file is not None:
            where.append(f"file {self.file!r}")
        if self.offset is not None:
            where.append(f"byte {self.offset}")
        return f"{', '.join(where)}: {self.message}" if where else self.message


class PlanError(ShardpointError, ValueError):
    """What is wanted and what is stored do not fit; every reason is in `problems`."""

    def __init__(self, summary: str, problems: Iterable[Problem] = ()) -> None:
        self.summary = summary
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(summary, self.problems)

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  - {problem}" for problem in self.problems)])


class DamagedCheckpointError(PlanError, CorruptionError):
    """Chunks overlap, leave holes, or lie outside of their files; every reason is in `problems`."""


class NotSupportedError(ShardpointError, NotImplementedError):
    """The thing is known, and shardpoint does not do it."""


class UnknownExtensionError(NotSupportedError, ValueError):
    """A descriptor names an extension, or a version of one, that the registry does not know."""


class StorageError(ShardpointError, OSError):
    """The store refused an operation."""


class ConcurrentSaveError(ShardpointError, RuntimeError):
    """Another save is writing to that place, or has replaced what was being saved over or read."""


class RankLostError(ShardpointError, RuntimeError):
    """Ranks are gone, or do not answer.

    Attributes
    ----------
    ranks
        Who; numbers in the process group.
    is_final
        Whether the time was over: then no rank can be reached any more.
    """

    def __init__(self, message: str, ranks: Iterable[int]) -> None:
        self.ranks: tuple[int, ...] = tuple(ranks)
        self.is_final = False
        super().__init__(message, self.ranks)

    def __str__(self) -> str:
        return str(self.args[0])


class RankFailedError(ShardpointError, RuntimeError):
    """One or more ranks failed in a step; every rank raises this with the same list.

    Attributes
    ----------
    step
        The step in which they failed: ``"plan"``, ``"write"``, ``"commit"``, ``"read"``, ...
    causes
        Rank to the exception raised there.
    stacks
        Rank to where it was raised: exceptions lose their traceback on the way between
        processes.
    is_agreed
        Whether the coordinator knows of it and does not go on. False on a rank that lost
        contact with it.
    """

    def __init__(
        self,
        step: str,
        causes: Mapping[int, BaseException],
        stacks: Mapping[int, StackSummary] | None = None,
    ) -> None:
        self.step = step
        self.causes: dict[int, BaseException] = dict(sorted(causes.items()))
        self.stacks: dict[int, StackSummary] = dict(sorted((stacks or {}).items()))
        self.is_agreed = True
        super().__init__(step, self.causes, self.stacks)
        frames = {rank: "".join(stack.format()) for rank, stack in self.stacks.items() if stack}
        for text, ranks in _by_text(frames):
            self.add_note(f"{_ranks_text(ranks)}, most recent call last:\n{text}".rstrip())

    def __str__(self) -> str:
        lines = [f"{self.step} failed on {_ranks_text(list(self.causes))}"]
        texts = {}
        for rank, cause in self.causes.items():
            notes = getattr(cause, "__notes__", ())
            text = "\n".join([str(cause), *notes]).replace("\n", "\n    ")
            texts[rank] = f"{type(cause).__name__}: {text}"
        lines += [f"  {_ranks_text(ranks)}: {text}" for text, ranks in _by_text(texts)]
        return "\n".join(lines)


def _by_text(texts: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """Return each text once, with the ranks that have it: often it is the same on hundreds."""
    ranks: dict[str, list[int]] = {}
    for rank, text in texts.items():
        ranks.setdefault(text, []).append(rank)
    return list(ranks.items())


def _ranks_text(ranks: Sequence[int]) -> str:
    """Name ranks, in rising order; those in a row of three or more by the first and the last."""
    rows: list[list[int]] = []
    for rank in ranks:
        if rows and rank == rows[-1][-1] + 1:
            rows[-1].append(rank)
        else:
            rows.append([rank])
    parts = [f"{row[0]} to {row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


class ShardpointWarning(UserWarning):
    """The root of the warnings that shardpoint gives."""


class NarrowingWarning(ShardpointWarning):
    """Values are loaded into a dtype that cannot hold all of them exactly."""
