"""The commit protocol of a folder of safetensors files: several fixed names, one step that counts.

1. What a broken-off save has left is finished, if it counts, or cleared away.
2. New files are written under temporary names, and synced.
3. A journal is put in place: this is the commit. It says which temporary files there are, and
   which files count no more. Whoever reads by way of this package reads by it from now on.
4. The files that count no more are removed, the new ones get their names, and the journal goes.

A crash before the third step leaves what was there before, and later than that the new files;
the next save does what is left to do. Where nothing was there and the save is of a single data
file, that file's rename is the commit, and no journal is needed.

In a store where renaming copies, nothing is copied when the place is empty: files are written
under their final names, and from before the first until after the last of them a journal says
that they do not count. Its removal is the commit.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shardpoint.engine.committing import Turn
from shardpoint.errors import (
    ConcurrentSaveError,
    CorruptionError,
    LimitExceededError,
    ShardpointError,
    StorageError,
    UnsafePathError,
)
from shardpoint.formats.huggingface import find_files
from shardpoint.formats.huggingface_journal import (
    JOURNAL_NAME,
    MAX_JOURNAL_BYTES,
    Journal,
    decode_journal,
    is_full_file,
    is_shard,
    is_temporary,
    temporary_name,
)
from shardpoint.formats.huggingface_writing import INDEX_NAME
from shardpoint.storage import Storage
from shardpoint.storage.renamed import RenamedStorage

__all__ = ["Replacement", "begin_replacement", "by_journal", "remove_uncommitted"]

logger = logging.getLogger(__name__)

_SHARD_FOLDER = "sharded"


@dataclass(slots=True)
class Replacement:
    """A save of safetensors files, from its beginning to its end; see `begin_replacement`.

    Attributes
    ----------
    places
        Final name to where the file is to be written.
    """

    storage: Storage
    places: Mapping[str, str]
    _turn: Turn
    _marker: bytes | None
    _present: frozenset[str]
    _is_alone: bool
    _save_id: str
    _written: list[str] = field(default_factory=list)

    def commit(self, index: bytes | None, *, removes_shards: bool, sync: bool) -> None:
        """Make the files that were written what counts at this place.

        Parameters
        ----------
        index
            Content of the index, if there is to be one; its name is among `places` then.
        removes_shards
            Whether ranks' files that are not of this save go, too.
        sync
            Make everything durable before returning.

        Raises
        ------
        ConcurrentSaveError
            If another save has come between, in a store that could not keep it out.
        StorageError
            Then the old files are what counts; or, if the commit is done, the new ones, and
            the next save finishes what is left to do. A note says so.
        """
        if index is not None:
            self._write_index(index, sync=sync)
        if sync:
            self.storage.sync()
        stale = [
            name
            for name in sorted(self._present - self.places.keys())
            if is_full_file(name) or (removes_shards and is_shard(name))
        ]
        if self._marker is not None:
            self._check_marker(self._marker)
            self.storage.remove(JOURNAL_NAME)
        else:
            self._turn.check()
            self._put_in_place(stale, sync=sync)
        self._remove_leftovers()

    def _write_index(self, index: bytes, *, sync: bool) -> None:
        place = self.places[INDEX_NAME]
        with self.storage.create(place, size=len(index)) as file:
            self._written.append(place)
            file.write_from(0, [memoryview(index)])
            if sync:
                file.sync()

    def _put_in_place(self, stale: Sequence[str], *, sync: bool) -> None:
        names = sorted(self.places, key=lambda name: name == INDEX_NAME)
        if self._is_alone and names[1:] in ([], [INDEX_NAME]):
            # A file of whole tensors counts without the index, too: the first rename commits.
            for name in names:
                self.storage.rename(self.places[name], name)
                if sync:  # each: an index alone must not be what a power loss leaves
                    self.storage.sync()
            return
        journal = Journal(True, tuple(self.places.values()), tuple(stale), self._save_id)
        self.storage.replace(JOURNAL_NAME, journal.encode(), sync=sync)
        try:
            _carry_out(self.storage, journal, self.storage.rename, sync=sync)
        except ShardpointError as error:
            error.add_note(
                f"the new files count already: {JOURNAL_NAME!r} says how this package reads them, "
                f"and the next save here finishes the renaming; other software may find a mixture"
            )
            raise

    def _check_marker(self, marker: bytes) -> None:
        if not self.storage.has(JOURNAL_NAME) or self.storage.read(JOURNAL_NAME) != marker:
            raise ConcurrentSaveError(
                f"another save has begun in {self.storage.location!r} since this one did: this one "
                f"is given up"
            )

    def _remove_leftovers(self) -> None:
        """Remove what saves that were broken off have left; not what counts depends on it."""
        try:
            for name in sorted(self._present):
                if is_temporary(name):
                    self.storage.remove(name)
        except ShardpointError as error:  # the save itself is done; the next one cleans up
            logger.warning("%s: temporary files remain: %s", self.storage.location, error)

    def abort(self, written: Iterable[str]) -> None:
        """Remove what was written, unless it counts all the same, and let others save there.

        Parameters
        ----------
        written
            Where this rank has written files.
        """
        try:
            marker, self._marker = self._marker, None
            if marker is None:
                remove_uncommitted(self.storage, [*written, *self._written])
            elif self.storage.has(JOURNAL_NAME) and self.storage.read(JOURNAL_NAME) == marker:
                _clear(self.storage, decode_journal(marker))
        finally:
            self.end()

    def end(self) -> None:
        """Let others save there; more calls do nothing."""
        self._turn.end()


def begin_replacement(
    storage: Storage, names: Collection[str], *, may_write: Callable[[Sequence[str]], None] | None
) -> Replacement:
    """Begin a save of safetensors files, when the last one there is over.

    Parameters
    ----------
    storage
        Prepared already.
    names
        The final names of all files that will be written, of all ranks.
    may_write
        Given what is directly in the place, as the last save has left it: raises if that is
        not to be written to.

    Raises
    ------
    ConcurrentSaveError
        If another save is writing there.
    FormatError
        If there is a journal that no save has written.
    StorageError, UnsafePathError
    """
    claim = storage.claim(shared=False)
    try:
        _finish_last(storage)
        top = storage.list_folder()
        if may_write is not None:
            may_write(top)
        present = frozenset(
            name
            for name in (*top, *_in_shard_folder(storage, top))
            if is_full_file(name) or is_shard(name) or is_temporary(name) or name == INDEX_NAME
        )
        save_id = secrets.token_hex(8)
        marker = None
        is_empty = not any(map(_counts, present))
        if storage.rename_copies and is_empty:
            marker = Journal(False, tuple(names), (), save_id).encode()
            storage.replace(JOURNAL_NAME, marker, sync=False)
            places = {name: name for name in names}
        else:
            places = {name: temporary_name(name, save_id) for name in names}
        watched = INDEX_NAME if INDEX_NAME in places else min(places, default=INDEX_NAME)
        turn = Turn(storage, watched, claim, None if is_empty else storage.version(watched))
        return Replacement(
            storage,
            places,
            turn,
            marker,
            present,
            is_empty and not find_files(storage, top),
            save_id,
        )
    except BaseException:
        claim.release()
        raise


def _counts(name: str) -> bool:
    return not is_temporary(name)


def _in_shard_folder(storage: Storage, top: Sequence[str]) -> list[str]:
    if f"{_SHARD_FOLDER}/" in top:
        return storage.list_folder(_SHARD_FOLDER)
    if _SHARD_FOLDER in top:
        # A link, which stays as it is; or a folder, in a store that does not tell.
        try:
            return storage.list_folder(_SHARD_FOLDER)
        except (StorageError, UnsafePathError):
            return []
    return []


def _finish_last(storage: Storage) -> None:
    """Do what a save that was broken off has left to do."""
    journal = _read_journal(storage)
    if journal is None:
        return
    if not journal.is_committed:
        _clear(storage, journal)
        return

    def rename(name: str, new_name: str) -> None:
        if storage.has(name):
            storage.rename(name, new_name)
        elif not storage.has(new_name):
            raise CorruptionError(
                f"{storage.location!r} has neither {name!r} nor {new_name!r}, with which a save "
                f"that was broken off is to be finished; to give it up, remove {JOURNAL_NAME!r}"
            )

    _carry_out(storage, journal, rename, sync=True)


def _carry_out(
    storage: Storage, journal: Journal, rename: Callable[[str, str], None], *, sync: bool
) -> None:
    """Do what a journal of a save that counts says, and remove it.

    What a reader of the old files looks at to tell whether they were replaced, the index or else
    the first of them by name, goes or changes before any file changes that stays.
    """
    for name in journal.removed:
        storage.remove(name)
    finals = journal.finals
    for name in sorted(finals, key=lambda name: (name != INDEX_NAME, name)):
        rename(finals[name], name)
    if sync:
        storage.sync()
    storage.remove(JOURNAL_NAME)
    if sync and journal.removed:
        # Else it might be back after a power loss, and remove what has been written there since.
        storage.sync()


def _clear(storage: Storage, journal: Journal) -> None:
    """Remove the files of a save that does not count, and then the journal that says so."""
    for name in journal.files:
        storage.remove(name)
    storage.remove(JOURNAL_NAME)


def _read_journal(storage: Storage) -> Journal | None:
    size = storage.size(JOURNAL_NAME)
    if size is None:
        return None
    if size > MAX_JOURNAL_BYTES:
        raise LimitExceededError(
            f"file {JOURNAL_NAME!r} has {size} bytes: at most {MAX_JOURNAL_BYTES} are read"
        )
    try:
        return decode_journal(storage.read(JOURNAL_NAME))
    except CorruptionError:
        if storage.has(JOURNAL_NAME):
            raise
        return None  # finished meanwhile


def by_journal(storage: Storage) -> Storage:
    """Return the storage as a journal in it says that it is to be read; itself without one.

    Raises
    ------
    FormatError
        If the journal is none.
    """
    journal = _read_journal(storage)
    if journal is None:
        return storage
    if not journal.is_committed:
        return RenamedStorage(storage, {}, hidden={*journal.files, JOURNAL_NAME})
    names = {final: (temporary, final) for final, temporary in journal.finals.items()}
    return RenamedStorage(storage, names, hidden={*journal.removed, *journal.files, JOURNAL_NAME})


def remove_uncommitted(storage: Storage, written: Collection[str]) -> None:
    """Remove files that a save has written which failed, unless they count all the same.

    What was written under final names is left to the journal that says that it does not count.
    """
    temporary = [name for name in written if is_temporary(name)]
    if not temporary:
        return
    journal = _read_journal(storage)
    if journal is not None and not set(temporary).isdisjoint(journal.files):
        return
    for name in temporary:
        storage.remove(name)
