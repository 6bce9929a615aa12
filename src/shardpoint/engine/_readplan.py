"""What is wanted to what has to be read: checked against the index, then cut by chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from shardpoint.engine._payload import Payload, Place, known_payload, place_of
from shardpoint.engine.targets import ReadRequest, Target
from shardpoint.errors import PlanError, Problem, UnsafePathError
from shardpoint.index import NO_FILE, CheckpointIndex
from shardpoint.planning.intersect import Intersections, intersect
from shardpoint.planning.validate import find_problems, find_span_problems
from shardpoint.storage import Storage

__all__ = ["ChunkWork", "Part", "plan_reads"]

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """The box, in the tensor's coordinates, that one request wants of one chunk."""

    target: Target
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def start_in(self, place: Place) -> tuple[int, ...]:
        """Return where the box begins in the chunk."""
        return tuple(a - b for a, b in zip(self.offsets, place.offsets, strict=True))


@dataclass(slots=True, eq=False)
class ChunkWork:
    """One chunk that is needed, and the parts of it that go somewhere."""

    place: Place
    payload: Payload | None
    parts: list[Part] = field(default_factory=list)

    @property
    def is_wanted_whole(self) -> bool:
        """Whether some request takes all of it."""
        return any(part.sizes == self.place.sizes for part in self.parts)


def plan_reads(
    index: CheckpointIndex, storage: Storage, requests: Sequence[ReadRequest]
) -> tuple[list[ChunkWork], list[Target]]:
    """Return the chunks to read, in the order of files and offsets; and the empty targets.

    Raises
    ------
    PlanError
        With every problem that the requests, or the tensors they name, have.
    FormatError
        If a payload that the index gives is not inside its record.
    UnsafePathError, StorageError
    """
    rows = _check_requests(index, requests)
    chunk_rows = _chunks_of(index, rows)
    _check_tensors(index, storage, rows, chunk_rows)
    pairs = _pairs(index, requests, chunk_rows)
    _check_files(index, storage, np.unique(chunk_rows[pairs.b]))
    counts = np.bincount(pairs.a, minlength=len(requests)).tolist()
    targets = [
        Target(
            request,
            index.tensors.keys[request.tensor],
            index.tensors.dtype_of(request.tensor),
            count,
        )
        for request, count in zip(requests, counts, strict=True)
    ]
    _check_covered(index, requests, pairs)
    empty = [target for target, count in zip(targets, counts, strict=True) if not count]
    return _works(index, targets, pairs, chunk_rows), empty


def _check_requests(index: CheckpointIndex, requests: Sequence[ReadRequest]) -> Int64Array:
    """Return the rows of the tensors that are asked for."""
    problems = []
    for request in requests:
        if not 0 <= request.tensor < len(index.tensors):
            problems.append(Problem(f"there is no tensor of row {request.tensor}"))
            continue
        shape = index.tensors.shape_of(request.tensor)
        if any(size < 0 for size in shape):
            message = f"the shape {shape} has a negative number"
            problems.append(Problem(message, index.tensors.keys[request.tensor]))
            continue
        fits = len(request.offsets) == len(request.sizes) == len(shape) and all(
            offset >= 0 and size >= 0 and offset + size <= length
            for offset, size, length in zip(request.offsets, request.sizes, shape, strict=True)
        )
        if not fits:
            message = (
                f"the region at {list(request.offsets)} of sizes {list(request.sizes)} is not "
                f"inside the shape {list(shape)}"
            )
            problems.append(Problem(message, index.tensors.keys[request.tensor]))
    if problems:
        raise PlanError("what is wanted is not in the checkpoint", problems)
    return np.unique(np.array([request.tensor for request in requests], np.int64))


def _chunks_of(index: CheckpointIndex, rows: Int64Array) -> Int64Array:
    wanted = np.zeros(len(index.tensors), np.bool_)
    wanted[rows] = True
    return np.flatnonzero(wanted[index.chunks.tensor])


