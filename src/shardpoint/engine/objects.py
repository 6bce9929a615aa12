"""Reads objects that are no tensors, decoded by the closed list."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias, TypeVar

from shardpoint.engine._files import OpenFiles
from shardpoint.engine._numbers import read_numbers
from shardpoint.errors import (
    CorruptionError,
    FormatError,
    PlanError,
    Problem,
    ShardpointError,
    StorageError,
)
from shardpoint.formats.checksum import crc32
from shardpoint.formats.number_pickles import UNKNOWN_PICKLE, number_of
from shardpoint.formats.object_decoder import ObjectFactory, decode_object
from shardpoint.formats.torch_record import read_object_pickle
from shardpoint.index import NO_FILE, UNKNOWN, CheckpointIndex
from shardpoint.storage import Storage
from shardpoint.transforms import TransformFinder, Transforms, decode

__all__ = ["read_object", "read_object_records", "read_objects"]

Failures: TypeAlias = MutableMapping[int, ShardpointError]

_DECODED = 64 << 20
_DECODED_RATIO = 100
_GROUP = 1 << 20


def read_object_records(
    index: CheckpointIndex,
    storage: Storage,
    rows: Sequence[int],
    *,
    verify: bool = True,
    failures: Failures | None = None,
    finder: TransformFinder | None = None,
) -> Iterator[tuple[int, bytes]]:
    """Read the torch.save records of objects, transforms undone; neighbours in one read.

    Parameters
    ----------
    rows
        In `Objects`.
    verify
        Whether to compare the checksums that the index has of whole records.
    failures
        Gets the error of each object that cannot be read, and the others are read. Without
        it the first such error is raised.
    finder
        Knows how transforms are undone; None knows those of shardpoint that need no key.

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
    finder = Transforms() if finder is None else finder
    placed = []
    for row in rows:
        try:
            _check_place(index, row)
        except ShardpointError as error:
            _keep(failures, row, error)
            continue
        placed.append(row)
    placed.sort(key=lambda row: (objects.file[row], objects.record_offset[row]))
    with OpenFiles(storage) as files:
        for group in _groups(index, placed):
            for row, record in _stored_records(index, files, group, failures):
                try:
                    if verify:
                        _compare(index, row, record)
                    decoded = _decoded(index, row, record, finder)
                except ShardpointError as error:
                    _keep(failures, row, error)
                    continue
                yield row, decoded


def _keep(failures: Failures | None, row: int, error: ShardpointError) -> None:
    """Put an error where it is wanted, or raise it."""
    if failures is None:
        raise error
    failures[row] = error


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


def _stored_records(
    index: CheckpointIndex, files: OpenFiles, group: Sequence[int], failures: Failures | None
) -> Iterator[tuple[int, bytes]]:
    """Read neighbours in one go; one by one where that fails, so that each has its own error."""
    objects = index.objects
    start = int(objects.record_offset[group[0]])
    end = int(objects.record_offset[group[-1]] + objects.record_length[group[-1]])
    try:
        data = _read_span(index, files, group[-1], start, end)
    except ShardpointError as error:
        if isinstance(error, StorageError) and failures is None:
            raise  # the store failed, not a record: trying again would hide it
        if len(group) == 1:
            _keep(failures, group[0], error)
            return
        for row in group:
            yield from _stored_records(index, files, [row], failures)
        return
    for row in group:
        begin = int(objects.record_offset[row]) - start
        yield row, bytes(data[begin : begin + int(objects.record_length[row])])


def _read_span(
    index: CheckpointIndex, files: OpenFiles, row: int, start: int, end: int
) -> memoryview:
    """Read a part of an object's file, up to the end of its record; errors name the object."""
    objects = index.objects
    key, name = objects.keys[row], index.files[int(objects.file[row])]
    try:
        with files.use(name) as file:
            if end <= file.size:
                data = memoryview(bytearray(end - start))
                file.read_into(start, [data])
                return data
            size = file.size
    except (CorruptionError, FormatError) as error:
        raise _with_key(error, key) from error
    message = f"a record of {end - start} bytes does not fit into a file of {size}"
    raise CorruptionError(str(Problem(message, key, name, start)))


