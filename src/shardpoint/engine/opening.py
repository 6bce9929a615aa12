"""Finds out what lies at a place, and reads its index."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from shardpoint.engine._own_rank import preferring
from shardpoint.engine.replacing import by_journal
from shardpoint.engine.safetensors_opening import open_safetensors, watched_file
from shardpoint.errors import (
    CheckpointNotFoundError,
    ConcurrentSaveError,
    CorruptionError,
    FormatError,
    ShardpointError,
    ShardpointWarning,
    StorageError,
    UnsafePathError,
)
from shardpoint.formats.checksum import crc32
from shardpoint.formats.dcp_metadata import read_metadata, read_per_rank_metadata
from shardpoint.formats.huggingface import find_files
from shardpoint.formats.huggingface_journal import JOURNAL_NAME
from shardpoint.formats.native_index import MetadataStamp, index_name, read_index
from shardpoint.formats.object_decoder import ObjectFactory
from shardpoint.formats.torch_save import read_torch_save
from shardpoint.index import NO_FILE, CheckpointIndex, Container
from shardpoint.storage import LocalStorage, MappableFile, ReadableFile, Storage
from shardpoint.storage.places import local_path, remote_storage

__all__ = [
    "noticing_replacement",
    "open_index",
    "read_native",
    "read_stamp",
    "read_with_metadata",
]

PathLike: TypeAlias = "str | os.PathLike[str]"
Allowed: TypeAlias = Mapping[str, Callable[..., Any]]

_METADATA = ".metadata"
_RANK_METADATA = re.compile(r"__\d+\.metadata")
_INDEX_SUFFIX = ".safetensors.index.json"
_SAFETENSORS = (".safetensors", _INDEX_SUFFIX)
_DATA_SUFFIX = ".distcp"
_TORCH_SAVE = (".pt", ".pth", ".bin", ".ckpt")
_SMALL = 4 << 20  # bytes of metadata or index that are simply read
_MOST_LOOKED_INTO = 100
_MOST_NAMED = 5


def open_index(
    place: PathLike | Storage,
    *,
    prefer_rank: int | None = None,
    allowed: Allowed | None = None,
    options: Mapping[str, Any] | None = None,
    factory: ObjectFactory | None = None,
) -> tuple[CheckpointIndex, Storage]:
    """Return the index of the checkpoint at a place, and the storage its files are in.

    Looked for are, in this order: ``.metadata`` (torch's distributed checkpoints; where there
    is a native index that goes with it, that is read in its stead),
    ``__*.metadata`` (the same, saved without collectives), ``*.safetensors`` (Hugging Face)
    at the top or else in ``sharded/``, and one ``torch.save`` file. No data is read, but for
    a few bytes where the metadata leaves open what the data files hold.

    Parameters
    ----------
    place
        A folder, or one file of the last two kinds, which its name tells apart, by path or
        URL; or the storage of a folder. A file may be a link to anywhere; links in a folder
        are followed only inside it (see `LocalStorage` for the one exception).
    prefer_rank
        Where each rank has metadata of its own and several have the same thing: whose is
        taken. By default the lowest rank's.
    allowed
        Classes that the objects of a ``torch.save`` file may hold beyond the closed list, by
        qualified name: such a file is one pickle, decoded here.
    options
        For the file system of a URL: credentials and the like.
    factory
        Makes the tensors inside of objects of a ``torch.save`` file; see `read_torch_save`.

    Raises
    ------
    CheckpointNotFoundError
        If there is none of these; names what was looked for, and subfolders that look like
        checkpoints.
    FormatError, CorruptionError, UnsafePathError, NotSupportedError, StorageError
    TypeError
        If the place is no path.
    """
    storage, name = (place, None) if isinstance(place, Storage) else _locate(place, options)
    if name is not None and not _is_metadata(name):
        return _open_file(storage, name, allowed, factory)
    if storage.has(_METADATA):
        return read_with_metadata(storage), storage
    names = storage.list_folder()
    ranks = [name for name in names if _RANK_METADATA.fullmatch(name)]
    if ranks:
        parts = {name: storage.read(name) for name in ranks}
        index = read_per_rank_metadata(parts)
        own = f"__{prefer_rank}.metadata"
        if own in parts:
            index = preferring(index, read_per_rank_metadata({own: parts[own]}))
        return _with_containers(index, storage), storage
    files = [name for name in names if name.endswith(_TORCH_SAVE)]
    seen = by_journal(storage) if JOURNAL_NAME in names else storage
    seen_names = names if seen is storage else seen.list_folder()
    if _has_safetensors(seen, seen_names, is_alone=not files):
        return open_safetensors(storage, None, names)
    return _open_only_file(storage, names, files, allowed, factory), storage


def read_with_metadata(storage: Storage) -> CheckpointIndex:
    """Return the index of a folder with ``.metadata``: the native one, if it has one.

    Raises
    ------
    UnsafePathError
        Also if the native index is a link that leads out of the folder.
    FormatError, CorruptionError, NotSupportedError, StorageError

    Warns
    -----
    ShardpointWarning
        If the native index is damaged: then ``.metadata`` is read, as where there is none.
    """
    version = storage.version(_METADATA)
    with storage.open(_METADATA) as file:
        # Both from one open file: what it says stays the same if another is put in its place.
        stamp, data = read_stamp(file)
        try:
            index = read_native(storage, stamp)
        except (StorageError, UnsafePathError):
            raise
        except ShardpointError as error:
            warnings.warn(
                f"{storage.location!r} is read without its native index, and so without "
                f"checksums of its own: {error}",
                ShardpointWarning,
                stacklevel=4,
            )
            index = None
        if index is not None:
            return replace(index, version_read=version)
        if data is None:
            data = bytearray(file.size)
            file.read_into(0, [memoryview(data)])
    index = _with_containers(read_metadata(data, file=_METADATA), storage)
    return replace(index, version_read=version)


@contextmanager
def noticing_replacement(index: CheckpointIndex, storage: Storage) -> Iterator[None]:
    """Say so where reading fails because another save has replaced the checkpoint meanwhile.

    Raises
    ------
    ConcurrentSaveError
        In place of the error that it caused.
    """
    cause = None
    # The names of safetensors files are the same in every save: what was read may be of two.
    is_fixed = index.source == "huggingface" and bool(index.metadata_files)
    watched = watched_file(index.metadata_files) if is_fixed else _METADATA
    look = storage.written if is_fixed else storage.version
    try:
        yield
    except ShardpointError as error:
        if index.version_read is None or look(watched) == index.version_read:
            raise
        cause = error
    else:
        known = index.version_read if is_fixed else None
        if known is None or look(watched) == known:
            return
    # Of safetensors files, others than the new ones are removed: only if none is left it is gone.
    is_gone = not storage.has(watched)
    if is_gone and not (is_fixed and find_files(storage, storage.list_folder())):
        raise ConcurrentSaveError(
            f"the checkpoint at {storage.location!r} was removed while it was read: its "
            f"{watched!r} is gone"
        ) from cause
    raise ConcurrentSaveError(
        f"the checkpoint at {storage.location!r} was replaced by another save while it was "
        f"read: open it again, and what is read then is the new one"
    ) from cause


def read_stamp(file: ReadableFile) -> tuple[MetadataStamp, bytearray | None]:
    """Return the stamp of an open metadata file, and its bytes if they are few."""
    size = file.size
    data = bytearray(min(size, _SMALL))
    view = memoryview(data)
    checksum = 0
    for start in range(0, size, _SMALL):
        part = view[: min(_SMALL, size - start)]
        file.read_into(start, [part])
        checksum = crc32(part, checksum)
    return MetadataStamp(size, checksum), data if size <= _SMALL else None


def read_native(storage: Storage, stamp: MetadataStamp) -> CheckpointIndex | None:
    """Return the native index that goes with ``.metadata``, None if there is none.

    Raises
    ------
    UnsafePathError
        If it is a link that leads out of the folder.
    FormatError, CorruptionError, NotSupportedError
        If it is damaged, or a later release wrote it.
    StorageError
    """
    name = index_name(stamp)
    if not storage.has(name):
        return None
    try:
        file = storage.open(name)
    except CorruptionError:  # removed meanwhile: another checkpoint has replaced this one
        return None
    with file:
        # Small ones are read: mapped memory has its price and, on a network, its risks.
        if file.size > _SMALL and isinstance(file, MappableFile):
            data = file.map()
        else:
            data = memoryview(bytearray(file.size))
            file.read_into(0, [data])
    return read_index(data, stamp, file=name, metadata_file=_METADATA)


def _locate(path: PathLike, options: Mapping[str, Any] | None) -> tuple[Storage, str | None]:
    """Return the storage of a folder, or of a file's folder with the file's name."""
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"a path must be a str or os.PathLike of str, not {type(text).__name__}")
    if not text:
        raise CheckpointNotFoundError(f"there is nothing at {text!r}")
    local = local_path(text)
    if local is None:
        remote = remote_storage(text, options)
        return _checked_name(*remote.split()) if remote.is_file() else (remote, None)
    text = local
    if os.path.isdir(text):
        return LocalStorage(text), None
    folder, name = os.path.split(os.path.abspath(text))
    if not os.path.exists(text):
        if name.endswith(_SAFETENSORS) and os.path.exists(os.path.join(folder, JOURNAL_NAME)):
            return LocalStorage(folder), name  # a save was broken off before it had that name
        raise CheckpointNotFoundError(f"there is nothing at {text!r}")
    target = os.path.realpath(text)
    if _names_others(name) and _names_others(os.path.basename(target)):
        # What such a file names lies beside it: where it really is, unless a cache keeps it
        # under another name.
        folder, name = os.path.split(target)
    return _checked_name(LocalStorage(folder, trusted=name), name)


def _checked_name(storage: Storage, name: str) -> tuple[Storage, str]:
    if name.endswith(_DATA_SUFFIX):
        raise FormatError(
            f"{name!r} is a data file of a checkpoint folder: open its folder, {storage.location!r}"
        )
    return storage, name


def _is_metadata(name: str) -> bool:
    return name == _METADATA or _RANK_METADATA.fullmatch(name) is not None


def _open_file(
    storage: Storage, name: str, allowed: Allowed | None, factory: ObjectFactory | None
) -> tuple[CheckpointIndex, Storage]:
    if name.endswith(_SAFETENSORS):
        return open_safetensors(storage, name, None)
    return read_torch_save(storage, name, allowed=allowed, factory=factory), storage


def _names_others(name: str) -> bool:
    """Whether a file of that name says which files a checkpoint has."""
    return _is_metadata(name) or name.endswith(_INDEX_SUFFIX)


def _has_safetensors(storage: Storage, names: Sequence[str], *, is_alone: bool) -> bool:
    """Whether there are Hugging Face's files; not being able to tell matters only if `is_alone`."""
    try:
        return bool(find_files(storage, names))
    except StorageError:
        if is_alone:
            raise
        return False


