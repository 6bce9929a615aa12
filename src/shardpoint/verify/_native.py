"""The native index against its checksum, and against the ``.metadata`` that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shardpoint.engine.opening import read_native, read_stamp
from shardpoint.errors import Problem, ShardpointError
from shardpoint.formats.dcp_metadata import read_metadata
from shardpoint.formats.native_index import (
    index_name,
    is_index_name,
    read_save_id,
    stamp_of,
    with_save_id,
)
from shardpoint.index import CheckpointIndex, Chunks, Objects
from shardpoint.storage import Storage
from shardpoint.verify._report import problem_of

__all__ = ["NativeResult", "check_native"]

Int64Array = npt.NDArray[np.int64]

_METADATA = ".metadata"
_MOST_NAMED = 3


@dataclass(slots=True)
class NativeResult:
    """What was found."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_native(index: CheckpointIndex, storage: Storage, *, quick: bool) -> NativeResult:
    """Check all native indexes of a folder with ``.metadata``.

    The one that goes with it must be whole and, unless `quick`, say the same. Others are told
    of: that other software has saved here is no damage. But one of the *same* save means that
    the ``.metadata`` has been changed since.
    """
    result = NativeResult()
    if _METADATA not in index.metadata_files:
        return result
    try:
        names = [name for name in storage.list_folder() if is_index_name(name)]
        if names:
            _check_all(index, storage, names, result, quick=quick)
        elif not quick:
            # Its absence is no damage, torch writes none, but somebody may have removed one.
            result.notes.append(
                "there is no native index: what was compared is what torch's own CRC-32 covers"
            )
    except ShardpointError as error:
        result.problems.append(problem_of(error, None, _METADATA, None))
    return result


def _check_all(
    index: CheckpointIndex, storage: Storage, names: list[str], result: NativeResult, *, quick: bool
) -> None:
    with storage.open(_METADATA) as file:
        stamp, data = read_stamp(file)
        own = index_name(stamp)
        native = None
        if own in names:
            try:
                native = read_native(storage, stamp)
            except ShardpointError as error:
                result.problems.append(problem_of(error, None, own, None))
        if native is not None and not quick:
            if data is None:
                data = bytearray(file.size)
                file.read_into(0, [memoryview(data)])
            described = read_metadata(data, file=_METADATA)
            result.problems += _differences(native, described, own)
    others = [name for name in names if name != own]
    if others and own not in names and data is None:
        data = bytearray(storage.read(_METADATA))
    save_id = (index.storage_meta or {}).get("save_id")
    for name in others:
        if own not in names and _is_of_same_save(storage, name, bytes(data or b""), save_id):
            message = (
                f"the metadata has been changed since it was written: wanted the bytes that "
                f"{name!r} was made for, found {stamp.size} bytes with CRC-32 "
                f"{stamp.checksum:#010x}"
            )
            result.problems.append(Problem(message, file=_METADATA))
        else:
            result.notes.append(
                f"{name!r} belongs to another save: other software has saved here since, or a "
                "save was broken off; it is not used"
            )


def _is_of_same_save(storage: Storage, name: str, metadata: bytes, save_id: object) -> bool:
    """Whether an index that does not go with ``.metadata`` was made for what that was once.

    Then the number of the save that the index has is somewhere in the file, even if that cannot
    be read as it was; or only that number was changed, and with the index's own in its place the
    metadata are those that the index is named after.
    """
    try:
        wanted = read_save_id(memoryview(storage.read(name)), file=name)
    except ShardpointError:
        return False
    if not wanted:
        return False
    if wanted.encode() in metadata:
        return True
    if not isinstance(save_id, str) or not save_id:
        return False
    return index_name(stamp_of(with_save_id(metadata, save_id, wanted))) == name


