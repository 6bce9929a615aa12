"""Which back end serves a path or a URL."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardpoint.errors import NotSupportedError, StorageError
from shardpoint.storage.base import Storage
from shardpoint.storage.local import LocalStorage

if TYPE_CHECKING:
    from shardpoint.storage.fsspec import FsspecStorage

__all__ = ["is_url", "local_path", "path_text", "remote_storage", "same_spelling", "storage_at"]

_LOCAL_PROTOCOLS = ("file://", "local://")


def is_url(place: str) -> bool:
    """Whether this is a URL of any protocol, ``file`` included, and no path."""
    return "://" in place


def local_path(place: str) -> str | None:
    """Return the path of a place in the local file system; None for other URLs.

    Raises
    ------
    StorageError
        If no file can have that name.
    """
    try:
        is_possible = b"\0" not in os.fsencode(place)
    except UnicodeEncodeError:
        is_possible = False
    if not is_possible:
        raise StorageError(
            errno.EINVAL,
            f"{place!r} can be no file's name: it holds a NUL or what cannot be encoded",
        )
    for protocol in _LOCAL_PROTOCOLS:
        if place.startswith(protocol):
            return place[len(protocol) :]
    return None if is_url(place) else place


def path_text(place: object) -> str | None:
    """Return a path or URL as text; None for what is neither, like keys of other storage."""
    text = os.fspath(place) if isinstance(place, os.PathLike) else place
    return text if isinstance(text, str) else None


def same_spelling(place: str | os.PathLike[str]) -> str:
    """Return one spelling for all names of a place that can be told to be the same.

    Local places are whole paths then, without links, whether given as paths or URLs.
    """
    text = os.fspath(place)
    path = local_path(text)
    if path is not None:
        return os.path.realpath(path)
    protocol, _, rest = text.partition("://")
    return f"{protocol}://{rest.strip('/')}"


def storage_at(place: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage of a folder, given by a path or a URL.

    Parameters
    ----------
    options
        For fsspec's file system, where the place is a URL that is not local.

    Raises
    ------
    NotSupportedError
        If there is no file system for the URL.
    """
    text = os.fspath(place)
    path = local_path(text)
    return LocalStorage(path) if path is not None else remote_storage(text, options)


def remote_storage(url: str, options: Mapping[str, Any] | None = None) -> FsspecStorage:
    """Return the storage of a URL.

    Raises
    ------
    NotSupportedError
        If fsspec is not installed, or has no file system for the URL.
    """
    try:
        from shardpoint.storage.fsspec import FsspecStorage
    except ImportError as error:
        raise NotSupportedError(
            f"cannot open {url!r}: URLs need the package fsspec (pip install 'shardpoint[cloud]')"
        ) from error
    return FsspecStorage.from_url(url, options)
