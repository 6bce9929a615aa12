"""Chunks and their places, both largely in runs, to columns: no object for a chunk.

What is checked is what `check_metadata` checks. Where something is wrong, or so unusual that
vector operations would not serve, `RunsRefused` is raised: the metadata is then read without
runs, which either works or names the fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardpoint.formats._metadata_cursors import Int64s
from shardpoint.formats._metadata_fields import Checker, MetadataFields, Place, TensorFields
from shardpoint.formats._metadata_grammar import ChunkColumns, StorageColumns, TensorColumns
from shardpoint.formats._metadata_matching import match_offsets
from shardpoint.formats._metadata_records import MetadataRecord
from shardpoint.formats._metadata_runs import RUN, MetadataRuns, Run
from shardpoint.formats._metadata_values import TableValues
from shardpoint.formats._pickle_opcodes import RunsRefused
from shardpoint.index import NO_FILE

__all__ = ["JoinedMetadata", "join_runs", "separate_chunks"]

_NO_PLACE = -1


@dataclass(frozen=True, slots=True, eq=False)
class JoinedMetadata:
    """A whole ``Metadata``, chunks in columns.

    Attributes
    ----------
    fields
        All but the chunks; the places of objects are in `object_places`.
    counts
        ``int64[t]``: chunks of each tensor.
    offsets, sizes
        ``int64[m, D]``, padded with 0 and 1.
    chunk_places, object_places
        ``int64[m, 4]``, ``int64[n, 4]``: file, offset, length, transform.
    files, transforms
        What the columns number.
    """

    fields: MetadataFields
    counts: Int64s
    offsets: Int64s
    sizes: Int64s
    chunk_places: Int64s
    object_places: Int64s
    files: list[str]
    transforms: list[tuple[str, ...]]


@dataclass(slots=True, eq=False)
class _Entries:
    """Entries of ``storage_data`` in their order: key, axes (-1: no offset), position, place."""

    key: Int64s
    axes: Int64s
    offset: Int64s
    position: Int64s
    places: Int64s


def join_runs(record: MetadataRecord, runs: MetadataRuns, *, file: str) -> JoinedMetadata:
    """Check a ``Metadata`` that has runs in it, and find the place of each chunk.

    Raises
    ------
    RunsRefused
        If it must be read without runs.
    ShardpointError
        As `check_metadata`; the error without runs may be another.
    """
    checker = Checker(file, size=len(runs.data))
    values = TableValues(runs.data, runs.tables, runs.memo)
    state, entries = checker.entries(record)
    tensors: list[TensorFields] = []
    chunk_lists: list[list[Any] | Run] = []
    object_keys: list[str] = []
    keys: dict[str, None] = {}
    tensor_runs = 0
    for key, entry in entries.items():
        if type(key) is Run:
            if entry is not RUN:
                raise RunsRefused
            more = _run_tensors(values, key)
            tensors.extend(more)
            chunk_lists.extend([key] * len(more))
            keys.update(dict.fromkeys(tensor.key for tensor in more))
            tensor_runs += 1
            continue
        if key in keys:
            raise RunsRefused
        keys[key] = None
        if checker.is_object(key, entry):
            object_keys.append(key)
        else:
            tensor, chunks = checker.tensor_and_chunks(key, entry)
            tensors.append(tensor)
            chunk_lists.append(chunks)
    if tensor_runs != runs.taken_tensors or len(keys) != len(tensors) + len(object_keys):
        raise RunsRefused  # something else has taken one, or a key is there twice
    counts, offsets, sizes = _boxes(checker, values, tensors, chunk_lists)
    storage = _storage(checker, values, state.get("storage_data"))
    row_of = {tensor.key: row for row, tensor in enumerate(tensors)}
    text_rows = np.array([row_of.get(text, -1) for text in values.texts], np.int64)
    axes = np.array([len(tensor.shape) for tensor in tensors], np.int64)
    with_offset = np.flatnonzero(storage.axes >= 0)
    tensor_of = text_rows[storage.key[with_offset]] if len(with_offset) else with_offset
    found = tensor_of >= 0
    with_offset, tensor_of = with_offset[found], tensor_of[found]
    found = storage.axes[with_offset] == axes[tensor_of]
    with_offset, tensor_of = with_offset[found], tensor_of[found]
    place_of = match_offsets(
        np.repeat(np.arange(len(tensors)), counts),
        offsets,
        counts,
        tensor_of,
        _fitted(storage.offset[with_offset], offsets.shape[1]),
        storage.position[with_offset],
    )
    place_of = np.where(place_of >= 0, _at(with_offset, place_of), _NO_PLACE)
    by_position = _by_position(values, storage)
    _place_by_position(place_of, by_position, tensors, counts)
    objects = [
        by_position.get((key, None), by_position.get((key, 0), _NO_PLACE)) for key in object_keys
    ]
    all_places = _renumbered(
        _at(storage.places, np.concatenate([place_of, np.array(objects, np.int64)])),
        values,
    )
    fields = checker.whole(state, keys, tensors, dict.fromkeys(object_keys))
    return JoinedMetadata(
        fields,
        counts,
        offsets,
        sizes,
        all_places[0][: len(place_of)],
        all_places[0][len(place_of) :],
        all_places[1],
        all_places[2],
    )


def separate_chunks(joined: JoinedMetadata) -> MetadataFields:
    """Return the metadata with the chunks in lists of their tensors, as `check_metadata` does."""
    fields = joined.fields
    names, transforms = joined.files, joined.transforms

    def places(rows: Int64s) -> list[Place | None]:
        return [
            None if file == NO_FILE else (names[file], offset, length, transforms[transform])
            for file, offset, length, transform in rows.tolist()
        ]

    offsets, sizes = joined.offsets.tolist(), joined.sizes.tolist()
    chunk_places = places(joined.chunk_places)
    first = 0
    for tensor, count in zip(fields.tensors, joined.counts.tolist(), strict=True):
        rows, axes = slice(first, first + count), len(tensor.shape)
        tensor.offsets = [tuple(numbers[:axes]) for numbers in offsets[rows]]
        tensor.sizes = [tuple(numbers[:axes]) for numbers in sizes[rows]]
        tensor.places = chunk_places[rows]
        first += count
    fields.objects = dict(zip(fields.objects, places(joined.object_places), strict=True))
    return fields


def _run_tensors(values: TableValues, run: Run) -> list[TensorFields]:
    """Return the tensors of a run, without their chunks."""
    table, columns = run.table, run.table.columns
    if not isinstance(columns, TensorColumns):
        raise RunsRefused
    whole = values.tensors(table, columns)
    first = int(np.searchsorted(values.rows(table), run.first))
    rows = slice(first, first + len(run))
    texts = values.texts
    keys = [run.key, *(texts[number] for number in whole.next_key[rows][:-1].tolist())]
    return [
        TensorFields(
            key,
            whole.dtypes[dtype],
            tuple(numbers[:axes]),
            requires_grad,
            pin_memory,
            whole.memory_formats[memory_format],
        )
        for key, dtype, numbers, axes, requires_grad, pin_memory, memory_format in zip(
            keys,
            whole.dtype[rows].tolist(),
            whole.size[rows].tolist(),
            whole.axes[rows].tolist(),
            whole.requires_grad[rows].tolist(),
            whole.pin_memory[rows].tolist(),
            whole.memory_format[rows].tolist(),
            strict=True,
        )
    ]


def _at(values: Int64s, positions: Int64s) -> Int64s:
    """Return the values at positions; where a position is negative, a row of them."""
    if len(values):
        result = values[positions]
    else:
        result = np.zeros((len(positions), *values.shape[1:]), np.int64)
    result[positions < 0] = _NO_PLACE
    return result


def _fitted(numbers: Int64s, axes: int) -> Int64s:
    """Return rows of another width; what is cut off does not count."""
    if numbers.shape[1] == axes:
        return numbers
    result = np.zeros((len(numbers), axes), np.int64)
    both = min(axes, numbers.shape[1])
    result[:, :both] = numbers[:, :both]
    return result


def _boxes(
    checker: Checker,
    values: TableValues,
    tensors: Sequence[TensorFields],
    chunk_lists: Sequence[list[Any] | Run],
) -> tuple[Int64s, Int64s, Int64s]:
    """Return the number of chunks of each tensor, and the offsets and sizes of all."""
    counts = np.array(
        [
            1
            if isinstance(chunks, Run)
            else sum(len(chunk) if type(chunk) is Run else 1 for chunk in chunks)
            for chunks in chunk_lists
        ],
        np.int64,
    )
    total = int(counts.sum())
    if total > checker.size:
        raise RunsRefused
    ndim = np.array([len(tensor.shape) for tensor in tensors], np.int64)
    wide = int(ndim.max(initial=0))
    offsets = np.zeros((total, wide), np.int64)
    sizes = np.ones((total, wide), np.int64)
    row = number = 0
    while number < len(tensors):
        tensor, chunks = tensors[number], chunk_lists[number]
        if isinstance(chunks, Run):  # that many tensors of one chunk each
            count = len(chunks)
            at = slice(row, row + count)
            _put_run(values, chunks, ndim[number : number + count], offsets[at], sizes[at])
            row, number = row + count, number + count
            continue
        axes = len(tensor.shape)
        for position, chunk in enumerate(chunks):
            if type(chunk) is Run:
                at = slice(row, row + len(chunk))
                _put_run(values, chunk, ndim[number], offsets[at], sizes[at])
                row += len(chunk)
            else:
                offsets[row, :axes], sizes[row, :axes] = checker.box(tensor, position, chunk)
                row += 1
        number += 1
    return counts, offsets, sizes


def _put_run(values: TableValues, run: Run, ndim: Any, offsets: Int64s, sizes: Int64s) -> None:
    """Put the boxes of a run of chunks, of tensors with so many axes, into columns."""
    table, columns = run.table, run.table.columns
    if not isinstance(columns, (ChunkColumns, TensorColumns)):
        raise RunsRefused
    first = int(np.searchsorted(values.rows(table), run.first))
    part = slice(first, first + len(run))
    for shapes, target in ((columns.offsets, offsets), (columns.sizes, sizes)):
        numbers, axes = values.shape_columns(table, shapes)
        if (axes[part] != ndim).any():
            raise RunsRefused
        both = min(target.shape[1], numbers.shape[1])
        there = np.arange(both) < axes[part][:, None]
        np.copyto(target[:, :both], numbers[part, :both], where=there)


def _storage(checker: Checker, values: TableValues, storage_data: Any) -> _Entries:
    """Return all entries of ``storage_data``, in order."""
    parts: list[_Entries] = []
    single: list[tuple[str, tuple[int, ...] | None, int | None, Place]] = []
    columns: dict[int, _Entries] = {}

    def flush() -> None:
        if single:
            parts.append(_single_entries(values, single))
            single.clear()

    for index, place in checker.storage_items(storage_data):
        if type(index) is not Run:
            single.append(checker.entry(index, place))
            continue
        flush()
        table = index.table
        if not isinstance(table.columns, StorageColumns) or place is not RUN:
            raise RunsRefused
        if id(table) not in columns:
            columns[id(table)] = _run_entries(values, index)
        whole = columns[id(table)]
        first = int(np.searchsorted(values.rows(table), index.first))
        rows = slice(first, first + len(index))
        parts.append(
            _Entries(
                whole.key[rows],
                whole.axes[rows],
                whole.offset[rows],
                whole.position[rows],
                whole.places[rows],
            )
        )
    flush()
    wide = max((part.offset.shape[1] for part in parts), default=0)
    empty = np.zeros(0, np.int64)
    return _Entries(
        np.concatenate([empty, *(part.key for part in parts)]),
        np.concatenate([empty, *(part.axes for part in parts)]),
        np.concatenate(
            [np.zeros((0, wide), np.int64), *(_fitted(part.offset, wide) for part in parts)]
        ),
        np.concatenate([empty, *(part.position for part in parts)]),
        np.concatenate([np.zeros((0, 4), np.int64), *(part.places for part in parts)]),
    )


def _single_entries(
    values: TableValues, single: Sequence[tuple[str, tuple[int, ...] | None, int | None, Place]]
) -> _Entries:
    wide = max(len(offset or ()) for _, offset, _, _ in single)
    offsets = np.zeros((len(single), wide), np.int64)
    for row, (_, offset, _, _) in enumerate(single):
        offsets[row, : len(offset or ())] = offset or ()
    places = [
        (values.text_number(place[0]), place[1], place[2], values.transform_number(place[3]))
        for *_, place in single
    ]
    if any(position is not None and position < 0 for _, _, position, _ in single):
        raise RunsRefused
    return _Entries(
        np.array([values.text_number(key) for key, *_ in single], np.int64),
        np.array([-1 if offset is None else len(offset) for _, offset, _, _ in single], np.int64),
        offsets,
        np.array([-1 if position is None else position for *_, position, _ in single], np.int64),
        np.array(places, np.int64),
    )


def _run_entries(values: TableValues, run: Run) -> _Entries:
    table, columns = run.table, run.table.columns
    assert isinstance(columns, StorageColumns)
    rows = values.rows(table)
    offset, axes = values.shape_columns(table, columns.offset)
    places = np.empty((len(rows), 4), np.int64)
    places[:, 0] = values.text_column(table, columns.path)
    places[:, 1] = columns.record_offset[rows]
    places[:, 2] = columns.record_length[rows]
    places[:, 3] = values.transform_column(table, columns)
    return _Entries(
        values.text_column(table, columns.key),
        np.where(columns.has_offset[rows], axes, -1),
        offset,
        columns.position[rows],
        places,
    )


def _by_position(values: TableValues, storage: _Entries) -> dict[tuple[str, int | None], int]:
    """Return the entries that have no offset, by key and position in the tensor's list."""
    rows = np.flatnonzero(storage.axes < 0)
    keys, positions = storage.key[rows].tolist(), storage.position[rows].tolist()
    return {
        (values.texts[key], None if position < 0 else position): row
        for key, position, row in zip(keys, positions, rows.tolist(), strict=True)
    }


