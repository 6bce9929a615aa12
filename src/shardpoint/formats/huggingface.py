"""Folders of safetensors files, as Hugging Face and torch's ``HuggingFaceStorageWriter`` write.

Facts (torch 2.8 to 2.15):

- Full files at the top with an index (``model.safetensors.index.json``: ``weight_map`` from
  key to file), or a single ``model.safetensors`` without one.
- Shards of several ranks: every file's ``__metadata__`` has ``DCP_SHARDING_INFO``, JSON with
  the ``saved_offsets`` of each tensor. The global shape is the maximum of offset and size.
- After consolidation the full files are at the top and the shards in ``sharded/``; the full
  files are read, and the shards only where there are no full ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from shardpoint.dtypes import DType
from shardpoint.errors import CheckpointNotFoundError, FormatError, Problem
from shardpoint.formats._store import Store, reader_of
from shardpoint.formats.safetensors import (
    MAX_HEADER_BYTES,
    SafetensorsHeader,
    SafetensorsTensor,
    read_header,
)
from shardpoint.index import (
    CheckpointIndex,
    ChunkEntry,
    Container,
    TensorEntry,
    build_index,
)

__all__ = ["choose_files", "find_files", "read_directory", "read_files"]

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_USUAL_INDEX = "model.safetensors.index.json"
_SHARD_FOLDER = "sharded/"
_SHARDING_INFO = "DCP_SHARDING_INFO"
_MAX_NUMBER = (1 << 63) - 1


@dataclass(slots=True)
class _Found:
    """What the files say of one tensor."""

    dtype: DType
    first_file: str
    axes: int
    is_sharded: bool
    chunks: dict[tuple[tuple[int, ...], tuple[int, ...]], ChunkEntry] = field(default_factory=dict)


def read_directory(storage: Store, name: str | None = None) -> CheckpointIndex:
    """Return the index of a folder of safetensors files, reading their headers only.

    Parameters
    ----------
    storage
        The folder.
    name
        One file to read alone: a ``.safetensors`` file, or an index. By default the index at
        the top if there is one, else all files at the top, else those in ``sharded/``.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file.
    FormatError
        If a header or the index is not what its format says; shards of one tensor differ in
        dtype or axes, or have negative offsets; a tensor occurs twice in full; the index
        names a tensor that its file does not have.
    UnsafePathError
        If the index names a file outside.
    CorruptionError, LimitExceededError, NotSupportedError, StorageError
    """
    return read_files(storage, *choose_files(storage, name))


def read_files(storage: Store, index_name: str | None, files: list[str]) -> CheckpointIndex:
    """Return the index of the files that `choose_files` chose; raises as `read_directory` does."""
    homes: dict[str, str] = {}
    if index_name is not None:
        homes = _read_weight_map(storage, index_name)
        files = list(dict.fromkeys(homes.values()))
    found: dict[str, _Found] = {}
    present: dict[str, set[str]] = {}
    for file in files:
        header = _read_file_header(storage, file)
        present[file] = set(header.tensors)
        _collect(found, header, file, homes)
    for key, file in homes.items():
        if key not in present[file]:
            _fail("the index places it in this file, which does not have it", key, file)
    order = [*homes, *(key for key in found if key not in homes)]
    return build_index(
        [_tensor_entry(key, found[key]) for key in order],
        [],
        key_order=order,
        paths={key: (key,) for key in order},
        storage_meta=None,
        version=None,
        source="huggingface",
        metadata_files=files if index_name is None else [index_name],
    )


def _fail(message: str, key: str | None, file: str) -> NoReturn:
    raise FormatError(str(Problem(message, key=key, file=file)))


def choose_files(
    storage: Store, name: str | None, names: Iterable[str] | None = None
) -> tuple[str | None, list[str]]:
    """Return the index to follow, or else the files to read; see `read_directory`.

    Parameters
    ----------
    names
        What is directly in the folder; None if that is to be looked up.
    """
    if name is not None:
        if not storage.has(name):
            raise CheckpointNotFoundError(f"no file {name!r} in {storage.location!r}")
        return (name, []) if name.endswith(_INDEX_SUFFIX) else (None, [name])
    found = find_files(storage, storage.list_folder() if names is None else names)
    indexes = [n for n in found if n.endswith(_INDEX_SUFFIX)]
    if _USUAL_INDEX in indexes:
        return _USUAL_INDEX, []
    if len(indexes) > 1:
        raise FormatError(
            f"{storage.location!r} has several indexes, open one of them: {', '.join(indexes)}"
        )
    if indexes:
        return indexes[0], []
    if not found:
        raise CheckpointNotFoundError(f"no safetensors files in {storage.location!r}")
    return None, found


def find_files(storage: Store, names: Iterable[str]) -> list[str]:
    """Return the indexes and safetensors files of a folder; at the top, else in ``sharded/``.

    Parameters
    ----------
    names
        What is directly in the folder, as `Store.list_folder` gives it.

    Raises
    ------
    StorageError
        If ``sharded/`` has to be looked into, and cannot be.
    """
    names = list(names)
    found = [name for name in names if name.endswith((_SUFFIX, _INDEX_SUFFIX))]
    if not found and _SHARD_FOLDER in names:
        inside = storage.list_folder(_SHARD_FOLDER.rstrip("/"))
        found = [name for name in inside if name.endswith(_SUFFIX)]
    return found


def _parse_json(text: str | bytes, what: str, file: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        _fail(f"{what} is not JSON: {error}", None, file)


def _read_weight_map(storage: Store, name: str) -> dict[str, str]:
    """Return key to file, both relative to the checkpoint."""
    with storage.open(name) as file:
        if file.size > MAX_HEADER_BYTES:
            _fail(f"the index has {file.size} bytes", None, name)
        raw = reader_of(file)(0, file.size)
    content = _parse_json(raw, "the index", name)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        _fail("the index has no weight_map", None, name)
    for key, file_name in weight_map.items():
        if not isinstance(file_name, str):
            _fail(f"weight_map gives no file name but {file_name!r:.100}", key, name)
    folder = name[: name.rfind("/") + 1]
    return {key: folder + file_name for key, file_name in weight_map.items()}


def _read_file_header(storage: Store, name: str) -> SafetensorsHeader:
    with storage.open(name) as file:
        return read_header(reader_of(file), file.size, file=name)


def _collect(
    found: dict[str, _Found], header: SafetensorsHeader, file: str, homes: dict[str, str]
) -> None:
    """Add one file's tensors; those that the index has elsewhere are left out."""
    offsets_of = _saved_offsets(header, file)
    for key, tensor in header.tensors.items():
        if homes.get(key, file) != file:
            continue
        offsets = offsets_of(key, tensor)
        axes = len(tensor.shape)
        known = found.get(key)
        if known is None:
            known = _Found(tensor.dtype, file, axes, offsets is not None)
            found[key] = known
        elif known.dtype is not tensor.dtype or known.axes != axes:
            _fail(
                f"here it is {tensor.dtype.name} with {axes} axes, in {known.first_file!r} "
                f"{known.dtype.name} with {known.axes}",
                key,
                file,
            )
        elif offsets is None or not known.is_sharded:
            _fail(f"it is in {known.first_file!r} as well", key, file)
        place = (offsets or (0,) * axes, tensor.shape)
        # Ranks that hold the same box write it each; one is enough.
        known.chunks.setdefault(place, _chunk_entry(*place, tensor, file))


