"""Asynchronous saves: how long the caller is held up, and what the write then costs it.

The first save finds no staging memory, the second the one that the first has left. What each is
compared with as the limit is one copy of the state: into new memory, then into that memory again.
The compute loop is the same work in every turn; it begins when the second call has returned, and
for the limit nothing is written meanwhile.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from contenders import LIBRARIES, library, load
from measuring import Measurement, measure
from states import check_equal, empty_like, large

from cases import Case, Job

__all__ = ["CASES"]

_LOOP_SECONDS = 1.5


def _run(job: Job, *, processes: bool) -> dict[str, Measurement]:
    state = large(job.settings.size_mb)
    if job.contender == "raw":
        copies: dict[str, torch.Tensor] = {}
        first = measure(lambda: copies.update((k, v.clone()) for k, v in state.items()))
        again = measure(lambda: [copies[key].copy_(value) for key, value in state.items()])
        return {"call, first": first, "call, again": again, "compute loop": _compute()}
    store = f"file://{job.folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    saver = _Saver(job, processes=processes)
    saver({"tiny": torch.ones(2)}, "tiny").result()
    futures: list[Future[Any]] = []
    first = measure(lambda: futures.append(saver(state, "first")))
    futures.pop().result()
    again = measure(lambda: futures.append(saver(state, "again")))
    wanted = {key: value.clone() for key, value in state.items()}
    for value in state.values():
        value.view(torch.uint8).zero_()  # what the files hold must be what was there at the call
    loop = _compute()
    futures.pop().result()
    saver.close()
    dist.destroy_process_group()
    target = empty_like(state)
    load(job.contender, target, job.folder / "again")
    check_equal(target, wanted)
    return {"call, first": first, "call, again": again, "compute loop": loop}


class _Saver:
    """One library's asynchronous save, with the staging memory kept between calls."""

    def __init__(self, job: Job, *, processes: bool) -> None:
        self._module = library(job.contender)
        self._folder = job.folder
        kind = self._module.state_dict_saver.AsyncCheckpointerType
        self._type = kind.PROCESS if processes else kind.THREAD
        options = self._module.staging.StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=processes,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager = self._module.staging.DefaultStager(options)

    def __call__(self, state: dict[str, Any], name: str) -> Future[Any]:
        writer = self._module.FileSystemWriter(self._folder / name, sync_files=False)
        response = self._module.async_save(
            state,
            storage_writer=writer,
            async_checkpointer_type=self._type,
            async_stager=self._stager,
        )
        future = getattr(response, "upload_completion", response)
        assert isinstance(future, Future)
        return future

    def close(self) -> None:
        self._stager.close()


def _compute() -> Measurement:
    """Run matrix products on one thread, as many as take `_LOOP_SECONDS` when nothing else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix = torch.rand(256, 256)

    def loop(count: int) -> None:
        for _ in range(count):
            torch.mm(matrix, matrix)

    try:
        return measure(partial(loop, _loop_count()))
    finally:
        torch.set_num_threads(threads)


def _loop_count() -> int:
    """Return a count that is the same in every turn: 2 x 256^3 operations at 30 GFLOP/s."""
    return int(_LOOP_SECONDS * 30e9 / (2 * 256**3))


CASES = [
    Case(
        "async-thread", "asynchronous, thread", (*LIBRARIES, "raw"), partial(_run, processes=False)
    ),
    Case(
        "async-process", "asynchronous, process", (*LIBRARIES, "raw"), partial(_run, processes=True)
    ),
]