def _open_only_file(
    storage: Storage,
    names: Sequence[str],
    files: Sequence[str],
    allowed: Allowed | None,
    factory: ObjectFactory | None,
) -> CheckpointIndex:
    if len(files) == 1:
        return read_torch_save(storage, files[0], allowed=allowed, factory=factory)
    if files:
        raise CheckpointNotFoundError(
            f"{storage.location!r} has several torch.save files, open one of them: "
            f"{', '.join(files)}"
        )
    raise CheckpointNotFoundError(
        f"no checkpoint at {storage.location!r}: looked for {_METADATA}, __<rank>.metadata, "
        f"*.safetensors, and one file of {', '.join('*' + suffix for suffix in _TORCH_SAVE)}"
        f"{_hint_at_subfolders(storage, names)}"
    )


def _hint_at_subfolders(storage: Storage, names: Sequence[str]) -> str:
    """Name the subfolders to open in place of their parent; looks at the first few only."""
    folders = [name.rstrip("/") for name in names if name.endswith("/")][:_MOST_LOOKED_INTO]
    found = [repr(folder) for folder in folders if _looks_like_checkpoint(storage, folder)]
    if not found:
        return ""
    more = ", ..." if len(found) > _MOST_NAMED else ""
    return f"; open one of its subfolders: {', '.join(found[:_MOST_NAMED])}{more}"


