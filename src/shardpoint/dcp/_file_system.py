"""The interface by which programs bring a file system of their own, and the local one."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

from shardpoint.dcp._file_system_storage import FileSystemStorage
from shardpoint.errors import PlanError
from shardpoint.storage import Storage, storage_at
from shardpoint.storage.places import is_url

__all__ = [
    "FileSystem",
    "FileSystemBase",
    "StoragePlace",
    "is_known",
    "place_text",
    "storage_of",
]

PathLike = str | os.PathLike[str]


def place_text(place: object) -> str:
    """Return a path or URL as text.

    Raises
    ------
    PlanError
        If it is something else.
    """
    text = os.fspath(place) if isinstance(place, str | os.PathLike) else place
    if isinstance(text, str):
        return text
    hint = "; os.fsdecode makes text of bytes" if isinstance(text, bytes) else ""
    raise PlanError(
        f"a checkpoint lies at a path or URL, a str or os.PathLike; {place!r:.80} is of type "
        f"{type(place).__name__}{hint}"
    )


class FileSystemBase(ABC):
    """A file system for `FileSystemWriter` and `FileSystemReader`: set their ``fs`` to one.

    Paths are what `init_path` and `concat_path` return, of any type. File systems that can
    list a folder have a method ``ls(path) -> list[str]`` too.
    """

    @abstractmethod
    def create_stream(self, path: PathLike, mode: str) -> AbstractContextManager[io.IOBase]:
        """Open a file as a context manager; `mode` is ``"rb"`` or ``"wb"``.

        Streams for reading can seek. Those for writing are written from start to end.
        """

    @abstractmethod
    def concat_path(self, path: PathLike, suffix: str) -> PathLike:
        """Return the path of a file in a folder."""

    @abstractmethod
    def rename(self, path: PathLike, new_path: PathLike) -> None:
        """Give a file another name."""

    @abstractmethod
    def init_path(self, path: PathLike) -> PathLike:
        """Take a folder as the user gives it; return what the other methods take."""

    @abstractmethod
    def mkdir(self, path: PathLike) -> None:
        """Make a folder with its parents, if it is not there."""

    @classmethod
    @abstractmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Whether this file system has such a place."""

    @abstractmethod
    def exists(self, path: PathLike) -> bool:
        """Whether there is a file or folder."""

    @abstractmethod
    def rm_file(self, path: PathLike) -> None:
        """Remove a file."""


class FileSystem(FileSystemBase):
    """The local file system.

    Writers and readers that have just this one go to the storage engine, and so know URLs
    too; one that is derived from it is called for everything.
    """

    def known_storage(self, path: PathLike) -> Storage:
        """Return the storage of a folder, which does without the other methods."""
        return storage_at(path)

    @contextmanager
    def create_stream(self, path: PathLike, mode: str) -> Iterator[io.IOBase]:
        with Path(path).open(mode) as stream:
            yield cast(io.IOBase, stream)

    def concat_path(self, path: PathLike, suffix: str) -> PathLike:
        text = os.fspath(path)
        return f"{text.rstrip('/')}/{suffix}" if is_url(text) else Path(path) / suffix

    def init_path(self, path: PathLike) -> PathLike:
        return str(path) if is_url(place_text(path)) else Path(path)

    def rename(self, path: PathLike, new_path: PathLike) -> None:
        Path(path).rename(new_path)

    def mkdir(self, path: PathLike) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Whether this is a path that is there or that can be made."""
        if isinstance(checkpoint_id, Path):
            return True
        if is_url(os.fspath(checkpoint_id)):
            return False
        parents = Path(checkpoint_id).parents
        return any(parent.exists() and os.access(parent, os.W_OK) for parent in parents)

    def exists(self, path: PathLike) -> bool:
        return Path(path).exists()

    def rm_file(self, path: PathLike) -> None:
        Path(path).unlink()

    def ls(self, path: PathLike) -> list[str]:
        """Return the paths of what is directly in a folder."""
        return [str(entry) for entry in Path(path).iterdir()]


def storage_of(file_system: Any, path: PathLike) -> Storage:
    """Return the storage of a folder in a file system that a program may have brought."""
    if is_known(file_system):
        known: Storage = file_system.known_storage(path)
        return known
    return FileSystemStorage(file_system, path)


def is_known(file_system: Any) -> bool:
    """Whether this is one of our own file systems, which the engine needs no methods of.

    One derived from them may have overridden anything.
    """
    return "known_storage" in vars(type(file_system))


class StoragePlace:
    """What `fs` and `path` say, as a storage; programs may set either at any time.

    Attributes
    ----------
    fs
        The file system.
    path
        What its ``init_path`` gave.
    """

    fs: Any
    path: str | os.PathLike[str]
    _known: tuple[Any, Any, Storage] | None = None

    @property
    def storage(self) -> Storage:
        """The storage of the place."""
        known = self._known
        if known is None or known[0] is not self.fs or known[1] != self.path:
            known = self._known = (self.fs, self.path, storage_of(self.fs, self.path))
        return known[2]

    @storage.setter
    def storage(self, storage: Storage) -> None:
        self._known = (self.fs, self.path, storage)

    def _forget_storage(self) -> None:
        self._known = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the storage behind: another process makes its own."""
        return {name: value for name, value in vars(self).items() if name != "_known"}
