"""What is wanted to what has to be read: checked against the index, then cut by chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shardpoint.engine._payload import Payload, Place, known_payload, place_of
from shardpoint.engine.targets import ReadRequest
from shardpoint.errors import DamagedCheckpointError, PlanError, Problem, UnsafePathError
from shardpoint.index import NO_FILE, CheckpointIndex
from shardpoint.planning.intersect import intersect
from shardpoint.planning.validate import find_problems, find_span_problems
from shardpoint.region import contains
from shardpoint.storage import Storage

__all__ = ["ChunkWork", "Pairs", "Part", "Wanted", "plan_reads", "wanted_by", "works_of"]

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """The regions that are wanted, in columns.

    Attributes
    ----------
    tensor
        ``int64[n]``: rows in `Tensors`.
    offsets, sizes
        ``int64[n, D]``, padded with 0 and 1 as the index's boxes are.
    """

    tensor: Int64Array
    offsets: Int64Array
    sizes: Int64Array

    def __len__(self) -> int:
        return len(self.tensor)


class Pairs(NamedTuple):
    """One row for each region and each chunk that has a part of it.

    ``number`` int64[k] is the region's row in `Wanted`, ``chunk`` the chunk's in `Chunks`;
    ``offsets``, ``sizes`` int64[k, D] are the part, in the tensor's coordinates.
    """

    number: Int64Array
    chunk: Int64Array
    offsets: Int64Array
    sizes: Int64Array

    def take(self, rows: Int64Array) -> Pairs:
        """Return some of the rows."""
        return Pairs(*(column[rows] for column in self))


@dataclass(frozen=True, slots=True)
class Part:
    """The box, in the tensor's coordinates, that one region takes of one chunk.

    `number` is the region's, `origin` where it begins in the tensor.
    """

    number: int
    origin: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def start_in(self, place: Place) -> tuple[int, ...]:
        """Return where the box begins in the chunk."""
        return tuple(a - b for a, b in zip(self.offsets, place.offsets, strict=True))

    @property
    def start(self) -> tuple[int, ...]:
        """Where the box begins in the region."""
        return tuple(a - b for a, b in zip(self.offsets, self.origin, strict=True))

    def of(self, memory: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the part of the region's memory that it fills."""
        box: list[Any] = [slice(a, a + n) for a, n in zip(self.start, self.sizes, strict=True)]
        part: npt.NDArray[Any] = memory[(*box, ...)]
        return part


@dataclass(slots=True, eq=False)
class ChunkWork:
    """One chunk that is needed, and the parts of it that go somewhere."""

    place: Place
    payload: Payload | None
    parts: list[Part] = field(default_factory=list)

    @property
    def is_wanted_whole(self) -> bool:
        """Whether some region takes all of it."""
        return any(part.sizes == self.place.sizes for part in self.parts)


def wanted_by(index: CheckpointIndex, requests: Sequence[ReadRequest]) -> Wanted:
    """Return requests as columns.

    Raises
    ------
    PlanError
        If a request has not as many numbers as its tensor has axes, or names no tensor.
    """
    axes = index.tensors.shape.shape[1]
    offsets = np.zeros((len(requests), axes), np.int64)
    sizes = np.ones((len(requests), axes), np.int64)
    tensor = np.zeros(len(requests), np.int64)
    problems = []
    for i, request in enumerate(requests):
        if not 0 <= request.tensor < len(index.tensors):
            problems.append(Problem(f"there is no tensor of row {request.tensor}"))
            continue
        rank = int(index.tensors.ndim[request.tensor])
        tensor[i] = request.tensor
        if len(request.offsets) == len(request.sizes) == rank:
            offsets[i, :rank] = request.offsets
            sizes[i, :rank] = request.sizes
        else:
            problems.append(_outside(index, request.tensor, request.offsets, request.sizes))
    wanted = Wanted(tensor, offsets, sizes)
    if problems:
        raise PlanError(_NOT_THERE, [*problems, *_region_problems(index, wanted)])
    return wanted


def plan_reads(index: CheckpointIndex, storage: Storage, wanted: Wanted) -> Pairs:
    """Return which parts of which chunks make up the regions.

    Raises
    ------
    PlanError
        With every problem that the regions, or the tensors they name, have.
    UnsafePathError, StorageError
    """
    problems = _region_problems(index, wanted)
    if problems:
        raise PlanError(_NOT_THERE, problems)
    rows = np.unique(wanted.tensor)
    chunk_rows = _chunks_of(index, rows)
    _check_tensors(index, storage, rows, chunk_rows)
    found = intersect(
        wanted.tensor,
        wanted.offsets,
        wanted.sizes,
        index.chunks.tensor[chunk_rows],
        index.chunks.offsets[chunk_rows],
        index.chunks.sizes[chunk_rows],
    )
    pairs = Pairs(found.a, chunk_rows[found.b], found.offsets, found.sizes)
    _check_files(index, storage, np.unique(pairs.chunk))
    _check_covered(index, storage, wanted, pairs)
    return pairs