def _place_by_position(
    place_of: Int64s,
    by_position: dict[tuple[str, int | None], int],
    tensors: Sequence[TensorFields],
    counts: Int64s,
) -> None:
    """Give chunks without a place that of an entry without an offset, in place."""
    if not by_position:
        return
    first = np.cumsum(counts) - counts
    missing = np.flatnonzero(place_of < 0)
    owners = np.searchsorted(first, missing, side="right") - 1
    for row, owner in zip(missing.tolist(), owners.tolist(), strict=True):
        key, position = tensors[owner].key, row - int(first[owner])
        entry = by_position.get((key, position))
        if entry is None and counts[owner] == 1:
            entry = by_position.get((key, None))
        if entry is not None:
            place_of[row] = entry


def _renumbered(
    places: Int64s, values: TableValues
) -> tuple[Int64s, list[str], list[tuple[str, ...]]]:
    """Number files and transforms in the order in which they appear, no transform first."""
    places[places[:, 0] < 0] = (NO_FILE, 0, 0, 0)
    known = places[:, 0] != NO_FILE
    files = _numbered(places[:, 0], known, len(values.texts), first=())
    transforms = _numbered(places[:, 3], known, len(values.transforms), first=(0,))
    names = list(values.transforms)
    return places, [values.texts[n] for n in files], [names[n] for n in transforms]


def _numbered(column: Int64s, known: Any, count: int, *, first: tuple[int, ...]) -> list[int]:
    """Number the values of a column anew, in place; return the old numbers in new order."""
    seen = np.full(count, len(column), np.int64)
    rows = np.flatnonzero(known)[::-1]
    seen[column[rows]] = rows  # the last assignment stays: that of the first row
    seen[list(first)] = -1
    order = np.argsort(seen, kind="stable")[: int((seen < len(column)).sum())]
    numbers = np.zeros(count, np.int64)
    numbers[order] = np.arange(len(order))
    column[known] = numbers[column[known]]
    return [int(number) for number in order]
