"""torch's ``.metadata``: read into columns and written from them, without torch.

Source: the files that torch 2.3 to 2.15 write and read (``torch.distributed.checkpoint``).
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from shardpoint.errors import FormatError, ShardpointError
from shardpoint.formats._metadata_fields import (
    MetadataFields,
    Place,
    TensorFields,
    check_metadata,
)
from shardpoint.formats._metadata_joining import (
    JoinedMetadata,
    join_runs,
    separate_chunks,
)
from shardpoint.formats._metadata_pickle import load_metadata_pickle
from shardpoint.formats._metadata_runs import MetadataRuns
from shardpoint.formats._metadata_writing import write_metadata
from shardpoint.formats._pickle_opcodes import RunsRefused
from shardpoint.index import NO_FILE, CheckpointIndex, Chunks, Container, Objects, Tensors

__all__ = ["read_metadata", "read_per_rank_metadata", "write_metadata"]

_HAS_RUNS = 1 << 15  # bytes of metadata: below, vector operations gain nothing
_LARGE = 1 << 20  # bytes of metadata: some thousands of chunks


def read_metadata(data: bytes | bytearray | memoryview, *, file: str) -> CheckpointIndex:
    """Read a ``.metadata`` file.

    Parameters
    ----------
    data
        The whole file.
    file
        Its name, for errors and for `CheckpointIndex.metadata_files`.

    Returns
    -------
    CheckpointIndex
        With source ``"dcp"``. Names of data files are as they stand there: whether they stay
        inside the checkpoint is checked where they are opened. A chunk or object that the
        file says nothing of the whereabouts of has `NO_FILE`.

    Raises
    ------
    ForbiddenContentError
        If it names a class or function that has no place there. Nothing is imported or run.
    FormatError
        If it is no such file, or a field has a wrong type; the error names key and file.
    NotSupportedError
        If a tensor has a dtype or layout that shardpoint does not know.
    """
    with _no_collection(len(data)):
        content = bytes(data)
        joined = _read_by_runs(content, file)
        if joined is not None:
            return _from_joined(joined, metadata_files=[file])
        fields = _read_fields(content, file)
        return _to_columns(fields, source="dcp", metadata_files=[file])


def read_per_rank_metadata(
    parts: Mapping[str, bytes | bytearray | memoryview],
) -> CheckpointIndex:
    """Read the ``__{rank}.metadata`` files of a checkpoint saved without collectives.

    Chunks that several ranks wrote with the same box are kept once, the lowest rank's; of
    objects under one key, too. Where planners stored more than paths, it is that of the lowest
    rank that stored any.

    Parameters
    ----------
    parts
        File name to content.

    Raises
    ------
    FormatError
        As `read_metadata`; and where ranks disagree on dtype, shape, kind or path of a key.
    """
    if not parts:
        raise FormatError("there are no per-rank metadata files")
    names = sorted(parts, key=_rank_order)
    with _no_collection(sum(map(len, parts.values()))):
        merged = _read_part(bytes(parts[names[0]]), names[0])
        union = _Union(merged)
        for name in names[1:]:
            union.add(_read_part(bytes(parts[name]), name))
        return _to_columns(merged, source="dcp-per-rank", metadata_files=names)


@contextlib.contextmanager
def _no_collection(size: int) -> Iterator[None]:
    """Pause the cyclic garbage collector while a large pickle becomes many small objects.

    It would walk all of them again and again, for up to half of the time, and there are no
    cycles among them.
    """
    pause = size >= _LARGE and gc.isenabled()
    if pause:
        gc.disable()
    try:
        yield
    finally:
        if pause:
            gc.enable()


def _read_fields(data: bytes, file: str) -> MetadataFields:
    """Read a pickle step by step."""
    record = load_metadata_pickle(data, source=f"file {file!r}")
    return check_metadata(record, file=file, size=len(data))


def _read_part(data: bytes, file: str) -> MetadataFields:
    """Read one of several pickles."""
    joined = _read_by_runs(data, file)
    return _read_fields(data, file) if joined is None else separate_chunks(joined)


def _read_by_runs(data: bytes, file: str) -> JoinedMetadata | None:
    """Read a pickle with the help of its runs; None if it has none, or anything is odd.

    Then it is read step by step, which gives the result or the error that counts.
    """
    if len(data) < _HAS_RUNS:
        return None
    runs = MetadataRuns(data)
    try:
        record = load_metadata_pickle(data, source=f"file {file!r}", runs=runs)
        if runs.taken:
            return join_runs(record, runs, file=file)
    except RunsRefused:
        return None
    except ShardpointError:
        if not runs.taken:
            raise
    return None


def _rank_order(name: str) -> tuple[bool, int, str]:
    match = re.search(r"__(\d{1,18})\.metadata$", name)
    return (match is None, int(match.group(1)) if match else 0, name)


class _Union:
    """Adds the metadata of one rank after another to that of the first."""

    def __init__(self, first: MetadataFields) -> None:
        self.merged = first
        self.tensors = {t.key: t for t in first.tensors}
        self.boxes = {t.key: set(zip(t.offsets, t.sizes, strict=True)) for t in first.tensors}

    def add(self, other: MetadataFields) -> None:
        merged = self.merged
        mine = self.tensors.keys() | merged.objects.keys()
        merged.key_order.extend(key for key in other.key_order if key not in mine)
        for tensor in other.tensors:
            self._add_tensor(tensor, other.file)
        for key, place in other.objects.items():
            if key in self.tensors:
                raise FormatError(
                    f"key {key!r}, file {other.file!r}: an object, elsewhere a tensor"
                )
            if merged.objects.get(key) is None:
                merged.objects[key] = place
        self._add_planner_data(other)

    def _add_planner_data(self, other: MetadataFields) -> None:
        merged = self.merged
        own_values = merged.planner_data is not None or other.planner_data is not None
        if merged.planner_data is None:
            merged.planner_data = other.planner_data
        if other.paths is None or merged.paths is None:
            if not own_values and merged.paths is not other.paths:
                raise FormatError(
                    f"file {other.file!r}: only some of the ranks flattened their state"
                )
            merged.paths = other.paths if merged.paths is None else merged.paths
            return
        for key, path in other.paths.items():
            if merged.paths.setdefault(key, path) != path:
                raise FormatError(f"key {key!r}, file {other.file!r}: ranks differ in its path")

    def _add_tensor(self, tensor: TensorFields, file: str) -> None:
        key = tensor.key
        if key in self.merged.objects:
            raise FormatError(f"key {key!r}, file {file!r}: a tensor, elsewhere an object")
        known = self.tensors.get(key)
        if known is None:
            self.tensors[key] = tensor
            self.boxes[key] = set(zip(tensor.offsets, tensor.sizes, strict=True))
            self.merged.tensors.append(tensor)
            return
        if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
            raise FormatError(
                f"key {key!r}, file {file!r}: {tensor.dtype.name} of shape {tensor.shape}, "
                f"but another rank has {known.dtype.name} of shape {known.shape}"
            )
        boxes = self.boxes[key]
        for offsets, sizes, place in zip(tensor.offsets, tensor.sizes, tensor.places, strict=True):
            if (offsets, sizes) not in boxes:
                boxes.add((offsets, sizes))
                known.offsets.append(offsets)
                known.sizes.append(sizes)
                known.places.append(place)


class _Places:
    """Columns of where things lie; files and transforms are numbered across all of them."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.transforms: dict[tuple[str, ...], int] = {(): 0}

    def columns(self, places: Iterable[Place | None]) -> npt.NDArray[np.int64]:
        """Return ``int64[n, 4]``: file, offset, length, transform."""
        files, transforms = self.files, self.transforms
        rows = [
            (NO_FILE, 0, 0, 0)
            if place is None
            else (
                files.setdefault(place[0], len(files)),
                place[1],
                place[2],
                transforms.setdefault(place[3], len(transforms)),
            )
            for place in places
        ]
        return np.array(rows, np.int64).reshape(-1, 4)


