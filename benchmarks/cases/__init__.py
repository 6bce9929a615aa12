"""The cases: each module has `CASES`, what is measured and between whom."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from measuring import Measurement
from settings import Settings

__all__ = ["Case", "Job", "all_cases"]

_MODULES = (
    "large",
    "small",
    "llama",
    "slices",
    "reshard",
    "one_key",
    "opening",
    "metadata",
    "planning",
    "again",
    "compressed",
    "asynchronous",
)


@dataclass(frozen=True)
class Job:
    """One contender's turn, in one process.

    Attributes
    ----------
    contender
        Whose turn it is.
    settings
        Sizes.
    folder
        A new folder of this turn alone; removed after it.
    prepared
        What the case's `prepare` has made, the same for all turns; not to be changed.
    rank, world_size
        Of this process among those of the turn.
    """

    contender: str
    settings: Settings
    folder: Path
    prepared: Path
    rank: int
    world_size: int


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes
    ----------
    name, title
        For the command line, and for the table.
    contenders
        In the order of the table. The first is what others are compared with.
    run
        Does a turn; returns a measurement by operation. Raises if anything that was loaded
        or planned is not what it should be.
    prepare
        Makes what all turns read, in processes of its own; gets a job without a contender.
    world_size, prepare_world_size
        Processes of a turn, and of `prepare`.
    most_rounds
        For cases that take long: no more rounds than that. None is as many as are asked for.
    """

    name: str
    title: str
    contenders: tuple[str, ...]
    run: Callable[[Job], dict[str, Measurement]]
    prepare: Callable[[Job], None] | None = None
    world_size: int = 1
    prepare_world_size: int = 1
    most_rounds: int | None = None


def all_cases() -> dict[str, Case]:
    """Return the cases by name, in order. Imports torch."""
    return {
        case.name: case
        for name in _MODULES
        for case in importlib.import_module(f"cases.{name}").CASES
    }
