"""Objects are checked by decoding them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
    """Decode objects and return what was wrong, by row.

    A record that many keys name is decoded once: metadata may name a large one a thousand times.
    """
    objects = index.objects
    sharing: dict[tuple[int, ...], list[int]] = {}
    columns = (objects.file, objects.record_offset, objects.record_length, objects.transform)
    for row in rows:
        is_placed = int(objects.file[row]) != NO_FILE
        span = tuple(int(column[row]) for column in columns) if is_placed else (-1, row)
        sharing.setdefault(span, []).append(row)
    first = {alike[0]: alike for alike in sharing.values()}
    failures: dict[int, ShardpointError] = {}
    values = read_objects(
        index,
        storage,
        list(first),
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
        problem = problem_of(error, objects.keys[row], name, offset)
        for other in first[row]:
            problems[other] = replace(problem, key=objects.keys[other])
    return problems
