"""Rows of a plan to files: plain records, records that go through extensions, or images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from shardpoint.dcp._extensions import StreamExtension, descriptors_of, encode
from shardpoint.dcp._write_images import image_records, in_images
from shardpoint.dcp._write_records import PreparedRecords, row_major
from shardpoint.dcp._write_results import ResultTable, results_of
from shardpoint.dtypes import BY_CODE
from shardpoint.engine.encoding import EncodedRecords, frame_threads
from shardpoint.engine.writing import write_files
from shardpoint.index import Container
from shardpoint.planning.save import OBJECT, WriteColumns
from shardpoint.storage.base import Storage

__all__ = ["RowWriter"]

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RowWriter:
    """Writes the rows of one plan; errors are those of `write_files`.

    Attributes
    ----------
    storage, threads, sync
        See `write_files`.
    columns, prepared
        What is to be written, row by row.
    storage_info
        Makes the `storage_data` of a result.
    """

    storage: Storage
    columns: WriteColumns
    prepared: PreparedRecords
    storage_info: Any
    threads: int
    sync: bool

    def write(
        self, files: Mapping[str, Int64Array], *, extensions: Sequence[StreamExtension]
    ) -> ResultTable:
        """Write torch.save records.

        Parameters
        ----------
        files
            The rows that each file holds, in its order.
        extensions
            What every record goes through, the last one first.
        """
        records = self.prepared.records
        plain = {name: [records[row] for row in rows.tolist()] for name, rows in files.items()}
        if not extensions:
            written = write_files(self.storage, plain, threads=self.threads, sync=self.sync)
        else:
            sizes = _element_sizes(self.columns)
            with frame_threads(self.threads) as frame_map:
                encoded = {
                    name: EncodedRecords(
                        plain[name],
                        [sizes[row] for row in rows.tolist()],
                        partial(encode, extensions, frame_map),
                    )
                    for name, rows in files.items()
                }
                stored = write_files(
                    self.storage,
                    {name: file.records for name, file in encoded.items()},
                    threads=self.threads,
                    sync=self.sync,
                )
            written = {name: file.decoded(stored[name]) for name, file in encoded.items()}
        return results_of(
            self.columns,
            self.prepared.strides,
            files,
            written,
            descriptors_of(extensions),
            Container.TORCH_RECORD,
            self.storage_info,
        )

    def write_images(self, files: Mapping[str, Int64Array]) -> ResultTable:
        """Write objects as records, and the tensors of each file as one safetensors image.

        Parameters
        ----------
        files
            The rows that each file holds, in any order; no key twice in one file.
        """
        columns = self.columns
        made = {
            name: image_records(columns, self.prepared.records, self.prepared.strides, rows)
            for name, rows in files.items()
        }
        stored = write_files(
            self.storage,
            {name: records for name, (records, _) in made.items()},
            threads=self.threads,
            sync=self.sync,
        )
        ordered = {name: rows for name, (_, rows) in made.items()}
        written = {
            name: in_images(stored[name], int((columns.kind[rows] == OBJECT).sum()))
            for name, rows in ordered.items()
        }
        return results_of(
            columns,
            row_major(columns.sizes, columns.ndim),
            ordered,
            written,
            (),
            Container.SAFETENSORS_IMAGE,
            self.storage_info,
        )


def _element_sizes(columns: WriteColumns) -> list[int | None]:
    """Return the bytes of the elements of each row; None for objects."""
    sizes = [dtype.itemsize for dtype in BY_CODE]
    kinds = zip(columns.kind.tolist(), columns.dtype.tolist(), strict=True)
    return [None if kind == OBJECT else sizes[code] for kind, code in kinds]
