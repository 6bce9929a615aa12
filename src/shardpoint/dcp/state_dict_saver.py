"""Saving a state dict from one process or from all ranks of a group."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.distributed as dist

from shardpoint.coordination import (
    Coordinator,
    SingleProcess,
    broadcast_result,
    gather_scatter,
)
from shardpoint.dcp._async_saving import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    SaveRequest,
    start_save,
)
from shardpoint.dcp._file_system import place_text
from shardpoint.dcp._metadata_view import index_of, metadata_of
from shardpoint.dcp._pending import settle
from shardpoint.dcp._process_group import Timeout, coordinator_for
from shardpoint.dcp._save_planning import cache_of, plan_together
from shardpoint.dcp._signatures import accepted
from shardpoint.dcp._state import call_state_dict
from shardpoint.dcp._torch_objects import is_torchs_object, ours
from shardpoint.dcp._torch_parts import saving_parts
from shardpoint.dcp._write_results import bytes_of
from shardpoint.dcp.api import checkpoint_exceptions
from shardpoint.dcp.default_planner import DefaultSavePlanner
from shardpoint.dcp.filesystem import FileSystemWriter, _StorageInfo
from shardpoint.dcp.metadata import STATE_DICT_TYPE, Metadata
from shardpoint.dcp.planner import SavePlan, SavePlanner
from shardpoint.dcp.staging import AsyncStager
from shardpoint.dcp.storage import StorageWriter, WriteResult
from shardpoint.errors import PlanError, RankFailedError, ShardpointError
from shardpoint.index import CheckpointIndex

__all__ = [
    "AsyncCheckpointerType",
    "AsyncSaveResponse",
    "async_save",
    "save",
    "save_state_dict",
]

logger = logging.getLogger(__name__)


def save_state_dict(
    state_dict: STATE_DICT_TYPE,
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Save without calling `Stateful`s; use `save`.

    .. deprecated:: as in torch.
    """
    warnings.warn("save_state_dict is deprecated, use save instead", FutureWarning, stacklevel=2)
    storage_writer.reset()
    return _save_state_dict(
        state_dict, storage_writer, process_group, coordinator_rank, no_dist, planner
    )


def save(
    state_dict: STATE_DICT_TYPE,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    timeout: Timeout = None,
) -> Metadata:
    """Save a state dict; every rank of the group calls this with its part.

    The checkpoint is complete, or not there at all: whatever was at that place before stays
    readable until the new one counts.

    Parameters
    ----------
    state_dict
        Tensors, `DTensor` s, `ShardedTensor` s, objects, containers of them, and `Stateful` s,
        whose ``state_dict()`` is called.
    checkpoint_id
        The folder, or a URL that fsspec knows.
    storage_writer
        Where to write; None is a `FileSystemWriter` of `checkpoint_id`.
    planner
        What to write; None is a `DefaultSavePlanner`.
    process_group
        The ranks that save together; None is all.
    no_dist
        Save from this process alone, whatever groups there are.
    use_collectives
        False: each rank saves on its own, with a metadata file of its own.
    timeout
        Seconds, or a `timedelta`, that ranks wait for one another in each step; None is the
        process group's timeout. It has to be longer than the slowest rank's writing takes
        beyond the fastest one's.

    Returns
    -------
    Metadata
        Of the saved checkpoint, on every rank.

    Raises
    ------
    CheckpointException
        On every rank, if any rank failed at any step or is gone; names the ranks and the
        causes. Where ranks hung, the process group cannot be used any more.
    """
    if use_collectives:
        coordinator = coordinator_for(process_group, 0, no_dist, timeout=timeout, name="save")
        rank = None
    else:
        coordinator = SingleProcess()
        rank = coordinator_for(process_group, 0, no_dist, timeout=timeout, name="save").rank
    return _save(
        lambda: _current_state(state_dict),
        make_writer=lambda: _writer(storage_writer, checkpoint_id),
        planner=planner,
        coordinator=coordinator,
        rank=rank,
    )


