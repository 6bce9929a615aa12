"""Real process groups for tests: gloo workers that stay alive from test to test.

Starting Python with torch takes seconds, making a process group milliseconds. So the
workers are started once in a test session, and each job makes and destroys its own group.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest

__all__ = ["RankPool"]

_PRELOADED = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "shardpoint.dcp"]
_GROUP_TIMEOUT = timedelta(seconds=60)


def _work(rank: int, connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import warnings

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # given off by torch itself on CPU-only machines
    warnings.filterwarnings("ignore", module=r"torch\..*")
    while True:
        job = connection.recv()
        if job is None:
            return
        function, arguments, world_size, store = job
        try:
            dist.init_process_group(
                "gloo",
                init_method=store,
                rank=rank,
                world_size=world_size,
                timeout=_GROUP_TIMEOUT,
            )
            answer: tuple[bool, Any] = (True, function(*arguments))
        except BaseException as error:  # noqa: BLE001  the test has to see it
            text = "".join(traceback.format_exception(error))
            answer = (False, f"rank {rank}:\n{text}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        try:
            connection.send(answer)
        except Exception as error:  # noqa: BLE001  a result that cannot be pickled
            connection.send((False, f"rank {rank}: cannot send its result: {error!r}"))


class RankPool:
    """Up to four workers."""

    def __init__(self) -> None:
        # The server imports torch once; its workers are forks that have it already.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._jobs = 0
        atexit.register(self.close)

    def _new_store(self) -> str:
        self._jobs += 1
        return f"file://{self._folder.name}/store-{self._jobs}"

    def run(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120
    ) -> list[Any]:
        """Call a module-level function on every rank of a new group; return all results."""
        self._start(world_size)
        store = self._new_store()
        for _, connection in self._workers[:world_size]:
            connection.send((function, arguments, world_size, store))
        answers = []
        for rank, (process, connection) in enumerate(self._workers[:world_size]):
            if not connection.poll(timeout):
                self.close()
                pytest.fail(f"rank {rank} of {world_size} did not answer within {timeout} s")
            try:
                answers.append(connection.recv())
            except EOFError:
                code = process.exitcode
                self.close()
                pytest.fail(f"rank {rank} of {world_size} died with exit code {code}")
        failures = [text for good, text in answers if not good]
        if failures:
            pytest.fail("\n".join(failures))
        return [value for _, value in answers]

    def run_to_the_end(
        self,
        world_size: int,
        function: Callable[..., Any],
        *arguments: Any,
        hanging: int | None = None,
        store: str | None = None,
        timeout: float = 60,
    ) -> list[Any]:
        """Call a function on every rank, in processes that may die of it.

        Return each rank's result, or its exit code where it had none. The process of `hanging`
        is killed when the others are done. `store` is where the ranks meet, a file otherwise.
        """
        job = (function, arguments, world_size, store or self._new_store())
        workers = [self._worker(rank) for rank in range(world_size)]
        for _, connection in workers:
            connection.send(job)
        answers: list[Any] = [None] * world_size
        try:
            ranks = [rank for rank in range(world_size) if rank != hanging]
            for rank in [*ranks, *([] if hanging is None else [hanging])]:
                process, connection = workers[rank]
                if rank == hanging:
                    process.kill()
                if not connection.poll(timeout):
                    pytest.fail(f"rank {rank} of {world_size} did not answer within {timeout} s")
                try:
                    answers[rank] = connection.recv()[1]
                except EOFError:
                    process.join(timeout)
                    answers[rank] = process.exitcode
        finally:
            for process, connection in workers:
                if process.is_alive():  # the server buries the dead: their numbers come again
                    process.kill()
                process.join()
                connection.close()
        return answers

    def _worker(self, rank: int) -> tuple[Any, Connection]:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_work, args=(rank, there), daemon=True)
        process.start()
        there.close()
        return process, here

    def _start(self, count: int) -> None:
        while len(self._workers) < count:
            self._workers.append(self._worker(len(self._workers)))

    def close(self) -> None:
        """End all workers, by force where they hang."""
        for _, connection in self._workers:
            try:
                connection.send(None)
            except OSError:
                continue
        for process, connection in self._workers:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._workers = []
