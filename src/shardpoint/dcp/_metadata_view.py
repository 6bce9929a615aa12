"""Between the index's columns and torch's metadata objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shardpoint.dcp._tensors import dtype_of
from shardpoint.dcp._write_items import properties_of
from shardpoint.dcp.metadata import (
    _MEMORY_FORMATS,
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from shardpoint.index import (
    NO_FILE,
    CheckpointIndex,
    ChunkEntry,
    ObjectEntry,
    TensorEntry,
    build_index,
)

__all__ = ["index_of", "metadata_of", "stored_index_of"]


class _View(dict[Any, Any]):
    """A dict whose content is made at first sight, and that knows whether it was changed."""

    def __init__(self, make: Callable[[], Mapping[Any, Any]]) -> None:
        super().__init__()
        self._make: Callable[[], Mapping[Any, Any]] | None = make

    @property
    def untouched(self) -> bool:
        """Whether nobody has looked at (and so perhaps changed) the content."""
        return self._make is not None

    def _fill(self) -> None:
        if self._make is not None:
            make, self._make = self._make, None
            super().update(make())

    def __reduce__(self) -> tuple[Any, ...]:
        self._fill()
        return dict, (dict(self.items()),)

    def __iter__(self) -> Iterator[Any]:
        self._fill()
        return super().__iter__()

    def __len__(self) -> int:
        self._fill()
        return super().__len__()


def _filling(name: str) -> Any:
    method = getattr(dict, name)

    def call(self: _View, *arguments: Any, **keywords: Any) -> Any:
        self._fill()
        return method(self, *arguments, **keywords)

    call.__name__ = name
    return call


_METHODS = (
    *("__getitem__", "__setitem__", "__delitem__", "__contains__", "__eq__", "__ne__", "__repr__"),
    *("__or__", "__ror__", "__ior__", "__reversed__", "clear", "copy", "get", "items", "keys"),
    *("pop", "popitem", "setdefault", "update", "values"),
)
for _name in _METHODS:
    setattr(_View, _name, _filling(_name))


def metadata_of(index: CheckpointIndex, storage_info: Callable[..., Any] | None) -> Metadata:
    """Return torch's view of an index.

    `storage_info` makes the entries of `storage_data`; None where nothing is written yet.
    """
    metadata = Metadata(
        state_dict_metadata=_View(lambda: _state_dict_metadata(index)),
        planner_data=_planner_data(index),
        storage_data=None
        if storage_info is None
        else _View(lambda: _storage_data(index, storage_info)),
        storage_meta=_storage_meta(index.storage_meta),
        version=index.version,
    )
    metadata._index = index  # type: ignore[attr-defined]
    metadata._storage_info = storage_info  # type: ignore[attr-defined]
    return metadata


def _storage_meta(fields: Mapping[str, Any] | None) -> StorageMeta | None:
    if fields is None:
        return None
    meta = StorageMeta()
    vars(meta).update(fields)  # as unpickling does: a later release may have more of them
    return meta


def _state_dict_metadata(index: CheckpointIndex) -> dict[str, STORAGE_TYPES]:
    tensors, chunks = index.tensors, index.chunks
    found: dict[str, STORAGE_TYPES] = {key: BytesStorageMetadata() for key in index.objects.keys}
    for row, key in enumerate(tensors.keys):
        rank = int(tensors.ndim[row])
        span = slice(int(tensors.first_chunk[row]), int(tensors.first_chunk[row + 1]))
        offsets, sizes = chunks.offsets[span, :rank].tolist(), chunks.sizes[span, :rank].tolist()
        found[key] = TensorStorageMetadata(
            properties=properties_of(tensors, row),
            size=torch.Size(tensors.shape_of(row)),
            chunks=[
                ChunkStorageMetadata(torch.Size(o), torch.Size(s))
                for o, s in zip(offsets, sizes, strict=True)
            ],
        )
    return {key: found[key] for key in index.key_order}


def _storage_data(
    index: CheckpointIndex, storage_info: Callable[..., Any]
) -> dict[MetadataIndex, Any]:
    tensors, chunks, objects = index.tensors, index.chunks, index.objects
    made: dict[MetadataIndex, Any] = {}
    for row in np.flatnonzero(objects.file != NO_FILE).tolist():
        made[MetadataIndex(objects.keys[row])] = storage_info(
            index.files[objects.file[row]],
            int(objects.record_offset[row]),
            int(objects.record_length[row]),
            list(index.transforms[objects.transform[row]]) or None,
        )
    for row in np.flatnonzero(chunks.file != NO_FILE).tolist():
        tensor = int(chunks.tensor[row])
        offsets = chunks.offsets[row, : tensors.ndim[tensor]].tolist()
        place = row - int(tensors.first_chunk[tensor])
        made[MetadataIndex(tensors.keys[tensor], offsets, place)] = storage_info(
            index.files[chunks.file[row]],
            int(chunks.record_offset[row]),
            int(chunks.record_length[row]),
            list(index.transforms[chunks.transform[row]]) or None,
        )
    return made


def index_of(metadata: Any) -> CheckpointIndex:
    """Return the columns of metadata objects, ours or torch's.

    Where the metadata came from the engine and nobody has changed it, these are the columns
    it came from; else they are made once.
    """
    index: CheckpointIndex | None = getattr(metadata, "_index", None)
    if index is None or not _is_unchanged(metadata, index):
        return _columns(metadata)
    if metadata.planner_data == _planner_data(index):
        return index
    return replace(index, **_planner_fields(metadata.planner_data))


def stored_index_of(metadata: Any, stored: Any) -> CheckpointIndex:
    """Return the columns that say what lies where, for those who read it.

    That is `stored`, the metadata's ``storage_data``, alone: a planner may have renamed or
    dropped what is described, and its items still name what is stored.
    """
    index: CheckpointIndex | None = getattr(metadata, "_index", None)
    if index is not None and _is_stored_so(metadata, stored, index):
        return index
    return index_of(metadata if stored is metadata.storage_data else _with(metadata, stored))


def _with(metadata: Any, stored: Any) -> Metadata:
    return Metadata(
        state_dict_metadata=metadata.state_dict_metadata,
        planner_data=metadata.planner_data,
        storage_data=stored,
        storage_meta=metadata.storage_meta,
        version=getattr(metadata, "version", None),
    )


def _is_unchanged(metadata: Any, index: CheckpointIndex) -> bool:
    """Whether the metadata still says what the index does; what nobody looked at does."""
    described = metadata.state_dict_metadata
    if not (isinstance(described, _View) and described.untouched) and (
        described != _state_dict_metadata(index)
    ):
        return False
    return _is_stored_so(metadata, metadata.storage_data, index)


def _is_stored_so(metadata: Any, stored: Any, index: CheckpointIndex) -> bool:
    if stored is None or (isinstance(stored, _View) and stored.untouched):
        return True
    info = getattr(metadata, "_storage_info", None)
    return info is not None and bool(stored == _storage_data(index, info))


def _planner_data(index: CheckpointIndex) -> Any:
    if index.planner_data is not None or index.paths is None:
        return index.planner_data
    return dict(index.paths)


def _planner_fields(data: Any) -> dict[str, Any]:
    """Return the index's fields for what a planner wants stored."""
    if data is None:
        return {"paths": None, "planner_data": None}
    paths = {
        key: path
        for key, path in (data.items() if isinstance(data, dict) else ())
        if isinstance(key, str)
        and isinstance(path, tuple)
        and path
        and all(type(part) in (str, int) for part in path)
    }
    whole = isinstance(data, dict) and len(paths) == len(data)
    return {"paths": paths or (paths if whole else None), "planner_data": None if whole else data}