def _padded(rows: Sequence[tuple[int, ...]], axes: int, padding: int) -> npt.NDArray[np.int64]:
    result = np.full((len(rows), axes), padding, np.int64)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    numbers = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    result[np.arange(axes) < lengths[:, None]] = numbers
    return result


def _to_columns(
    fields: MetadataFields, *, source: str, metadata_files: Sequence[str]
) -> CheckpointIndex:
    tensors = fields.tensors
    axes = max((len(t.shape) for t in tensors), default=0)
    places = _Places()
    chunk_places = places.columns(chain.from_iterable(t.places for t in tensors))
    object_places = places.columns(fields.objects.values())
    if len(places.transforms) > np.iinfo(np.int16).max:
        raise FormatError(f"file {fields.file!r}: too many different transforms")
    return _index(
        fields,
        counts=np.array([len(t.offsets) for t in tensors], np.int64),
        offsets=_padded([o for t in tensors for o in t.offsets], axes, 0),
        sizes=_padded([s for t in tensors for s in t.sizes], axes, 1),
        chunk_places=chunk_places,
        object_places=object_places,
        files=list(places.files),
        transforms=list(places.transforms),
        source=source,
        metadata_files=metadata_files,
    )


def _index(
    fields: MetadataFields,
    *,
    counts: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    chunk_places: npt.NDArray[np.int64],
    object_places: npt.NDArray[np.int64],
    files: Sequence[str],
    transforms: Sequence[tuple[str, ...]],
    source: str,
    metadata_files: Sequence[str],
) -> CheckpointIndex:
    tensors = fields.tensors
    axes = max((len(t.shape) for t in tensors), default=0)
    return CheckpointIndex(
        tensors=Tensors(
            keys=[t.key for t in tensors],
            dtype=np.array([t.dtype.code for t in tensors], np.uint8),
            ndim=np.array([len(t.shape) for t in tensors], np.int16),
            shape=_padded([t.shape for t in tensors], axes, 1),
            first_chunk=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
            requires_grad=np.array([t.requires_grad for t in tensors], np.bool_),
            pin_memory=np.array([t.pin_memory for t in tensors], np.bool_),
            memory_format=np.array([t.memory_format for t in tensors], np.uint8),
        ),
        chunks=Chunks(
            tensor=np.repeat(np.arange(len(tensors), dtype=np.int64), counts),
            offsets=offsets,
            sizes=sizes,
            file=chunk_places[:, 0].astype(np.int32),
            record_offset=chunk_places[:, 1].copy(),
            record_length=chunk_places[:, 2].copy(),
            container=np.full(len(chunk_places), Container.TORCH_RECORD, np.uint8),
            transform=chunk_places[:, 3].astype(np.int16),
        ),
        objects=_object_columns(fields.objects, object_places),
        files=files,
        transforms=transforms,
        key_order=fields.key_order,
        paths=fields.paths,
        planner_data=fields.planner_data,
        storage_meta=fields.storage_meta,
        version=fields.version,
        source=source,
        metadata_files=list(metadata_files),
    )


def _from_joined(joined: JoinedMetadata, *, metadata_files: Sequence[str]) -> CheckpointIndex:
    fields = joined.fields
    if len(joined.transforms) > np.iinfo(np.int16).max:
        raise FormatError(f"file {fields.file!r}: too many different transforms")
    return _index(
        fields,
        counts=joined.counts,
        offsets=joined.offsets,
        sizes=joined.sizes,
        chunk_places=joined.chunk_places,
        object_places=joined.object_places,
        files=joined.files,
        transforms=joined.transforms,
        source="dcp",
        metadata_files=metadata_files,
    )


def _object_columns(objects: Mapping[str, Any], places: npt.NDArray[np.int64]) -> Objects:
    return Objects(
        keys=list(objects),
        file=places[:, 0].astype(np.int32),
        record_offset=places[:, 1].copy(),
        record_length=places[:, 2].copy(),
        transform=places[:, 3].astype(np.int16),
    )
