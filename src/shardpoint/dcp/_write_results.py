"""Write results as columns, and the view that shows columns as write results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardpoint.dcp._lazy_list import LazyList
from shardpoint.dcp.metadata import MetadataIndex
from shardpoint.dcp.storage import WriteResult
from shardpoint.engine.written import WrittenRecords
from shardpoint.index import BLOCK_BYTES, UNKNOWN, BlockChecksums, Container, Payloads
from shardpoint.planning.placing import Written
from shardpoint.planning.save import OBJECT, WriteColumns

__all__ = ["ResultTable", "bytes_of", "results_of", "written_by"]

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ResultColumns:
    """Where rows were written, and what makes the `storage_data` of a result.

    `storage_info` takes file, offset, length and transforms; None where that is not known.
    """

    written: Written
    storage_info: Callable[..., Any] | None


class ResultTable(LazyList[WriteResult, ResultColumns]):
    """Columns that look like a list of write results."""

    def _count(self, columns: ResultColumns) -> int:
        return len(columns.written.keys)

    def _columns_from(self, items: Iterable[WriteResult]) -> ResultColumns:
        return ResultColumns(_written(items), None)

    def __reduce__(self) -> Any:
        # what was changed stays as it is: columns cannot tell what its places were made by
        return (
            (list, (list(self),)) if self._columns is None or self._kept else super().__reduce__()
        )

    def _make(self, columns: ResultColumns, row: int) -> WriteResult:
        written = columns.written
        axes = int(written.ndim[row])
        offset = None if written.is_object[row] else written.offsets[row, :axes].tolist()
        length = int(written.length[row])
        assert columns.storage_info is not None
        place = columns.storage_info(
            written.file[row],
            int(written.offset[row]),
            length,
            list(written.transforms[row]) or None,
        )
        return WriteResult(MetadataIndex(written.keys[row], offset), length, place)


def results_of(
    columns: WriteColumns,
    strides: Int64Array,
    files: Mapping[str, Int64Array],
    written: Mapping[str, WrittenRecords],
    transforms: tuple[str, ...],
    container: Container,
    storage_info: Any,
) -> ResultTable:
    """Return what was written, file by file.

    Parameters
    ----------
    columns
        What was to be written.
    strides
        ``int64[n, D]``: of each row's payload, in elements.
    files
        The rows that each file holds, in its order.
    written
        Where the records of each file are; payloads of transformed ones as in
        `EncodedRecords.decoded`.
    transforms
        What all records went through.
    container
        What the tensors are in.
    """
    rows = np.concatenate([np.zeros(0, np.int64), *files.values()])
    numbers = rows.tolist()
    parts = [written[name] for name in files]
    is_object = columns.kind[rows] == OBJECT

    def joined(name: str) -> Int64Array:
        return np.concatenate([np.zeros(0, np.int64), *(getattr(part, name) for part in parts)])

    # An object's pickle counts as a payload to the engine; an index knows no such thing.
    block_counts = np.concatenate(
        [np.zeros(0, np.int64), *(np.diff(part.first_block) for part in parts)]
    )
    of_tensor = np.repeat(~is_object, block_counts)
    blocks = np.concatenate([np.zeros(0, np.uint32), *(part.blocks for part in parts)])
    block_counts[is_object] = 0
    payloads = Payloads(
        offset=np.where(is_object, UNKNOWN, joined("payload_offset")),
        strides=np.where(is_object[:, None], 0, strides[rows]),
        length=np.where(is_object, UNKNOWN, joined("payload_length")),
        checksum=np.where(is_object | bool(transforms), UNKNOWN, joined("payload_checksum")),
        flags=np.zeros(len(rows), np.uint8),
    )
    keys = columns.keys
    return ResultTable.from_columns(
        ResultColumns(
            Written(
                keys=[keys[row] for row in numbers],
                is_object=is_object,
                ndim=columns.ndim[rows],
                offsets=columns.offsets[rows],
                # The same string in every row: pickling writes it once.
                file=[name for name, part in files.items() for _ in range(len(part))],
                offset=joined("offset"),
                length=joined("length"),
                transforms=[transforms] * len(rows),
                payloads=payloads,
                blocks=BlockChecksums(BLOCK_BYTES, _firsts(block_counts), blocks[of_tensor]),
                record_checksum=joined("record_checksum"),
                container=np.where(is_object, Container.TORCH_RECORD, container).astype(np.uint8),
            ),
            storage_info,
        )
    )


def bytes_of(results: Sequence[Any]) -> int:
    """Return how many bytes of files some results are about; other storage need not say."""
    if isinstance(results, ResultTable):
        return int(results.columns.written.length.sum())
    return sum(getattr(result, "size_in_bytes", 0) for result in results)


def _firsts(counts: Int64Array) -> Int64Array:
    first = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=first[1:])
    return first


def written_by(results: Iterable[Sequence[Any]]) -> Written:
    """Return the results of all ranks as columns; a plain list may hold torch's results."""
    parts = [
        rank.columns.written if isinstance(rank, ResultTable) else _written(rank)
        for rank in results
    ]

    def joined(name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in parts)])

    return Written(
        keys=[key for part in parts for key in part.keys],
        is_object=joined("is_object", np.bool_),
        ndim=joined("ndim", np.int16),
        offsets=_stacked([part.offsets for part in parts]),
        file=[name for part in parts for name in part.file],
        offset=joined("offset", np.int64),
        length=joined("length", np.int64),
        transforms=[transforms for part in parts for transforms in part.transforms],
        payloads=_all_payloads(parts),
        blocks=_all_blocks(parts),
        record_checksum=_all_checksums(parts),
        container=_all_containers(parts),
    )


