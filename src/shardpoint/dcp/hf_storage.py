"""Checkpoints as safetensors files, as Hugging Face's libraries load them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch.futures import Future

from shardpoint.convert import to_safetensors
from shardpoint.convert.safetensors import check_convertible, full_names, write_full_files
from shardpoint.convert.source import Source
from shardpoint.coordination import gather_scatter
from shardpoint.dcp._hf_planning import HuggingFacePlan, SaveShape, shape_of_save
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
from shardpoint.engine.replacing import Replacement, begin_replacement, remove_uncommitted
from shardpoint.engine.safetensors_opening import open_safetensors
from shardpoint.errors import CheckpointExistsError, NotSupportedError, PlanError, RankFailedError
from shardpoint.formats.huggingface import find_files
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
from shardpoint.storage.renamed import RenamedStorage

__all__ = [
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "consolidate_safetensors_files",
    "consolidate_safetensors_files_on_every_rank",
]

_SHARDED = "sharded"
_SUFFIX = ".safetensors"


class HuggingFaceStorageWriter(FileSystemWriter):
    """Writes safetensors files: full ones with an index, or each rank's shards.

    Full files are written by all ranks together, each its own parts at their places, where the
    store allows that; no rank has more in memory than its parts, and nothing is written twice.
    What was there before, other software's full files included, stays until all new files are
    complete, and is then replaced as a whole; see `shardpoint.engine.replacing`.

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
        self._replacement: Replacement | None = None
        super().__init__(path=path, thread_count=thread_count)
        self.serialization_format = SerializationFormat.SAFETENSORS
        self.fqn_to_index_mapping = fqn_to_index_mapping
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.thread_count_consolidation = thread_count_consolidation
        self.consolidated_output_path = str(path) if enable_consolidation else None
        self._shape: SaveShape | None = None
        self._is_second_pass = False

    @property
    def metadata_path(self) -> str:
        """The index's name."""
        return INDEX_NAME

    @property
    def _writes_shards(self) -> bool:
        return self.save_distributed and not self.enable_consolidation

    def _end_turn(self) -> None:
        replacement, self._replacement = self._replacement, None
        if replacement is not None:
            replacement.end()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not self.use_collectives:
            raise NotSupportedError("safetensors files cannot be saved with use_collectives=False")
        self._written = []
        self.storage.prepare()
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        shape = self._shape = shape_of_save(plans, self.fqn_to_index_mapping)
        self._end_turn()
        is_shared = not self._writes_shards and isinstance(self.storage, SharedStorage)
        is_full = is_shared or (not self._writes_shards and shape.have_one_owner_each())
        self._is_second_pass = not self._writes_shards and not is_full
        names = [] if is_full else shape.shard_files("" if self._writes_shards else _SHARDED + "/")
        if not self._writes_shards:
            names += [*(file.name for file in shape.full_files()), INDEX_NAME]
        replacement = self._replacement = begin_replacement(
            self.storage, names, may_write=self._check_present
        )
        if is_shared:
            told = self._create_shared(shape, replacement.places)
        else:
            told = self._name_own(shape, replacement.places, is_full=is_full)
        return [
            dataclasses.replace(plan, storage_data=part)
            for plan, part in zip(plans, told, strict=True)
        ]

    def _check_present(self, names: Sequence[str]) -> None:
        if not self.overwrite and find_files(self.storage, names):
            raise CheckpointExistsError(
                f"{self.path} holds safetensors files already and overwrite=False was given"
            )
        full = (n == INDEX_NAME or (n.startswith("model") and n.endswith(_SUFFIX)) for n in names)
        if self._writes_shards and any(full):
            raise CheckpointExistsError(
                f"{self.path} holds full safetensors files, which readers would take in place of "
                f"the shards: give another folder"
            )

    def _create_shared(self, shape: SaveShape, where: Mapping[str, str]) -> list[HuggingFacePlan]:
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
            name = where[file.name]
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

    def _name_own(
        self, shape: SaveShape, where: Mapping[str, str], *, is_full: bool
    ) -> list[HuggingFacePlan]:
        """Give each rank names for files of its own."""
        folder = f"{_SHARDED}/" if self._is_second_pass else ""
        told = []
        for rank, table in enumerate(shape.tables):
            shard = None if is_full else rank + 1
            numbers = list(dict.fromkeys(shape.numbers[key] for key in table.keys))
            names = [where[folder + file_name(number, shape.count, shard)] for number in numbers]
            positions = {number: position for position, number in enumerate(numbers)}
            file_of = [positions[shape.numbers[key]] for key in table.keys]
            told.append(HuggingFacePlan(names, file_of, starts=None, is_full=is_full))
        return told

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
        shape, replacement = self._shape, self._replacement
        if shape is None or replacement is None:
            raise PlanError("prepare_global_plan was not called")
        index = None
        if self._is_second_pass:
            self._put_together(shape, replacement.places)
        if not self._writes_shards:
            names = {key: file_name(shape.numbers[key], shape.count) for key in shape.tensors}
            index = encode_index(names, shape.total_size())
        replacement.commit(index, removes_shards=True, sync=self.sync_files)
        self._written = []
        self._end_turn()

    def _put_together(self, shape: SaveShape, where: Mapping[str, str]) -> None:
        """Make full files of the shards."""
        folder = f"{_SHARDED}/"
        shards = {name: (where[name],) for name in where if name.startswith(folder)}
        source = Source(
            RenamedStorage(self.storage, shards, hidden=None),
            threads=max(1, self.thread_count_consolidation),
        )
        numbers = {key: shape.numbers[key] for key in shape.tensors}
        check_convertible(source, numbers)
        places = {file.number: where[file.name] for file in shape.full_files()}
        write_full_files(source, self.storage, numbers, places, sync=self.sync_files)
        self._written += places.values()

    def clean_up(self, index: CheckpointIndex, *, coordinator_rank: int) -> None:
        """Do nothing: all ranks write into one folder, and the coordinator cleans it up."""

    def abort(self) -> None:
        """Remove what this rank has written of a save that failed on some rank.

        Where the commit itself failed it may have come through all the same: then the files
        count and stay.
        """
        written, self._written = self._written, []
        replacement, self._replacement = self._replacement, None
        if replacement is not None:
            replacement.abort(written)
        else:
            remove_uncommitted(self.storage, written)


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
        return open_safetensors(self.storage, None, None)


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
    consolidation = _Consolidation(input_dir, storage_at(output_dir), fqn_to_index_mapping)
    try:
        places = gather_scatter(
            coordinator,
            "plan",
            lambda: consolidation.open(max(1, num_threads)),
            consolidation.begin,
        )
        gather_scatter(
            coordinator, "consolidate", lambda: consolidation.write(places), consolidation.finish
        )
    except BaseException as error:
        if coordinator.is_coordinator or (isinstance(error, RankFailedError) and error.is_agreed):
            consolidation.abort()
        raise


