"""Whole records against the checksums that the native index has of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardpoint.engine.checksumming import Spans, checksum_spans
from shardpoint.errors import Problem
from shardpoint.index import NO_FILE, UNKNOWN, CheckpointIndex, Container
from shardpoint.storage import Storage
from shardpoint.verify._report import problem_of

__all__ = ["StoredResult", "check_stored"]

Int64Array = npt.NDArray[np.int64]

_MOST_RANGES = 8


@dataclass(frozen=True, slots=True, eq=False)
class StoredResult:
    """What was found.

    Attributes
    ----------
    chunks, objects
        ``bool[m]`` and ``bool[n]``: whose records were compared and are as they were written.
    damaged_chunks, damaged_objects
        The same, whose records are not, or cannot be read.
    bytes_read
        Bytes that took.
    problems
        What was wrong.
    """

    chunks: npt.NDArray[np.bool_]
    objects: npt.NDArray[np.bool_]
    damaged_chunks: npt.NDArray[np.bool_]
    damaged_objects: npt.NDArray[np.bool_]
    bytes_read: int
    problems: list[Problem]


@dataclass(frozen=True, slots=True, eq=False)
class _Records:
    """The records of all chunks, then those of all objects."""

    file: Int64Array
    start: Int64Array
    length: Int64Array
    checksum: Int64Array

    @property
    def end(self) -> Int64Array:
        return self.start + self.length


def check_stored(
    index: CheckpointIndex,
    storage: Storage,
    sizes: Mapping[str, int | None],
    *,
    threads: int,
    progress: Callable[[int], None],
) -> StoredResult:
    """Compare every record that has a checksum, byte by byte, and look for bytes between them.

    A file of which all records have checksums must consist of them: bytes that belong to no
    record are a problem. Records that do not lie inside their file are left to the checks of
    spans, and so are those of files that are missing.
    """
    records = _records_of(index)
    known = [sizes.get(name) for name in index.files]
    file_size = np.array([*(-1 if size is None else size for size in known), -1], np.int64)
    present = records.file != NO_FILE
    inside = present & (records.end <= file_size[records.file])
    wanted = np.flatnonzero(inside & (records.checksum != UNKNOWN))
    wanted, problems = _without_overlaps(index, records, wanted)
    spans = Spans(index.files, records.file[wanted], records.start[wanted], records.length[wanted])
    found = checksum_spans(storage, spans, threads=threads, progress=progress)
    is_wrong = found.values != records.checksum[wanted]
    is_wrong[list(found.errors)] = True
    damaged = np.zeros(len(records.file), np.bool_)
    damaged[wanted[is_wrong]] = True
    fine = np.zeros(len(records.file), np.bool_)
    fine[wanted[~is_wrong]] = True
    for at in np.flatnonzero(is_wrong).tolist():
        row = int(wanted[at])
        error = found.errors.get(at)
        if error is None:
            problems += _damage(index, storage, records, row, int(found.values[at]), threads)
        else:
            name = index.files[int(records.file[row])]
            problems.append(problem_of(error, _key_of(index, row), name, int(records.start[row])))
    complete = np.ones(len(index.files) + 1, np.bool_)
    complete[records.file[present & (records.checksum == UNKNOWN)]] = False
    problems += _between(index, records, file_size, complete)
    count = len(index.chunks)
    return StoredResult(
        chunks=fine[:count],
        objects=fine[count:],
        damaged_chunks=damaged[:count],
        damaged_objects=damaged[count:],
        bytes_read=found.bytes_read,
        problems=problems,
    )


def _records_of(index: CheckpointIndex) -> _Records:
    chunks, objects = index.chunks, index.objects

    def joined(name: str, missing: int) -> Int64Array:
        columns = [
            np.full(len(places), missing, np.int64)
            if getattr(places, name) is None
            else getattr(places, name).astype(np.int64)
            for places in (chunks, objects)
        ]
        return np.concatenate(columns)

    checksum = joined("record_checksum", UNKNOWN)
    # That of an image is its header's, which is checked where headers are.
    checksum[: len(chunks)][chunks.container == Container.SAFETENSORS_IMAGE] = UNKNOWN
    return _Records(
        file=joined("file", NO_FILE),
        start=joined("record_offset", 0),
        length=joined("record_length", 0),
        checksum=checksum,
    )


def _key_of(index: CheckpointIndex, row: int) -> str:
    count = len(index.chunks)
    if row < count:
        return index.tensors.keys[int(index.chunks.tensor[row])]
    return index.objects.keys[row - count]


def _without_overlaps(
    index: CheckpointIndex, records: _Records, rows: Int64Array
) -> tuple[Int64Array, list[Problem]]:
    """Leave out records that begin before another one ends: reading could take forever."""
    rows = rows[np.lexsort((records.start[rows], records.file[rows]))]
    file, end = records.file[rows], records.end[rows]
    # The furthest end so far in the same file: files one after the other on one axis.
    reach = int(end.max(initial=0)) + 1
    if len(rows) and reach > np.iinfo(np.int64).max // (len(index.files) + 1):
        return rows[:0], []  # no file is that long
    shift = file * reach
    before = np.concatenate([[-1], np.maximum.accumulate(end + shift)[:-1]]) if len(rows) else end
    overlaps = records.start[rows] + shift < before
    problems = [
        Problem(
            f"the record at {int(records.start[row])} to {int(records.end[row])} begins inside "
            "another one",
            key=_key_of(index, row),
            file=index.files[int(records.file[row])],
            offset=int(records.start[row]),
        )
        for row in rows[overlaps].tolist()
    ]
    return rows[~overlaps], problems


def _between(
    index: CheckpointIndex,
    records: _Records,
    file_size: Int64Array,
    complete: npt.NDArray[np.bool_],
) -> Iterator[Problem]:
    """Find bytes that belong to no record."""
    order = np.lexsort((records.start, records.file))
    files = records.file[order]
    for number, name in enumerate(index.files):
        size = int(file_size[number])
        if size < 0 or not complete[number]:
            continue
        rows = order[np.searchsorted(files, number) : np.searchsorted(files, number, "right")]
        ends = np.maximum.accumulate(np.concatenate([[0], records.end[rows]]))
        starts = np.concatenate([records.start[rows], [size]])
        for gap in np.flatnonzero(starts > ends).tolist():
            start, end = int(ends[gap]), int(starts[gap])
            yield Problem(
                f"bytes {start} to {end} belong to no record: wanted none there, found "
                f"{end - start}",
                file=name,
                offset=start,
            )


def _damage(
    index: CheckpointIndex,
    storage: Storage,
    records: _Records,
    row: int,
    found: int,
    threads: int,
) -> list[Problem]:
    """Say which bytes of a record are damaged, as exactly as the checksums of blocks tell."""
    key, name = _key_of(index, row), index.files[int(records.file[row])]
    blocks = _damaged_blocks(index, storage, records, row, threads)
    if blocks:
        return [
            Problem(
                f"bytes {start} to {end} are damaged: wanted CRC-32 {wanted:#010x}, found "
                f"{value:#010x}",
                key,
                name,
                start,
            )
            for start, end, wanted, value in blocks[:_MOST_RANGES]
        ] + (
            [Problem(f"{len(blocks) - _MOST_RANGES} more blocks are damaged", key, name)]
            if len(blocks) > _MOST_RANGES
            else []
        )
    start, end = int(records.start[row]), int(records.end[row])
    where = f"bytes {start} to {end}"
    payloads = index.chunks.payloads
    if row < len(index.chunks) and payloads is not None and payloads.offset[row] != UNKNOWN:
        first = int(payloads.offset[row])
        where += f", outside of the elements at {first} to {first + int(payloads.length[row])},"
    wanted = int(records.checksum[row])
    message = f"{where} are damaged: wanted CRC-32 {wanted:#010x}, found {found:#010x}"
    return [Problem(message, key, name, start)]


def _damaged_blocks(
    index: CheckpointIndex, storage: Storage, records: _Records, row: int, threads: int
) -> Sequence[tuple[int, int, int, int]]:
    """Return start, end, and both checksums of each damaged block of a chunk's payload."""
    blocks, payloads = index.chunks.blocks, index.chunks.payloads
    if row >= len(index.chunks) or blocks is None or payloads is None:
        return []
    values = blocks.values[int(blocks.first[row]) : int(blocks.first[row + 1])].astype(np.int64)
    if not len(values):
        return []
    offsets = np.arange(len(values), dtype=np.int64) * blocks.block_size
    spans = Spans(
        index.files,
        np.full(len(values), records.file[row]),
        payloads.offset[row] + offsets,
        np.minimum(payloads.length[row] - offsets, blocks.block_size),
    )
    found = checksum_spans(storage, spans, threads=threads, progress=None)
    return [
        (
            int(spans.start[at]),
            int(spans.start[at] + spans.length[at]),
            int(values[at]),
            int(found.values[at]),
        )
        for at in np.flatnonzero(found.values != values).tolist()
        if at not in found.errors
    ]