def _all_containers(parts: Sequence[Written]) -> npt.NDArray[np.uint8] | None:
    if all(part.container is None for part in parts):
        return None
    plain = Container.TORCH_RECORD
    known = [
        np.full(len(part.keys), plain, np.uint8) if part.container is None else part.container
        for part in parts
    ]
    return np.concatenate(known)


def _stacked(arrays: Sequence[Int64Array]) -> Int64Array:
    """Put arrays of rows below each other, padded with 0 to the same number of axes."""
    axes = max((array.shape[1] for array in arrays), default=0)
    wide = [np.pad(array, ((0, 0), (0, axes - array.shape[1]))) for array in arrays]
    return np.concatenate([np.zeros((0, axes), np.int64), *wide])


def _all_payloads(parts: Sequence[Written]) -> Payloads | None:
    if all(part.payloads is None for part in parts):
        return None
    known = [_no_payloads(part) if part.payloads is None else part.payloads for part in parts]
    return Payloads(
        offset=np.concatenate([part.offset for part in known]),
        strides=_stacked([part.strides for part in known]),
        length=np.concatenate([part.length for part in known]),
        checksum=np.concatenate([part.checksum for part in known]),
        flags=np.concatenate([part.flags for part in known]),
    )


def _no_payloads(part: Written) -> Payloads:
    unknown = np.full(len(part.keys), UNKNOWN, np.int64)
    flags = np.zeros(len(part.keys), np.uint8)
    return Payloads(unknown, np.zeros((len(part.keys), 0), np.int64), unknown, unknown, flags)


def _all_blocks(parts: Sequence[Written]) -> BlockChecksums | None:
    """Join the checksums of blocks; those of another size than the first ones' are dropped."""
    size = next((part.blocks.block_size for part in parts if part.blocks is not None), None)
    if size is None:
        return None
    counts, values = [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)]
    for part in parts:
        if part.blocks is None or part.blocks.block_size != size:
            counts.append(np.zeros(len(part.keys), np.int64))
        else:
            counts.append(np.diff(part.blocks.first))
            values.append(part.blocks.values)
    return BlockChecksums(size, _firsts(np.concatenate(counts)), np.concatenate(values))


def _all_checksums(parts: Sequence[Written]) -> Int64Array | None:
    if all(part.record_checksum is None for part in parts):
        return None
    return np.concatenate(
        [
            np.full(len(part.keys), UNKNOWN, np.int64)
            if part.record_checksum is None
            else part.record_checksum
            for part in parts
        ]
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
