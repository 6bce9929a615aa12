"""Reads regions of tensors: only the bytes they need, straight into their memory.

Small records that are wanted whole are read together with their neighbours. For all others
the header is read first, then the bytes of what is wanted, large ones in pieces side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np

from shardpoint.dtypes import BY_CODE
from shardpoint.engine._chunks import ChunkReader, is_simple
from shardpoint.engine._dense import DenseReader
from shardpoint.engine._files import BufferPool, OpenFiles
from shardpoint.engine._parts import ReadContext
from shardpoint.engine._readplan import Wanted, plan_reads, wanted_by, works_of
from shardpoint.engine._resolve import resolve_tasks
from shardpoint.engine._segments import find_segments
from shardpoint.engine._transfer import BUFFER
from shardpoint.engine.collector import collection_paused
from shardpoint.engine.executor import run_tasks
from shardpoint.engine.objects import read_object
from shardpoint.engine.targets import (
    ArraySink,
    Progress,
    ReadRequest,
    RequestTargets,
    Targets,
    TensorSink,
)
from shardpoint.index import CheckpointIndex
from shardpoint.storage import Storage
from shardpoint.transforms import Tally, TransformFinder, Transforms

__all__ = [
    "ArraySink",
    "ReadRequest",
    "ReadStatistics",
    "Targets",
    "TensorSink",
    "Wanted",
    "read_object",
    "read_regions",
    "read_tensors",
]

_Task: TypeAlias = Callable[[], None]

_NAME = "shardpoint-read"


@dataclass(frozen=True, slots=True)
class ReadStatistics:
    """What a read did.

    Attributes
    ----------
    bytes_read
        All bytes read from data files.
    payload_bytes
        Bytes of the elements that were wanted.
    metadata_bytes
        Bytes of record headers, part of `bytes_read`.
    reads
        Calls of the storage.
    seconds
        How long it took.
    """

    bytes_read: int
    payload_bytes: int
    metadata_bytes: int
    reads: int
    seconds: float


def read_tensors(
    index: CheckpointIndex,
    storage: Storage,
    requests: Sequence[ReadRequest],
    *,
    threads: int,
    verify: bool,
    gap_ratio: float = 0.05,
    finder: TransformFinder | None = None,
    tally: Tally | None = None,
) -> ReadStatistics:
    """Fill the sinks of all requests.

    Everything that the index and the files' sizes tell is checked before any sink is asked
    for its memory; so are the headers of all records that are not read whole. After an
    error, sinks may hold some elements, and some may have been committed.

    Where the index says where elements lie, no header is read, nor checked.

    Parameters
    ----------
    threads
        How many pieces may be read at once.
    verify
        Whether to compare checksums: of chunks that are read whole, and where the index has
        them by blocks, of all blocks that are read. A part of a chunk is read up to the borders
        of its blocks, so that all of it is checked, unless that costs more than 128 KiB and
        more than `gap_ratio` of it (for parts in many runs: half of it).
    gap_ratio
        How many bytes nobody wants may be read to save calls, for each wanted one.
    finder
        Knows how transforms are undone; None knows those of shardpoint that need no key.
    tally
        Counts what transforms decode, or None.

    Raises
    ------
    PlanError
        If a region is not in its tensor, or the tensor's chunks overlap, leave holes, are
        outside of it, or are not in their files; with all problems.
    CorruptionError
        If bytes are missing or differ from their checksum.
    FormatError
        If a record is not what its format and the index say.
    UnsafePathError, NotSupportedError, LimitExceededError, StorageError
        And whatever a sink raises.
    """
    return read_regions(
        index,
        storage,
        wanted_by(index, requests),
        RequestTargets(index, requests),
        threads=threads,
        verify=verify,
        gap_ratio=gap_ratio,
        finder=Transforms() if finder is None else finder,
        tally=tally,
    )


def read_regions(
    index: CheckpointIndex,
    storage: Storage,
    wanted: Wanted,
    targets: Targets,
    *,
    threads: int,
    verify: bool,
    gap_ratio: float,
    finder: TransformFinder,
    tally: Tally | None,
) -> ReadStatistics:
    """Fill regions that are given in columns; all else as `read_tensors` does."""
    started = time.perf_counter()
    with collection_paused():
        pairs = plan_reads(index, storage, wanted)
        segments, taken = find_segments(index, wanted, pairs, targets.dense())
        works = works_of(index, wanted, pairs.take(np.flatnonzero(~taken)))
        progress = Progress(np.bincount(pairs.number, minlength=len(wanted)), targets)
    with OpenFiles(storage) as files:
        context = ReadContext(
            index=index,
            files=files,
            targets=targets,
            progress=progress,
            buffers=BufferPool(BUFFER),
            verify=verify,
            gap_ratio=gap_ratio,
            finder=finder,
            tally=tally,
        )
        chunks = ChunkReader(context)
        reader = DenseReader(
            index, files, segments, targets, progress, verify=verify, gap_ratio=gap_ratio
        )
        unresolved = [work for work in works if not is_simple(work)]
        run_tasks(resolve_tasks(files, unresolved), threads=threads, name=_NAME)
        chunks.metadata_bytes = files.bytes_read
        tasks = chain(reader.tasks(), chunks.tasks(works))
        run_tasks(tasks, threads=threads, name=_NAME)
    progress.commit_empty()
    itemsizes = np.array([dtype.itemsize for dtype in BY_CODE], np.int64)
    itemsize = itemsizes[index.tensors.dtype[wanted.tensor]]
    return ReadStatistics(
        bytes_read=files.bytes_read,
        payload_bytes=int((wanted.sizes.prod(axis=1) * itemsize).sum()),
        metadata_bytes=chunks.metadata_bytes + reader.metadata_bytes,
        reads=files.reads,
        seconds=time.perf_counter() - started,
    )
