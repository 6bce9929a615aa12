"""Write results as columns, and the view that shows columns as write results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardpoint.dcp._lazy_list import LazyList
from shardpoint.dcp.metadata import MetadataIndex
from shardpoint.dcp.planner import WriteItem
from shardpoint.dcp.storage import WriteResult
from shardpoint.planning.placing import Written

__all__ = ["ResultTable", "results_of", "written_by"]

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class ResultColumns:
    """Where rows were written, and what makes the `storage_data` of a result.

    `storage_info` takes file, offset, length and transforms.
    """

    written: Written
    storage_info: Callable[..., Any]


class ResultTable(LazyList[WriteResult, ResultColumns]):
    """Columns that look like a list of write results."""

    def _count(self) -> int:
        return len(self._columns.written.keys)

    def _columns_from(self, items: Iterable[WriteResult]) -> ResultColumns:
        return ResultColumns(_written(items), self._columns.storage_info)

    def _make(self, row: int) -> WriteResult:
        written = self._columns.written
        axes = int(written.ndim[row])
        offset = None if written.is_object[row] else written.offsets[row, :axes].tolist()
        length = int(written.length[row])
        place = self._columns.storage_info(
            written.file[row],
            int(written.offset[row]),
            length,
            list(written.transforms[row]) or None,
        )
        return WriteResult(MetadataIndex(written.keys[row], offset), length, place)


def results_of(
    files: Mapping[str, Sequence[WriteItem]],
    spans: Mapping[str, Sequence[Span]],
    storage_info: Any,
) -> ResultTable:
    """Return what was written, file by file."""
    rows = [
        (item.index, name, span)
        for name, items in files.items()
        for item, span in zip(items, spans[name], strict=True)
    ]
    written = _columns((index, name, *span, ()) for index, name, span in rows)
    return ResultTable(ResultColumns(written, storage_info))


def written_by(results: Iterable[Sequence[Any]]) -> Written:
    """Return the results of all ranks as columns; a plain list may hold torch's results."""
    parts = [
        rank.columns.written if isinstance(rank, ResultTable) else _written(rank)
        for rank in results
    ]
    axes = max((part.offsets.shape[1] for part in parts), default=0)
    return Written(
        keys=[key for part in parts for key in part.keys],
        is_object=np.concatenate([np.zeros(0, np.bool_), *(part.is_object for part in parts)]),
        ndim=np.concatenate([np.zeros(0, np.int16), *(part.ndim for part in parts)]),
        offsets=np.concatenate(
            [
                np.zeros((0, axes), np.int64),
                *(np.pad(p.offsets, ((0, 0), (0, axes - p.offsets.shape[1]))) for p in parts),
            ]
        ),
        file=[name for part in parts for name in part.file],
        offset=np.concatenate([np.zeros(0, np.int64), *(part.offset for part in parts)]),
        length=np.concatenate([np.zeros(0, np.int64), *(part.length for part in parts)]),
        transforms=[transforms for part in parts for transforms in part.transforms],
    )


def _written(results: Iterable[Any]) -> Written:
    places = [(result.index, result.storage_data) for result in results]
    return _columns(
        (
            index,
            str(place.relative_path),
            place.offset,
            place.length,
            tuple(place.transform_descriptors or ()),
        )
        for index, place in places
    )


def _columns(rows: Iterable[tuple[Any, str, int, int, tuple[str, ...]]]) -> Written:
    """Rows of index, file, offset, length, transforms."""
    table = list(rows)
    places = [index.offset for index, *_ in table]
    ndim = np.array([0 if place is None else len(place) for place in places], np.int16)
    offsets = np.zeros((len(table), int(ndim.max(initial=0))), np.int64)
    for row, place in enumerate(places):
        if place:
            offsets[row, : len(place)] = place
    return Written(
        keys=[index.fqn for index, *_ in table],
        is_object=np.array([place is None for place in places], np.bool_),
        ndim=ndim,
        offsets=offsets,
        file=[name for _, name, *_ in table],
        offset=np.array([offset for _, _, offset, _, _ in table], np.int64),
        length=np.array([length for *_, length, _ in table], np.int64),
        transforms=[transforms for *_, transforms in table],
    )