def _looks_like_checkpoint(storage: Storage, folder: str) -> bool:
    try:
        names = [name[len(folder) + 1 :] for name in storage.list_folder(folder)]
    except ShardpointError:
        return False  # it cannot be looked into: then it is not named
    return any(_is_metadata(name) or name.endswith(_SAFETENSORS + _TORCH_SAVE) for name in names)


def _with_containers(index: CheckpointIndex, storage: Storage) -> CheckpointIndex:
    """Find files that hold a safetensors image where torch.save records would be.

    torch's ``SerializationFormat.SAFETENSORS`` gives, for each tensor, the place of the whole
    image and the bytes of the tensor alone. A torch.save record is always larger than its
    tensor, so only files with such lengths are looked into.
    """
    chunks = index.chunks
    itemsizes = np.array(
        [index.tensors.dtype_of(row).itemsize for row in range(len(index.tensors))]
    )
    if not len(chunks):
        return index
    nbytes = chunks.sizes.prod(axis=1) * itemsizes[chunks.tensor]
    bare = (
        (chunks.container == Container.TORCH_RECORD)
        & (chunks.transform == 0)
        & (chunks.file != NO_FILE)
        & (chunks.record_length == nbytes)
    )
    candidates = np.flatnonzero(bare & (nbytes > 0))
    files, first = np.unique(chunks.file[candidates], return_index=True)
    images = [
        number
        for number, at in zip(files.tolist(), candidates[first].tolist(), strict=True)
        if _begins_image(storage, index.files[number], int(chunks.record_offset[at]))
    ]
    if not images:
        return index
    container = chunks.container.copy()
    container[bare & np.isin(chunks.file, images)] = Container.SAFETENSORS_IMAGE
    return replace(index, chunks=replace(chunks, container=container))


def _begins_image(storage: Storage, name: str, offset: int) -> bool:
    """Whether a safetensors header begins there. Files that cannot be read are left alone:
    reading from them gives the error, and other keys stay readable.
    """
    start = bytearray(9)
    try:
        with storage.open(name) as file:
            if offset < 0 or offset + len(start) > file.size:
                return False
            file.read_into(offset, [memoryview(start)])
            length = int.from_bytes(start[:8], "little")
            return start[8:] == b"{" and offset + 8 + length <= file.size
    except ShardpointError:
        return False
