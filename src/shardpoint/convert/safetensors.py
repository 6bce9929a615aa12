"""Any checkpoint of tensors to full safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from shardpoint.convert.placing import place_name, remove_quietly
from shardpoint.convert.source import InOrder, Source, flat_bytes
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

__all__ = ["to_safetensors", "write_full_files"]


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

    The shards that several ranks saved are put together. Files appear when all are complete,
    the index last.

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
    _check_numbers(opened, numbers)
    weight_map, total = write_full_files(opened, storage, numbers, set(numbers.values()), sync=sync)
    storage.replace(INDEX_NAME, encode_index(weight_map, total), sync=sync)


def _check_numbers(source: Source, numbers: Mapping[str, int]) -> None:
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


def write_full_files(
    source: Source,
    storage: Storage,
    numbers: Mapping[str, int],
    chosen: set[int],
    *,
    sync: bool,
) -> tuple[dict[str, str], int]:
    """Write some of the full files.

    Parameters
    ----------
    numbers
        File number of every tensor of the checkpoint.
    chosen
        The files to write.

    Returns
    -------
    dict, int
        Key to file name and the bytes of all tensors, of these files.
    """
    if len(source.index.objects):
        raise NotSupportedError(
            f"safetensors holds tensors only, not the objects "
            f"{', '.join(map(repr, list(source.index.objects.keys)[:5]))}"
        )
    storage.prepare()
    count = max(numbers.values())
    rows: dict[int, list[int]] = {number: [] for number in sorted(chosen)}
    for row, key in enumerate(source.index.tensors.keys):
        if numbers[key] in rows:
            rows[numbers[key]].append(row)
    names = {number: file_name(number, count) for number in rows}
    places = {number: place_name(storage, name) for number, name in names.items()}
    records = {places[number]: _records(source, some) for number, some in rows.items()}
    write_files(storage, records, threads=1, sync=sync)  # one tensor in memory
    try:
        for number, place in places.items():
            if place != names[number]:
                storage.rename(place, names[number])
    except BaseException:
        for place in set(places.values()) - set(names.values()):
            remove_quietly(storage, place)
        raise
    if sync:
        storage.sync()
    keys = source.index.tensors.keys
    weight_map = {keys[row]: names[number] for number, some in rows.items() for row in some}
    total = sum(source.nbytes(row) for some in rows.values() for row in some)
    return weight_map, total


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
