"""Rows of a plan to files: plain records, or records that go through extensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from shardpoint.dcp._extensions import StreamExtension, encode
from shardpoint.dtypes import BY_CODE
from shardpoint.engine.encoding import EncodedRecords, frame_threads
from shardpoint.engine.writing import AnyRecord, WrittenRecords, write_files
from shardpoint.planning.save import OBJECT, WriteColumns
from shardpoint.storage.base import Storage

__all__ = ["write_rows"]

Int64Array = npt.NDArray[np.int64]


def write_rows(
    storage: Storage,
    columns: WriteColumns,
    records: Sequence[AnyRecord],
    files: Mapping[str, Int64Array],
    *,
    extensions: Sequence[StreamExtension],
    threads: int,
    sync: bool,
) -> Mapping[str, WrittenRecords]:
    """Write files; parameters and errors beyond these are those of `write_files`.

    Parameters
    ----------
    columns, records
        What is to be written, row by row.
    files
        The rows that each file holds, in its order.
    extensions
        What every record goes through, the last one first.

    Returns
    -------
    dict
        As of `write_files`; with extensions, payloads are as `EncodedRecords.decoded` has them.
    """
    plain = {name: [records[row] for row in rows.tolist()] for name, rows in files.items()}
    if not extensions:
        return write_files(storage, plain, threads=threads, sync=sync)
    sizes = _element_sizes(columns)
    with frame_threads(threads) as frame_map:
        encoded = {
            name: EncodedRecords(
                plain[name],
                [sizes[row] for row in rows.tolist()],
                partial(encode, extensions, frame_map),
            )
            for name, rows in files.items()
        }
        written = write_files(
            storage,
            {name: file.records for name, file in encoded.items()},
            threads=threads,
            sync=sync,
        )
    return {name: file.decoded(written[name]) for name, file in encoded.items()}


def _element_sizes(columns: WriteColumns) -> list[int | None]:
    """Return the bytes of the elements of each row; None for objects."""
    sizes = [dtype.itemsize for dtype in BY_CODE]
    kinds = zip(columns.kind.tolist(), columns.dtype.tolist(), strict=True)
    return [None if kind == OBJECT else sizes[code] for kind, code in kinds]
