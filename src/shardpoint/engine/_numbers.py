"""Reads objects that are plain numbers, by the thousand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shardpoint.engine._files import OpenFiles
from shardpoint.errors import ShardpointError, StorageError
from shardpoint.formats.checksum import crc32_of_each
from shardpoint.formats.number_pickles import UNKNOWN_PICKLE
from shardpoint.formats.number_records import numbers_in
from shardpoint.index import NO_FILE, UNKNOWN, CheckpointIndex
from shardpoint.storage import Storage

__all__ = ["read_numbers"]

Int64Array = npt.NDArray[np.int64]

_FEWEST = 16
_LONGEST = 8192
_GROUP = 1 << 20


def read_numbers(
    index: CheckpointIndex, storage: Storage, rows: Sequence[int], *, verify: bool
) -> Iterator[tuple[int, object]]:
    """Yield rows of objects with their numbers, where many records of one length touch.

    Whatever is not certainly a sound record of a number is left out, without an error: to be
    read as any other object, which says what is wrong with it.

    Parameters
    ----------
    rows
        In `Objects`; none of them twice.
    verify
        Whether to compare the checksums of whole records.

    Raises
    ------
    StorageError
        If the store fails.
    """
    with OpenFiles(storage) as files:
        for group in _groups(index, np.asarray(rows, np.int64)):
            try:
                records = _records(index, files, group)
            except StorageError:
                raise  # the store failed, not a record: trying again would hide it
            except ShardpointError:
                continue
            verified, right = _verify(index, group, records, verify)
            numbers = numbers_in(records, verified)
            for row, number, is_right in zip(group.tolist(), numbers, right.tolist(), strict=True):
                if is_right and number is not UNKNOWN_PICKLE:
                    yield row, number


def _groups(index: CheckpointIndex, rows: Int64Array) -> Iterator[Int64Array]:
    """Yield rows whose records touch and have one length, in the order of the files."""
    objects = index.objects
    rows = rows[(rows >= 0) & (rows < len(objects))]
    named = [name in index.metadata_files for name in index.files]
    is_metadata = np.array([*named, True])  # the last one is that of NO_FILE
    offset, length = objects.record_offset[rows], objects.record_length[rows]
    rows = rows[
        (objects.file[rows] != NO_FILE)
        & ~is_metadata[objects.file[rows]]
        & (objects.transform[rows] == 0)
        & (offset >= 0)
        & (length > 0)
        & (length <= _LONGEST)
    ]
    rows = rows[np.lexsort((objects.record_offset[rows], objects.file[rows]))]
    file, offset, length = (
        objects.file[rows],
        objects.record_offset[rows],
        objects.record_length[rows],
    )
    apart = (
        (file[1:] != file[:-1])
        | (length[1:] != length[:-1])
        | (offset[1:] != offset[:-1] + length[:-1])
    )
    for run in np.split(rows, np.flatnonzero(apart) + 1):
        if len(run) < _FEWEST:
            continue
        step = max(_FEWEST, _GROUP // int(objects.record_length[run[0]]))
        for start in range(0, len(run), step):
            yield run[start : start + step]


def _records(index: CheckpointIndex, files: OpenFiles, group: Int64Array) -> npt.NDArray[np.uint8]:
    objects = index.objects
    length = int(objects.record_length[group[0]])
    records = np.empty((len(group), length), np.uint8)
    with files.use(index.files[int(objects.file[group[0]])]) as file:
        file.read_into(int(objects.record_offset[group[0]]), [records.reshape(-1).data])
    return records


def _verify(
    index: CheckpointIndex, group: Int64Array, records: npt.NDArray[np.uint8], verify: bool
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which records agree with a checksum of all their bytes, and which may be used."""
    checksums = index.objects.record_checksum
    none = np.zeros(len(group), np.bool_)
    if checksums is None or not verify:
        return none, ~none
    wanted = checksums[group]
    whole, length = records.reshape(-1).data, records.shape[1]
    found = crc32_of_each(whole[at : at + length] for at in range(0, len(whole), length))
    agree = wanted == np.array(found, np.int64)
    return agree, agree | (wanted == UNKNOWN)