def _chunk_entry(
    offsets: tuple[int, ...], sizes: tuple[int, ...], tensor: SafetensorsTensor, file: str
) -> ChunkEntry:
    length = tensor.end - tensor.start
    return ChunkEntry(
        offsets=offsets,
        sizes=sizes,
        file=file,
        record_offset=tensor.start,
        record_length=length,
        container=Container.RAW,
        payload_offset=tensor.start,
        payload_length=length,
    )


def _saved_offsets(
    header: SafetensorsHeader, file: str
) -> Callable[[str, SafetensorsTensor], tuple[int, ...] | None]:
    """Return what gives a tensor's offsets; None where the file says it is whole."""
    raw = header.metadata.get(_SHARDING_INFO)
    if raw is None:
        return lambda key, tensor: None
    content = _parse_json(raw, _SHARDING_INFO, file)
    if not isinstance(content, dict):
        _fail(f"{_SHARDING_INFO} is not an object", None, file)

    def offsets_of(key: str, tensor: SafetensorsTensor) -> tuple[int, ...] | None:
        entry = content.get(key)
        if entry is None:
            return None
        offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or not _fit(offsets, tensor.shape):
            _fail(
                f"{_SHARDING_INFO} gives saved_offsets {offsets!r:.100} for a chunk of "
                f"shape {tensor.shape}",
                key,
                file,
            )
        return tuple(offsets)

    return offsets_of


def _fit(offsets: Iterable[Any], shape: tuple[int, ...]) -> bool:
    numbers = list(offsets)
    return len(numbers) == len(shape) and all(
        type(n) is int and n >= 0 and n + size <= _MAX_NUMBER
        for n, size in zip(numbers, shape, strict=True)
    )


def _tensor_entry(key: str, found: _Found) -> TensorEntry:
    shape = tuple(
        max(offsets[axis] + sizes[axis] for offsets, sizes in found.chunks)
        for axis in range(found.axes)
    )
    return TensorEntry(key, found.dtype, shape, list(found.chunks.values()))
