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

from shardpoint.dcp._metadata_view import index_of
from shardpoint.dcp._saver_channel import Channel, load_state, portable, set_memory
from shardpoint.dcp.state_dict_saver import save_staged
from shardpoint.errors import ShardpointError

__all__ = ["main"]


def main() -> None:
    """Serve saves until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the other process, not before
    torch.set_num_threads(1)
    # it has no process groups, and says so for every mesh of a DTensor
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    _watch(int(sys.argv[2]))
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    forward = _Forward(channel)
    logger = logging.getLogger("shardpoint")
    logger.addHandler(forward)
    logger.propagate = False
    memory: dict[int, npt.NDArray[np.uint8]] = {}
    set_memory(memory)
    try:
        while True:
            header = pickle.loads(channel.receive())  # noqa: S301  from our own parent
            _map_slabs(channel, memory, header)
            logger.setLevel(header["log_level"])
            with suppress(OSError):
                os.chdir(header["folder"] or "/")
            answer = _save(channel, channel.receive(), header)
            channel.send(pickle.dumps(answer))
            del answer
    except (EOFError, OSError):
        return


def _watch(parent: int) -> None:
    """End with the parent, also in the middle of a save."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="shardpoint-watch").start()


def _map_slabs(
    channel: Channel, memory: dict[int, npt.NDArray[np.uint8]], header: Mapping[str, Any]
) -> None:
    for number in set(memory) - set(header["kept"]):
        del memory[number]
    for number, size in header["new"]:
        file = channel.receive_file()
        try:
            memory[number] = np.frombuffer(mmap.mmap(file, size), np.uint8)
        finally:
            os.close(file)


def _save(channel: Channel, message: bytes, header: Mapping[str, Any]) -> tuple[str, Any]:
    try:
        request, state = load_state(message, header["main"])
        metadata = save_staged(request, lambda: state, RelayedCoordinator(channel, header))
        index = getattr(metadata, "_index", None)
        return "done", (metadata if index is None else index_of(metadata))
    except (EOFError, ConnectionError):
        raise
    except BaseException as error:  # noqa: BLE001  raised in the other process
        return "failed", portable(error)


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