_Named = TypeVar("_Named", bound=ShardpointError)


def _with_key(error: _Named, key: str) -> _Named:
    """Return the same error, attributes and all, with the key before its message."""
    named = copy.copy(error)
    named.args = (f"key {key!r}: {error}",)
    return named


def _compare(index: CheckpointIndex, row: int, record: bytes) -> None:
    """Compare a record with its checksum, where the index has one."""
    objects = index.objects
    if objects.record_checksum is None:
        return
    wanted = int(objects.record_checksum[row])
    found = crc32(record)
    if wanted not in (found, UNKNOWN):
        start = int(objects.record_offset[row])
        message = (
            f"bytes {start} to {start + len(record)} are damaged: "
            f"wanted CRC-32 {wanted:#010x}, found {found:#010x}"
        )
        name = index.files[int(objects.file[row])]
        raise CorruptionError(str(Problem(message, objects.keys[row], name, start)))


def _decoded(index: CheckpointIndex, row: int, record: bytes, finder: TransformFinder) -> bytes:
    objects = index.objects
    transforms = index.transforms[int(objects.transform[row])]
    if not transforms:
        return record
    decoded = decode(
        transforms,
        record,
        finder=finder,
        max_size=max(_DECODED, _DECODED_RATIO * len(record)),
        key=objects.keys[row],
        file=index.files[int(objects.file[row])],
    )
    return bytes(decoded)


def read_objects(
    index: CheckpointIndex,
    storage: Storage,
    rows: Sequence[int],
    *,
    factory: ObjectFactory,
    allowed: Mapping[str, Callable[..., Any]],
    verify: bool,
    failures: Failures | None = None,
    finder: TransformFinder | None = None,
) -> Iterator[tuple[int, Any]]:
    """Read several objects, neighbours in one read; parameters and errors as `read_object`.

    Parameters
    ----------
    failures
        Gets the error of each object that cannot be read, and the others are read. Without
        it the first such error is raised.
    finder
        Knows how transforms are undone; None knows those of shardpoint that need no key.

    Yields
    ------
    (row, value)
        Those that the index holds, then the others in the order of the files, plain numbers
        first.
    """
    objects = index.objects
    stored = []
    for row in rows:
        if 0 <= row < len(objects) and objects.keys[row] in objects.values:
            yield row, objects.values[objects.keys[row]]
        else:
            stored.append(row)
    done = set()
    for row, number in read_numbers(index, storage, list(dict.fromkeys(stored)), verify=verify):
        done.add(row)
        yield row, number
    stored = [row for row in stored if row not in done]
    for row, record in read_object_records(
        index, storage, stored, verify=verify, failures=failures, finder=finder
    ):
        try:
            value = _value(index, row, record, factory=factory, allowed=allowed, verify=verify)
        except ShardpointError as error:
            _keep(failures, row, error)
            continue
        yield row, value


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
    ((_, value),) = read_objects(
        index, storage, [row], factory=factory, allowed=allowed, verify=verify
    )
    return value


def _value(
    index: CheckpointIndex,
    row: int,
    record: bytes,
    *,
    factory: ObjectFactory,
    allowed: Mapping[str, Callable[..., Any]],
    verify: bool,
) -> Any:
    key = index.objects.keys[row]
    name = index.files[int(index.objects.file[row])]
    data, load_storage = read_object_pickle(record, file=name, key=key, verify=verify)
    number = number_of(data)
    if number is not UNKNOWN_PICKLE:
        return number
    return decode_object(
        data,
        load_storage=load_storage,
        source=str(Problem("object", key, name, int(index.objects.record_offset[row]))),
        factory=factory,
        allowed=allowed,
    )
