"""Everything that is wrong with a checkpoint: by its index and files, or by reading all of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from shardpoint._sinks import NewArraySink
from shardpoint.engine.alone import chunks_alone
from shardpoint.engine.objects import read_objects
from shardpoint.engine.reading import ReadRequest, read_tensors
from shardpoint.errors import PlanError, Problem, ShardpointError
from shardpoint.formats.object_decoder import NumpyFactory
from shardpoint.index import NO_FILE, CheckpointIndex
from shardpoint.planning.validate import find_problems
from shardpoint.storage import Storage
from shardpoint.transforms import TransformFinder

__all__ = ["Progress", "VerifyReport", "file_sizes", "verify_index"]

Progress: TypeAlias = Callable[[int, int], None]
"""Told, in the calling thread, how many bytes of tensors have been looked at, and of how many."""

_BATCH_BYTES = 64 << 20
_BATCH_CHUNKS = 4096


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
    """

    problems: tuple[Problem, ...]
    tensors: int
    chunks: int
    objects: int
    chunks_read: int
    bytes_read: int
    seconds: float

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
        return "\n".join([*lines, *(f"  - {problem}" for problem in self.problems)])


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
    """Check the index against itself and the files; unless `quick`, read all chunks and objects.

    Holds one batch of chunks (64 MiB, or one chunk where that is larger) at a time. Every
    error of shardpoint's becomes a problem, those of the store as well.
    """
    started = time.perf_counter()
    sizes, problems = file_sizes(storage, index.files)
    problems += find_problems(index, rows=None, file_sizes=sizes)
    chunks_read = bytes_read = 0
    if not quick:
        wrong = {problem.key for problem in problems if problem.key is not None}
        missing = {name for name, size in sizes.items() if size is None}
        readable = _readable_chunks(index, missing, wrong)
        for count, nbytes, found in _read_all(index, storage, readable, finder, threads, progress):
            chunks_read += count
            bytes_read += nbytes
            problems += found
        problems += _object_problems(index, storage, allowed, finder)
    return VerifyReport(
        problems=tuple(dict.fromkeys(problems)),
        tensors=len(index.tensors),
        chunks=len(index.chunks),
        objects=len(index.objects),
        chunks_read=chunks_read,
        bytes_read=bytes_read,
        seconds=time.perf_counter() - started,
    )


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


def _readable_chunks(index: CheckpointIndex, missing: set[str], wrong: set[str]) -> Sequence[int]:
    """Return the chunks that hold elements and belong to sound tensors, in file order."""
    chunks = index.chunks
    gone = np.array([name in missing for name in index.files] or [False])
    bad = np.array([key in wrong for key in index.tensors.keys] or [False])
    keep = (chunks.sizes > 0).all(axis=1) & (chunks.file != NO_FILE)
    if len(chunks):
        keep &= ~bad[chunks.tensor] & ~gone[np.maximum(chunks.file, 0)]
    rows = np.flatnonzero(keep)
    order = np.lexsort((chunks.record_offset[rows], chunks.file[rows]))
    sorted_rows: list[int] = rows[order].tolist()
    return sorted_rows


def _chunk_bytes(index: CheckpointIndex, chunk: int) -> int:
    nbytes = index.tensors.dtype_of(int(index.chunks.tensor[chunk])).itemsize
    for size in index.chunks.sizes[chunk].tolist():
        nbytes *= size
    return nbytes


def _batches(index: CheckpointIndex, chunks: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    total = 0
    for chunk in chunks:
        nbytes = _chunk_bytes(index, chunk)
        if batch and (total + nbytes > _BATCH_BYTES or len(batch) == _BATCH_CHUNKS):
            yield batch
            batch, total = [], 0
        batch.append(chunk)
        total += nbytes
    if batch:
        yield batch


def _read_all(
    index: CheckpointIndex,
    storage: Storage,
    chunks: Sequence[int],
    finder: TransformFinder,
    threads: int,
    progress: Progress | None,
) -> Iterator[tuple[int, int, list[Problem]]]:
    """Read batch after batch; give what `_read_chunks` gives of each."""
    total = sum(_chunk_bytes(index, chunk) for chunk in chunks) if progress is not None else 0
    done = 0
    for batch in _batches(index, chunks):
        yield _read_chunks(index, storage, batch, finder, threads)
        if progress is not None:
            done += sum(_chunk_bytes(index, chunk) for chunk in batch)
            progress(done, total)


def _read_chunks(
    index: CheckpointIndex,
    storage: Storage,
    batch: Sequence[int],
    finder: TransformFinder,
    threads: int,
) -> tuple[int, int, list[Problem]]:
    """Read whole chunks; return how many, their bytes, and what was wrong.

    The first failure ends a read, so a batch that fails is read again, chunk by chunk.
    """
    try:
        return len(batch), _read_whole(index, storage, batch, finder, threads), []
    except ShardpointError as error:
        if len(batch) == 1:
            return 1, 0, _chunk_problems(index, batch[0], error)
    nbytes = 0
    problems = []
    for chunk in batch:
        _, read, found = _read_chunks(index, storage, [chunk], finder, threads)
        nbytes += read
        problems += found
    return len(batch), nbytes, problems


def _read_whole(
    index: CheckpointIndex,
    storage: Storage,
    batch: Sequence[int],
    finder: TransformFinder,
    threads: int,
) -> int:
    """Read whole chunks and return how many bytes that took."""
    alone = chunks_alone(index, batch)
    requests = []
    for row, key in enumerate(alone.tensors.keys):
        sizes = alone.tensors.shape_of(row)
        sink = NewArraySink(alone.tensors.dtype_of(row), sizes, key=key)
        requests.append(ReadRequest(tensor=row, offsets=(0,) * len(sizes), sizes=sizes, sink=sink))
    return read_tensors(
        alone, storage, requests, threads=threads, verify=True, finder=finder
    ).bytes_read


def _chunk_problems(index: CheckpointIndex, chunk: int, error: ShardpointError) -> list[Problem]:
    if isinstance(error, PlanError) and error.problems:
        return list(error.problems)
    return [
        _problem(
            error,
            index.tensors.keys[int(index.chunks.tensor[chunk])],
            index.files[int(index.chunks.file[chunk])],
            int(index.chunks.record_offset[chunk]),
        )
    ]


def _problem(error: ShardpointError, key: str, file: str | None, offset: int | None) -> Problem:
    """Return an error as a problem; a place that its message begins with is not said twice."""
    message = str(error)
    place = re.compile(
        rf"key {re.escape(repr(key))}(?:, file {re.escape(repr(file))})?(?:, byte (\d+))?: ",
    )
    while found := place.match(message):
        message = message[found.end() :]
        if found[1] is not None and file is not None:
            offset = int(found[1])
    return Problem(message, key=key, file=file, offset=offset)


def _object_problems(
    index: CheckpointIndex,
    storage: Storage,
    allowed: Mapping[str, Callable[..., Any]],
    finder: TransformFinder,
) -> list[Problem]:
    objects = index.objects
    failures: dict[int, ShardpointError] = {}
    values = read_objects(
        index,
        storage,
        range(len(objects)),
        factory=NumpyFactory(),
        allowed=allowed,
        verify=True,
        failures=failures,
        finder=finder,
    )
    for _ in values:
        pass  # decoding them is the check
    problems = []
    for row, error in sorted(failures.items()):
        file = int(objects.file[row])
        is_placed = file != NO_FILE
        name = index.files[file] if is_placed else None
        offset = int(objects.record_offset[row]) if is_placed else None
        problems.append(_problem(error, objects.keys[row], name, offset))
    return problems
