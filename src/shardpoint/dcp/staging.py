"""Copies of a state dict that a save can write while training goes on.

`async_save` copies the state, then returns and writes the copy in the background. Who copies
is a stager: an `AsyncStager`. The ones here copy in one pass over memory, keep shared memory
shared, and use their buffers again.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from shardpoint.dcp._slabs import release_free
from shardpoint.dcp._stage_state import StateStager
from shardpoint.dcp.metadata import STATE_DICT_TYPE
from shardpoint.errors import PlanError

__all__ = [
    "AsyncStager",
    "BlockingAsyncStager",
    "DefaultStager",
    "StagingOptions",
    "release_staging_memory",
]


@runtime_checkable
class AsyncStager(Protocol):
    """Copies the state before an asynchronous save goes on in the background."""

    _synchronize_after_execute: bool = True

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether `async_save` calls `synchronize_staging` before it returns.

        False where the caller does so at a better moment.
        """
        return self._synchronize_after_execute

    def stage(self, state_dict: STATE_DICT_TYPE) -> Future[STATE_DICT_TYPE] | STATE_DICT_TYPE:
        """Return a copy that no later change of the state reaches, or a future of one.

        The copy has to stay as it is until the save is done.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement stage")

    def synchronize_staging(self) -> None:
        """Wait until the state may be changed."""

    def close(self) -> None:
        """Give back what the stager holds."""


@dataclass
class StagingOptions:
    """How a `DefaultStager` copies.

    Attributes
    ----------
    use_pinned_memory
        Copy to memory that an accelerator reaches without a detour. Without one it has no
        effect.
    use_shared_memory
        Copy to memory that a saving process can read where it is, instead of a second copy.
    use_async_staging
        Copy in a thread: `DefaultStager.stage` returns a future.
    use_non_blocking_copy
        Let the copies from an accelerator run side by side, and wait for all at the end.
        Without one it has no effect.
    """

    use_pinned_memory: bool = True
    use_shared_memory: bool = True
    use_async_staging: bool = True
    use_non_blocking_copy: bool = True


class DefaultStager(AsyncStager):
    """Keeps its buffers: each copy overwrites the one before, which must have been saved.

    `async_save` sees to that. One stager serves one thread. All options work on machines
    without an accelerator.

    Parameters
    ----------
    config
        See `StagingOptions`.
    """

    def __init__(
        self,
        config: StagingOptions = StagingOptions(),  # noqa: B008  torch's signature; not changed
    ) -> None:
        self._config = config
        self._stager = StateStager(
            shared=config.use_shared_memory,
            pinned=config.use_pinned_memory,
            keep=True,
            type_check=False,
        )
        self._executor: ThreadPoolExecutor | None = None
        self._stream: torch.Stream | None = None
        if config.use_async_staging:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="shardpoint-stage")
            if config.use_non_blocking_copy and torch.accelerator.is_available():
                # made here: in the copying thread it could turn out to be the one that computes
                self._stream = torch.Stream()
        self._future: Future[STATE_DICT_TYPE] | None = None
        self._is_closed = False

    def stage(
        self, state_dict: STATE_DICT_TYPE, **kwargs: Any
    ) -> STATE_DICT_TYPE | Future[STATE_DICT_TYPE]:
        """Return a copy on the host, or with ``use_async_staging`` a future of it.

        Raises
        ------
        PlanError
            If a value cannot be copied (from the future, where one is returned).
        """
        if self._executor is None:
            return self._stage(state_dict, None)
        if self._is_closed:
            raise PlanError("the stager was closed: make another one")
        written = None
        if torch.accelerator.is_available():
            # what the caller's stream has been given so far comes before the copies
            written = torch.accelerator.current_stream().record_event()
        self._future = self._executor.submit(self._stage, state_dict, written)
        return self._future

    def _stage(self, state_dict: STATE_DICT_TYPE, written: Any) -> STATE_DICT_TYPE:
        if not torch.accelerator.is_available():
            return self._stager.stage(state_dict, non_blocking=False)
        if written is not None:
            written.synchronize()
        non_blocking = self._config.use_non_blocking_copy
        if self._stream is None:
            staged = self._stager.stage(state_dict, non_blocking=non_blocking)
            torch.accelerator.synchronize()
            return staged
        with self._stream:
            staged = self._stager.stage(state_dict, non_blocking=non_blocking)
        self._stream.synchronize()
        return staged

    def synchronize_staging(self) -> None:
        """Wait for the copy that is being made, if any; raise what it raised."""
        if self._future is not None:
            self._future.result()

    def close(self) -> None:
        """Wait for the copy that is being made, and let go of thread and buffers."""
        self._is_closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        self._future = None
        self._stager.close()


class BlockingAsyncStager(AsyncStager):
    """Copies in the calling thread.

    Parameters
    ----------
    cache_staged_state_dict
        Hold on to the buffers: each copy overwrites the one before. Otherwise they are free
        for other stagers when the copy is gone.
    type_check
        Refuse values other than tensors, numbers, strings, bytes, None and their containers.
    """

    _synchronize_after_execute: bool = False

    def __init__(self, cache_staged_state_dict: bool = False, type_check: bool = False) -> None:
        self.cache_staged_state_dict = cache_staged_state_dict
        self.type_check = type_check
        self._stager = StateStager(
            shared=False,
            pinned=cache_staged_state_dict,
            keep=cache_staged_state_dict,
            type_check=type_check,
        )

    @property
    def state_dict_cache(self) -> STATE_DICT_TYPE | None:
        """The copy that is kept, with ``cache_staged_state_dict``."""
        return self._stager.last

    def _share_memory(self, is_shared: bool) -> None:
        """Copy to memory that a saving process can read where it is, from now on."""
        self._stager.shared = is_shared

    def stage(self, state_dict: STATE_DICT_TYPE) -> STATE_DICT_TYPE:
        """Return a copy on the host.

        Raises
        ------
        PlanError
            If a value cannot be copied.
        """
        return self._stager.stage(state_dict, non_blocking=False)

    def synchronize_staging(self) -> None:
        """Do nothing: `stage` returns when all is copied."""

    def close(self) -> None:
        """Let go of the buffers."""
        self._stager.close()


def release_staging_memory() -> None:
    """Give memory that is kept for the next asynchronous save back to the system.

    Memory of a save that is under way, and of stagers that hold on to theirs, stays.
    """
    release_free()
