"""Everything that is wrong with a checkpoint: by its index and files, or by reading all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardpoint.errors import Problem
from shardpoint.index import NO_FILE, CheckpointIndex, Container
from shardpoint.planning.validate import find_problems
from shardpoint.storage import Storage
from shardpoint.transforms import TransformFinder
from shardpoint.verify._chunks import chunk_bytes, read_chunks, readable_chunks
from shardpoint.verify._headers import check_headers
from shardpoint.verify._native import check_native
from shardpoint.verify._objects import object_problems
from shardpoint.verify._report import Progress, VerifyReport, file_sizes
from shardpoint.verify._stored import StoredResult, check_stored

__all__ = ["Progress", "VerifyReport", "file_sizes", "verify_index"]


def verify_index(
    index: CheckpointIndex,
    storage: Storage,
    *,
    allowed: Mapping[str, Callable[..., Any]],
    finder: TransformFinder,
    threads: int,
    quick: bool,
    progress: Progress | None,
) -> VerifyReport:
    """Check the index against itself and the files; unless `quick`, read all data files.

    Holds a few MiB for each thread; of chunks with transforms, and of those that are no records,
    one batch (64 MiB, or one chunk where that is larger). Every error of shardpoint's becomes a
    problem, those of the store as well.
    """
    started = time.perf_counter()
    sizes, problems = file_sizes(storage, index.files)
    problems += find_problems(index, rows=None, file_sizes=sizes)
    native = check_native(index, storage, quick=quick)
    problems += native.problems
    data = _Data(0, 0, [])
    if not quick:
        wrong = {problem.key for problem in problems if problem.key is not None}
        data = _verify_data(
            index,
            storage,
            sizes,
            wrong,
            allowed=allowed,
            finder=finder,
            threads=threads,
            progress=progress,
        )
    return VerifyReport(
        problems=tuple(dict.fromkeys([*problems, *data.problems])),
        tensors=len(index.tensors),
        chunks=len(index.chunks),
        objects=len(index.objects),
        chunks_read=data.chunks_read,
        bytes_read=data.bytes_read,
        seconds=time.perf_counter() - started,
        notes=tuple(native.notes),
    )


@dataclass(slots=True)
class _Data:
    """What was found in the data files."""

    chunks_read: int
    bytes_read: int
    problems: list[Problem]


class _Advance:
    """Adds up what has been done, for those who want to know."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, nbytes: int) -> None:
        self._done = min(self._done + nbytes, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> None:
        if self._done < self._total:
            self(self._total - self._done)


def _verify_data(
    index: CheckpointIndex,
    storage: Storage,
    sizes: Mapping[str, int | None],
    wrong: set[str],
    *,
    allowed: Mapping[str, Callable[..., Any]],
    finder: TransformFinder,
    threads: int,
    progress: Progress | None,
) -> _Data:
    """Read everything once that can be read."""
    missing = {name for name, size in sizes.items() if size is None}
    chunks = np.array(readable_chunks(index, missing, wrong), np.int64)
    plain = (index.chunks.container == Container.TORCH_RECORD) & (index.chunks.transform == 0)
    is_image = (index.chunks.container == Container.SAFETENSORS_IMAGE) & (
        index.chunks.transform == 0
    )
    others = chunks[~plain[chunks]].tolist()
    total = int(index.chunks.record_length[chunks[plain[chunks]]].sum())
    advance = _Advance(progress, total + sum(chunk_bytes(index, chunk) for chunk in others))
    stored = check_stored(index, storage, sizes, threads=threads, progress=advance)
    failed = object_problems(
        index,
        storage,
        np.flatnonzero(~stored.damaged_objects).tolist(),
        allowed=allowed,
        finder=finder,
    )
    readable = chunks[~stored.damaged_chunks[chunks]]
    headers = check_headers(
        index,
        storage,
        readable[(plain | is_image)[readable]].tolist(),
        _unchecked_objects(index, missing, stored, failed),
        are_compared=lambda chunk: bool(stored.chunks[chunk]),
        threads=threads,
        progress=advance,
    )
    nbytes, found = read_chunks(
        index, storage, readable[~plain[readable]].tolist(), finder, threads, advance
    )
    advance.finish()
    return _Data(
        chunks_read=len(chunks),
        bytes_read=stored.bytes_read + headers.bytes_read + nbytes,
        problems=[*stored.problems, *headers.problems, *found, *failed.values()],
    )


def _unchecked_objects(
    index: CheckpointIndex, missing: set[str], stored: StoredResult, failed: Mapping[int, Problem]
) -> list[int]:
    """Return the objects with records that nothing has been compared with so far.

    Of those with one record, the first: metadata may name a large one a thousand times.
    """
    objects = index.objects
    rows = np.flatnonzero((objects.file != NO_FILE) & (objects.transform == 0) & ~stored.objects)
    places = (objects.file[rows], objects.record_offset[rows], objects.record_length[rows])
    _, first = np.unique(np.stack(places, axis=1), axis=0, return_index=True)
    rows = rows[np.sort(first)]
    return [
        row
        for row in rows.tolist()
        if row not in failed
        and not stored.damaged_objects[row]
        and index.files[int(objects.file[row])] not in missing
    ]