def _check_tensors(
    index: CheckpointIndex, storage: Storage, rows: Int64Array, chunk_rows: Int64Array
) -> None:
    """Check the tensors' chunks with each other; where they are wrong, with the files too."""
    if not find_problems(index, rows=rows, file_sizes=None):
        return
    sizes = _file_sizes(index, storage, chunk_rows)
    raise _damaged(storage, find_problems(index, rows=rows, file_sizes=sizes))


def _check_files(index: CheckpointIndex, storage: Storage, chunk_rows: Int64Array) -> None:
    """Check the chunks that are read with their files: others may be missing."""
    sizes = _file_sizes(index, storage, chunk_rows)
    problems = find_span_problems(index, chunk_rows=chunk_rows, file_sizes=sizes)
    problems += [
        Problem("a metadata file is named as a file of data", file=name)
        for name in sizes
        if name in index.metadata_files and index.source.startswith("dcp")
    ]
    if problems:
        raise _damaged(storage, problems)


def _file_sizes(
    index: CheckpointIndex, storage: Storage, chunk_rows: Int64Array
) -> dict[str, int | None]:
    """Return the size of each file that the chunks are in."""
    numbers, first = np.unique(index.chunks.file[chunk_rows], return_index=True)
    sizes: dict[str, int | None] = {}
    for number, at in zip(numbers.tolist(), first.tolist(), strict=True):
        if number == NO_FILE:
            continue
        name = index.files[number]
        try:
            sizes[name] = storage.size(name)
        except UnsafePathError as error:
            key = index.tensors.keys[int(index.chunks.tensor[chunk_rows[at]])]
            raise UnsafePathError(f"key {key!r}: {error}") from error
    return sizes


def _damaged(storage: Storage, problems: Sequence[Problem]) -> PlanError:
    return PlanError(f"the checkpoint at {storage.location!r} is damaged", problems)


def _pairs(
    index: CheckpointIndex, requests: Sequence[ReadRequest], chunk_rows: Int64Array
) -> Intersections:
    axes = index.tensors.shape.shape[1]
    offsets = np.zeros((len(requests), axes), np.int64)
    sizes = np.ones((len(requests), axes), np.int64)
    for i, request in enumerate(requests):
        offsets[i, : len(request.offsets)] = request.offsets
        sizes[i, : len(request.sizes)] = request.sizes
    return intersect(
        np.array([request.tensor for request in requests], np.int64),
        offsets,
        sizes,
        index.chunks.tensor[chunk_rows],
        index.chunks.offsets[chunk_rows],
        index.chunks.sizes[chunk_rows],
    )


def _check_covered(
    index: CheckpointIndex, requests: Sequence[ReadRequest], pairs: Intersections
) -> None:
    """Check that every wanted element comes, whatever went wrong before."""
    found = np.zeros(len(requests), np.int64)
    np.add.at(found, pairs.a, pairs.sizes.prod(axis=1))
    problems = [
        Problem(
            f"{prod(request.sizes)} elements are wanted, the chunks give {count}",
            index.tensors.keys[request.tensor],
        )
        for request, count in zip(requests, found.tolist(), strict=True)
        if prod(request.sizes) != count
    ]
    if problems:
        raise PlanError("the stored chunks do not give what is wanted", problems)


def _works(
    index: CheckpointIndex,
    targets: Sequence[Target],
    pairs: Intersections,
    chunk_rows: Int64Array,
) -> list[ChunkWork]:
    chunk_of_pair = chunk_rows[pairs.b]
    chunks = index.chunks
    order = np.lexsort(
        (chunk_of_pair, chunks.record_offset[chunk_of_pair], chunks.file[chunk_of_pair])
    )
    works: list[ChunkWork] = []
    rows = zip(
        pairs.a[order].tolist(),
        chunk_of_pair[order].tolist(),
        pairs.offsets[order].tolist(),
        pairs.sizes[order].tolist(),
        strict=True,
    )
    for request, chunk, offsets, sizes in rows:
        if not works or works[-1].place.chunk != chunk:
            place = place_of(index, chunk)
            works.append(ChunkWork(place, known_payload(index, place)))
        axes = len(works[-1].place.sizes)
        part = Part(targets[request], tuple(offsets[:axes]), tuple(sizes[:axes]))
        works[-1].parts.append(part)
    return works