class _Consolidation:
    """What one rank does of it."""

    def __init__(
        self, source: str | os.PathLike[str], storage: Storage, numbers: Mapping[str, int]
    ) -> None:
        self._place = source
        self._storage = storage
        self._numbers = numbers
        self._names = full_names(numbers)
        self._source: Source | None = None
        self._replacement: Replacement | None = None
        self._written: list[str] = []

    def open(self, threads: int) -> None:
        """Look at the shards."""
        self._source = Source(self._place, threads=threads)
        check_convertible(self._source, self._numbers)
        self._storage.prepare()

    def begin(self, ranks: Sequence[None]) -> list[dict[int, str]]:
        """Return which files each rank writes, and where."""
        self._replacement = begin_replacement(
            self._storage, [*self._names.values(), INDEX_NAME], may_write=None
        )
        places = {n: self._replacement.places[name] for n, name in self._names.items()}
        return [
            {n: place for n, place in places.items() if n % len(ranks) == rank}
            for rank in range(len(ranks))
        ]

    def write(self, places: Mapping[int, str]) -> int:
        """Write this rank's files; return the bytes of their tensors."""
        assert self._source is not None
        total = write_full_files(self._source, self._storage, self._numbers, places, sync=True)
        self._written = list(places.values())
        return total

    def finish(self, totals: Sequence[int]) -> list[None]:
        """Let all files count."""
        assert self._replacement is not None
        index = encode_index({k: self._names[n] for k, n in self._numbers.items()}, sum(totals))
        self._replacement.commit(index, removes_shards=False, sync=True)
        self._replacement.end()
        return [None] * len(totals)

    def abort(self) -> None:
        """Remove what was written, unless it counts."""
        if self._replacement is not None:
            self._replacement.abort(self._written)
        else:
            remove_uncommitted(self._storage, self._written)
