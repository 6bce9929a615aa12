"""Reads objects that are no tensors, decoded by the closed list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from shardpoint.engine._files import OpenFiles
from shardpoint.errors import CorruptionError, FormatError, PlanError, Problem
from shardpoint.formats.object_decoder import ObjectFactory, decode_object
from shardpoint.formats.torch_record import read_object_pickle
from shardpoint.index import NO_FILE, CheckpointIndex
from shardpoint.storage import Storage
from shardpoint.transforms import decode

__all__ = ["read_object", "read_object_records"]

_DECODED = 64 << 20
_DECODED_RATIO = 100
_GROUP = 1 << 20


def read_object_records(
    index: CheckpointIndex, storage: Storage, rows: Sequence[int]
) -> Iterator[tuple[int, bytes]]:
    """Read the torch.save records of objects, transforms undone; neighbours in one read.

    Yields
    ------
    (row, record)
        In the order of the files.

    Raises
    ------
    PlanError
        If there is no such row, or its value is in the index itself.
    CorruptionError
        If a record is not inside its file, or the file is missing.
    FormatError, UnsafePathError, LimitExceededError, NotSupportedError, StorageError
    """
    objects = index.objects
    for row in rows:
        _check_place(index, row)
    ordered = sorted(rows, key=lambda row: (objects.file[row], objects.record_offset[row]))
    with OpenFiles(storage) as files:
        for group in _groups(index, ordered):
            yield from _read_group(index, files, group)


def _check_place(index: CheckpointIndex, row: int) -> None:
    """Raise where the index does not say where an object's record is."""
    objects = index.objects
    if not 0 <= row < len(objects):
        raise PlanError(f"there is no object of row {row}")
    key = objects.keys[row]
    number = int(objects.file[row])
    if number == NO_FILE:
        raise CorruptionError(f"key {key!r}: the metadata does not say where the object is")
    name = index.files[number]
    if name in index.metadata_files:
        raise FormatError(str(Problem("a metadata file is named as a file of data", key, name)))
    offset, length = int(objects.record_offset[row]), int(objects.record_length[row])
    if offset < 0 or length < 0:
        raise CorruptionError(str(Problem(f"a record of {length} bytes", key, name, offset)))


def _groups(index: CheckpointIndex, rows: Sequence[int]) -> Iterator[list[int]]:
    """Split ordered rows into runs of records that touch, of a bounded size."""
    objects = index.objects
    group: list[int] = []
    start = end = 0
    for row in rows:
        offset, length = int(objects.record_offset[row]), int(objects.record_length[row])
        if group and (
            objects.file[row] != objects.file[group[0]]
            or offset != end
            or offset + length - start > _GROUP
        ):
            yield group
            group = []
        if not group:
            start = offset
        group.append(row)
        end = offset + length
    if group:
        yield group


def _read_group(
    index: CheckpointIndex, files: OpenFiles, group: Sequence[int]
) -> Iterator[tuple[int, bytes]]:
    objects = index.objects
    key, name = objects.keys[group[0]], index.files[int(objects.file[group[0]])]
    start = int(objects.record_offset[group[0]])
    length = int(objects.record_offset[group[-1]] + objects.record_length[group[-1]]) - start
    try:
        with files.use(name) as file:
            for row in group:
                _check_span(index, row, file.size)
            data = bytearray(length)
            file.read_into(start, [memoryview(data)])
    except (CorruptionError, FormatError) as error:
        if f"key {key!r}" in str(error):
            raise
        raise type(error)(f"key {key!r}: {error}") from error
    for row in group:
        begin = int(objects.record_offset[row]) - start
        record = bytes(memoryview(data)[begin : begin + int(objects.record_length[row])])
        transforms = index.transforms[int(objects.transform[row])]
        most = max(_DECODED, _DECODED_RATIO * len(record))
        if transforms:
            record = decode(transforms, record, max_size=most, key=objects.keys[row], file=name)
        yield row, record


def _check_span(index: CheckpointIndex, row: int, size: int) -> None:
    objects = index.objects
    offset, length = int(objects.record_offset[row]), int(objects.record_length[row])
    if offset + length > size:
        message = f"a record of {length} bytes does not fit into a file of {size}"
        name = index.files[int(objects.file[row])]
        raise CorruptionError(str(Problem(message, objects.keys[row], name, offset)))


def read_object(
    index: CheckpointIndex,
    storage: Storage,
    row: int,
    *,
    factory: ObjectFactory,
    allowed: Mapping[str, Callable[..., Any]],
    verify: bool,
) -> Any:
    """Return one object.

    Parameters
    ----------
    row
        In `Objects`.
    factory
        Makes tensors, sizes, dtypes and devices.
    allowed
        What else objects may be made of, by qualified name.
    verify
        Whether to compare the checksums of storages inside the object.

    Raises
    ------
    ForbiddenContentError
        If the object has something that is not on the closed list.
    CorruptionError, FormatError, UnsafePathError, LimitExceededError, NotSupportedError,
    StorageError
    """
    objects = index.objects
    if 0 <= row < len(objects) and objects.keys[row] in objects.values:
        return objects.values[objects.keys[row]]
    ((_, record),) = read_object_records(index, storage, [row])
    key = objects.keys[row]
    name = index.files[int(objects.file[row])]
    data, load_storage = read_object_pickle(record, file=name, key=key, verify=verify)
    return decode_object(
        data,
        load_storage=load_storage,
        source=str(Problem("object", key, name, int(objects.record_offset[row]))),
        factory=factory,
        allowed=allowed,
    )
