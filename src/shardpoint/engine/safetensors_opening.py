"""Opens folders of safetensors files, also while a save puts others in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardpoint.engine.replacing import by_journal
from shardpoint.errors import ConcurrentSaveError, ShardpointError
from shardpoint.formats.huggingface import choose_files, read_files
from shardpoint.formats.huggingface_journal import JOURNAL_NAME, is_full_file, is_shard
from shardpoint.index import CheckpointIndex
from shardpoint.storage import Storage

__all__ = ["open_safetensors", "watched_file"]

_TRIES = 5


def open_safetensors(
    storage: Storage, name: str | None, names: Sequence[str] | None
) -> tuple[CheckpointIndex, Storage]:
    """Return the index of a folder of safetensors files, and the storage to read it from.

    That is another one than the given where a save is not over: it is read by its journal.

    Parameters
    ----------
    name
        One file to read alone; None is all, see `read_directory`.
    names
        What is directly in the folder, where that is known.

    Raises
    ------
    ConcurrentSaveError
        If one save after the other replaces the files.
    CheckpointNotFoundError, FormatError, UnsafePathError, CorruptionError
    LimitExceededError, NotSupportedError, StorageError
        As `read_directory` does, also for a journal that is none.
    """
    for _ in range(_TRIES):
        names = storage.list_folder() if name is None and names is None else names
        is_journaled = storage.has(JOURNAL_NAME) if names is None else JOURNAL_NAME in names
        seen = by_journal(storage) if is_journaled else storage
        index_name, files = choose_files(seen, name, None if is_journaled else names)
        names = None
        watched = watched_file([index_name] if index_name else files)
        version = seen.written(watched)
        try:
            index = read_files(seen, index_name, files)
        except ShardpointError:
            if seen.written(watched) == version and storage.has(JOURNAL_NAME) == is_journaled:
                raise
            continue
        if seen.written(watched) == version:
            return replace(index, version_read=version), seen
    raise ConcurrentSaveError(
        f"the files in {storage.location!r} are replaced by one save after the other: open it again"
    )


def watched_file(files: Sequence[str]) -> str:
    """Return the file that changes first when a save replaces the checkpoint of these files."""
    return next((file for file in files if is_full_file(file) or is_shard(file)), files[0])
