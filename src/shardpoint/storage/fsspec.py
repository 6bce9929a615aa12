"""Checkpoints in any file system that fsspec knows: object stores, memory, remote machines.

Nothing is assumed that an object store does not have: no rename, no fsync, no writing at
offsets. A file is there when its upload is complete, and a single put of the metadata commits.
Reads are ranged requests, one for each range that the engine wants.
"""

from __future__ import annotations

import builtins
import errno
import secrets
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from shardpoint.errors import CorruptionError, NotSupportedError, ShardpointError, StorageError
from shardpoint.storage.base import Buffer, Closing, ReadableFile, Storage, WritableFile
from shardpoint.storage.names import check_name
from shardpoint.storage.spooling import SpooledFile

__all__ = ["FsspecStorage"]

_RENAMING = frozenset({"file", "local", "sftp", "ssh"})
"""Protocols of file systems in which a put is not atomic, and a rename is."""

_SMALL = 64 << 10
"""Files up to this size are fetched whole when they are opened: most reads of a small file
want its head and its tail, and a round trip takes longer than the bytes."""


_VERSION_FIELDS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "LastModified",
    "created",
    "ino",
    "mtime",
)
"""What file systems call the things that change when a file is put anew."""


class FsspecStorage(Storage):
    """One folder (or prefix) of an fsspec file system.

    Parameters
    ----------
    file_system
        Any fsspec file system. It is called from several threads.
    path
        The folder in it, without a protocol.
    location
        What messages call it; by default the protocol and the path.
    """

    def __init__(
        self, file_system: AbstractFileSystem, path: str, *, location: str | None = None
    ) -> None:
        self._files = file_system
        self._path = path.rstrip("/")
        self._prefix = self._path + "/" if self._path else file_system.root_marker
        protocol = file_system.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._location = location or file_system.unstrip_protocol(path)
        self._known_folders: set[str] = set()

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, Any] | None = None) -> FsspecStorage:
        """Return the storage of a URL such as ``"s3://bucket/run/step-100"``.

        Parameters
        ----------
        options
            For the file system: credentials, endpoints, ...

        Raises
        ------
        NotSupportedError
            If fsspec does not know the protocol, or the package for it is not installed; says
            which one is.
        StorageError
            If the file system cannot be set up with these options.
        """
        try:
            file_system, path = url_to_fs(url, **(options or {}))
        except (ImportError, ValueError) as error:
            raise NotSupportedError(f"cannot open {url!r}: {error}") from error
        except Exception as error:
            raise _refused("set up the file system of", url, error) from error
        return cls(file_system, path, location=url.rstrip("/"))

    @property
    def location(self) -> str:
        """The URL."""
        return self._location

    def is_file(self) -> bool:
        """Whether the place itself is a file, and no folder."""
        return bool(self._call("look at", "", lambda: self._files.isfile(self._path)))

    def split(self) -> tuple[FsspecStorage, str]:
        """Return the folder around this place, and this place's name in it."""
        folder, _, name = self._path.rpartition("/")
        location = self._location.rpartition("/")[0]
        return FsspecStorage(self._files, folder, location=location), name

    def exists(self) -> bool:
        """Whether there is a folder, or anything with this prefix."""
        self._forget()
        return bool(self._call("look at", "", lambda: self._files.isdir(self._path)))

    def prepare(self) -> None:
        """Make the folder where the store has such a thing; see `Storage.prepare`."""
        if self._path or not self.exists():
            self._make_folder(self._path)

    def list(self) -> builtins.list[str]:
        """Return the names of all files; see `Storage.list`."""
        self._forget()
        found = self._call("list", "", lambda: self._files.find(self._path), missing=[])
        start = len(self._prefix)
        return sorted(
            name[start:]
            for name in found
            if name.startswith(self._prefix) and not name.endswith("/")
        )

    def list_folder(self, folder: str = "") -> builtins.list[str]:
        """Return what is directly in one folder; see `Storage.list_folder`."""
        path = self._at(folder) if folder else self._path
        self._forget()
        found = self._call("list", folder, lambda: self._files.ls(path, detail=True), missing=[])
        start = len(self._prefix)
        return sorted(
            entry["name"].rstrip("/")[start:] + ("/" if entry["type"] == "directory" else "")
            for entry in found
            if entry["name"].rstrip("/") != path
        )

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Return a file's size, None if there is no file of that name."""
        found = self._info(name)
        return None if found is None else int(found["size"])

    def version(self, name: str) -> Hashable:
        """Return what the store says of a file that changes with it; see `Storage.version`."""
        found = self._info(name)
        if found is None:
            return None
        return (int(found["size"]), *(str(found.get(field)) for field in _VERSION_FIELDS))

    def _info(self, name: str) -> dict[str, Any] | None:
        path = self._at(name)
        self._forget()
        found = self._call("look at", name, lambda: self._files.info(path), missing=None)
        return None if found is None or found["type"] != "file" else dict(found)

    def open(self, name: str) -> ReadableFile:
        """Open a file for ranged reads; see `Storage.open`."""
        size = self.size(name)
        if size is None:
            raise CorruptionError(f"file {name!r} is missing from {self._location!r}")
        if size <= _SMALL:
            return _RangedFile(self, name, None, self.read(name))
        return _RangedFile(self, name, size, None)

    def read(self, name: str) -> bytes:
        """Return a whole file, in one request."""
        return self.fetch(name, None, None)

    def fetch(self, name: str, start: int | None, end: int | None) -> bytes:
        """Return a range of a file's bytes (fewer where the file ends before)."""
        path = self._at(name)
        data = self._call(
            "read", name, lambda: self._files.cat_file(path, start=start, end=end), missing=None
        )
        if data is None:
            raise CorruptionError(f"file {name!r} is missing from {self._location!r}")
        return bytes(data)

    def create(self, name: str, *, size: int | None) -> WritableFile:
        """Begin a new file, which is there when it has been closed; see `Storage.create`."""
        path = self._at(name)
        if self.has(name):
            raise StorageError(errno.EEXIST, f"file {name!r} of {self._location!r} exists already")
        return SpooledFile(
            f"{self._location}/{name}",
            size,
            put_bytes=lambda data: self._put(path, name, data),
            put_file=lambda local: self._upload(path, name, local),
        )

    def replace(self, name: str, data: bytes, *, sync: bool) -> None:
        """Put a whole file in place; see `Storage.replace`.

        An object store's put is atomic. File systems of which a rename is known to be atomic
        get a temporary file and a rename.
        """
        path = self._at(name)
        if not self._renames():
            self._put(path, name, data)
            return
        folder, _, base = path.rpartition("/")
        temporary = f"{folder}/.{base}.{secrets.token_hex(8)}.tmp"
        self._put(temporary, name, data)
        try:
            self._call("replace", name, lambda: self._files.mv(temporary, path))
        except BaseException:
            self._call("remove", name, lambda: self._files.rm_file(temporary), missing=None)
            raise

    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name; see `Storage.rename`. Object stores copy it."""
        old, new = self._at(name), self._at(new_name)
        self._make_folder_of(new)
        if self._renames():
            self._call("rename", name, lambda: self._files.mv(old, new))
            return
        self._call("copy", name, lambda: self._files.cp_file(old, new))
        self.remove(name)

    @property
    def rename_copies(self) -> bool:
        """Whether a rename moves the bytes."""
        return not self._renames()

    def remove(self, name: str) -> None:
        """Remove a file; see `Storage.remove`."""
        path = self._at(name)
        self._call("remove", name, lambda: self._remove(path), missing=None)

    def sync(self) -> None:
        """Do nothing: what a store has taken, it has."""

    def _remove(self, path: str) -> None:
        try:
            self._files.rm_file(path)
        except KeyError:  # what some stores say of a file that is not there
            if self._files.exists(path):
                raise

    def _at(self, name: str) -> str:
        check_name(name)
        return f"{self._prefix}{name}"

    def _renames(self) -> bool:
        return bool(self._protocols & _RENAMING)

    def _put(self, path: str, name: str, data: bytes) -> None:
        self._make_folder_of(path)
        self._call("write", name, lambda: self._files.pipe_file(path, data))

    def _upload(self, path: str, name: str, local: str) -> None:
        self._make_folder_of(path)
        self._call("write", name, lambda: self._files.put_file(local, path))

    def _make_folder_of(self, path: str) -> None:
        folder = path.rpartition("/")[0]
        if folder != self._path:
            self._make_folder(folder)

    def _make_folder(self, folder: str) -> None:
        if folder not in self._known_folders:
            self._call(
                "make the folder of",
                folder,
                lambda: self._files.makedirs(folder, exist_ok=True),
            )
            self._known_folders.add(folder)

    def _forget(self) -> None:
        """Drop cached listings: other processes write into this place too."""
        self._files.invalidate_cache(self._path)

    def _call(self, action: str, name: str, function: Callable[[], Any], **missing: Any) -> Any:
        """Call the file system; with ``missing=value``, return that where there is no file."""
        try:
            return function()
        except ShardpointError:
            raise
        except FileNotFoundError as error:
            if "missing" in missing:
                return missing["missing"]
            raise _refused(action, self._shown(name), error) from error
        except Exception as error:
            raise _refused(action, self._shown(name), error) from error

    def _shown(self, name: str) -> str:
        return f"{self._location}/{name}" if name else self._location


def _refused(action: str, path: str, cause: Exception) -> StorageError:
    """Return an error that names the file; libraries of stores have exceptions of all kinds."""
    reason = f"{type(cause).__name__}: {cause}"
    number = getattr(cause, "errno", None)
    message = f"cannot {action} {path!r}: {reason}"
    return StorageError(number, message) if isinstance(number, int) else StorageError(message)


class _RangedFile(Closing):
    """A file of a store; implements `shardpoint.storage.base.ReadableFile`.

    Nothing is open between the calls. A small file's content is at hand as it was when the
    file was opened.
    """

    def __init__(
        self, storage: FsspecStorage, name: str, size: int | None, content: bytes | None
    ) -> None:
        self._storage = storage
        self._name = name
        self._content = content
        self._size = len(content) if content is not None else size or 0

    @property
    def size(self) -> int:
        """Size in bytes when the file was opened."""
        return self._size

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill all buffers with the bytes from `offset` on, in one request; see the protocol."""
        wanted = sum(map(len, buffers))
        if not wanted:
            return
        end = offset + wanted
        if self._content is not None:
            data = memoryview(self._content)[offset:end]
        else:
            data = memoryview(self._storage.fetch(self._name, offset, end))
        if len(data) < wanted:
            raise CorruptionError(
                f"file {self._name!r} of {self._storage.location!r} ends at byte "
                f"{offset + len(data)}: {wanted - len(data)} bytes are missing"
            )
        start = 0
        for buffer in filter(len, buffers):
            buffer[:] = data[start : start + len(buffer)]
            start += len(buffer)

    def close(self) -> None:
        """Do nothing: there is nothing open."""