_NOT_THERE = "what is wanted is not in the checkpoint"


def _region_problems(index: CheckpointIndex, wanted: Wanted) -> list[Problem]:
    """Return what is wrong with the regions, or with the shapes of their tensors."""
    shape = index.tensors.shape[wanted.tensor]
    negative: npt.NDArray[np.bool_] = np.any(shape < 0, axis=1)
    wrong = negative | ~contains(shape, wanted.offsets, wanted.sizes)
    problems = []
    for i in np.flatnonzero(wrong).tolist():
        row = int(wanted.tensor[i])
        if negative[i]:
            message = f"the shape {index.tensors.shape_of(row)} has a negative number"
            problems.append(Problem(message, index.tensors.keys[row]))
        else:
            rank = int(index.tensors.ndim[row])
            box = wanted.offsets[i, :rank].tolist(), wanted.sizes[i, :rank].tolist()
            problems.append(_outside(index, row, *box))
    return problems


def _outside(
    index: CheckpointIndex, row: int, offsets: Sequence[int], sizes: Sequence[int]
) -> Problem:
    message = (
        f"the region at {list(offsets)} of sizes {list(sizes)} is not inside the shape "
        f"{list(index.tensors.shape_of(row))}"
    )
    return Problem(message, index.tensors.keys[row])


def _chunks_of(index: CheckpointIndex, rows: Int64Array) -> Int64Array:
    wanted = np.zeros(len(index.tensors), np.bool_)
    wanted[rows] = True
    return np.flatnonzero(wanted[index.chunks.tensor])


def _check_tensors(
    index: CheckpointIndex, storage: Storage, rows: Int64Array, chunk_rows: Int64Array
) -> None:
    """Check the tensors' chunks with each other; where they are wrong, with the files too.

    What no chunk covers matters only where it is wanted: a rank that saved alone has its own
    part of each tensor there and nothing else.
    """
    if not find_problems(index, rows=rows, file_sizes=None, check_coverage=False):
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


def _damaged(storage: Storage, problems: Sequence[Problem]) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"the checkpoint at {storage.location!r} is damaged", problems)


def _check_covered(index: CheckpointIndex, storage: Storage, wanted: Wanted, pairs: Pairs) -> None:
    """Check that every wanted element comes, whatever went wrong before."""
    found = np.zeros(len(wanted), np.int64)
    np.add.at(found, pairs.number, pairs.sizes.prod(axis=1))
    needed = wanted.sizes.prod(axis=1)
    short = np.flatnonzero(found != needed)
    if not len(short):
        return
    problems = find_problems(index, rows=np.unique(wanted.tensor[short]), file_sizes=None)
    if problems:
        raise _damaged(storage, problems)
    problems = [
        Problem(
            f"{int(needed[i])} elements are wanted, the chunks give {int(found[i])}",
            index.tensors.keys[int(wanted.tensor[i])],
        )
        for i in short.tolist()
    ]
    raise PlanError("the stored chunks do not give what is wanted", problems)


def works_of(index: CheckpointIndex, wanted: Wanted, pairs: Pairs) -> list[ChunkWork]:
    """Return the chunks of some pairs as values, in the order of files and offsets.

    Raises
    ------
    FormatError
        If a payload that the index gives is not inside its record.
    """
    chunks = index.chunks
    order = np.lexsort((pairs.chunk, chunks.record_offset[pairs.chunk], chunks.file[pairs.chunk]))
    pairs = pairs.take(order)
    works: list[ChunkWork] = []
    origins = wanted.offsets[pairs.number].tolist()
    columns = (column.tolist() for column in pairs)
    for number, chunk, offsets, sizes, origin in zip(*columns, origins, strict=True):
        if not works or works[-1].place.chunk != chunk:
            place = place_of(index, chunk)
            works.append(ChunkWork(place, known_payload(index, place)))
        axes = len(works[-1].place.sizes)
        part = Part(number, tuple(origin[:axes]), tuple(offsets[:axes]), tuple(sizes[:axes]))
        works[-1].parts.append(part)
    return works
