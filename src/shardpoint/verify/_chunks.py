"""Chunks that only reading can check: those with transforms, and those that are no records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from shardpoint._sinks import NewArraySink
from shardpoint.engine.alone import chunks_alone
from shardpoint.engine.reading import ReadRequest, read_tensors
from shardpoint.errors import PlanError, Problem, ShardpointError
from shardpoint.index import NO_FILE, CheckpointIndex
from shardpoint.storage import Storage
from shardpoint.transforms import TransformFinder
from shardpoint.verify._report import problem_of

__all__ = ["chunk_bytes", "read_chunks", "readable_chunks"]

_BATCH_BYTES = 64 << 20
_BATCH_CHUNKS = 4096


def readable_chunks(index: CheckpointIndex, missing: set[str], wrong: set[str]) -> Sequence[int]:
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


def chunk_bytes(index: CheckpointIndex, chunk: int) -> int:
    """Return the bytes of a chunk's elements."""
    nbytes = index.tensors.dtype_of(int(index.chunks.tensor[chunk])).itemsize
    for size in index.chunks.sizes[chunk].tolist():
        nbytes *= size
    return nbytes


def _batches(index: CheckpointIndex, chunks: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    total = 0
    for chunk in chunks:
        nbytes = chunk_bytes(index, chunk)
        if batch and (total + nbytes > _BATCH_BYTES or len(batch) == _BATCH_CHUNKS):
            yield batch
            batch, total = [], 0
        batch.append(chunk)
        total += nbytes
    if batch:
        yield batch


def read_chunks(
    index: CheckpointIndex,
    storage: Storage,
    chunks: Sequence[int],
    finder: TransformFinder,
    threads: int,
    progress: Callable[[int], None],
) -> tuple[int, list[Problem]]:
    """Read whole chunks, transforms undone, and return the bytes read and what was wrong.

    Holds one batch of chunks (64 MiB, or one chunk where that is larger) at a time.
    """
    bytes_read = 0
    problems: list[Problem] = []
    for batch in _batches(index, chunks):
        nbytes, found = _read_chunks(index, storage, batch, finder, threads)
        bytes_read += nbytes
        problems += found
        progress(sum(chunk_bytes(index, chunk) for chunk in batch))
    return bytes_read, problems


def _read_chunks(
    index: CheckpointIndex,
    storage: Storage,
    batch: Sequence[int],
    finder: TransformFinder,
    threads: int,
) -> tuple[int, list[Problem]]:
    """Read whole chunks; return their bytes, and what was wrong.

    The first failure ends a read, so a batch that fails is read again, chunk by chunk.
    """
    try:
        return _read_whole(index, storage, batch, finder, threads), []
    except ShardpointError as error:
        if len(batch) == 1:
            return 0, _chunk_problems(index, batch[0], error)
    nbytes = 0
    problems = []
    for chunk in batch:
        read, found = _read_chunks(index, storage, [chunk], finder, threads)
        nbytes += read
        problems += found
    return nbytes, problems


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
        problem_of(
            error,
            index.tensors.keys[int(index.chunks.tensor[chunk])],
            index.files[int(index.chunks.file[chunk])],
            int(index.chunks.record_offset[chunk]),
        )
    ]