def _current_state(state_dict: STATE_DICT_TYPE) -> dict[str, Any]:
    settle()  # here, so that all ranks hear of it if an asynchronous save failed
    return call_state_dict(state_dict)


def async_save(
    state_dict: STATE_DICT_TYPE,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    timeout: Timeout = None,
) -> Future[Metadata] | AsyncSaveResponse:
    """Copy a state dict, and save the copy while the program goes on.

    When this returns, or with a stager that copies in the background when
    ``staging_completion`` is done, tensors and objects may be changed: the checkpoint has
    their values from before.

    Saves follow one another: this waits for the one before, and so does `save`. The program
    does not exit before the last is done.

    Parameters
    ----------
    state_dict, checkpoint_id, storage_writer, planner, process_group, no_dist
    use_collectives, timeout
        As for `save`. All ranks of the group call this; the first call for a group makes a
        second one of the same ranks, for the background alone. In the process form writer,
        planner and objects are pickled, and the program's own ones stay as they are.
    async_checkpointer_type
        Save in a thread of this process, or in a process of its own, which is started once.
    async_stager
        Who copies. None is the storage writer, where it is a stager too (a
        `FileSystemWriter` is), or a `BlockingAsyncStager`.

    Returns
    -------
    Future of Metadata
        Done when the checkpoint is complete.
    AsyncSaveResponse
        Instead, if the stager's ``stage`` gave a future.

    Raises
    ------
    CheckpointException
        From the future, as `save` raises it. Here, if the asynchronous save before failed
        and nobody has asked its future: then this one was not begun.
    PlanError
        If a value of the state cannot be copied. The other ranks' futures name this one.
    """
    return start_save(
        state_dict,
        SaveRequest(checkpoint_id, storage_writer, planner, rank=None),
        process_group=process_group,
        kind=async_checkpointer_type,
        async_stager=async_stager,
        no_dist=no_dist,
        use_collectives=use_collectives,
        timeout=timeout,
        save=save_staged,
    )


def save_staged(
    request: SaveRequest, staged: Callable[[], dict[str, Any]], coordinator: Coordinator
) -> Metadata:
    """Save what an asynchronous save has copied; runs in the background."""
    return _save(
        staged,
        make_writer=lambda: _writer(request.storage_writer, request.checkpoint_id),
        planner=request.planner,
        coordinator=coordinator,
        rank=request.rank,
    )


def _save_state_dict(
    state_dict: STATE_DICT_TYPE,
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
    use_collectives: bool = True,
) -> Metadata:
    """Save without `Stateful`s to a writer that is set up already."""
    coordinator = coordinator_for(process_group, coordinator_rank, no_dist, name="save")
    return _save(
        lambda: state_dict,
        make_writer=lambda: storage_writer,
        planner=planner,
        coordinator=coordinator if use_collectives else SingleProcess(),
        rank=None if use_collectives else coordinator.rank,
    )


def _writer(
    storage_writer: StorageWriter | None, checkpoint_id: str | os.PathLike[str] | None
) -> StorageWriter:
    if storage_writer is not None:
        storage_writer.reset(checkpoint_id)
        return storage_writer
    if checkpoint_id is None:
        raise PlanError("save needs a checkpoint_id or a storage_writer")
    if not place_text(checkpoint_id):
        raise PlanError("no checkpoint can be written to '': give a folder or a URL")
    return FileSystemWriter(checkpoint_id)


