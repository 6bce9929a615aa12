"""Checkpoints in a folder: written atomically, read by byte runs."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.futures import Future

from shardpoint.dcp._extensions import (
    Registry,
    RegistryFinder,
    check_extensions,
)
from shardpoint.dcp._file_system import (
    FileSystem,
    FileSystemBase,
    StoragePlace,
    is_known,
    place_text,
)
from shardpoint.dcp._forking import make_ready_for_threads
from shardpoint.dcp._metadata_view import index_of, metadata_of, stored_index_of
from shardpoint.dcp._reading import carry_out
from shardpoint.dcp._safe_globals import with_safe_globals
from shardpoint.dcp._write_files import RowWriter
from shardpoint.dcp._write_images import without_repeated_keys
from shardpoint.dcp._write_items import columns_of
from shardpoint.dcp._write_records import prepare_records
from shardpoint.dcp._write_results import written_by
from shardpoint.dcp.metadata import Metadata, MetadataIndex, StorageMeta
from shardpoint.dcp.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
)
from shardpoint.dcp.staging import BlockingAsyncStager
from shardpoint.dcp.storage import StorageReader, StorageWriter, WriteResult
from shardpoint.engine import committing
from shardpoint.engine.collector import collection_paused
from shardpoint.engine.executor import default_threads
from shardpoint.engine.opening import noticing_replacement, open_index
from shardpoint.engine.reading import ReadStatistics
from shardpoint.engine.unfinished import wait_until_written
from shardpoint.errors import (
    CheckpointExistsError,
    FormatError,
    NotSupportedError,
    PlanError,
    ShardpointError,
)
from shardpoint.formats.dcp_metadata import write_metadata
from shardpoint.index import CheckpointIndex
from shardpoint.planning.balance import spread_rows
from shardpoint.planning.placing import attach_storage
from shardpoint.planning.save import OBJECT, WriteColumns
from shardpoint.storage import Storage
from shardpoint.storage.places import local_path, remote_storage

__all__ = [
    "FileSystem",
    "FileSystemBase",
    "FileSystemReader",
    "FileSystemWriter",
    "SerializationFormat",
]

logger = logging.getLogger(__name__)

DEFAULT_SUFFIX = ".distcp"
_metadata_fn = committing.METADATA_NAME
CURRENT_DCP_VERSION = "1.0.0"


def is_place(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Whether this is a path, or a URL of a protocol that there is a file system for."""
    text = place_text(checkpoint_id)
    if not text or local_path(text) is not None:
        return bool(text)
    try:
        remote_storage(text)
    except NotSupportedError:
        return False
    return True


class SerializationFormat(Enum):
    """What a data file's tensor entries are."""

    TORCH_SAVE = "torch_save"
    SAFETENSORS = "safetensors"


