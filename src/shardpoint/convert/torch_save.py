"""Any checkpoint to one torch.save file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from shardpoint.convert.placing import place_name, remove_quietly
from shardpoint.convert.source import Allowed, Source, flat_bytes
from shardpoint.errors import CheckpointNotFoundError
from shardpoint.formats.torch_save_writing import torch_save_length, torch_save_pieces
from shardpoint.formats.value_pickling import StoredTensor, pickle_value, tensor_bytes
from shardpoint.storage import Buffer, Storage, WritableFile, storage_at
from shardpoint.transforms import Transform
from shardpoint.tree import unflatten

__all__ = ["to_torch_save"]

_GATHERED = 1 << 20
_BLOCK = 4 << 20


def to_torch_save(
    source: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str],
    *,
    threads: int | None = None,
    allowed: Allowed | None = None,
    transforms: Iterable[Transform] = (),
    sync: bool = True,
) -> None:
    """Write a checkpoint into one file, as ``torch.save`` writes the nested state dict.

    Tensors are read whole and written one after the other, row-major; the file appears at its
    place when it is complete, over one that is there already.

    Parameters
    ----------
    source
        Any checkpoint that `shardpoint.open` opens.
    target
        The file, by path or URL. Its folder is made if it does not exist.
    threads
        How many pieces of a tensor are read at once.
    allowed
        Classes beyond the closed list that objects may be made of; they are written as Python
        pickles them, and then ``torch.load(weights_only=True)`` wants to be told of them too.
    transforms
        What undoes compression or encryption of the source beyond what is known anyway; see
        `shardpoint.open`. What is written is plain.
    sync
        Make the file durable before it takes its place.

    Raises
    ------
    CheckpointNotFoundError, FormatError, CorruptionError, StorageError, NotSupportedError
        As `shardpoint.open` and reading do.
    """
    opened = Source(source, threads=threads, allowed=allowed, transforms=transforms)
    index = opened.index
    rows = {}
    values: dict[str, Any] = opened.objects()
    for row, key in enumerate(index.tensors.keys):
        tensor = StoredTensor(index.tensors.dtype_of(row), index.tensors.shape_of(row))
        rows[id(tensor)] = row
        values[key] = tensor
    paths = opened.paths
    nested = unflatten({key: values[key] for key in index.key_order if key in values}, paths)
    pickle, tensors = pickle_value(nested)
    sizes = [_nbytes(tensor) for tensor in tensors]
    lazy = [number for number, tensor in enumerate(tensors) if id(tensor) in rows]
    positions = {number: position for position, number in enumerate(lazy)}
    arrays = opened.in_order([rows[id(tensors[number])] for number in lazy])

    def blocks(number: int) -> Iterator[memoryview]:
        if number in positions:
            whole = flat_bytes(arrays.take(positions[number]))
        else:
            whole = tensor_bytes(tensors[number])
        for start in range(0, len(whole), _BLOCK):
            yield whole[start : start + _BLOCK]

    storage, name = _split(target)
    storage.prepare()
    place = place_name(storage, name)
    try:
        with storage.create(place, size=torch_save_length(pickle, sizes)) as file:
            _write(file, torch_save_pieces(pickle, sizes, blocks))
            if sync:
                file.sync()
        if place != name:
            storage.rename(place, name)
        if sync:
            storage.sync()
    except BaseException:
        remove_quietly(storage, place)
        raise


def _nbytes(tensor: StoredTensor) -> int:
    nbytes = tensor.dtype.itemsize
    for size in tensor.shape:
        nbytes *= size
    return nbytes


def _split(target: str | os.PathLike[str]) -> tuple[Storage, str]:
    """Return the storage of a file's folder, and the file's name."""
    text = os.fspath(target)
    folder, _, name = (text if "://" in text else os.path.abspath(text)).rpartition("/")
    if not name:
        raise CheckpointNotFoundError(f"{text!r} is no name of a file")
    return storage_at(folder or "/"), name


def _write(file: WritableFile, pieces: Iterator[Any]) -> None:
    """Write pieces in order; small ones together with the next large one."""
    offset = 0
    waiting: list[Buffer] = []
    size = 0
    for piece in pieces:
        waiting.append(memoryview(piece))
        size += len(piece)
        # A view may be overwritten once the next one is asked for.
        if isinstance(piece, memoryview) or size >= _GATHERED:
            file.write_from(offset, waiting)
            offset += size
            waiting, size = [], 0
    if waiting:
        file.write_from(offset, waiting)
