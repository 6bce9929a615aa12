"""A storage that counts, and fails where it is told to: for tests of what lies above."""

from __future__ import annotations

import builtins
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from shardpoint.errors import StorageError
from shardpoint.storage.base import Buffer, Claim, Closing, ReadableFile, Storage, WritableFile

__all__ = ["CountingStorage", "Operation"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One call: ``"open"``, ``"read"``, ``"create"``, ``"write"``, ``"sync"``, ...

    `name` is the file's, ``""`` for the place itself; `nbytes` what a read or write moved.
    """

    kind: str
    name: str
    offset: int
    nbytes: int


class CountingStorage(Storage):
    """Passes every call on, counts it, and can fail at one of them.

    Parameters
    ----------
    storage
        The storage that does the work.
    fail_at
        The number (from 0) of the counted operation that fails before it is done.
    fail_kinds
        The kinds of operation that are counted for `fail_at`; None is all of them.
    make_error
        Makes the error to raise; the default is a `StorageError`.

    Attributes
    ----------
    operations
        All calls, in the order in which they began.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        fail_at: int | None = None,
        fail_kinds: frozenset[str] | None = None,
        make_error: Callable[[Operation], Exception] | None = None,
    ) -> None:
        self._storage = storage
        self._fail_at = fail_at
        self._fail_kinds = fail_kinds
        self._make_error = make_error or _injected_error
        self._lock = threading.Lock()
        self._counted = 0
        self._open_files = 0
        self.operations: builtins.list[Operation] = []

    @property
    def location(self) -> str:
        """The wrapped storage's location."""
        return self._storage.location

    @property
    def calls(self) -> Counter[str]:
        """Number of calls of each kind."""
        with self._lock:
            return Counter(operation.kind for operation in self.operations)

    @property
    def bytes_read(self) -> int:
        """Bytes asked for by reads."""
        return self._total("read")

    @property
    def bytes_written(self) -> int:
        """Bytes given to writes and replacements."""
        return self._total("write") + self._total("replace")

    @property
    def open_files(self) -> int:
        """Files opened or created and not closed yet."""
        with self._lock:
            return self._open_files

    def reset(self) -> None:
        """Forget what was counted."""
        with self._lock:
            self._counted = 0
            self.operations.clear()

    def exists(self) -> bool:
        """Pass on; not counted."""
        return self._storage.exists()

    def version(self, name: str) -> Hashable:
        """Pass on; not counted."""
        return self._storage.version(name)

    def written(self, name: str) -> Hashable:
        """Pass on; not counted."""
        return self._storage.written(name)

    def claim(self, *, shared: bool) -> Claim:
        """Pass on."""
        self.note("claim", "", 0, 0)
        return self._storage.claim(shared=shared)

    def prepare(self) -> None:
        """Pass on."""
        self.note("prepare", "", 0, 0)
        self._storage.prepare()

    def list(self) -> builtins.list[str]:
        """Pass on."""
        self.note("list", "", 0, 0)
        return self._storage.list()

    def list_folder(self, folder: str = "") -> builtins.list[str]:
        """Pass on."""
        self.note("list_folder", folder, 0, 0)
        return self._storage.list_folder(folder)

    def has(self, name: str) -> bool:
        """Pass on; not counted."""
        return self._storage.has(name)

    def size(self, name: str) -> int | None:
        """Pass on; not counted."""
        return self._storage.size(name)

    def open(self, name: str) -> ReadableFile:
        """Pass on; reads of the file are counted too."""
        self.note("open", name, 0, 0)
        file = self._storage.open(name)
        self._change_open(1)
        return _CountedReadableFile(self, name, file)

    def create(self, name: str, *, size: int | None) -> WritableFile:
        """Pass on; writes to the file are counted too."""
        self.note("create", name, 0, size or 0)
        file = self._storage.create(name, size=size)
        self._change_open(1)
        return _CountedWritableFile(self, name, file)

    def replace(self, name: str, data: bytes, *, sync: bool) -> None:
        """Pass on."""
        self.note("replace", name, 0, len(data))
        self._storage.replace(name, data, sync=sync)

    def rename(self, name: str, new_name: str) -> None:
        """Pass on."""
        self.note("rename", name, 0, 0)
        self._storage.rename(name, new_name)

    @property
    def rename_copies(self) -> bool:
        """Pass on."""
        return self._storage.rename_copies

    def remove(self, name: str) -> None:
        """Pass on."""
        self.note("remove", name, 0, 0)
        self._storage.remove(name)

    def sync(self) -> None:
        """Pass on."""
        self.note("sync", "", 0, 0)
        self._storage.sync()

    def note(self, kind: str, name: str, offset: int, nbytes: int) -> None:
        """Count one operation, and raise if it is the one that is to fail."""
        operation = Operation(kind, name, offset, nbytes)
        with self._lock:
            self.operations.append(operation)
            if self._fail_kinds is not None and kind not in self._fail_kinds:
                return
            number = self._counted
            self._counted += 1
        if number == self._fail_at:
            raise self._make_error(operation)

    def _change_open(self, by: int) -> None:
        with self._lock:
            self._open_files += by

    def _total(self, kind: str) -> int:
        with self._lock:
            return sum(o.nbytes for o in self.operations if o.kind == kind)


class _CountedFile(Closing):
    """What both kinds of file have in common: closing, counted once."""

    def __init__(
        self, storage: CountingStorage, name: str, file: ReadableFile | WritableFile
    ) -> None:
        self._storage = storage
        self._name = name
        self._closing = file
        self._closed = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._storage._change_open(-1)
        self._closing.close()


class _CountedReadableFile(_CountedFile):
    def __init__(self, storage: CountingStorage, name: str, file: ReadableFile) -> None:
        super().__init__(storage, name, file)
        self._file = file

    @property
    def size(self) -> int:
        return self._file.size

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._storage.note("read", self._name, offset, sum(map(len, buffers)))
        self._file.read_into(offset, buffers)


class _CountedWritableFile(_CountedFile):
    def __init__(self, storage: CountingStorage, name: str, file: WritableFile) -> None:
        super().__init__(storage, name, file)
        self._file = file

    def write_from(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._storage.note("write", self._name, offset, sum(map(len, buffers)))
        self._file.write_from(offset, buffers)

    def sync(self) -> None:
        self._storage.note("sync", self._name, 0, 0)
        self._file.sync()


def _injected_error(operation: Operation) -> Exception:
    return StorageError(f"injected failure of {operation.kind!r} of {operation.name!r}")
