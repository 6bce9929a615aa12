"""What the engine asks of a place where checkpoints lie.

Names are relative to the checkpoint, with ``/`` between parts. Every implementation
confines them: absolute names, ``..``, empty names and symbolic links that resolve outside
raise `UnsafePathError` before anything is opened.
"""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from shardpoint.errors import NotSupportedError

__all__ = [
    "Buffer",
    "Claim",
    "Closing",
    "MappableFile",
    "NoClaim",
    "ReadableFile",
    "SharedStorage",
    "Storage",
    "WritableFile",
]

Buffer: TypeAlias = memoryview
"""A C-contiguous view of bytes (format ``B``, one axis)."""


class ReadableFile(Protocol):
    """An open file to read from. Calls may run side by side in several threads."""

    @property
    def size(self) -> int:
        """Size in bytes when the file was opened."""
        ...

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill all buffers, one after the other, with the bytes from `offset` on.

        The caller owns the buffers; nothing is kept. On return all of them are full.

        Raises
        ------
        CorruptionError
            If the file ends before the buffers are full.
        StorageError
            If the store fails; names the file, the offset and the cause.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@runtime_checkable
class MappableFile(Protocol):
    """What some open files can do besides."""

    def map(self) -> Buffer:
        """Return all bytes of the file as memory that is read when it is looked at.

        It stays valid after the file is closed, removed or replaced, and cannot be written
        to. A file that is made shorter meanwhile ends the process when the bytes that are gone
        are looked at: map only what nobody changes in place.

        Raises
        ------
        StorageError
            If the store cannot do that for this file.
        """
        ...


@runtime_checkable
class SpanReadable(Protocol):
    """The ability of a file to read many short spans at less cost than a call for each."""

    def read_spans(self, starts: npt.NDArray[np.int64], length: int, into: Buffer) -> None:
        """Fill a buffer with spans of the file, one after the other.

        Parameters
        ----------
        starts
            ``int64[n]``, ascending: where each span begins.
        length
            Bytes of each, more than 0.
        into
            ``n * length`` bytes, the caller's; all are filled on return.

        Raises
        ------
        CorruptionError, StorageError
            As `ReadableFile.read_into` does.
        """
        ...


class WritableFile(Protocol):
    """A new file to write to. Calls may run side by side in several threads."""

    def write_from(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, one after the other, from `offset` on.

        The caller owns the buffers and may change them on return. Short writes are
        continued until all is written.

        Raises
        ------
        StorageError
            If the store fails (no space, input/output error, ...).
        """
        ...

    def sync(self) -> None:
        """Return only when everything written is durable."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Closing(ABC):
    """What is closed at the end of a ``with`` block."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held; more calls do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Claim(Protocol):
    """Keeps others from writing to a place; see `Storage.claim`."""

    def release(self) -> None:
        """Let others write again; more calls do nothing."""
        ...


class NoClaim:
    """What a store gives that cannot keep others out."""

    def release(self) -> None:
        """Do nothing."""


class Storage(ABC):
    """One checkpoint's place. May be used by several threads at once."""

    @property
    @abstractmethod
    def location(self) -> str:
        """The path or URL, for messages."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether the place itself exists."""

    @abstractmethod
    def prepare(self) -> None:
        """Create the place (with its parents) if it does not exist."""

    @abstractmethod
    def list(self) -> list[str]:
        """Return the names of all files, at any depth, sorted; empty if there is no place."""

    def list_folder(self, folder: str = "") -> builtins.list[str]:
        """Return what is directly in one folder (``""``: the place itself), sorted.

        Names are relative to the checkpoint; those of folders end with ``/``. Empty if there
        is no such folder.

        Raises
        ------
        UnsafePathError, StorageError
        """
        prefix = folder + "/" if folder else ""
        found = set()
        for name in self.list():
            if name.startswith(prefix):
                first, slash, _ = name[len(prefix) :].partition("/")
                found.add(prefix + first + slash)
        return sorted(found)

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a file of that name exists."""

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, None if there is no such file.

        Raises
        ------
        UnsafePathError, StorageError
        """
        if not self.has(name):
            return None
        with self.open(name) as file:
            return file.size

    def version(self, name: str) -> Hashable:
        """Return what changes when a file is replaced; None if there is no such file.

        Equal values do not prove that a file is the same one.

        Raises
        ------
        UnsafePathError, StorageError
        """
        return self.size(name)

    def written(self, name: str) -> Hashable:
        """Return what changes when a file gets other content; None if there is no such file.

        Like `version`, without what a store may change by itself, such as the number that a
        mounted object store makes up for a file each time. A rename does not change it, where
        that does not copy.

        Raises
        ------
        UnsafePathError, StorageError
        """
        return self.version(name)

    def claim(self, *, shared: bool) -> Claim:
        """Keep others from writing to the place until the claim is released.

        A claim ends with its process, however that ends. Stores that cannot do this give a
        claim that keeps nobody out.

        Parameters
        ----------
        shared
            Keep out only those who want the place for themselves.

        Raises
        ------
        ConcurrentSaveError
            If another has claimed the place.
        StorageError
            If the store fails.
        """
        return NoClaim()

    @abstractmethod
    def open(self, name: str) -> ReadableFile:
        """Open a file for reading.

        Raises
        ------
        CorruptionError
            If there is no such file (a checkpoint names only files it has).
        UnsafePathError, StorageError
        """

    @abstractmethod
    def create(self, name: str, *, size: int | None) -> WritableFile:
        """Create a new file; `size` in bytes where it is known, for preallocation.

        Raises
        ------
        StorageError
            Also if a file of that name exists: nothing is ever overwritten.
        """

    @abstractmethod
    def replace(self, name: str, data: bytes, *, sync: bool) -> None:
        """Put a whole small file in place atomically: readers see the old one or the new one.

        With `sync`, the file and then its directory are durable on return.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; no error if it is gone already."""

    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name, over a file that has it already.

        Raises
        ------
        NotSupportedError
            If the store cannot.
        UnsafePathError, StorageError
        """
        raise NotSupportedError(f"{self.location!r} is in a store that cannot rename files")

    @property
    def rename_copies(self) -> bool:
        """Whether a rename is not atomic, and takes as long as writing the file does."""
        return True

    @abstractmethod
    def sync(self) -> None:
        """Make created and removed names durable (fsync of the directory); no-op where moot."""

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        with self.open(name) as file:
            data = bytearray(file.size)
            file.read_into(0, [memoryview(data)])
            return bytes(data)


@runtime_checkable
class SharedStorage(Protocol):
    """The ability of a storage whose files several processes can write at once."""

    def reopen(self, name: str) -> WritableFile:
        """Open a file that `Storage.create` made, here or in another process, to write to it.

        Writes of several processes to bytes that do not overlap are all kept.

        Raises
        ------
        UnsafePathError, StorageError
        """
        ...
