"""The handle that `shardpoint.open` returns: a checkpoint read with numpy alone."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from shardpoint import _selection
from shardpoint._arguments import (
    checked_threads,
    checked_transforms,
)
from shardpoint._info import ChunkInfo, ObjectInfo, Path, TensorInfo, object_info, tensor_info
from shardpoint._prefixes import path_below
from shardpoint._selection import AxisSelection, Selection
from shardpoint._sinks import NewArraySink
from shardpoint.engine.executor import default_threads
from shardpoint.engine.objects import read_objects
from shardpoint.engine.opening import noticing_replacement, open_index
from shardpoint.engine.reading import ReadRequest, read_tensors
from shardpoint.engine.unfinished import wait_until_written
from shardpoint.errors import CheckpointKeyError, FormatError, PlanError, StorageError
from shardpoint.formats.allowing import check_allowed
from shardpoint.formats.object_decoder import NumpyFactory
from shardpoint.index import CheckpointIndex
from shardpoint.storage import Closing, Storage
from shardpoint.transforms import Transform, Transforms
from shardpoint.tree import unflatten
from shardpoint.verify import Progress, VerifyReport, file_sizes, verify_index

__all__ = [
    "AxisSelection",
    "Checkpoint",
    "ChunkInfo",
    "ObjectInfo",
    "Selection",
    "TensorInfo",
    "open",
]

_MOST_COMPARED = 5_000  # keys that a wrong one is compared with: each takes microseconds
_MOST_LETTERS = 200


def open(  # the module that needs the builtin is storage, not this one
    path: str | os.PathLike[str],
    *,
    allowed: Mapping[str, Callable[..., Any]] | None = None,
    verify: bool = True,
    threads: int | None = None,
    transforms: Iterable[Transform] = (),
) -> Checkpoint:
    """Open a checkpoint for reading, without torch. Reads the index only.

    One that `shardpoint.dcp.async_save` of this process is still writing is waited for.

    Parameters
    ----------
    path
        A folder that torch.distributed.checkpoint, shardpoint or Hugging Face wrote, or one
        file: ``.safetensors``, or what ``torch.save`` wrote.
    allowed
        Classes and functions beyond the built-in closed list that objects may be made of,
        by qualified name, such as ``{"my_package.Config": Config}``. They are called with
        what the checkpoint says: name only what you trust with that.
    verify
        Whether checksums are compared where there are any and a whole chunk is read.
    threads
        How many threads read side by side; by default one a processor, at most 16.
    transforms
        What undoes compression or encryption beyond what shardpoint knows by itself: with a
        key, ``[shardpoint.transforms.AesGcm(key)]``, or objects of your own
        (`shardpoint.transforms.Transform`).

    Raises
    ------
    CheckpointNotFoundError
        If there is nothing to open at that place.
    FormatError
        If the index is not what its format says, or holds what could run code.
    PlanError
        If `threads` is below 1.
    TypeError
        If an argument is of another kind.
    CorruptionError, StorageError, UnsafePathError, NotSupportedError
    """
    if threads is not None:
        threads = checked_threads(threads)
    if allowed is not None:
        check_allowed(allowed)
    added = checked_transforms(transforms)
    wait_until_written(path)
    index, storage = open_index(path, allowed=allowed)
    return Checkpoint(
        index,
        storage,
        allowed={} if allowed is None else allowed,
        verify=verify,
        threads=default_threads() if threads is None else threads,
        transforms=added,
        place=_from_anywhere(os.fspath(path)),
    )


def _reopen(
    place: str,
    allowed: Mapping[str, Callable[..., Any]],
    verify: bool,
    threads: int,
    transforms: Sequence[Transform],
) -> Checkpoint:
    return open(place, allowed=allowed, verify=verify, threads=threads, transforms=transforms)


def _from_anywhere(path: str) -> str:
    """Return a path that leads to the same place from another working directory."""
    return path if "://" in path else os.path.abspath(path)


class Checkpoint(Closing):
    """A checkpoint that is open for reading; made by `open`.

    Tensors come as numpy arrays of their own (``ml_dtypes`` for bfloat16 and 8-bit floats;
    a structured ``(real, imag)`` dtype for complex32). Objects come as plain Python values,
    with arrays for the tensors inside them. Nothing is kept: reading twice reads twice.
    May be used by several threads at once. Pickling one takes along where it lies and the
    arguments of `open`, keys among them, not what it holds: it is opened again where it is
    unpickled.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        storage: Storage,
        *,
        allowed: Mapping[str, Callable[..., Any]],
        verify: bool,
        threads: int,
        transforms: Sequence[Transform] = (),
        place: str | None = None,
    ) -> None:
        self._place = place
        self._index = index
        self._storage = storage
        self._allowed = dict(allowed)
        self._verify = verify
        self._threads = threads
        self._transforms = tuple(transforms)
        self._finder = Transforms(self._transforms)
        self._closed = False
        tensors = {key: row for row, key in enumerate(index.tensors.keys)}
        objects = {key: row for row, key in enumerate(index.objects.keys)}
        # In saved order; each key is a tensor (True) or an object, and has a row there.
        self._rows: dict[str, tuple[bool, int]] = {
            key: (True, tensors[key]) if key in tensors else (False, objects[key])
            for key in index.key_order
            if key in tensors or key in objects
        }

    @property
    def index(self) -> CheckpointIndex:
        """Everything that is known without reading data, in columns."""
        return self._index

    @property
    def location(self) -> str:
        """Where it lies."""
        return self._storage.location

    def keys(self) -> KeysView[str]:
        """Return all flat keys, in saved order."""
        return self._rows.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        tensors = len(self._index.tensors)
        objects = len(self._index.objects)
        return (
            f"<Checkpoint {self._storage.location!r} ({self._index.source}): "
            f"{tensors:,} tensors, {objects:,} objects>"
        )

    def info(self, key: str) -> TensorInfo | ObjectInfo:
        """Describe one key from the index; reads nothing.

        Raises
        ------
        CheckpointKeyError
            If there is no such key; names similar ones.
        """
        is_tensor, row = self._row(key)
        return tensor_info(self._index, row) if is_tensor else object_info(self._index, row)

    def __getitem__(self, key: str) -> Any:
        """Return a whole tensor as an array, or an object; see `read` for the errors."""
        return self.read(key)

    def read(self, key: str, slices: Selection = ...) -> Any:
        """Read a tensor or a part of it, or an object.

        Only the bytes of the selected box are read (whole chunks where they are compressed).
        A step other than 1 reads the box that covers it and picks from it in memory.

        Parameters
        ----------
        key
            A flat key.
        slices
            Integers, slices and one Ellipsis, as for a numpy array; everything by default.

        Returns
        -------
        numpy.ndarray or object
            An array that shares memory with no other and may be changed. An integer takes its
            axis away; where no axis is left the array is 0-d.

        Raises
        ------
        CheckpointKeyError
            If there is no such key; names similar ones.
        PlanError
            If the slices do not fit the shape, or the stored chunks do not cover the tensor.
        CorruptionError
            If bytes are missing, or differ from their checksum.
        FormatError
            If a record is not what its format and the index say; `ForbiddenContentError` where
            an object is made of something outside the closed list.
        StorageError, NotSupportedError, UnsafePathError
        """
        is_tensor, row = self._row(key)
        if not is_tensor:
            if slices is not Ellipsis:
                raise PlanError(f"key {key!r} is an object, of which no slices can be read")
            ((_, value),) = self._read_objects([row])
            return value
        shape = self._index.tensors.shape_of(row)
        selected = _selection.select(shape, slices, key=key)
        array = self._read_boxes([(row, selected.offsets, selected.sizes)])[0]
        if selected.takes_all:
            return array
        # A view would hold on to the whole box.
        return np.array(array[selected.take], array.dtype, order="C", copy=True)

    def tree(self, prefix: str = "") -> Any:
        """Return a nested dictionary of arrays and objects, as it was saved.

        Parameters
        ----------
        prefix
            Only keys that are `prefix` or go on from it after a dot, without the prefix.

        Returns
        -------
        Any
            Dictionaries and lists (containers inside objects are part of the objects). A
            list position without a value is None. Where it was saved flat, a dictionary of
            flat keys. A prefix that is a key gives that key's value.

        Raises
        ------
        CheckpointKeyError
            If no key has the prefix.
        TypeError
            If the prefix is no str.
        FormatError
            If the paths in the checkpoint do not form a tree; and all errors of `read`.
        """
        if not isinstance(prefix, str):
            raise TypeError(f"a prefix must be a str, not {type(prefix).__name__}")
        paths = self._paths_under(prefix)
        tensors = [(key, self._rows[key][1]) for key in paths if self._rows[key][0]]
        # Before any byte is read: a tree that cannot be built is found at once.
        unflatten(dict.fromkeys(paths), paths)
        shapes = [self._index.tensors.shape_of(row) for _, row in tensors]
        arrays = self._read_boxes(
            [
                (row, (0,) * len(shape), shape)
                for (_, row), shape in zip(tensors, shapes, strict=True)
            ]
        )
        values: dict[str, Any] = dict.fromkeys(paths)
        values.update(zip((key for key, _ in tensors), arrays, strict=True))
        objects = [row for is_tensor, row in map(self._rows.__getitem__, paths) if not is_tensor]
        for row, value in self._read_objects(objects):
            values[self._index.objects.keys[row]] = value
        return unflatten(values, paths)

    def verify(self, *, quick: bool = False, progress: Progress | None = None) -> VerifyReport:
        """Look for everything that is wrong: chunks that overlap, leave holes or lie outside
        their tensor, missing files and bytes, wrong checksums, objects that cannot be decoded.

        Reads every chunk once, whatever `open` was told about checksums, and holds only a few
        chunks at a time.

        Parameters
        ----------
        quick
            Only the index against itself and the sizes of the files: no data is read, so
            changed bytes and objects that cannot be decoded are not found.
        progress
            Called now and then, in this thread, with how many bytes of tensors have been
            looked at and of how many.

        Returns
        -------
        VerifyReport
            All problems, those of the store (a file that cannot be read) among them.
        """
        self._check_open()
        return verify_index(
            self._index,
            self._storage,
            allowed=self._allowed,
            finder=self._finder,
            threads=self._threads,
            quick=quick,
            progress=progress,
        )

    def file_sizes(self) -> dict[str, int | None]:
        """Return the size in bytes of every file: those with the index first, then the data.

        None stands for a file that is missing or that the store refuses; `verify` tells which.
        """
        self._check_open()
        names = dict.fromkeys([*self._index.metadata_files, *self._index.files])
        return file_sizes(self._storage, names)[0]

    def close(self) -> None:
        """Refuse further reading. Files are open only during a read: nothing else to release."""
        self._closed = True

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_open()
        if self._place is None:
            raise TypeError(f"{self!r} cannot be pickled: it was not opened by a path")
        return _reopen, (
            self._place,
            self._allowed,
            self._verify,
            self._threads,
            self._transforms,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError(f"the checkpoint at {self._storage.location!r} has been closed")

    def _row(self, key: str) -> tuple[bool, int]:
        try:
            return self._rows[key]
        except (KeyError, TypeError):
            raise CheckpointKeyError(self._no_such("key", key)) from None

    def _no_such(self, what: str, name: object) -> str:
        some = islice(self._rows, _MOST_COMPARED)
        similar = difflib.get_close_matches(str(name)[:_MOST_LETTERS], some, n=3, cutoff=0.6)
        hint = f"; similar: {', '.join(map(repr, similar))}" if similar else ""
        return f"the checkpoint at {self._storage.location!r} has no {what} {name!r}{hint}"

    def _read_boxes(
        self, boxes: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]
    ) -> list[npt.NDArray[Any]]:
        """Read boxes of tensors; each is a row, its offsets and its sizes."""
        self._check_open()
        tensors = self._index.tensors
        sinks = [
            NewArraySink(tensors.dtype_of(row), sizes, key=tensors.keys[row])
            for row, _, sizes in boxes
        ]
        with noticing_replacement(self._index, self._storage):
            read_tensors(
                self._index,
                self._storage,
                [
                    ReadRequest(tensor=row, offsets=offsets, sizes=sizes, sink=sink)
                    for (row, offsets, sizes), sink in zip(boxes, sinks, strict=True)
                ],
                threads=self._threads,
                verify=self._verify,
                finder=self._finder,
            )
        return [sink.array() for sink in sinks]

    def _read_objects(self, rows: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Yield rows of objects with their values, neighbours read together."""
        self._check_open()
        objects = self._index.objects
        values = read_objects(
            self._index,
            self._storage,
            rows,
            factory=NumpyFactory(),
            allowed=self._allowed,
            verify=self._verify,
            finder=self._finder,
        )
        with noticing_replacement(self._index, self._storage):
            for row, value in values:
                # What came with the index is the index's own: nobody may change it there.
                yield row, copy.deepcopy(value) if objects.keys[row] in objects.values else value

    def _paths_under(self, prefix: str) -> dict[str, Path]:
        """Return keys with that prefix and their paths below it."""
        paths: dict[str, Path] = {}
        for key in self._rows:
            below = path_below(key, self._path(key), prefix)
            if below is not None:
                paths[key] = below
        if prefix and not paths:
            raise CheckpointKeyError(self._no_such("key with the prefix", prefix))
        return paths

    def _path(self, key: str) -> Path:
        if self._index.paths is None:
            return (key,)
        path = self._index.paths.get(key)
        if path is None:
            raise FormatError(f"key {key!r}: the metadata gives no path for it")
        return path
