"""The commit protocol of a folder: fresh names, one rename that counts, then the cleanup.

Data go into files that no committed checkpoint refers to, and so does the index, whose name
says which metadata file it belongs to; that file is put in place atomically, and this is the
commit; only then are the files of the replaced checkpoint removed. A crash leaves the old or
the new checkpoint, each with its index, and garbage that the next save removes.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Hashable
from dataclasses import dataclass

from shardpoint.errors import ConcurrentSaveError
from shardpoint.formats.native_index import (
    index_name,
    is_index_name,
    stamp_of,
    write_index,
)
from shardpoint.index import CheckpointIndex
from shardpoint.storage.base import Claim, Storage
from shardpoint.storage.local import LocalStorage

__all__ = [
    "METADATA_NAME",
    "Turn",
    "begin",
    "commit",
    "data_prefix",
    "holds_any",
    "index_for",
    "new_token",
    "own_prefix",
    "rank_metadata_name",
    "remove_own_elsewhere",
    "remove_replaced",
]

METADATA_NAME = ".metadata"
_DATA_FILE = re.compile(r"__\d+_(?:[0-9a-f]{8}_)?\d+\.distcp")
_RANK_METADATA = re.compile(r"__\d+\.metadata")
_TEMPORARY = re.compile(
    r"\.(?:(?:__\d+)?\.metadata|\.shardpoint-[0-9a-f]{8}\.index)\.[0-9a-f]+\.tmp"
)


def rank_metadata_name(rank: int) -> str:
    """Return the metadata file of one rank that saves without the others."""
    return f"__{rank}.metadata"


def new_token(storage: Storage, rank: int | None = None) -> str:
    """Return what makes file names fresh: nothing in an empty place, as torch names files.

    With `rank`, only that rank's files count, where ranks save without each other.
    """
    begin = "__" if rank is None else f"__{rank}_"
    names = (name for name in storage.list() if name.startswith(begin))
    taken = any(_DATA_FILE.fullmatch(name) for name in names)
    return f"{secrets.token_hex(4)}_" if taken else ""


@dataclass(slots=True)
class Turn:
    """A save's turn at a place: nobody else's save may come between its beginning and its end."""

    storage: Storage
    name: str
    _claim: Claim
    _version: Hashable

    def check(self) -> None:
        """Look whether another save has come between, in a store that could not keep it out.

        Raises
        ------
        ConcurrentSaveError
            Then what the other has saved counts.
        """
        if self.storage.version(self.name) != self._version:
            raise ConcurrentSaveError(
                f"another save has put its {self.name!r} into {self.storage.location!r} since this "
                f"one began: the other one counts, this one is given up"
            )

    def end(self) -> None:
        """Let others save there."""
        self._claim.release()


def begin(storage: Storage, name: str, *, shared: bool) -> Turn:
    """Begin a save that will put the metadata file `name` in place.

    Parameters
    ----------
    shared
        Other saves with metadata files of their own may go on at the same time.

    Raises
    ------
    ConcurrentSaveError
        If another save is writing there.
    """
    claim = storage.claim(shared=shared)
    try:
        return Turn(storage, name, claim, storage.version(name))
    except BaseException:
        claim.release()
        raise


def data_prefix(rank: int, token: str) -> str:
    """Return what the names of a rank's data files begin with."""
    return f"__{rank}_{token}"


def own_prefix(storage: Storage, prefix: str, rank: int, ends: Collection[str]) -> str:
    """Return a prefix for a rank's files, the one that the coordinator chose if it can be.

    The coordinator has looked whether names are free, but in its own folder. On disks that are
    not shared a rank may have files of a save that the coordinator's folder knows nothing of.
    """
    if prefix != data_prefix(rank, "") or not isinstance(storage, LocalStorage):
        return prefix  # nobody has such names, or all see the same
    if any(storage.has(prefix + end) for end in ends):
        return data_prefix(rank, f"{secrets.token_hex(4)}_")
    return prefix


def commit(
    storage: Storage, name: str, metadata: bytes, *, index: tuple[str, bytes] | None, sync: bool
) -> None:
    """Make what was written the checkpoint at this place.

    Parameters
    ----------
    name, metadata
        The metadata file.
    index
        Name and content of the native index, which has to be in place before; None for none.
    sync
        Make both durable before returning.

    Raises
    ------
    StorageError
        Then the checkpoint that was there before is still there.
    """
    if index is not None:
        storage.replace(index[0], index[1], sync=sync)
    storage.replace(name, metadata, sync=sync)


def index_for(index: CheckpointIndex, metadata: bytes) -> tuple[str, bytes]:
    """Return name and content of the native index that goes with a metadata file.

    Raises
    ------
    FormatError
        If what a planner stored does not fit into one.
    """
    stamp = stamp_of(metadata)
    return index_name(stamp), write_index(index, stamp)


def holds_any(storage: Storage, name: str, files: Collection[str]) -> bool:
    """Whether the metadata file in place names one of these files, or one is its index."""
    if not storage.has(name):
        return False
    metadata = storage.read(name)
    if index_name(stamp_of(metadata)) in files:
        return True
    return any(file.encode() in metadata for file in files)


def remove_replaced(storage: Storage, keep: Collection[str], *, rank: int | None = None) -> None:
    """Remove the data files and indexes of replaced and of broken-off saves.

    Only files with names that a save gives are ever touched.

    Parameters
    ----------
    keep
        The files of the checkpoint that counts now, its index among them.
    rank
        Only this rank's files, where ranks save without each other (those have no index); None
        is all, and then the metadata files of such saves go too.
    """
    for name in storage.list():
        if name in keep:
            continue
        stale = _DATA_FILE.fullmatch(name) or _TEMPORARY.fullmatch(name)
        if rank is not None:
            own = name.startswith((data_prefix(rank, ""), f".{rank_metadata_name(rank)}."))
            stale = stale if own else None
        if stale or (rank is None and (_RANK_METADATA.fullmatch(name) or is_index_name(name))):
            storage.remove(name)


def remove_own_elsewhere(
    storage: Storage, keep: Collection[str], *, rank: int, coordinator_rank: int
) -> None:
    """Remove this rank's data files of replaced saves, where nobody else can.

    That is on disks that are not shared with the coordinator, which cleans up its own folder.

    Parameters
    ----------
    keep
        The files of the checkpoint that counts now.
    """
    if not isinstance(storage, LocalStorage):
        return  # remote stores are the same for all
    of_coordinator = data_prefix(coordinator_rank, "")
    sign = next((name for name in keep if name.startswith(of_coordinator)), METADATA_NAME)
    if not storage.has(sign):
        remove_replaced(storage, keep, rank=rank)
