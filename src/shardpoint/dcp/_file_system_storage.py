"""A storage on a program's own file system, with the few calls that such a one has."""

from __future__ import annotations

import builtins
import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from shardpoint.errors import CorruptionError, ShardpointError, StorageError
from shardpoint.formats.dcp_metadata import read_metadata
from shardpoint.storage.base import Buffer, Closing, ReadableFile, Storage, WritableFile
from shardpoint.storage.names import check_name
from shardpoint.storage.spooling import SpooledFile

__all__ = ["FileSystemStorage"]

_METADATA = ".metadata"
_COPY = 16 << 20


class FileSystemStorage(Storage):
    """One folder of a file system that follows `FileSystemBase`, torch's own included.

    Such a file system writes streams from start to end, so files are collected before (see
    `shardpoint.storage.spooling.SpooledFile`). Where it cannot list a folder, the files are
    those that the metadata names.

    Parameters
    ----------
    file_system
        Whose methods are called, from several threads.
    path
        What its ``init_path`` gave for the folder.
    """

    def __init__(self, file_system: Any, path: Any) -> None:
        self._files = file_system
        self._path = path
        self._made: set[str] = set()

    @property
    def location(self) -> str:
        """The path, as the file system has it."""
        return str(self._path)

    def exists(self) -> bool:
        """Whether the folder exists."""
        return bool(self._call("look at", "", lambda: self._files.exists(self._path)))

    def prepare(self) -> None:
        """Make the folder."""
        self._call("make folder", "", lambda: self._files.mkdir(self._path))

    def list(self) -> builtins.list[str]:
        """Return the names of the files in the folder itself, sorted."""
        if hasattr(self._files, "ls"):
            return self.list_folder()
        if not self.has(_METADATA):
            return []
        named = read_metadata(self.read(_METADATA), file=_METADATA).files
        return sorted([_METADATA, *filter(self.has, named)])

    def list_folder(self, folder: str = "") -> builtins.list[str]:
        """Return what is in one folder; folders are not told apart from files."""
        path = self._at(folder) if folder else self._path
        if not hasattr(self._files, "ls"):
            return [] if folder else self.list()
        if not self._call("look at", folder, lambda: self._files.exists(path)):
            return []
        found = self._call("list", folder, lambda: self._files.ls(path))
        prefix = folder + "/" if folder else ""
        return sorted(prefix + os.fspath(entry).rstrip("/").rpartition("/")[2] for entry in found)

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        path = self._at(name)
        return bool(self._call("look at", name, lambda: self._files.exists(path)))

    def open(self, name: str) -> ReadableFile:
        """Open a file for reading; see `Storage.open`."""
        path = self._at(name)
        if not self.has(name):
            raise CorruptionError(f"file {name!r} is missing from {self.location!r}")
        return _StreamFile(name, lambda: self._files.create_stream(path, "rb"), self._call)

    def create(self, name: str, *, size: int | None) -> WritableFile:
        """Begin a new file, which is there when it has been closed; see `Storage.create`."""
        path = self._at(name)
        if self.has(name):
            raise StorageError(f"file {name!r} of {self.location!r} exists already")
        return SpooledFile(
            f"{self.location}/{name}",
            size,
            put_bytes=lambda data: self._write(name, path, data),
            put_file=lambda local: self._copy(name, path, local),
        )

    def replace(self, name: str, data: bytes, *, sync: bool) -> None:
        """Put a file in place with a rename, as torch does; see `Storage.replace`.

        Where the file system does not rename over a file, that one is removed first.
        """
        check_name(name)
        temporary = _beside(name, f".{secrets.token_hex(8)}.tmp")
        self._write(name, self._at(temporary), data)
        try:
            self.rename(temporary, name)
        except ShardpointError:
            self.remove(temporary)
            raise

    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name; see `Storage.rename`."""
        old, new = self._at(name), self._at(new_name)
        self._make_folder_of(new_name)
        try:
            self._files.rename(old, new)
        except Exception as error:
            if not self.has(new_name) or not self.has(name):
                raise _refused("rename", f"{self.location}/{name}", error) from error
            self.remove(new_name)
            self._call("rename", name, lambda: self._files.rename(old, new))

    @property
    def rename_copies(self) -> bool:
        """False: that is what file systems have the call for."""
        return False

    def remove(self, name: str) -> None:
        """Remove a file; see `Storage.remove`."""
        path = self._at(name)
        if self.has(name):
            with contextlib.suppress(FileNotFoundError):
                self._call("remove", name, lambda: self._files.rm_file(path))

    def sync(self) -> None:
        """Do nothing: file systems have no call for it."""

    def _at(self, name: str) -> Any:
        path = self._path
        for part in check_name(name):
            path = self._files.concat_path(path, part)
        return path

    def _make_folder_of(self, name: str) -> None:
        folder = name.rpartition("/")[0]
        if folder and folder not in self._made:
            self._call("make folder", folder, lambda: self._files.mkdir(self._at(folder)))
            self._made.add(folder)

    def _write(self, name: str, path: Any, data: bytes) -> None:
        def write() -> None:
            with self._files.create_stream(path, "wb") as stream:
                stream.write(data)

        self._make_folder_of(name)
        self._call("write", name, write)

    def _copy(self, name: str, path: Any, local: str) -> None:
        def copy() -> None:
            with builtins.open(local, "rb") as source, self._files.create_stream(path, "wb") as out:
                shutil.copyfileobj(source, out, _COPY)

        self._make_folder_of(name)
        self._call("write", name, copy)

    def _call(self, action: str, name: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except ShardpointError:
            raise
        except Exception as error:
            shown = f"{self.location}/{name}" if name else self.location
            raise _refused(action, shown, error) from error


def _beside(name: str, suffix: str) -> str:
    """Return the name of a temporary file in the same folder."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}.{base}{suffix}"


def _refused(action: str, path: str, cause: Exception) -> StorageError:
    message = f"cannot {action} {path!r}: {type(cause).__name__}: {cause}"
    number = getattr(cause, "errno", None)
    return StorageError(number, message) if isinstance(number, int) else StorageError(message)


class _StreamFile(Closing):
    """A stream to read from; implements `shardpoint.storage.base.ReadableFile`."""

    def __init__(
        self,
        name: str,
        open_stream: Callable[[], Any],
        call: Callable[[str, str, Callable[[], Any]], Any],
    ) -> None:
        self._name = name
        self._call = call
        self._lock = threading.Lock()  # a stream has one position
        self._open = ExitStack()
        self._stream = call("open", name, lambda: self._open.enter_context(open_stream()))
        self._size = int(call("look at", name, lambda: self._stream.seek(0, os.SEEK_END)))

    @property
    def size(self) -> int:
        """Size in bytes when the file was opened."""
        return self._size

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill all buffers with the bytes from `offset` on; see the protocol."""
        with self._lock:
            self._call(f"read at byte {offset} of", self._name, lambda: self._stream.seek(offset))
            for buffer in filter(len, buffers):
                self._fill(buffer)

    def _fill(self, buffer: Buffer) -> None:
        while len(buffer):
            data = self._call("read", self._name, partial(self._stream.read, len(buffer)))
            if not data:
                raise CorruptionError(
                    f"file {self._name!r} ends early: {len(buffer)} bytes are missing"
                )
            buffer[: len(data)] = data
            buffer = buffer[len(data) :]

    def close(self) -> None:
        """Close the stream; closing again does nothing."""
        with self._lock:
            self._call("close", self._name, self._open.close)
