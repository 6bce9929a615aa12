"""Checkpoints in a folder of the local (or a mounted) file system."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Hashable

from shardpoint.errors import CorruptionError, StorageError, UnsafePathError
from shardpoint.storage._claims import claim_folder
from shardpoint.storage._files import LocalReadableFile, LocalWritableFile, refused
from shardpoint.storage.base import Claim, ReadableFile, Storage, WritableFile
from shardpoint.storage.names import check_name

__all__ = ["LocalStorage"]

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)
_CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | _CLOSE_ON_EXEC
_REOPEN_FLAGS = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | _CLOSE_ON_EXEC
_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | _CLOSE_ON_EXEC


class LocalStorage(Storage):
    """One folder.

    Symbolic links are followed only while they stay inside the folder; the folder itself
    may be reached through links. Only regular files are opened: a pipe or a device is
    refused at once instead of being waited for.

    One layout is read although its links lead out: that of Hugging Face's cache
    (huggingface_hub 0.8 and later), where the files of a folder ``snapshots/<revision>`` are
    links to files directly in the folder ``blobs`` beside ``snapshots``.

    Parameters
    ----------
    path
        The folder; it need not exist.
    trusted
        The name of one file in it that may be a link to anywhere: the caller chose it, not
        the checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str], *, trusted: str | None = None) -> None:
        self._path = os.path.abspath(os.fspath(path))
        self._trusted = trusted
        self._known_root: str | None = None
        self._lock = threading.Lock()
        self._unsynced_folders: set[str] = set()

    @property
    def location(self) -> str:
        """The folder's absolute path."""
        return self._path

    def exists(self) -> bool:
        """Whether the folder exists."""
        return os.path.isdir(self._path)

    def prepare(self) -> None:
        """Create the folder and its parents; see `Storage.prepare`.

        Raises
        ------
        StorageError
            If it cannot be created, or something else has that name.
        """
        self._make_folder(self._path)

    def list_folder(self, folder: str = "") -> builtins.list[str]:
        """Return what is directly in one folder; see `Storage.list_folder`."""
        path = self._resolve(folder) if folder else self._path
        prefix = folder + "/" if folder else ""
        try:
            with os.scandir(path) as entries:
                return sorted(
                    prefix + entry.name + ("/" if entry.is_dir(follow_symlinks=False) else "")
                    for entry in entries
                )
        except OSError as error:
            if error.errno in _ABSENT:
                return []
            raise refused("list", path, error) from error

    def list(self) -> builtins.list[str]:
        """Return the names of all files and links at any depth, sorted."""
        names: builtins.list[str] = []
        waiting = [""]
        while waiting:
            prefix = waiting.pop()
            folder = os.path.join(self._path, prefix)
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        name = prefix + entry.name
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(name + "/")
                        else:
                            names.append(name)
            except OSError as error:
                # A folder that vanished meanwhile holds no files.
                if error.errno == errno.ENOENT or (not prefix and error.errno in _ABSENT):
                    continue
                raise refused("list", folder, error) from error
        return sorted(names)

    def has(self, name: str) -> bool:
        """Whether a regular file of that name exists; see `Storage.has`."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Return the file's size, None if there is no regular file; see `Storage.size`."""
        found = self._stat(name)
        return None if found is None else found.st_size

    def version(self, name: str) -> Hashable:
        """Return the file's number, size and time; see `Storage.version`."""
        found = self._stat(name)
        return None if found is None else (found.st_ino, found.st_size, found.st_mtime_ns)

    def written(self, name: str) -> Hashable:
        """Return the file's size and time; see `Storage.written`."""
        found = self._stat(name)
        return None if found is None else (found.st_size, found.st_mtime_ns)

    def claim(self, *, shared: bool) -> Claim:
        """Lock the folder, where its file system can; see `Storage.claim`."""
        try:
            return claim_folder(self._path, shared=shared)
        except OSError as error:
            raise refused("open", self._path, error) from error

    def _stat(self, name: str) -> os.stat_result | None:
        path = self._resolve_for_reading(name)
        try:
            found = os.stat(path, follow_symlinks=False)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise refused("look at", path, error) from error
        return found if stat.S_ISREG(found.st_mode) else None

    def open(self, name: str) -> ReadableFile:
        """Open a regular file for reading; see `Storage.open`."""
        path = self._resolve_for_reading(name)
        try:
            descriptor = os.open(path, _OPEN_FLAGS)
        except OSError as error:
            if error.errno in _ABSENT:
                raise CorruptionError(f"file {name!r} is missing from {self._path!r}") from error
            raise refused("open", path, error) from error
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise StorageError(f"cannot open {path!r}: it is no regular file")
        except BaseException:
            _close_quietly(descriptor)
            raise
        return LocalReadableFile(descriptor, path, found.st_size)

    def create(self, name: str, *, size: int | None) -> WritableFile:
        """Create a new file and reserve `size` bytes for it; see `Storage.create`."""
        path = self._resolve_for_writing(name)
        try:
            descriptor = os.open(path, _CREATE_FLAGS, 0o666)
        except FileExistsError as error:
            raise StorageError(errno.EEXIST, f"file {path!r} exists already") from error
        except OSError as error:
            raise refused("create", path, error) from error
        try:
            _reserve(descriptor, path, size)
        except BaseException:
            _close_quietly(descriptor)
            _remove_quietly(path)
            raise
        return LocalWritableFile(descriptor, path)

    def replace(self, name: str, data: bytes, *, sync: bool) -> None:
        """Put a whole file in place atomically; see `Storage.replace`."""
        path = self._resolve_for_writing(name)
        folder, base = os.path.split(path)
        # A fresh name each time: neither a crashed nor a concurrent writer is in the way.
        temporary = os.path.join(folder, f".{base}.{secrets.token_hex(8)}.tmp")
        try:
            descriptor = os.open(temporary, _CREATE_FLAGS, 0o666)
        except OSError as error:
            raise refused("create", temporary, error) from error
        try:
            with LocalWritableFile(descriptor, temporary) as file:
                file.write_from(0, [memoryview(data).cast("B")])
                if sync:
                    file.sync()
            try:
                os.replace(temporary, path)
            except OSError as error:
                raise refused("replace", path, error) from error
        except BaseException:
            _remove_quietly(temporary)
            raise
        if sync:
            self.sync()

    def reopen(self, name: str) -> WritableFile:
        """Open an existing file to write to it; see `SharedStorage.reopen`."""
        path = self._resolve(name)
        try:
            descriptor = os.open(path, _REOPEN_FLAGS)
        except OSError as error:
            raise refused("open", path, error) from error
        return LocalWritableFile(descriptor, path)

    def rename(self, name: str, new_name: str) -> None:
        """Rename a file atomically; see `Storage.rename`."""
        old, new = self._resolve_for_writing(name), self._resolve_for_writing(new_name)
        try:
            os.replace(old, new)
        except OSError as error:
            raise refused("rename", old, error) from error

    @property
    def rename_copies(self) -> bool:
        """False."""
        return False

    def remove(self, name: str) -> None:
        """Remove a file, or a link itself; see `Storage.remove`."""
        parts = check_name(name)
        folder = self._resolve("/".join(parts[:-1])) if len(parts) > 1 else self._root()
        path = os.path.join(folder, parts[-1])
        try:
            os.unlink(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return
            raise refused("remove", path, error) from error
        with self._lock:
            self._unsynced_folders.add(folder)

    def sync(self) -> None:
        """Make created and removed names durable; see `Storage.sync`."""
        with self._lock:
            folders, self._unsynced_folders = self._unsynced_folders, set()
        for folder in sorted({*folders, self._root()}):
            try:
                _sync_folder(folder)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue
                with self._lock:
                    self._unsynced_folders |= folders
                raise refused("sync", folder, error) from error

    def _root(self) -> str:
        """Return the folder's path without links; looked up until the folder exists."""
        root = self._known_root
        if root is None:
            root = os.path.realpath(self._path)
            if os.path.isdir(root):
                self._known_root = root
        return root

    def _resolve(self, name: str) -> str:
        """Return the path behind all links.

        Raises
        ------
        UnsafePathError
            If the name is refused or leads out of the folder.
        """
        root, path = self._behind_links(name)
        if not _is_below(path, root):
            raise UnsafePathError(f"file {name!r} leads out of {self._path!r}")
        return path

    def _resolve_for_reading(self, name: str) -> str:
        """Return the path behind all links, also of the ones that may lead out."""
        root, path = self._behind_links(name)
        if _is_below(path, root) or name == self._trusted or _is_blob_of(path, root):
            return path
        raise UnsafePathError(f"file {name!r} leads out of {self._path!r}")

    def _behind_links(self, name: str) -> tuple[str, str]:
        """Return the folder's path and the file's, both without links."""
        parts = check_name(name)
        root = path = self._root()
        for part in parts:
            path = os.path.join(path, part)
            if os.path.islink(path):
                return root, os.path.realpath(os.path.join(root, *parts))
        return root, path

    def _resolve_for_writing(self, name: str) -> str:
        """Return the path with its folder made; the last part is not followed."""
        parts = check_name(name)
        folder = self._resolve("/".join(parts[:-1])) if len(parts) > 1 else self._root()
        self._make_folder(folder)
        with self._lock:
            self._unsynced_folders.add(folder)
        return os.path.join(folder, parts[-1])

    def _make_folder(self, folder: str) -> None:
        """Create a folder with its parents, and note whose entries are to be synced."""
        missing = folder
        parents = []
        while not os.path.isdir(missing):
            parent = os.path.dirname(missing)
            if parent == missing:
                break
            parents.append(parent)
            missing = parent
        if not parents:
            return
        try:
            os.makedirs(folder, exist_ok=True)
        except FileExistsError as error:
            what = "a link that leads nowhere" if os.path.islink(folder) else "a file"
            raise StorageError(
                errno.EEXIST, f"cannot create folder {folder!r}: {what} has that name"
            ) from error
        except OSError as error:
            raise refused("create folder", folder, error) from error
        with self._lock:
            self._unsynced_folders.update(parents)


def _is_below(path: str, root: str) -> bool:
    return path != root and os.path.commonpath([root, path]) == root


def _is_blob_of(path: str, root: str) -> bool:
    """Whether a file lies where the links of a Hugging Face snapshot folder lead."""
    snapshots, revision = os.path.split(root)
    cache, name = os.path.split(snapshots)
    blobs = os.path.join(cache, "blobs")
    return bool(revision) and name == "snapshots" and os.path.dirname(path) == blobs


def _reserve(descriptor: int, path: str, size: int | None) -> None:
    """Claim the space now, so that a full disk is an early error and extents are large."""
    allocate = getattr(os, "posix_fallocate", None)
    if not size or allocate is None:
        return
    try:
        allocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NO_PREALLOCATION:
            raise refused(f"reserve {size} bytes for", path, error) from error


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _CLOSE_ON_EXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; their renames are durable at once.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _close_quietly(descriptor: int) -> None:
    """Close after a failed step; the step's own error is the one that counts."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _remove_quietly(path: str) -> None:
    """Remove what a failed step left; the step's own error is the one that counts."""
    with contextlib.suppress(OSError):
        os.unlink(path)