@dataclass
class _StorageInfo:
    """Where an item lies: the `storage_data` of files in a folder.

    Attributes
    ----------
    relative_path
        The file, relative to the checkpoint.
    offset, length
        The item's byte span in it.
    transform_descriptors
        What was done to the bytes, in order; None is nothing.
    """

    relative_path: str
    offset: int
    length: int
    transform_descriptors: Sequence[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class _StoragePrefix:
    """What the coordinator tells each rank: how its files are to be named."""

    prefix: str


class FileSystemWriter(StoragePlace, StorageWriter, BlockingAsyncStager):
    """Writes a checkpoint into a folder, or to a URL.

    The place may hold a checkpoint already: it stays readable until the new one is
    complete, and is then replaced in one step.

    Parameters
    ----------
    path
        The folder, made if it does not exist; or a URL that fsspec knows.
    single_file_per_rank
        One file for each rank (and thread), or one for each item.
    sync_files
        Make everything durable before the checkpoint counts.
    thread_count
        Writing threads of each rank; each has its own file.
    per_thread_copy_ahead
        Accepted for torch's sake: copies from a device are made one tensor at a time.
    cache_staged_state_dict
        Keep the copy's memory between asynchronous saves with this writer.
    overwrite
        Replace a checkpoint that is there already, instead of an error.
    _extensions
        Extensions, ours or torch's or a program's own, that every entry goes through; the one
        named last is applied first.
    serialization_format
        What tensors are written as: a ``torch.save`` record each, or one safetensors image in
        each file, which torch 2.13 writes, too, but cannot read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
    ) -> None:
        self.extensions = check_extensions(_extensions or ())
        # By value, so that torch's own enumeration serves, too.
        self._writes_images = serialization_format.value == SerializationFormat.SAFETENSORS.value
        if self._writes_images and self.extensions:
            raise NotSupportedError("safetensors images cannot be written through extensions")
        if thread_count < 1:
            raise PlanError(f"thread_count must be at least 1, not {thread_count}")
        BlockingAsyncStager.__init__(self, cache_staged_state_dict=cache_staged_state_dict)
        self.single_file_per_rank = single_file_per_rank
        self.sync_files = sync_files
        self.thread_count = thread_count
        self.per_thread_copy_ahead = per_thread_copy_ahead
        self.overwrite = overwrite
        self.serialization_format = serialization_format
        self.rank: int | None = None
        self.use_collectives = True
        self.is_coordinator = False
        self.fs: FileSystemBase = FileSystem()
        self.path = self.fs.init_path(path)
        self._begin()

    def _begin(self) -> None:
        self.save_id = secrets.token_hex(16)
        self._written: list[str] = []
        self._turn: committing.Turn | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._end_turn()
        if checkpoint_id:
            self.path = self.fs.init_path(checkpoint_id)
        self._begin()

    def _take_turn(self) -> None:
        self._end_turn()
        self._turn = committing.begin(
            self.storage, self._metadata_name(), shared=not self.use_collectives
        )

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.end()

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_place(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.is_coordinator = is_coordinator
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.storage.prepare()
        if not self.overwrite and self.storage.has(self._metadata_name()):
            raise CheckpointExistsError(
                f"{self.path} holds a checkpoint already and overwrite=False was given"
            )
        if self.use_collectives:
            return plan
        if self.storage.has(committing.METADATA_NAME):
            # Readers would go on to find the old one, and its files would be cleaned away.
            raise CheckpointExistsError(
                f"{self.path} holds a checkpoint saved with collectives, which ranks that save "
                f"without them cannot replace: give another folder"
            )
        self._take_turn()
        rank = self.rank or 0
        prefix = committing.data_prefix(rank, committing.new_token(self.storage, rank))
        return replace(plan, storage_data=_StoragePrefix(prefix))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if not self.use_collectives:
            return plans
        self._take_turn()
        token = committing.new_token(self.storage)
        return [
            replace(plan, storage_data=_StoragePrefix(committing.data_prefix(rank, token)))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not isinstance(plan.storage_data, _StoragePrefix):
            raise PlanError("prepare_global_plan was not called on this plan")
        columns = columns_of(plan.items)
        prepared = prepare_records(plan.items, columns, planner)
        buckets = self._buckets(columns)
        if self._writes_images:
            buckets = list(without_repeated_keys(buckets, columns))
        ends = [f"{number}{DEFAULT_SUFFIX}" for number in range(len(buckets))]
        prefix = plan.storage_data.prefix
        if not self.is_coordinator:
            prefix = committing.own_prefix(self.storage, prefix, self.rank or 0, ends)
        files = {prefix + end: rows for end, rows in zip(ends, buckets, strict=True)}
        make_ready_for_threads()
        writer = RowWriter(
            self.storage,
            columns,
            prepared,
            _StorageInfo,
            threads=max(self.thread_count, default_threads()),
            sync=self.sync_files,
        )
        if self._writes_images:
            results = writer.write_images(files)
        else:
            results = writer.write(files, extensions=self.extensions)
        # Not before: what could not be written is gone already, or is another save's.
        self._written = list(files)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _buckets(self, columns: WriteColumns) -> list[npt.NDArray[np.int64]]:
        """Distribute the rows over files; objects come first in each."""
        is_object = columns.kind == OBJECT
        objects, tensors = np.flatnonzero(is_object), np.flatnonzero(~is_object)
        if not len(columns):
            return []
        if not self.single_file_per_rank:
            return np.split(np.concatenate([objects, tensors]), len(columns))
        return spread_rows(objects, tensors, columns.nbytes[tensors], self.thread_count)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        index = attach_storage(index_of(metadata), written_by(results))
        meta = self.storage_meta()
        index = replace(
            index,
            version=CURRENT_DCP_VERSION,
            storage_meta=None if meta is None else dict(vars(meta)),
        )
        finished = metadata_of(index, _StorageInfo)
        vars(metadata).update(vars(finished))
        kept = self._commit(index)
        try:
            committing.remove_replaced(
                self.storage, kept, rank=None if self.use_collectives else self.rank
            )
        except ShardpointError as error:  # the save itself is done; the next one cleans up
            logger.warning("%s: the replaced checkpoint's files remain: %s", self.path, error)
        self._end_turn()

    def clean_up(self, index: CheckpointIndex, *, coordinator_rank: int) -> None:
        """Remove what a save that counts has replaced, on a rank that did not commit it."""
        try:
            committing.remove_own_elsewhere(
                self.storage,
                set(index.files),
                rank=self.rank or 0,
                coordinator_rank=coordinator_rank,
            )
        except ShardpointError as error:
            logger.warning("%s: the replaced checkpoint's files remain: %s", self.path, error)

    def _commit(self, index: CheckpointIndex) -> set[str]:
        """Write index and metadata; return the files that make up the checkpoint."""
        kept = set(index.files)
        native = None
        with collection_paused():
            encoded = write_metadata(index)
            if self.use_collectives:
                try:
                    native = committing.index_for(index, encoded)
                except FormatError as error:  # the metadata says it all but for the checksums
                    logger.warning("%s: saved without an index: %s", self.path, error)
        if native is not None:
            kept.add(native[0])
            self._written.append(native[0])
        if self._turn is not None:
            self._turn.check()
        committing.commit(
            self.storage, self._metadata_name(), encoded, index=native, sync=self.sync_files
        )
        self._written = []
        return kept

    def abort(self) -> None:
        """Remove what this rank has written of a save that failed on some rank.

        Where the commit itself failed it may have come through all the same (the rename was
        done, the folder's sync failed): then the files count and stay.
        """
        self._end_turn()
        written, self._written = self._written, []
        if written and not committing.holds_any(self.storage, self._metadata_name(), written):
            for name in written:
                self.storage.remove(name)

    def _metadata_name(self) -> str:
        if self.use_collectives:
            return committing.METADATA_NAME
        return committing.rank_metadata_name(self.rank or 0)


class FileSystemReader(StoragePlace, StorageReader):
    """Reads a checkpoint: a folder of torch's or of safetensors files, or a torch.save file.

    Parameters
    ----------
    path
        The folder or file; or its URL.
    _extension_registry
        An `ExtensionRegistry`, ours or torch's, with the extensions that the checkpoint was
        written with beyond those every registry has.
    verify
        Compare what is read with its checksums, where whole records are read.
    thread_count
        Reading threads; None is a number that fits the machine.
    allowed
        Classes that objects in a ``torch.save`` file may hold beyond the closed list.

    Attributes
    ----------
    storage_data
        Where each item lies, as the metadata has it; a subclass may put another in its place.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: Registry | None = None,
        *,
        verify: bool = True,
        thread_count: int | None = None,
        allowed: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.finder = RegistryFinder(_extension_registry)
        self.verify = verify
        self.allowed = allowed
        self.thread_count = thread_count or default_threads()
        self.fs: FileSystemBase = FileSystem()
        self.path = self.fs.init_path(path)
        self._begin()

    def _begin(self) -> None:
        self._forget_storage()
        self.load_id = secrets.token_hex(16)
        self.statistics: ReadStatistics | None = None
        self._index: CheckpointIndex | None = None
        self._metadata: Metadata | None = None
        self.storage_data: dict[MetadataIndex, Any] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.path = self.fs.init_path(checkpoint_id)
        self._begin()

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder or file."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_place(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        wait_until_written(self.path)
        with collection_paused():
            self._index, self.storage = self._open(kwargs.get("rank"))
        metadata = metadata_of(self._index, _StorageInfo)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self._metadata, self.storage_data = metadata, metadata.storage_data
        return metadata

    def _open(self, rank: int | None) -> tuple[CheckpointIndex, Storage]:
        return open_index(
            self.path if is_known(self.fs) else self.storage,
            prefer_rank=rank,
            allowed=with_safe_globals(self.allowed),
            options=getattr(self.fs, "options", None),
        )

    @property
    def is_per_rank(self) -> bool:
        """Whether each rank saved metadata of its own."""
        return self._index is not None and self._index.source == "dcp-per-rank"

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._metadata, self.storage_data = metadata, metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if self._metadata is None:
            raise PlanError("set_up_storage_reader was not called")
        index = stored_index_of(self._metadata, self.storage_data)
        with noticing_replacement(index, self.storage):
            self.statistics = carry_out(
                plan,
                planner,
                index,
                self.storage,
                threads=self.thread_count,
                verify=self.verify,
                finder=self.finder,
            )
        future: Future[None] = Future()
        future.set_result(None)
        return future