@dataclass
class _Save:
    """One save on one rank."""

    state: Callable[[], dict[str, Any]]
    make_writer: Callable[[], StorageWriter]
    planner: SavePlanner
    coordinator: Coordinator
    rank: int | None
    writer: StorageWriter | None = None
    metadata: Metadata | None = None
    results: list[list[WriteResult]] | None = None
    bytes_written: int = 0

    def plan_locally(self) -> SavePlan:
        self.planner, writer = saving_parts(self.planner, self.make_writer())
        self.writer = writer
        is_coordinator = self.coordinator.is_coordinator
        set_up_planner = self.planner.set_up_planner
        meta = accepted(set_up_planner, storage_meta=writer.storage_meta())
        set_up_planner(self.state(), is_coordinator=is_coordinator, **meta)
        keywords = accepted(
            writer.set_up_storage_writer,
            rank=self.coordinator.rank if self.rank is None else self.rank,
            use_collectives=self.rank is None,
        )
        writer.set_up_storage_writer(is_coordinator, **keywords)
        return writer.prepare_local_plan(self.planner.create_local_plan())

    def plan_globally(self, plans: list[SavePlan]) -> list[SavePlan]:
        assert self.writer is not None
        plans, self.metadata = self.planner.create_global_plan(plans)
        return self.writer.prepare_global_plan(plans)

    def write(self, plan: SavePlan) -> list[WriteResult]:
        assert self.writer is not None
        future = self.writer.write_data(self.planner.finish_plan(plan), self.planner)
        results: list[WriteResult] = future.wait()
        self.bytes_written = bytes_of(results)
        return results

    def collect(self, results: list[list[WriteResult]]) -> list[None]:
        self.results = results
        return [None] * len(results)

    def finish(self) -> Metadata | CheckpointIndex:
        assert self.writer is not None
        assert self.metadata is not None
        assert self.results is not None
        self.writer.finish(self.metadata, self.results)
        # columns travel better than objects, and every rank can make the same view of them
        index = getattr(self.metadata, "_index", None)
        return self.metadata if index is None else index_of(self.metadata)


def _save(
    state: Callable[[], dict[str, Any]],
    *,
    make_writer: Callable[[], StorageWriter],
    planner: SavePlanner | None,
    coordinator: Coordinator,
    rank: int | None,
) -> Metadata:
    run = _Save(
        state=state,
        make_writer=make_writer,
        planner=planner if planner is not None else DefaultSavePlanner(),
        coordinator=coordinator,
        rank=rank,
    )
    times = [time.perf_counter()]
    with checkpoint_exceptions():
        try:
            plan = plan_together(run, coordinator, cache_of(planner, coordinator))
            times.append(time.perf_counter())
            gather_scatter(coordinator, "write", lambda: run.write(plan), run.collect)
            times.append(time.perf_counter())
            finished = broadcast_result(coordinator, "commit", run.finish)
        except BaseException as error:
            # A rank that merely lost contact cannot know whether the coordinator still
            # commits: its files stay then, and if they do not count the next save removes them.
            if coordinator.is_coordinator or (
                isinstance(error, RankFailedError) and error.is_agreed
            ):
                _abort(run)
            raise
    if not coordinator.is_coordinator and isinstance(finished, CheckpointIndex):
        _clean_up(run, finished)
    times.append(time.perf_counter())
    logger.info(
        "saved %d bytes of this rank's: plan %.3f s, write %.3f s, commit %.3f s",
        run.bytes_written,
        *(after - before for before, after in pairwise(times)),
    )
    if isinstance(finished, CheckpointIndex):
        return metadata_of(finished, _StorageInfo)
    if is_torchs_object(finished):  # planner and writer are torch's, too
        finished = ours(finished)
    return finished


def _clean_up(run: _Save, index: CheckpointIndex) -> None:
    if isinstance(run.writer, FileSystemWriter):
        run.writer.clean_up(index, coordinator_rank=run.coordinator.coordinator_rank)


def _abort(run: _Save) -> None:
    """Let the writer clean up; the error that broke the save off is the one that counts."""
    abort = getattr(run.writer, "abort", None)
    if abort is not None:
        try:
            abort()
        except ShardpointError as error:
            logger.warning("cleaning up after a failed save failed too: %s", error)
