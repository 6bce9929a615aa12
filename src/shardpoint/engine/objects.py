"""Reads objects that are no tensors, decoded by the closed list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shardpoint.errors import CorruptionError, FormatError, PlanError, Problem
from shardpoint.formats.object_decoder import ObjectFactory, decode_object
from shardpoint.formats.torch_record import read_object_pickle
from shardpoint.index import NO_FILE, CheckpointIndex
from shardpoint.storage import Storage
from shardpoint.transforms import decode

__all__ = ["read_object", "read_object_record"]

_DECODED = 64 << 20
_DECODED_RATIO = 100


def read_object_record(index: CheckpointIndex, storage: Storage, row: int) -> bytes:
    """Return the torch.save record of one object, transforms undone.

    Raises
    ------
    PlanError
        If there is no such row, or its value is in the index itself.
    CorruptionError
        If the record is not inside its file, or the file is missing.
    FormatError, UnsafePathError, LimitExceededError, NotSupportedError, StorageError
    """
    objects = index.objects
    if not 0 <= row < len(objects):
        raise PlanError(f"there is no object of row {row}")
    key = objects.keys[row]
    number = int(objects.file[row])
    if number == NO_FILE:
        raise CorruptionError(f"key {key!r}: the metadata does not say where the object is")
    name = index.files[number]
    offset, length = int(objects.record_offset[row]), int(objects.record_length[row])
    if name in index.metadata_files:
        raise FormatError(str(Problem("a metadata file is named as a file of data", key, name)))
    try:
        file = storage.open(name)
    except (CorruptionError, FormatError) as error:
        raise type(error)(f"key {key!r}: {error}") from error
    with file:
        if offset < 0 or length < 0 or offset + length > file.size:
            message = f"a record of {length} bytes does not fit into a file of {file.size}"
            raise CorruptionError(str(Problem(message, key, name, offset)))
        record = bytearray(length)
        file.read_into(offset, [memoryview(record)])
    transforms = index.transforms[int(objects.transform[row])]
    most = max(_DECODED, _DECODED_RATIO * length)
    return decode(transforms, record, max_size=most, key=key, file=name)


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
    record = read_object_record(index, storage, row)
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
