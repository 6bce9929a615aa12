"""What conversions read: objects as they are to be written again, tensors a few at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint._sinks import NewArraySink
from shardpoint.engine.executor import default_threads
from shardpoint.engine.objects import read_objects
from shardpoint.engine.opening import open_index
from shardpoint.engine.reading import ReadRequest, read_tensors
from shardpoint.engine.unfinished import wait_until_written
from shardpoint.formats.value_pickling import TensorKeepingFactory
from shardpoint.index import CheckpointIndex
from shardpoint.storage import Storage
from shardpoint.transforms import Transform, Transforms

__all__ = ["Allowed", "InOrder", "Source", "flat_bytes"]

Allowed: TypeAlias = Mapping[str, Callable[..., Any]]
AnyArray: TypeAlias = npt.NDArray[Any]

_TOGETHER = 4 << 20
"""Small tensors are read together up to this size: a read has costs of its own."""


class Source:
    """The checkpoint that is converted.

    Parameters
    ----------
    place
        What `shardpoint.open` takes, or a storage.
    threads
        How many pieces are read at once.
    allowed
        Classes beyond the closed list.
    transforms
        What undoes compression or encryption beyond what is known anyway.
    """

    def __init__(
        self,
        place: str | os.PathLike[str] | Storage,
        *,
        threads: int | None,
        allowed: Allowed | None = None,
        transforms: Iterable[Transform] = (),
    ) -> None:
        self._threads = default_threads() if threads is None else threads
        self._allowed = allowed or {}
        self._finder = Transforms(tuple(transforms))
        self._factory = TensorKeepingFactory()
        wait_until_written(place)
        self.index, self.storage = open_index(place, allowed=self._allowed, factory=self._factory)

    @property
    def paths(self) -> dict[str, tuple[str | int, ...]]:
        """Each key's path; where it was saved flat, the key itself."""
        known = self.index.paths or {}
        return {key: known.get(key, (key,)) for key in self.index.key_order}

    def objects(self) -> dict[str, Any]:
        """Return all objects, with `StoredTensor` for the tensors inside them."""
        keys = self.index.objects.keys
        values = read_objects(
            self.index,
            self.storage,
            range(len(keys)),
            factory=self._factory,
            allowed=self._allowed,
            verify=True,
            finder=self._finder,
        )
        return {keys[row]: value for row, value in values}

    def nbytes(self, row: int) -> int:
        """Return the bytes of a tensor's elements."""
        tensors = self.index.tensors
        return prod(tensors.shape_of(row)) * tensors.dtype_of(row).itemsize

    def in_order(self, rows: Sequence[int]) -> InOrder:
        """Return what gives these tensors, to be taken in this order, as raw elements."""
        return InOrder(
            [self.nbytes(row) for row in rows],
            lambda group: self.read(self.index, [rows[position] for position in group]),
        )

    def read(self, index: CheckpointIndex, rows: Sequence[int]) -> list[AnyArray]:
        """Read whole tensors of an index of the same files."""
        tensors = index.tensors
        sinks = [
            NewArraySink(tensors.dtype_of(row), tensors.shape_of(row), key=tensors.keys[row])
            for row in rows
        ]
        requests = [
            ReadRequest(
                tensor=row, offsets=(0,) * len(tensors.shape_of(row)), sizes=shape, sink=sink
            )
            for row, sink in zip(rows, sinks, strict=True)
            for shape in (tensors.shape_of(row),)
        ]
        read_tensors(
            index,
            self.storage,
            requests,
            threads=self._threads,
            verify=True,
            finder=self._finder,
        )
        return [sink.memory() for sink in sinks]


class InOrder:
    """Arrays that are taken one after the other: small neighbours are read together.

    Parameters
    ----------
    sizes
        Bytes of each.
    read
        Gives those at some neighbouring positions.
    """

    def __init__(self, sizes: npt.ArrayLike, read: Callable[[range], Sequence[AnyArray]]) -> None:
        self._ends = np.cumsum(np.asarray(sizes, np.int64))
        self._read = read
        self._ready: dict[int, AnyArray] = {}

    def take(self, position: int) -> AnyArray:
        """Return one; each is taken once, from one thread at a time."""
        if position not in self._ready:
            before = int(self._ends[position - 1]) if position else 0
            end = int(np.searchsorted(self._ends, before + _TOGETHER, side="right"))
            group = range(position, max(end, position + 1))
            self._ready = {}  # before others are read
            self._ready = dict(zip(group, self._read(group), strict=True))
        return self._ready.pop(position)


def flat_bytes(array: AnyArray) -> memoryview:
    """Return a row-major array's bytes."""
    return array.reshape(-1).view(np.uint8).data
