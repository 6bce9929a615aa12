"""Write results as columns, and the view that shows columns as write results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from shardpoint.dcp.metadata import MetadataIndex
from shardpoint.dcp.planner import WriteItem
from shardpoint.dcp.storage import WriteResult
from shardpoint.planning.save import Written

__all__ = ["ResultTable", "results_of", "written_by"]

Span = tuple[int, int]


class ResultTable(Sequence[WriteResult]):
    """Columns that look like a list of write results.

    Parameters
    ----------
    written
        The columns.
    storage_info
        Makes the `storage_data` of a result from file, offset, length and transforms.
    """

    def __init__(self, written: Written, storage_info: Any) -> None:
        self.written = written
        self._storage_info = storage_info

    def __len__(self) -> int:
        return len(self.written.keys)

    @overload
    def __getitem__(self, position: int) -> WriteResult: ...
    @overload
    def __getitem__(self, position: slice) -> list[WriteResult]: ...
    def __getitem__(self, position: int | slice) -> WriteResult | list[WriteResult]:
        if isinstance(position, slice):
            return [self[row] for row in range(*position.indices(len(self)))]
        row = range(len(self))[position]
        written = self.written
        axes = int(written.ndim[row])
        offset = None if written.is_object[row] else written.offsets[row, :axes].tolist()
        length = int(written.length[row])
        transforms = list(written.transforms[row]) or None
        place = self._storage_info(written.file[row], int(written.offset[row]), length, transforms)
        return WriteResult(MetadataIndex(written.keys[row], offset), length, place)

    def __iter__(self) -> Iterator[WriteResult]:
        return (self[row] for row in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.written, self._storage_info)


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
    return ResultTable(
        _columns((index, name, *span, ()) for index, name, span in rows), storage_info
    )


def written_by(results: Iterable[Sequence[Any]]) -> Written:
    """Return the results of all ranks as columns; a plain list may hold torch's results."""
    parts = [
        rank.written
        if isinstance(rank, ResultTable)
        else _columns(
            (
                result.index,
                result.storage_data.relative_path,
                result.storage_data.offset,
                result.storage_data.length,
                tuple(result.storage_data.transform_descriptors or ()),
            )
            for result in rank
        )
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
