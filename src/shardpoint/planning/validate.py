"""Everything that is wrong with a checkpoint, as far as its index and file sizes tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from shardpoint.dtypes import BY_CODE
from shardpoint.errors import Problem
from shardpoint.index import NO_FILE, UNKNOWN, CheckpointIndex
from shardpoint.planning._geometry import (
    Found,
    and_more,
    box_text,
    first_of_each,
    geometry_problems,
)
from shardpoint.region import MAX_VOLUME, Int64Array

__all__ = ["find_problems", "find_span_problems"]

_UNCHECKED = -1
_MISSING = -2


def find_problems(
    index: CheckpointIndex,
    *,
    rows: Int64Array | None,
    file_sizes: Mapping[str, int | None] | None,
    check_coverage: bool = True,
) -> list[Problem]:
    """Find what is wrong with tensors: shapes, chunks outside, overlaps, gaps, byte spans.

    Nothing is read, and nothing is allocated by a size that the index claims. Near-linear
    in the number of chunks. At most a few problems of one kind are named for each tensor.
    Chunks of size zero are fine wherever they lie in their tensor, with bytes or without; what
    bytes they have is to be in the file only where all tensors are looked at: nothing reads them.

    Parameters
    ----------
    rows
        Rows of the tensors to look at; None for all tensors, and the objects as well.
    file_sizes
        The size of each file, None for one that does not exist. Files that are not named
        are not checked. Without this mapping no byte spans are.
    check_coverage
        Whether elements that no chunk covers are a problem.

    Returns
    -------
    The problems, in the order of the tensors, then objects, then missing files.
    """
    chunks = index.chunks
    selected = np.full(len(index.tensors), rows is None)
    if rows is not None:
        selected[rows] = True
    chunk_rows = np.flatnonzero(selected[chunks.tensor])
    found = list(geometry_problems(index, selected, chunk_rows, check_coverage=check_coverage))
    stored = chunk_rows[chunks.file[chunk_rows] != NO_FILE]
    chunk_rows = chunk_rows[(chunks.sizes[chunk_rows] != 0).all(axis=1)]
    found += _without_file(index, chunk_rows)
    chunk_rows = chunk_rows[chunks.file[chunk_rows] != NO_FILE]
    last: list[Problem] = []
    if file_sizes is not None:
        known = [file_sizes.get(name, _UNCHECKED) for name in index.files]
        sizes = np.array([_MISSING if size is None else size for size in known], np.int64)
        found += _record_spans(index, stored if rows is None else chunk_rows, sizes)
        found += _payload_spans(index, chunk_rows, sizes)
        last += _objects(index, sizes) if rows is None else []
        needed = stored if rows is None else chunk_rows
        last += _missing_files(index, needed, sizes, with_objects=rows is None)
    found.sort(key=lambda item: item[0])
    return [*(problem for _, problem in found), *last]


def find_span_problems(
    index: CheckpointIndex, *, chunk_rows: Int64Array, file_sizes: Mapping[str, int | None]
) -> list[Problem]:
    """Find which of some chunks are not inside their files, as `find_problems` does for all.

    Parameters
    ----------
    chunk_rows
        Chunks that have a file.
    file_sizes
        As for `find_problems`.
    """
    known = [file_sizes.get(name, _UNCHECKED) for name in index.files]
    sizes = np.array([_MISSING if size is None else size for size in known], np.int64)
    found = [
        *_record_spans(index, chunk_rows, sizes),
        *_payload_spans(index, chunk_rows, sizes),
    ]
    found.sort(key=lambda item: item[0])
    missing = _missing_files(index, chunk_rows, sizes, with_objects=False)
    return [*(problem for _, problem in found), *missing]


def _chunk_text(index: CheckpointIndex, row: int, chunk: int) -> str:
    axes = slice(int(index.tensors.ndim[row]))
    box = box_text(index.chunks.offsets[chunk, axes], index.chunks.sizes[chunk, axes])
    return f"the chunk at {box}"


def _without_file(index: CheckpointIndex, rows: Int64Array) -> Iterator[Found]:
    missing = rows[index.chunks.file[rows] == NO_FILE]
    for row, chunk, more in first_of_each(index.chunks.tensor, missing):
        message = f"nothing says where {_chunk_text(index, row, chunk)} is stored{and_more(more)}"
        yield row, Problem(message, index.tensors.keys[row])


class _Spans(NamedTuple):
    """Byte spans in files, in columns; `size` is the file's, negative where not known."""

    file: Int64Array
    offset: Int64Array
    length: Int64Array
    size: Int64Array

    def wrong(self) -> Int64Array:
        """Return the rows that have a negative number or end past the file."""
        negative = (self.offset < 0) | (self.length < 0)
        rest = self.size - np.clip(self.offset, 0, None)  # cannot overflow where size >= 0
        return np.flatnonzero(negative | ((self.size >= 0) & (self.length > rest)))

    def problem(self, at: int, *, what: str, more: int, key: str, files: Sequence[str]) -> Problem:
        offset, length, size = int(self.offset[at]), int(self.length[at]), int(self.size[at])
        if offset < 0 or length < 0:
            message = f"{what} has the byte offset {offset} and the length {length}"
        else:
            message = f"{what} ends at byte {offset + length:,}, but the file has {size:,}"
        return Problem(message + and_more(more), key, files[self.file[at]], offset)


