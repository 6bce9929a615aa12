"""`async_save`: copy the state, return, and save the copy in the background."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, TypeAlias

import torch.distributed as dist

from shardpoint.coordination import Coordinator, SingleProcess, agree
from shardpoint.dcp._async_process import save_in_process, start_process
from shardpoint.dcp._background_group import background_coordinator
from shardpoint.dcp._file_system import StoragePlace, is_known
from shardpoint.dcp._guarded_coordinator import GuardedCoordinator, save_guarded
from shardpoint.dcp._pending import begin, settle
from shardpoint.dcp._process_group import Timeout
from shardpoint.dcp._state import call_state_dict
from shardpoint.dcp.api import checkpoint_exceptions
from shardpoint.dcp.default_planner import DefaultSavePlanner
from shardpoint.dcp.metadata import STATE_DICT_TYPE, Metadata
from shardpoint.dcp.planner import SavePlanner
from shardpoint.dcp.staging import AsyncStager, BlockingAsyncStager
from shardpoint.dcp.storage import StorageWriter
from shardpoint.errors import PlanError
from shardpoint.storage.places import local_path, path_text

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "SaveRequest", "start_save"]

logger = logging.getLogger(__name__)

StateGiver: TypeAlias = Callable[[], dict[str, Any]]
Saver: TypeAlias = Callable[["SaveRequest", StateGiver, Coordinator], Metadata]
"""Saves the state that the function gives, with all ranks of the coordinator."""


class AsyncCheckpointerType(Enum):
    """Where an asynchronous save runs."""

    THREAD = "thread"
    PROCESS = "process"


@dataclass
class AsyncSaveResponse:
    """What `async_save` returns where the stager copies in the background too.

    Attributes
    ----------
    staging_completion
        Done when the state may be changed.
    upload_completion
        Done when the checkpoint is complete; its result is the `Metadata`.
    """

    staging_completion: Future[None]
    upload_completion: Future[Metadata]


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """One asynchronous save, as the caller asked for it."""

    checkpoint_id: str | os.PathLike[str] | None
    storage_writer: StorageWriter | None
    planner: SavePlanner | None
    rank: int | None

    def with_whole_path(self) -> SaveRequest:
        """Return the request with a local place as a whole path.

        The program may change its folder while the save runs.
        """
        writer = self.storage_writer
        if writer is not None and not (isinstance(writer, StoragePlace) and is_known(writer.fs)):
            return self  # what its places are only the program knows
        path = local_path(self.place) if self.place else None
        if path is None or os.path.isabs(path):
            return self
        try:
            return replace(self, checkpoint_id=os.path.abspath(path))
        except OSError:  # the folder was removed; the save says so, to all ranks
            return self

    @property
    def place(self) -> str | None:
        """Where it saves to, if that can be known; the save complains of what is no place."""
        place: object = self.checkpoint_id
        if place is None:
            place = getattr(self.storage_writer, "checkpoint_id", None)
        return path_text(place)


def start_save(
    state_dict: STATE_DICT_TYPE,
    request: SaveRequest,
    *,
    process_group: dist.ProcessGroup | None,
    kind: AsyncCheckpointerType,
    async_stager: AsyncStager | None,
    no_dist: bool,
    use_collectives: bool,
    timeout: Timeout,
    save: Saver,
) -> Future[Metadata] | AsyncSaveResponse:
    """Copy the state and begin the save; see `async_save`.

    Parameters
    ----------
    save
        Saves a staged state.
    """
    if getattr(kind, "value", None) not in [known.value for known in AsyncCheckpointerType]:
        raise PlanError(f"async_checkpointer_type must be an AsyncCheckpointerType, not {kind!r}")
    in_process = kind.value == AsyncCheckpointerType.PROCESS.value
    # the first is collective: no rank may fail in a way of its own before it
    coordinator = background_coordinator(process_group, no_dist, timeout=timeout)
    if not use_collectives:
        request = replace(request, rank=coordinator.rank)
        coordinator = SingleProcess()
    request = request.with_whole_path()
    background = _Background(request, save, coordinator, in_process)
    try:
        if in_process:
            start_process()
        settle()
        stager = async_stager or _stager_of(request.storage_writer, in_process)
        started = time.perf_counter()
        staged = stager.stage(call_state_dict(state_dict))
        logger.info("staged: stage %.3f s", time.perf_counter() - started)
    except BaseException as error:
        if coordinator.world_size > 1:
            # the other ranks have begun this save: there they hear of the failure
            pending = begin(request.place, partial(background.run, _Raising(error)))
            pending.future.asked = True
        raise
    pending = begin(request.place, partial(background.run, _Handed(staged)))
    if isinstance(staged, Future):
        return AsyncSaveResponse(_completion(staged), pending.future)
    if stager.should_synchronize_after_execute:
        stager.synchronize_staging()
    return pending.future


def _stager_of(writer: StorageWriter | None, in_process: bool) -> AsyncStager:
    """Return the storage writer if it is a stager too, as torch does, or one of our own."""
    stager: Any = writer if isinstance(writer, AsyncStager) else BlockingAsyncStager()
    if isinstance(stager, BlockingAsyncStager):
        stager._share_memory(in_process)
    return stager  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Background:
    """What happens after the caller has gone on."""

    request: SaveRequest
    save: Saver
    coordinator: Coordinator
    in_process: bool

    def run(self, staged: StateGiver) -> Metadata:
        form = AsyncCheckpointerType.PROCESS if self.in_process else AsyncCheckpointerType.THREAD
        try:
            with checkpoint_exceptions():
                # Ranks in different forms would go on to speak past one another.
                agree(self.coordinator, f"begin, in the {form.value} form", lambda: None)
            if not self.in_process:
                return self.save(self.request, staged, self.coordinator)
            guarded = GuardedCoordinator(self.coordinator)
            save = self.save if isinstance(staged, _Raising) else save_in_process
            return save_guarded(guarded, lambda: save(self.request, staged, guarded))
        finally:
            planner = self.request.planner
            if isinstance(planner, DefaultSavePlanner):
                # it would keep the copy's memory from being used for the next one
                planner.state_dict = {}


class _Handed:
    """A staged state on its way to the planner, kept by nobody else."""

    def __init__(self, staged: Future[STATE_DICT_TYPE] | STATE_DICT_TYPE) -> None:
        self._staged: Future[STATE_DICT_TYPE] | STATE_DICT_TYPE | None = staged

    def __call__(self) -> dict[str, Any]:
        staged, self._staged = self._staged, None
        assert staged is not None
        return call_state_dict(staged.result() if isinstance(staged, Future) else staged)


@dataclass(frozen=True, slots=True)
class _Raising:
    """What a rank that could not stage has for the planner."""

    error: BaseException

    def __call__(self) -> dict[str, Any]:
        raise self.error


def _completion(staged: Future[STATE_DICT_TYPE]) -> Future[None]:
    """Return a future that is done with the staging, and does not hold the copy."""
    completion: Future[None] = Future()
    completion.set_running_or_notify_cancel()

    def done(future: Future[STATE_DICT_TYPE]) -> None:
        error = future.exception()
        if error is None:
            completion.set_result(None)
        else:
            completion.set_exception(error)

    staged.add_done_callback(done)
    return completion