def _columns(metadata: Any) -> CheckpointIndex:
    stored = {
        (item.fqn, None if item.offset is None else tuple(item.offset)): info
        for item, info in (metadata.storage_data or {}).items()
    }
    tensors, objects = [], []
    for key, value in metadata.state_dict_metadata.items():
        if not hasattr(value, "chunks"):
            objects.append(ObjectEntry(key, *_place(stored.get((key, None)))))
            continue
        properties = value.properties
        tensors.append(
            TensorEntry(
                key=key,
                dtype=dtype_of(properties.dtype),
                shape=tuple(value.size),
                chunks=[
                    _chunk(chunk, stored.get((key, tuple(chunk.offsets)))) for chunk in value.chunks
                ],
                requires_grad=properties.requires_grad,
                pin_memory=properties.pin_memory,
                memory_format=_MEMORY_FORMATS[properties.memory_format].value,
            )
        )
    meta = metadata.storage_meta
    index = build_index(
        tensors,
        objects,
        key_order=list(metadata.state_dict_metadata),
        paths=None,
        storage_meta=None if meta is None else dict(vars(meta)),
        version=metadata.version,
        source="dcp",
        metadata_files=[],
    )
    return replace(
        index,
        objects=replace(index.objects, values={}),  # one without a place is not there
        **_planner_fields(metadata.planner_data),
    )


def _place(info: Any) -> tuple[str | None, int, int, tuple[str, ...]]:
    if not all(hasattr(info, name) for name in ("relative_path", "offset", "length")):
        # A user's own storage: its reader knows the way.
        return None, 0, 0, ()
    transforms = tuple(getattr(info, "transform_descriptors", None) or ())
    return str(info.relative_path), info.offset, info.length, transforms


def _chunk(chunk: Any, info: Any) -> ChunkEntry:
    file, offset, length, transforms = _place(info)
    return ChunkEntry(
        offsets=tuple(chunk.offsets),
        sizes=tuple(chunk.sizes),
        file=file,
        record_offset=offset,
        record_length=length,
        transforms=transforms,
    )
