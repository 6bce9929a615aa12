"""Readers and writers of checkpoints in any file system that fsspec knows."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardpoint.dcp._extensions import Registry
from shardpoint.dcp._file_system import FileSystemBase
from shardpoint.dcp.filesystem import FileSystemReader, FileSystemWriter, SerializationFormat
from shardpoint.errors import PlanError, ShardpointError
from shardpoint.storage import Storage, storage_at
from shardpoint.storage.places import remote_storage

__all__ = ["FileSystem", "FsspecReader", "FsspecWriter"]

PathLike = str | os.PathLike[str]


class FileSystem(FileSystemBase):
    """A file system of fsspec, which `init_path` finds by the URL.

    Parameters
    ----------
    options
        For fsspec's file system.

    Attributes
    ----------
    fs
        fsspec's file system, after `init_path`.
    """

    def __init__(self, **options: Any) -> None:
        self.fs: Any = None
        self.options = options

    def known_storage(self, path: PathLike) -> Storage:
        """Return the storage of a folder, which does without the other methods."""
        return storage_at(path, self.options)

    @contextmanager
    def create_stream(self, path: PathLike, mode: str) -> Iterator[io.IOBase]:
        """Open a file; what is left of one whose writing failed is removed."""
        with self._opened().open(os.fspath(path), mode) as stream:
            try:
                yield stream
            except BaseException:
                if any(letter in mode for letter in "wax+"):
                    with contextlib.suppress(Exception):
                        self.rm_file(path)
                raise

    def concat_path(self, path: PathLike, suffix: str) -> PathLike:
        return os.path.join(os.fspath(path), suffix)

    def init_path(self, path: PathLike, **options: Any) -> PathLike:
        """Find the file system of a URL; `options` are kept for it."""
        from fsspec.core import url_to_fs

        self.options = {**self.options, **options}
        self.fs, _ = url_to_fs(os.fspath(path), **self.options)
        return path

    def rename(self, path: PathLike, new_path: PathLike) -> None:
        self._opened().rename(path, new_path)

    def mkdir(self, path: PathLike) -> None:
        self._opened().makedirs(path, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Whether fsspec has a file system for this text; a `Path` is left to the local one."""
        if isinstance(checkpoint_id, Path):
            return False
        try:
            remote_storage(os.fspath(checkpoint_id))
        except ShardpointError:
            return False
        return True

    def exists(self, path: PathLike) -> bool:
        return bool(self._opened().exists(path))

    def rm_file(self, path: PathLike) -> None:
        self._opened().rm_file(path)

    def ls(self, path: PathLike) -> list[str]:
        """Return the paths of what is directly in a folder."""
        return list(self._opened().ls(path, detail=False))

    def _opened(self) -> Any:
        if self.fs is None:
            raise PlanError("init_path was not called")
        return self.fs


class FsspecWriter(FileSystemWriter):
    """Writes a checkpoint to any place that fsspec knows.

    A file appears when its upload is complete, and the put of ``.metadata`` commits; see
    `FileSystemWriter` for the parameters.

    Parameters
    ----------
    path
        A URL such as ``"s3://bucket/run/step-100"``, or a local path.
    **kwargs
        For fsspec's file system: credentials, endpoints, ...
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            path,
            single_file_per_rank,
            sync_files,
            thread_count,
            per_thread_copy_ahead,
            overwrite=overwrite,
            _extensions=_extensions,
            serialization_format=serialization_format,
        )
        self.fs = FileSystem(**kwargs)
        self.path = self.fs.init_path(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return FileSystem.validate_checkpoint_id(checkpoint_id)


class FsspecReader(FileSystemReader):
    """Reads a checkpoint from any place that fsspec knows, by ranged requests.

    Parameters
    ----------
    path
        A URL or a local path.
    _extension_registry
        As of `FileSystemReader`.
    **kwargs
        For fsspec's file system.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        _extension_registry: Registry | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, _extension_registry)
        self.fs = FileSystem(**kwargs)
        self.path = self.fs.init_path(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return FileSystem.validate_checkpoint_id(checkpoint_id)
