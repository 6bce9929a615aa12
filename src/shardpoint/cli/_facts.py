"""What the commands tell, gathered from an open checkpoint; how it looks is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardpoint._info import ChunkInfo, ObjectInfo, TensorInfo
from shardpoint.checkpoint import Checkpoint
from shardpoint.cli._values import Simple, simplify
from shardpoint.errors import CheckpointKeyError, ShardpointError
from shardpoint.index import NO_FILE

__all__ = [
    "Entry",
    "Listing",
    "ObjectFacts",
    "Overview",
    "StoredFile",
    "TensorFacts",
    "gather_key",
    "gather_listing",
    "gather_overview",
]


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a listing; what an object does not have is None.

    `nbytes` is of a whole tensor, or of an object's record (None where the value lies in the
    index itself, as in a ``torch.save`` file).
    """

    key: str
    kind: str
    dtype: str | None
    shape: tuple[int, ...] | None
    nbytes: int | None
    chunks: int | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What ``ls`` tells; the totals are of the entries."""

    path: str
    entries: tuple[Entry, ...]
    tensors: int
    objects: int
    chunks: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file; `nbytes` is None where it is missing or cannot be opened."""

    name: str
    nbytes: int | None


@dataclass(frozen=True, slots=True)
class Overview:
    """What ``info`` tells of a whole checkpoint.

    Attributes
    ----------
    source
        `CheckpointIndex.source`: ``"dcp"``, ``"dcp-per-rank"``, ``"huggingface"``, ``"torch"``.
    metadata_version
        What torch 2.9 and later write into DCP's metadata, None elsewhere.
    tensor_bytes, object_bytes, file_bytes
        Of all tensors when they are whole; of the objects' records; of the files there are.
    transforms
        What was done to stored bytes, such as ``"stream.zstd/1"``.
    metadata_files
        What it was opened by, the native index included.
    """

    path: str
    source: str
    metadata_version: str | None
    nested: bool
    tensors: int
    chunks: int
    objects: int
    tensor_bytes: int
    object_bytes: int
    file_bytes: int
    transforms: tuple[str, ...]
    metadata_files: tuple[str, ...]
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What ``info`` tells of a tensor; see `TensorInfo` and `ChunkInfo`."""

    key: str
    kind: str
    path: Simple
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    requires_grad: bool
    layout: str
    chunks: tuple[ChunkInfo, ...]


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What ``info`` tells of an object; see `ObjectInfo`.

    `value` is short and simple; where it could not be decoded, `value_error` says why.
    """

    key: str
    kind: str
    path: Simple
    file: str | None
    record_offset: int
    record_length: int
    transforms: tuple[str, ...]
    record_checksum: int | None
    value: Simple
    value_error: str | None


def gather_listing(checkpoint: Checkpoint, path: str, prefix: str) -> Listing:
    """List the keys that are `prefix` or go on from it after a dot.

    Raises
    ------
    CheckpointKeyError
        If there is a prefix and no such key.
    """
    branch = prefix if prefix.endswith(".") else prefix + "."
    index = checkpoint.index
    columns = index.tensors
    # Straight from the columns: describing every chunk of every tensor takes its time.
    chunk_counts = np.diff(columns.first_chunk).tolist()
    found: dict[str, Entry] = {}
    for row, key in enumerate(columns.keys):
        dtype, shape = columns.dtype_of(row), columns.shape_of(row)
        nbytes = _volume(shape) * dtype.itemsize
        found[key] = Entry(key, "tensor", dtype.name, shape, nbytes, chunk_counts[row])
    for row, key in enumerate(index.objects.keys):
        stored = index.objects.file[row] != NO_FILE
        nbytes_or_none = int(index.objects.record_length[row]) if stored else None
        found.setdefault(key, Entry(key, "object", None, None, nbytes_or_none, None))
    entries = tuple(
        found[key] for key in checkpoint if not prefix or key == prefix or key.startswith(branch)
    )
    if prefix and not entries:
        raise CheckpointKeyError(
            f"the checkpoint at {checkpoint.location!r} has no key {prefix!r} and none that "
            "goes on from it after a dot"
        )
    return Listing(
        path=path,
        entries=entries,
        tensors=sum(entry.kind == "tensor" for entry in entries),
        objects=sum(entry.kind == "object" for entry in entries),
        chunks=sum(entry.chunks or 0 for entry in entries),
        nbytes=sum(entry.nbytes or 0 for entry in entries),
    )


def gather_overview(checkpoint: Checkpoint, path: str) -> Overview:
    """Describe the whole; looks at the files' sizes and reads nothing."""
    index = checkpoint.index
    listing = gather_listing(checkpoint, path, "")
    files = tuple(StoredFile(name, size) for name, size in checkpoint.file_sizes().items())
    sums = {
        kind: sum(entry.nbytes or 0 for entry in listing.entries if entry.kind == kind)
        for kind in ("tensor", "object")
    }
    return Overview(
        path=path,
        source=index.source,
        metadata_version=index.version,
        nested=index.paths is not None,
        tensors=listing.tensors,
        chunks=listing.chunks,
        objects=listing.objects,
        tensor_bytes=sums["tensor"],
        object_bytes=sums["object"],
        file_bytes=sum(file.nbytes or 0 for file in files),
        transforms=tuple(dict.fromkeys(name for names in index.transforms for name in names)),
        metadata_files=tuple(index.metadata_files),
        files=files,
    )


def gather_key(checkpoint: Checkpoint, key: str) -> TensorFacts | ObjectFacts:
    """Describe one key; reads an object, and nothing of a tensor.

    Raises
    ------
    CheckpointKeyError
        If there is no such key.
    """
    info = checkpoint.info(key)
    if isinstance(info, TensorInfo):
        return TensorFacts(
            key=info.key,
            kind="tensor",
            path=simplify(info.path),
            dtype=info.dtype,
            shape=info.shape,
            nbytes=info.nbytes,
            requires_grad=info.requires_grad,
            layout=str(info.layout),
            chunks=info.chunks,
        )
    return _object_facts(checkpoint, info)


def _object_facts(checkpoint: Checkpoint, info: ObjectInfo) -> ObjectFacts:
    value: Simple = None
    value_error = None
    try:
        value = simplify(checkpoint[info.key])
    except ShardpointError as error:
        value_error = str(error)
    return ObjectFacts(
        key=info.key,
        kind="object",
        path=simplify(info.path),
        file=info.file,
        record_offset=info.record_offset,
        record_length=info.record_length,
        transforms=info.transforms,
        record_checksum=info.record_checksum,
        value=value,
        value_error=value_error,
    )


def _volume(shape: tuple[int, ...]) -> int:
    """Return the number of elements in Python's integers: a shape may claim any."""
    volume = 1
    for size in shape:
        volume *= size
    return volume
