"""Files of another storage under other names, to be read."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import NoReturn, TypeVar

from shardpoint.errors import CorruptionError, NotSupportedError
from shardpoint.storage.base import ReadableFile, Storage, WritableFile

__all__ = ["RenamedStorage"]

Value = TypeVar("Value")


class RenamedStorage(Storage):
    """A storage in which some files have other names, and some are not seen; nothing is written.

    Parameters
    ----------
    storage
        Where the files lie.
    names
        Name here to names there: the first of them that is there is meant, at every call
        anew, so that a file may be renamed from one to the next meanwhile.
    hidden
        Names there that are not seen here, unless `names` has them; None is all others.
    """

    def __init__(
        self,
        storage: Storage,
        names: Mapping[str, Sequence[str]],
        *,
        hidden: Collection[str] | None,
    ) -> None:
        self._storage = storage
        self._names = dict(names)
        self._hidden = None if hidden is None else frozenset(hidden)

    @property
    def location(self) -> str:
        """The storage's."""
        return self._storage.location

    def exists(self) -> bool:
        """Whether the place exists."""
        return self._storage.exists()

    def list(self) -> builtins.list[str]:
        """Return the names of all files as they are here; see `Storage.list`."""
        found = set(self._storage.list())
        named = [name for name, places in self._names.items() if not found.isdisjoint(places)]
        return sorted([*named, *filter(self._is_plain, found)])

    def list_folder(self, folder: str = "") -> builtins.list[str]:
        """Return what is directly in one folder, as it is called here."""
        names = set(filter(self._is_plain, self._storage.list_folder(folder)))
        prefix = folder + "/" if folder else ""
        for name in self._names:
            if name.startswith(prefix) and self.has(name):
                first, slash, _ = name[len(prefix) :].partition("/")
                names.add(prefix + first + slash)
        return sorted(names)

    def has(self, name: str) -> bool:
        """Whether there is such a file here."""
        return any(self._storage.has(place) for place in self._places(name))

    def size(self, name: str) -> int | None:
        """Return a file's size; see `Storage.size`."""
        return self._first(name, self._storage.size)

    def version(self, name: str) -> Hashable:
        """Return what changes with a file; see `Storage.version`."""
        return self._first(name, self._storage.version)

    def written(self, name: str) -> Hashable:
        """Return what changes with a file's content; see `Storage.written`."""
        return self._first(name, self._storage.written)

    def open(self, name: str) -> ReadableFile:
        """Open a file for reading; see `Storage.open`."""
        *earlier, last = self._places(name) or (None,)
        if last is None:
            raise CorruptionError(f"file {name!r} is missing from {self.location!r}")
        for place in earlier:
            if self._storage.has(place):
                try:
                    return self._storage.open(place)
                except CorruptionError:
                    continue  # it has been renamed meanwhile
        return self._storage.open(last)

    def prepare(self) -> None:
        """Refuse: nothing is written here."""
        self._refuse()

    def create(self, name: str, *, size: int | None) -> WritableFile:
        """Refuse: nothing is written here."""
        self._refuse()

    def replace(self, name: str, data: bytes, *, sync: bool) -> None:
        """Refuse: nothing is written here."""
        self._refuse()

    def remove(self, name: str) -> None:
        """Refuse: nothing is written here."""
        self._refuse()

    def sync(self) -> None:
        """Do nothing: nothing is written here."""

    def _refuse(self) -> NoReturn:
        raise NotSupportedError(f"{self.location!r} is open for reading only")

    def _is_plain(self, name: str) -> bool:
        """Whether a name there means the same file here."""
        return self._hidden is not None and name not in self._hidden and name not in self._names

    def _places(self, name: str) -> Sequence[str]:
        if name in self._names:
            return self._names[name]
        return (name,) if self._is_plain(name) else ()

    def _first(self, name: str, look: Callable[[str], Value | None]) -> Value | None:
        for place in self._places(name):
            found = look(place)
            if found is not None:
                return found
        return None