def _record_spans(index: CheckpointIndex, rows: Int64Array, sizes: Int64Array) -> Iterator[Found]:
    chunks = index.chunks
    file = chunks.file[rows].astype(np.int64)
    spans = _Spans(file, chunks.record_offset[rows], chunks.record_length[rows], sizes[file])
    for row, at, more in first_of_each(chunks.tensor[rows], spans.wrong()):
        what = f"the record of {_chunk_text(index, row, int(rows[at]))}"
        key = index.tensors.keys[row]
        yield row, spans.problem(at, what=what, more=more, key=key, files=index.files)


def _payload_spans(index: CheckpointIndex, rows: Int64Array, sizes: Int64Array) -> Iterator[Found]:
    """Check payloads that are known: inside the file, and large enough for their strides."""
    chunks, payloads = index.chunks, index.chunks.payloads
    if payloads is None:
        return
    rows = rows[payloads.offset[rows] != UNKNOWN]
    file = chunks.file[rows].astype(np.int64)
    # Behind a transform, offsets are in what it decodes to.
    size = np.where(chunks.transform[rows] == 0, sizes[file], _UNCHECKED)
    spans = _Spans(file, payloads.offset[rows], payloads.length[rows], size)
    for row, at, more in first_of_each(chunks.tensor[rows], spans.wrong()):
        what = f"the payload of {_chunk_text(index, row, int(rows[at]))}"
        key = index.tensors.keys[row]
        yield row, spans.problem(at, what=what, more=more, key=key, files=index.files)

    strides, box = payloads.strides[rows], chunks.sizes[rows]
    itemsize = np.array([dtype.itemsize for dtype in BY_CODE], np.int64)
    itemsize = itemsize[index.tensors.dtype[chunks.tensor[rows]]]
    steps = (box.astype(np.float64) - 1) * strides
    fits = (strides >= 0).all(axis=1) & ((steps.sum(axis=1) + 1) * itemsize < MAX_VOLUME)
    needed = (((box - 1) * strides).sum(axis=1) + 1) * itemsize  # right wherever it fits
    wrong = np.flatnonzero(~fits | (needed > payloads.length[rows]))
    for row, at, more in first_of_each(chunks.tensor[rows], wrong):
        wanted = f"{int(needed[at]):,}" if fits[at] else "an impossible number of"
        axes = slice(int(index.tensors.ndim[row]))
        message = (
            f"{_chunk_text(index, row, int(rows[at]))} with strides "
            f"{tuple(strides[at, axes].tolist())} needs {wanted} bytes, but its payload has "
            f"{int(payloads.length[rows[at]]):,}{and_more(more)}"
        )
        name = index.files[file[at]]
        yield row, Problem(message, index.tensors.keys[row], name, int(payloads.offset[rows[at]]))


def _objects(index: CheckpointIndex, sizes: Int64Array) -> Iterator[Problem]:
    objects = index.objects
    for at in np.flatnonzero(objects.file == NO_FILE).tolist():
        if objects.keys[at] not in objects.values:
            yield Problem("nothing says where the object is stored", objects.keys[at])
    stored = np.flatnonzero(objects.file != NO_FILE)
    file = objects.file[stored].astype(np.int64)
    spans = _Spans(file, objects.record_offset[stored], objects.record_length[stored], sizes[file])
    for at in spans.wrong().tolist():
        key = objects.keys[int(stored[at])]
        yield spans.problem(at, what="the object's record", more=0, key=key, files=index.files)


def _missing_files(
    index: CheckpointIndex, rows: Int64Array, sizes: Int64Array, *, with_objects: bool
) -> Iterator[Problem]:
    """Report each missing file that something lies in once."""
    chunks, objects = index.chunks, index.objects
    used, first, counts = np.unique(chunks.file[rows], return_index=True, return_counts=True)
    missing = {
        file: f"{count:,} {'chunk' if count == 1 else 'chunks'}, such as one of key "
        f"{index.tensors.keys[int(chunks.tensor[rows[at]])]!r}"
        for file, at, count in zip(used.tolist(), first.tolist(), counts.tolist(), strict=True)
        if sizes[file] == _MISSING
    }
    if with_objects:
        for at in np.flatnonzero(objects.file != NO_FILE).tolist():
            if sizes[objects.file[at]] == _MISSING:
                missing.setdefault(int(objects.file[at]), f"the object {objects.keys[at]!r}")
    for file, what in sorted(missing.items()):
        yield Problem(f"the file is missing; it should hold {what}", file=index.files[file])
