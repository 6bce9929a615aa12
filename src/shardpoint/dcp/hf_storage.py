"""Checkpoints as safetensors files, as Hugging Face's libraries load them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch.futures import Future

from shardpoint.convert import to_safetensors
from shardpoint.convert.placing import place_name
from shardpoint.convert.safetensors import write_full_files
from shardpoint.convert.source import Source
from shardpoint.coordination import gather_scatter
from shardpoint.dcp._file_system import storage_of
from shardpoint.dcp._hf_planning import HuggingFacePlan, SaveShape, is_stale, shape_of_save
from shardpoint.dcp._hf_writing import write_own_files, write_shared_files
from shardpoint.dcp._process_group import coordinator_for
from shardpoint.dcp.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    SerializationFormat,
    _StorageInfo,
)
from shardpoint.dcp.metadata import Metadata
from shardpoint.dcp.planner import SavePlan, SavePlanner
from shardpoint.dcp.storage import WriteResult
from shardpoint.errors import CheckpointExistsError, NotSupportedError, PlanError, ShardpointError
from shardpoint.formats.huggingface import read_directory
from shardpoint.formats.huggingface_writing import (
    FULL_METADATA,
    INDEX_NAME,
    encode_index,
    file_name,
    sharding_metadata,
)
from shardpoint.formats.safetensors import encode_header
from shardpoint.index import CheckpointIndex
from shardpoint.storage import SharedStorage, Storage, storage_at

__all__ = [
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "consolidate_safetensors_files",
    "consolidate_safetensors_files_on_every_rank",
]

logger = logging.getLogger(__name__)

_SHARDED = "sharded"


class HuggingFaceStorageWriter(FileSystemWriter):
    """Writes safetensors files: full ones with an index, or each rank's shards.

    Full files are written by all ranks together, each its own parts at their places, where the
    store allows that; no rank has more in memory than its parts, and nothing is written twice.
    Files appear under their names when all are complete, the index last.

    Parameters
    ----------
    path
        The folder or URL.
    fqn_to_index_mapping
        Which file each tensor goes into, from 1 on; None is one file for all.
    thread_count
        Accepted for torch's sake: a number that fits the machine is used.
    save_distributed
        Write each rank's shards into files of its own, unless `enable_consolidation`.
    enable_consolidation
        Write full files.
    thread_count_consolidation
        Tensors in memory at once, where the store makes a second pass over the shards
        necessary.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fqn_to_index_mapping: dict[str, int] | None = None,
        thread_count: int = 1,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        thread_count_consolidation: int = 1,
    ) -> None:
        super().__init__(path=path, thread_count=thread_count)
        self.serialization_format = SerializationFormat.SAFETENSORS
        self.fqn_to_index_mapping = fqn_to_index_mapping
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.thread_count_consolidation = thread_count_consolidation
        self.consolidated_output_path = str(path) if enable_consolidation else None
        self._shape: SaveShape | None = None
        self._renames: dict[str, str] = {}
        self._is_second_pass = False

    @property
    def metadata_path(self) -> str:
        """The index's name."""
        return INDEX_NAME

    @property
    def _writes_shards(self) -> bool:
        return self.save_distributed and not self.enable_consolidation

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not self.use_collectives:
            raise NotSupportedError("safetensors files cannot be saved with use_collectives=False")
        self._written = []
        self._renames = {}
        self.storage.prepare()
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        shape = self._shape = shape_of_save(plans, self.fqn_to_index_mapping)
        is_shared = isinstance(self.storage, SharedStorage)
        if not self._writes_shards and is_shared:
            told = self._create_shared(shape)
        else:
            is_full = not self._writes_shards and shape.have_one_owner_each()
            self._is_second_pass = not self._writes_shards and not is_full
            told = self._name_own(shape, is_full=is_full)
        return [
            dataclasses.replace(plan, storage_data=part)
            for plan, part in zip(plans, told, strict=True)
        ]

    def _create_shared(self, shape: SaveShape) -> list[HuggingFacePlan]:
        """Make the full files with their headers; say where each tensor begins."""
        places: dict[str, tuple[str, int]] = {}
        for file in shape.full_files():
            metadata: Mapping[str, str] = FULL_METADATA
            if not self.save_distributed:  # as torch writes these
                metadata = sharding_metadata(
                    {key: [0] * len(sizes) for key, _, sizes in file.tensors}
                )
            header, spans = encode_header(file.tensors, metadata=metadata)
            end = max((span[1] for span in spans.values()), default=len(header))
            name = self._place(file.name)
            with self.storage.create(name, size=end) as created:
                self._written.append(name)
                created.write_from(0, [memoryview(header)])
            places.update((key, (name, start)) for key, (start, _) in spans.items())
        told = []
        for table in shape.tables:
            files = list(dict.fromkeys(places[key][0] for key in table.keys))
            numbers = {name: number for number, name in enumerate(files)}
            told.append(
                HuggingFacePlan(
                    files=files,
                    file_of=[numbers[places[key][0]] for key in table.keys],
                    starts=[places[key][1] for key in table.keys],
                    is_full=True,
                )
            )
        return told

    def _name_own(self, shape: SaveShape, *, is_full: bool) -> list[HuggingFacePlan]:
        """Give each rank names for files of its own."""
        if self._writes_shards and self._holds_full_files():
            raise CheckpointExistsError(
                f"{self.path} holds full safetensors files, which readers would take in place of "
                f"the shards: give another folder"
            )
        folder = f"{_SHARDED}/" if self._is_second_pass else ""
        told = []
        for rank, table in enumerate(shape.tables):
            shard = None if is_full else rank + 1
            numbers = list(dict.fromkeys(shape.numbers[key] for key in table.keys))
            names = [
                self._place(folder + file_name(number, shape.count, shard)) for number in numbers
            ]
            positions = {number: position for position, number in enumerate(numbers)}
            file_of = [positions[shape.numbers[key]] for key in table.keys]
            told.append(HuggingFacePlan(names, file_of, starts=None, is_full=is_full))
        return told

    def _place(self, name: str) -> str:
        """Return where a file is written that is called `name` in the end."""
        place = place_name(self.storage, name)
        self._renames[place] = name
        return place

    def _holds_full_files(self) -> bool:
        return any(
            name == INDEX_NAME or (name.startswith("model") and name.endswith(".safetensors"))
            for name in self.storage.list_folder()
        )

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        told = plan.storage_data
        if not isinstance(told, HuggingFacePlan):
            raise PlanError("prepare_global_plan was not called on this plan")
        if told.starts is None:
            self._written = list(told.files)
        write = write_own_files if told.starts is None else write_shared_files
        spans = write(self.storage, told, plan.items, planner, sync=self.sync_files)
        results = [
            WriteResult(item.index, length, _StorageInfo(name, offset, length))
            for item, (name, offset, length) in zip(plan.items, spans, strict=True)
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        shape = self._shape
        if shape is None:
            raise PlanError("prepare_global_plan was not called")
        for place, name in self._renames.items():
            if place != name:
                self.storage.rename(place, name)
        self._written = []
        keep = {*self._renames.values()}
        if self._is_second_pass:
            shards = storage_of(self.fs, self.fs.concat_path(self.path, _SHARDED))
            to_safetensors(
                shards,
                self.storage,
                file_numbers={key: shape.numbers[key] for key in shape.tensors},
                threads=self.thread_count_consolidation,
                sync=self.sync_files,
            )
        elif not self._writes_shards:
            names = {key: file_name(shape.numbers[key], shape.count) for key in shape.tensors}
            index = encode_index(names, shape.total_size())
            self.storage.replace(INDEX_NAME, index, sync=self.sync_files)
        if self._is_second_pass or not self._writes_shards:
            keep |= {file.name for file in shape.full_files()}
        self._remove_replaced(keep)
        if self.sync_files:
            self.storage.sync()

    def _remove_replaced(self, keep: set[str]) -> None:
        try:
            for name in self.storage.list():
                if is_stale(name, keep):
                    self.storage.remove(name)
        except ShardpointError as error:  # the save itself is done; the next one cleans up
            logger.warning("%s: the replaced checkpoint's files remain: %s", self.path, error)

    def abort(self) -> None:
        """Remove what this rank has written of a save that failed on some rank."""
        written, self._written = self._written, []
        for name in written:
            self.storage.remove(name)


class HuggingFaceStorageReader(FileSystemReader):
    """Reads safetensors files: full ones, by their index if there is one, or ranks' shards.

    Of each file only the header and the bytes that are wanted are read.

    Parameters
    ----------
    path
        The folder, or one file; a path or a URL.
    thread_count
        Reading threads, where more than the number that fits the machine.
    """

    def __init__(self, path: str | os.PathLike[str], thread_count: int = 1) -> None:
        super().__init__(path=path)
        self.thread_count = max(self.thread_count, thread_count)

    def _open(self, rank: int | None) -> tuple[CheckpointIndex, Storage]:
        if str(self.path).endswith((".safetensors", ".json")):
            return super()._open(rank)
        return read_directory(self.storage), self.storage


def consolidate_safetensors_files(
    input_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
) -> None:
    """Put the shards that ranks saved together into full files with an index.

    Parameters
    ----------
    input_dir, output_dir
        Folders or URLs.
    fqn_to_index_mapping
        Which file each tensor goes into, from 1 on.
    num_threads
        How many pieces are read at once.

    Raises
    ------
    PlanError
        If the mapping does not name each tensor of the shards, and only those.
    """
    to_safetensors(
        input_dir, output_dir, file_numbers=fqn_to_index_mapping, threads=max(1, num_threads)
    )


def consolidate_safetensors_files_on_every_rank(
    input_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Do what `consolidate_safetensors_files` does on all ranks, each for some of the files.

    Parameters
    ----------
    process_group
        The ranks that take part; None is all.

    Raises
    ------
    RankFailedError
        On every rank, if one failed.
    """
    coordinator = coordinator_for(process_group, 0, False)
    storage = storage_at(output_dir)

    def write() -> tuple[dict[str, str], int]:
        source = Source(input_dir, threads=max(1, num_threads))
        chosen = {
            number
            for number in set(fqn_to_index_mapping.values())
            if number % coordinator.world_size == coordinator.rank
        }
        return write_full_files(source, storage, fqn_to_index_mapping, chosen, sync=True)

    def finish(parts: Sequence[tuple[dict[str, str], int]]) -> list[None]:
        weight_map = {key: name for part, _ in parts for key, name in part.items()}
        ordered = {key: weight_map[key] for key in fqn_to_index_mapping}
        index = encode_index(ordered, sum(total for _, total in parts))
        storage.replace(INDEX_NAME, index, sync=True)
        return [None] * len(parts)

    gather_scatter(coordinator, "consolidate", write, finish)
