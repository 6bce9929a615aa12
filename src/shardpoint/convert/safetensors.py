"""Any checkpoint of tensors to full safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from shardpoint.convert.source import InOrder, Source, flat_bytes
from shardpoint.engine.replacing import begin_replacement
from shardpoint.engine.sources import RecordSource
from shardpoint.engine.writing import write_files
from shardpoint.errors import NotSupportedError, PlanError, Problem
from shardpoint.formats.huggingface_writing import (
    FULL_METADATA,
    INDEX_NAME,
    encode_index,
    file_name,
)
from shardpoint.formats.safetensors import encode_header
from shardpoint.storage import Storage, storage_at
from shardpoint.transforms import Transform

__all__ = ["check_convertible", "full_names", "to_safetensors", "write_full_files"]


def to_safetensors(
    source: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str] | Storage,
    *,
    file_numbers: Mapping[str, int] | None = None,
    threads: int | None = None,
    transforms: Iterable[Transform] = (),
    sync: bool = True,
) -> None:
    """Write a checkpoint of tensors as Hugging Face's libraries load it.

    The shards that several ranks saved are put together. Files count when all are complete,
    and then replace the full files that were there; see `shardpoint.engine.replacing`.

    Parameters
    ----------
    source
        Any checkpoint that `shardpoint.open` opens, without objects.
    target
        The folder, by path or URL.
    file_numbers
        Which file each tensor goes into, from 1 on; None is one file for all.
    threads
        How many pieces are read at once; a tensor is in memory while it is written.
    transforms
        What undoes compression or encryption of the source beyond what is known anyway; see
        `shardpoint.open`. What is written is plain.
    sync
        Make the files durable.

    Raises
    ------
    PlanError
        If tensors have no number, or numbers no tensor; names all of them.
    NotSupportedError
        If the checkpoint holds objects, or a dtype that safetensors does not have.
    """
    opened = Source(source, threads=threads, transforms=transforms)
    storage = target if isinstance(target, Storage) else storage_at(target)
    numbers = file_numbers or dict.fromkeys(opened.index.tensors.keys, 1)
    check_convertible(opened, numbers)
    storage.prepare()
    names = full_names(numbers)
    replacement = begin_replacement(storage, [*names.values(), INDEX_NAME], may_write=None)
    places = {number: replacement.places[name] for number, name in names.items()}
    try:
        total = write_full_files(opened, storage, numbers, places, sync=sync)
        index = encode_index({key: names[numbers[key]] for key in opened.index.tensors.keys}, total)
        replacement.commit(index, removes_shards=False, sync=sync)
    except BaseException:
        replacement.abort(places.values())
        raise
    replacement.end()


def full_names(numbers: Mapping[str, int]) -> dict[int, str]:
    """Return the names of the full files that these numbers of tensors make."""
    count = max(numbers.values(), default=1)
    return {number: file_name(number, count) for number in sorted(set(numbers.values()))}


def check_convertible(source: Source, numbers: Mapping[str, int]) -> None:
    """See that there are tensors only, and that each of them, and nothing else, has a number.

    Raises
    ------
    PlanError
        If the numbers do not fit; names all keys that are wrong.
    NotSupportedError
        If there are objects.
    """
    keys = source.index.tensors.keys
    problems = [Problem("has no file number", key) for key in keys if key not in numbers]
    known = set(keys)
    problems += [
        Problem("has a file number, and is not in the checkpoint", key)
        for key in numbers
        if key not in known
    ]
    problems += [
        Problem(f"has the file number {number}: they count from 1", key)
        for key, number in numbers.items()
        if number < 1
    ]
    if problems:
        raise PlanError("the file numbers do not fit the tensors", problems)
    if len(source.index.objects):
        raise NotSupportedError(
            f"safetensors holds tensors only, not the objects "
            f"{', '.join(map(repr, list(source.index.objects.keys)[:5]))}"
        )


def write_full_files(
    source: Source,
    storage: Storage,
    numbers: Mapping[str, int],
    places: Mapping[int, str],
    *,
    sync: bool,
) -> int:
    """Write some of the full files; what was written of them is removed if that fails.

    Parameters
    ----------
    numbers
        File number of every tensor of the checkpoint.
    places
        The files to write: number to where.

    Returns
    -------
    int
        The bytes of all tensors of these files.
    """
    rows: dict[int, list[int]] = {number: [] for number in sorted(places)}
    for row, key in enumerate(source.index.tensors.keys):
        if numbers[key] in rows:
            rows[numbers[key]].append(row)
    records = {places[number]: _records(source, some) for number, some in rows.items()}
    write_files(storage, records, threads=1, sync=sync)  # one tensor in memory
    return sum(source.nbytes(row) for some in rows.values() for row in some)


def _records(source: Source, rows: list[int]) -> list[RecordSource]:
    tensors = source.index.tensors
    header, spans = encode_header(
        [(tensors.keys[row], tensors.dtype_of(row), tensors.shape_of(row)) for row in rows],
        metadata=FULL_METADATA,
    )
    records = [RecordSource(length=len(header), head=header)]
    arrays = source.in_order(rows)
    for position, row in enumerate(rows):
        start, end = spans[tensors.keys[row]]
        payload = _TensorSource(arrays, position, end - start)
        records.append(RecordSource(length=end - start, payload=(payload,)))
    return records


class _TensorSource:
    """A whole tensor, read when it is to be written."""

    def __init__(self, arrays: InOrder, position: int, nbytes: int) -> None:
        self._arrays = arrays
        self._position = position
        self.nbytes = nbytes

    def blocks(self, block_size: int) -> Iterator[memoryview]:
        whole = flat_bytes(self._arrays.take(self._position))
        for start in range(0, len(whole), block_size):
            yield whole[start : start + block_size]
