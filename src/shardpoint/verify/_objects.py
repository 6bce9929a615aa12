"""Objects are checked by decoding them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardpoint.engine.objects import read_objects
from shardpoint.errors import Problem, ShardpointError
from shardpoint.formats.object_decoder import NumpyFactory
from shardpoint.index import NO_FILE, CheckpointIndex
from shardpoint.storage import Storage
from shardpoint.transforms import TransformFinder
from shardpoint.verify._report import problem_of

__all__ = ["object_problems"]


def object_problems(
    index: CheckpointIndex,
    storage: Storage,
    rows: Sequence[int],
    allowed: Mapping[str, Callable[..., Any]],
    finder: TransformFinder,
) -> dict[int, Problem]:
    """Decode objects and return what was wrong, by row."""
    objects = index.objects
    failures: dict[int, ShardpointError] = {}
    values = read_objects(
        index,
        storage,
        rows,
        factory=NumpyFactory(),
        allowed=allowed,
        verify=True,
        failures=failures,
        finder=finder,
    )
    for _ in values:
        pass  # decoding them is the check
    problems = {}
    for row, error in sorted(failures.items()):
        file = int(objects.file[row])
        is_placed = file != NO_FILE
        name = index.files[file] if is_placed else None
        offset = int(objects.record_offset[row]) if is_placed else None
        problems[row] = problem_of(error, objects.keys[row], name, offset)
    return problems
