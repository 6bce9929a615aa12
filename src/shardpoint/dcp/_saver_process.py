"""What runs in the process that saves for another.

It has no process group: where ranks have to speak, the process it saves for does so.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.coordination import portable
from shardpoint.dcp._metadata_view import index_of
from shardpoint.dcp._pending import let_go
from shardpoint.dcp._saver_channel import (
    Channel,
    LostPeerError,
    load_state,
    set_memory,
)
from shardpoint.dcp.state_dict_saver import save_staged
from shardpoint.errors import ShardpointError

__all__ = ["main"]


def main() -> None:
    """Serve saves until the other side is gone."""
    # It ends with the other process, not before: a scheduler that ends a job sends signals to
    # all its processes, and what the training does then is often one more save.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)
    # it has no process groups, and says so for every mesh of a DTensor
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    parent = int(sys.argv[2])
    _watch(parent)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), lambda: os.getppid() == parent)
    forward = _Forward(channel)
    logger = logging.getLogger("shardpoint")
    logger.addHandler(forward)
    logger.propagate = False
    memory: dict[int, npt.NDArray[np.uint8]] = {}
    set_memory(memory)
    try:
        while True:
            header = pickle.loads(channel.receive())  # noqa: S301  from our own parent
            files = [channel.receive_file() for _ in header["new"]]
            logger.setLevel(header["log_level"])
            channel.send(_answer(channel, memory, header, files, channel.receive()))
    except LostPeerError:
        return


def _watch(parent: int) -> None:
    """End with the parent, also in the middle of a save."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="shardpoint-watch").start()


def _answer(
    channel: Channel,
    memory: dict[int, npt.NDArray[np.uint8]],
    header: Mapping[str, Any],
    files: Sequence[int],
    message: bytes,
) -> bytes:
    """Save; return what came of it, whatever that is."""
    try:
        _map_slabs(memory, header, files)
        with suppress(OSError):
            os.chdir(header["folder"] or "/")
        request, state = load_state(message, header["main"])
        metadata = save_staged(request, lambda: state, RelayedCoordinator(channel, header))
        index = getattr(metadata, "_index", None)
        return pickle.dumps(("done", metadata if index is None else index_of(metadata)))
    except LostPeerError:
        raise
    except BaseException as error:  # noqa: BLE001  raised in the other process
        answer = pickle.dumps(("failed", portable(error)))
        let_go(error)
        return answer


def _map_slabs(
    memory: dict[int, npt.NDArray[np.uint8]], header: Mapping[str, Any], files: Sequence[int]
) -> None:
    for number in set(memory) - set(header["kept"]):
        del memory[number]
    try:
        for (number, size), file in zip(header["new"], files, strict=True):
            memory[number] = np.frombuffer(mmap.mmap(file, size), np.uint8)
    finally:
        for file in files:
            os.close(file)


class _Group:
    """Stands for a process group of the other process."""


_groups: dict[str, _Group] = {}


class RelayedCoordinator:
    """Lets the other process speak to the ranks."""

    def __init__(self, channel: Channel, header: Mapping[str, Any]) -> None:
        self._channel = channel
        self.group = _groups.setdefault(header["group"], _Group())  # its plans are kept
        self.rank: int = header["rank"]
        self.world_size: int = header["world_size"]
        self.coordinator_rank: int = header["coordinator_rank"]
        self.is_coordinator = self.rank == self.coordinator_rank

    def begin(self, step: str) -> None:
        self._relay("begin", step)

    def gather(self, payload: bytes) -> list[bytes | ShardpointError] | None:
        found: list[bytes | ShardpointError] | None = self._relay("gather", payload)
        return found

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        found: bytes = self._relay("scatter", payloads)
        return found

    def broadcast(self, payload: bytes | None) -> bytes:
        found: bytes = self._relay("broadcast", payload)
        return found

    def _relay(self, name: str, payload: Any) -> Any:
        self._channel.send(pickle.dumps(("exchange", (name, payload))))
        kind, value = pickle.loads(self._channel.receive())  # noqa: S301  from our own parent
        if kind == "failed":
            raise value
        return value


class _Forward(logging.Handler):
    """Gives log records to the other process, whose handlers know where they belong."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        facts = {"name": record.name, "levelno": record.levelno, "levelname": record.levelname}
        facts |= {"msg": record.getMessage(), "lineno": record.lineno, "funcName": record.funcName}
        self._channel.send(pickle.dumps(("log", facts)))


if __name__ == "__main__":
    main()