def _differences(native: CheckpointIndex, described: CheckpointIndex, name: str) -> list[Problem]:
    """Compare everything that both say; the first few differences of each tensor are named."""
    found: list[tuple[str | None, str]] = [*_differing_wholes(native, described)]
    tensors = {key: row for row, key in enumerate(described.tensors.keys)}
    objects = {key: row for row, key in enumerate(described.objects.keys)}
    if tensors.keys() == set(native.tensors.keys) and objects.keys() == set(native.objects.keys):
        rows = np.array([tensors[key] for key in native.tensors.keys], np.int64)
        found += _differing_tensors(native, described, rows)
        counts = np.diff(described.tensors.first_chunk)[rows]
        if np.array_equal(counts, np.diff(native.tensors.first_chunk)):
            start = described.tensors.first_chunk[:-1][rows]
            shift = np.repeat(start - native.tensors.first_chunk[:-1], counts)
            found += _differing_chunks(native, described, shift + np.arange(len(shift)))
        rows = np.array([objects[key] for key in native.objects.keys], np.int64)
        wrong = np.zeros(len(rows), np.bool_)
        for ours, theirs in _places(native, described, native.objects, described.objects, rows):
            wrong |= ours != theirs
        found += [
            (native.objects.keys[row], "the place of the object")
            for row in np.flatnonzero(wrong).tolist()
        ]
    else:
        found.append((None, "the keys"))
    return [
        Problem(f"the native index and {_METADATA} differ in {what}", key=key, file=name)
        for key, what in found
    ]


def _differing_wholes(
    native: CheckpointIndex, described: CheckpointIndex
) -> Iterator[tuple[None, str]]:
    if list(native.key_order) != list(described.key_order):
        yield None, "the order of keys"
    if native.paths != described.paths:
        yield None, "the paths of keys"
    if repr(native.planner_data) != repr(described.planner_data):  # NaN is not equal to itself
        yield None, "the planner's data"
    if native.version != described.version:
        yield None, "the version"


def _differing_tensors(
    native: CheckpointIndex, described: CheckpointIndex, rows: Int64Array
) -> Iterator[tuple[str, str]]:
    ours, theirs = native.tensors, described.tensors
    wrong = np.zeros(len(rows), np.bool_)
    for name in ("dtype", "ndim", "requires_grad", "pin_memory", "memory_format"):
        wrong |= getattr(ours, name) != getattr(theirs, name)[rows]
    wrong |= np.diff(ours.first_chunk) != np.diff(theirs.first_chunk)[rows]
    if ours.shape.shape[1] == theirs.shape.shape[1]:
        wrong |= (ours.shape != theirs.shape[rows]).any(axis=1)
    else:
        yield ours.keys[0], "the number of axes"
    for row in np.flatnonzero(wrong).tolist():
        yield ours.keys[row], "shape, dtype, properties or the number of chunks"


def _differing_chunks(
    native: CheckpointIndex, described: CheckpointIndex, rows: Int64Array
) -> Iterator[tuple[str, str]]:
    ours, theirs = native.chunks, described.chunks
    wrong = np.zeros(len(rows), np.bool_)
    if ours.offsets.shape[1] == theirs.offsets.shape[1]:
        wrong |= (ours.offsets != theirs.offsets[rows]).any(axis=1)
        wrong |= (ours.sizes != theirs.sizes[rows]).any(axis=1)
    for mine, other in _places(native, described, ours, theirs, rows):
        wrong |= mine != other
    differing = np.flatnonzero(wrong)
    tensor, first, counts = np.unique(ours.tensor[differing], return_index=True, return_counts=True)
    for row, start, count in zip(tensor.tolist(), first.tolist(), counts.tolist(), strict=True):
        chunk = int(differing[start]) - int(native.tensors.first_chunk[row])
        more = f" and {count - 1} more" if count > 1 else ""
        yield native.tensors.keys[row], f"the box or the place of chunk {chunk}{more}"


def _places(
    native: CheckpointIndex,
    described: CheckpointIndex,
    ours: Chunks | Objects,
    theirs: Chunks | Objects,
    rows: Int64Array,
) -> Iterator[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]:
    """Yield pairs of columns that should be equal; numbers of names are brought to one list."""
    numbers = {name: number for number, name in enumerate(native.files)}
    files = np.array([*(numbers.get(name, -2) for name in described.files), -1], np.int64)
    lists = {names: number for number, names in enumerate(native.transforms)}
    transforms = np.array([lists.get(names, -2) for names in described.transforms], np.int64)
    yield ours.file, files[theirs.file[rows]]
    yield ours.transform, transforms[theirs.transform[rows]]
    yield ours.record_offset, theirs.record_offset[rows]
    yield ours.record_length, theirs.record_length[rows]
