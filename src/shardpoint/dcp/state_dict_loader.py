"""Loading into a state dict, in one process or on all ranks of a group."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from shardpoint.coordination import Coordinator, agree, gather_scatter
from shardpoint.dcp._file_system import place_text
from shardpoint.dcp._process_group import Timeout, coordinator_for
from shardpoint.dcp._signatures import accepted, takes
from shardpoint.dcp._state import is_stateful
from shardpoint.dcp._torch_parts import loading_parts
from shardpoint.dcp.api import checkpoint_exceptions
from shardpoint.dcp.default_planner import (
    DefaultLoadPlanner,
    Narrowing,
    _EmptyStateDictLoadPlanner,
)
from shardpoint.dcp.filesystem import FileSystemReader
from shardpoint.dcp.metadata import STATE_DICT_TYPE, Metadata
from shardpoint.dcp.planner import LoadPlan, LoadPlanner
from shardpoint.dcp.storage import StorageReader
from shardpoint.engine.unfinished import wait_until_written
from shardpoint.errors import PlanError

__all__ = ["LoadReport", "load", "load_state_dict"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did on this rank.

    Attributes
    ----------
    missing
        Flat keys of the state dict that the checkpoint lacks (with ``allow_partial_load``).
    unexpected
        Flat keys of the checkpoint that the state dict did not ask for.
    bytes_read
        Bytes read from data files; the metadata file is not counted.
    seconds
        Wall time.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    bytes_read: int
    seconds: float


def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Load without calling `Stateful`s; use `load`.

    .. deprecated:: as in torch.
    """
    warnings.warn("load_state_dict is deprecated, use load instead", FutureWarning, stacklevel=2)
    storage_reader.reset()
    _load_state_dict(state_dict, storage_reader, process_group, coordinator_rank, no_dist, planner)


def load(
    state_dict: STATE_DICT_TYPE,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    on_narrowing: Narrowing = "warn",
    allowed: Mapping[str, Callable[..., Any]] | None = None,
    timeout: Timeout = None,
) -> LoadReport:
    """Fill a state dict from a checkpoint; every rank of the group calls this.

    Tensors are filled in place, in whatever layout they have here; of the checkpoint only
    the bytes they need are read. Objects are replaced. Each `Stateful` is asked for its
    ``state_dict()`` and given it back by ``load_state_dict()``. Whatever does not fit is
    found before anything is read or changed.

    Parameters
    ----------
    state_dict
        What to fill. All ranks give the same keys at the top.
    checkpoint_id
        The folder, or a ``torch.save`` or safetensors file; a path or a URL.
    storage_reader
        What to read from; None is a `FileSystemReader` of `checkpoint_id`.
    planner
        What to read; None is a `DefaultLoadPlanner`.
    process_group
        The ranks that load together; None is all.
    no_dist
        Load in this process alone, whatever groups there are.
    on_narrowing, allowed
        For the default planner; see `DefaultLoadPlanner`.
    timeout
        Seconds, or a `timedelta`, that ranks wait for one another in each step; None is the
        process group's timeout.

    Returns
    -------
    LoadReport

    Raises
    ------
    CheckpointException
        On every rank, if any rank failed at any step or is gone; names the ranks and the
        causes. Where ranks hung, the process group cannot be used any more.
    """
    started = time.perf_counter()
    if planner is None:
        planner = DefaultLoadPlanner(on_narrowing=on_narrowing, allowed=allowed)
    elif on_narrowing != "warn" or allowed:
        raise PlanError("on_narrowing and allowed are for the default planner: give them to yours")
    coordinator = coordinator_for(process_group, 0, no_dist, timeout=timeout, name="load")
    run = _Load(
        state=lambda: _states(state_dict),
        make_reader=lambda: _reader(storage_reader, checkpoint_id, allowed),
        reader_kind=FileSystemReader if storage_reader is None else type(storage_reader),
        planner=planner,
        coordinator=coordinator,
    )
    run.run()
    with checkpoint_exceptions():
        agree(coordinator, "load_state_dict", lambda: _hand_back(state_dict, run.loaded))
    return LoadReport(
        missing=tuple(getattr(planner, "missing", ())),
        unexpected=tuple(getattr(planner, "unexpected", ())),
        bytes_read=run.bytes_read,
        seconds=time.perf_counter() - started,
    )


def _states(state_dict: STATE_DICT_TYPE) -> dict[str, Any]:
    # sorted, so that states whose making is collective are made in the same order everywhere;
    # as text, since numbers may be among the keys
    return {
        key: value.state_dict() if is_stateful(value := state_dict[key]) else value
        for key in sorted(state_dict, key=str)
    }


def _hand_back(state_dict: STATE_DICT_TYPE, loaded: dict[str, Any]) -> None:
    for key, target in list(state_dict.items()):
        value = loaded[key]
        if is_stateful(target):
            target.load_state_dict(value)
        else:
            state_dict[key] = value


def _reader(
    storage_reader: StorageReader | None,
    checkpoint_id: str | os.PathLike[str] | None,
    allowed: Mapping[str, Callable[..., Any]] | None = None,
) -> StorageReader:
    # one that this process is still writing is read when it is complete
    wait_until_written(checkpoint_id or getattr(storage_reader, "checkpoint_id", None))
    if storage_reader is not None:
        storage_reader.reset(checkpoint_id)
        return storage_reader
    if checkpoint_id is None:
        raise PlanError("load needs a checkpoint_id or a storage_reader")
    if not place_text(checkpoint_id):
        raise PlanError("there is no checkpoint at '': give a folder, a file or a URL")
    return FileSystemReader(checkpoint_id, allowed=allowed)


