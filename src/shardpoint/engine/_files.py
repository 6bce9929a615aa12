"""Files open for one reading operation: few at a time, and every read counted."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from shardpoint.storage import Buffer, Closing, ReadableFile, SpanReadable, Storage

__all__ = ["BufferPool", "CountedFile", "OpenFiles"]

_MOST_IDLE = 64


class _Entry:
    __slots__ = ("file", "users")

    def __init__(self, file: ReadableFile) -> None:
        self.file = file
        self.users = 0


class OpenFiles(Closing):
    """Opens files of a storage when they are used, and keeps the last ones open.

    Attributes
    ----------
    bytes_read, reads
        What all reads so far asked for, and how many there were.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self.bytes_read = 0
        self.reads = 0

    @contextmanager
    def use(self, name: str) -> Iterator[CountedFile]:
        """Give an open file, which stays open at least until the block is left."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                entry = self._entries[name] = _Entry(self._storage.open(name))
            entry.users += 1
            self._entries.move_to_end(name)
            surplus = self._take_surplus()
        for file in surplus:
            file.close()
        try:
            yield CountedFile(self, entry.file)
        finally:
            with self._lock:
                entry.users -= 1

    def count(self, nbytes: int) -> None:
        """Add one read."""
        with self._lock:
            self.bytes_read += nbytes
            self.reads += 1

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            entry.file.close()

    def _take_surplus(self) -> list[ReadableFile]:
        count = len(self._entries) - _MOST_IDLE
        if count <= 0:
            return []
        idle = [name for name, entry in self._entries.items() if not entry.users]
        return [self._entries.pop(name).file for name in idle[:count]]


class CountedFile:
    """One open file; reads of it are counted."""

    __slots__ = ("_counter", "_file")

    def __init__(self, counter: OpenFiles, file: ReadableFile) -> None:
        self._counter = counter
        self._file = file

    @property
    def size(self) -> int:
        """Size in bytes when the file was opened."""
        return self._file.size

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `shardpoint.storage.ReadableFile`."""
        self._counter.count(sum(map(len, buffers)))
        self._file.read_into(offset, buffers)

    def read_spans(self, starts: npt.NDArray[np.int64], length: int, into: Buffer) -> None:
        """See `shardpoint.storage.SpanReadable`; other files are read span by span."""
        if isinstance(self._file, SpanReadable):
            self._counter.count(len(into))
            self._file.read_spans(starts, length, into)
            return
        for number, start in enumerate(starts.tolist()):
            self.read_into(start, [into[number * length : (number + 1) * length]])

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes; those must lie inside the file."""
        data = bytearray(length)
        self.read_into(offset, [memoryview(data)])
        return bytes(data)


class BufferPool:
    """Buffers of one size that are used again and again; as many as are in use at once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[bytearray] = []

    @contextmanager
    def take(self) -> Iterator[memoryview]:
        """Lend a buffer for the length of a block; its content is arbitrary."""
        try:
            buffer = self._free.pop()  # atomic
        except IndexError:
            buffer = bytearray(self._size)
        try:
            yield memoryview(buffer)
        finally:
            self._free.append(buffer)