@dataclass
class _Load:
    """One load on one rank."""

    state: Callable[[], dict[str, Any]]
    make_reader: Callable[[], StorageReader]
    reader_kind: type[StorageReader]
    planner: LoadPlanner
    coordinator: Coordinator
    reader: StorageReader | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    save_id: str = ""

    def run(self) -> None:
        started = time.perf_counter()
        with checkpoint_exceptions():
            plan = self._plan()
            planned = time.perf_counter()
            agree(self.coordinator, "read", lambda: self._read(plan))
        logger.info(
            "loaded %d bytes on this rank: plan %.3f s, read %.3f s",
            self.bytes_read,
            planned - started,
            time.perf_counter() - planned,
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of data files; 0 where the storage does not say."""
        statistics = getattr(self.reader, "statistics", None)
        return 0 if statistics is None else int(statistics.bytes_read)

    def _plan(self) -> LoadPlan:
        if self.coordinator.world_size == 1:
            if self._plans_alone():
                return agree(self.coordinator, "plan", self._plan_locally)
            return gather_scatter(self.coordinator, "plan", self._plan_locally, self._plan_globally)
        local: list[LoadPlan] = []

        def announce() -> _Found:
            local.append(self._plan_locally())
            return _Found(self.place, self.save_id, sends_plan=not self._plans_alone())

        def decide(found: list[_Found]) -> list[bool]:
            _check_same(found)
            return [any(rank.sends_plan for rank in found)] * len(found)

        if gather_scatter(self.coordinator, "plan", announce, decide):
            return gather_scatter(self.coordinator, "plan", lambda: local[0], self._plan_globally)
        return local[0]

    def _plans_alone(self) -> bool:
        """Whether nobody wants to see all ranks' plans: then they need not be sent."""
        return (
            getattr(type(self.planner), "create_global_plan", None)
            is DefaultLoadPlanner.create_global_plan
            and self.reader_kind.prepare_global_plan is FileSystemReader.prepare_global_plan
        )

    def _plan_locally(self) -> LoadPlan:
        self.planner, reader = loading_parts(self.planner, self.make_reader())
        self.reader = reader
        self.loaded = self.state()
        rank, is_coordinator = self.coordinator.rank, self.coordinator.is_coordinator
        metadata, use_collectives = _read_metadata(reader, rank)
        if isinstance(reader, FileSystemReader) and not reader.is_per_rank:
            meta = metadata.storage_meta
            self.place = os.fspath(reader.checkpoint_id)
            self.save_id = (meta.save_id or "") if meta is not None else ""
        self.planner.set_up_planner(self.loaded, metadata, is_coordinator)
        set_up = reader.set_up_storage_reader
        keywords = accepted(set_up, rank=rank, use_collectives=use_collectives)
        set_up(metadata, is_coordinator, **keywords)
        return reader.prepare_local_plan(self.planner.create_local_plan())

    def _plan_globally(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        assert self.reader is not None
        return self.reader.prepare_global_plan(self.planner.create_global_plan(plans))

    def _read(self, plan: LoadPlan) -> None:
        assert self.reader is not None
        self.reader.read_data(self.planner.finish_plan(plan), self.planner).wait()


@dataclass(frozen=True, slots=True)
class _Found:
    """What a rank found to load: where, the save that it is of, if known; how it plans."""

    place: str
    save_id: str
    sends_plan: bool


def _check_same(found: Sequence[_Found]) -> None:
    """Raise where a checkpoint was replaced after some ranks had opened it.

    Ranks that load from different places mean to.
    """
    first: dict[str, int] = {}
    for rank, one in enumerate(found):
        other = first.setdefault(one.place, rank)
        wanted = found[other].save_id
        if wanted and one.save_id and wanted != one.save_id:
            raise PlanError(
                f"rank {other} opened save {wanted} of {one.place!r} and rank {rank} save "
                f"{one.save_id}: it was replaced meanwhile, so load again"
            )


def _read_metadata(reader: StorageReader, rank: int) -> tuple[Metadata, bool]:
    """Return the metadata, and whether the checkpoint has one for all ranks.

    Our own reader finds by itself what there is. Others are asked for the whole first and,
    where they can tell ranks apart, for this rank's then, as torch does.
    """
    if isinstance(reader, FileSystemReader):
        metadata = reader.read_metadata(**accepted(reader.read_metadata, rank=rank))
        return metadata, not reader.is_per_rank
    try:
        return reader.read_metadata(), True
    except Exception:
        if not takes(reader.read_metadata, "rank"):
            raise
        logger.info("no metadata for all ranks, looking for rank %d's", rank, exc_info=True)
        return reader.read_metadata(rank=rank), False


def _load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Fill a state dict without `Stateful`s from a reader that is set up already."""
    _Load(
        state=lambda: state_dict,
        make_reader=lambda: storage_reader,
        reader_kind=type(storage_reader),
        planner=planner if planner is not None else DefaultLoadPlanner(),
        coordinator=coordinator_for(process_group, coordinator_rank, no_dist, name="load"),
    ).run()


def _load_state_dict_from_keys(
    keys: set[str] | str | None = None,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Return a new state dict of the whole checkpoint, or of some keys, in this process.

    Parameters
    ----------
    keys
        Flat keys, or dotted beginnings of paths; None is everything.
    """
    state_dict: dict[str, Any] = {}
    _load_state_dict(
        state_dict,
        _reader(storage_reader, checkpoint_id),
        process_group,
        planner=_EmptyStateDictLoadPlanner(keys={keys} if isinstance(keys, str) else keys),
    )
    return state_dict
