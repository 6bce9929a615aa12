"""How a process and the one that saves for it speak: framed bytes, pickles, descriptors.

State is pickled without the memory of its tensors: a tensor in shared memory travels as its
place there.
"""

from __future__ import annotations

import errno
import importlib
import io
import multiprocessing.spawn
import pickle
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.tensor import DTensor

from shardpoint.dcp._slabs import Slab, shared_slab_at
from shardpoint.dcp._stage_state import sharded_tensor_of
from shardpoint.dcp._tensors import NO_MEMORY, has_lost_memory
from shardpoint.errors import NotSupportedError, PlanError

__all__ = [
    "Channel",
    "LostPeerError",
    "dump_state",
    "is_in_shared_memory",
    "load_state",
    "set_memory",
]

_T = TypeVar("_T")

_LENGTH = struct.Struct("<Q")
_LOOKS_EVERY = 1000  # milliseconds


class LostPeerError(ConnectionError):
    """The process at the other end of a channel is gone."""


class Channel:
    """Messages over a Unix socket, whole and in order; any thread may send, one receives.

    Parameters
    ----------
    connection
        This side's end; the channel closes it.
    is_peer_alive
        Asked once a second while nothing comes. That a process is gone shows on the socket only
        where no other one, forked at the wrong moment, has inherited its end.

    Every method raises `LostPeerError` when the other side is gone.
    """

    def __init__(self, connection: socket.socket, is_peer_alive: Callable[[], bool]) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._is_peer_alive = is_peer_alive
        self._sending = threading.Lock()

    def send(self, message: bytes) -> None:
        """Send one message; log records come from other threads than what they stand between."""
        with self._sending:
            for part in (_LENGTH.pack(len(message)), message):
                left = memoryview(part)
                while left:
                    send = partial(self._socket.send, left)
                    left = left[self._when_ready(select.POLLOUT, send) :]

    def receive(self) -> bytes:
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return bytes(self._exactly(length))

    def _exactly(self, length: int) -> bytearray:
        data = bytearray(length)
        left = memoryview(data)
        while left:
            count = self._when_ready(select.POLLIN, partial(self._socket.recv_into, left))
            if count == 0:
                raise LostPeerError("the other side is gone")
            left = left[count:]
        return data

    def send_file(self, file: int) -> None:
        """Send an open file; the other side gets a descriptor of its own."""
        with self._sending:
            self._when_ready(select.POLLOUT, lambda: socket.send_fds(self._socket, [b"f"], [file]))

    def receive_file(self) -> int:
        data, files, _, _ = self._when_ready(
            select.POLLIN, lambda: socket.recv_fds(self._socket, 1, 1)
        )
        if not data:
            raise LostPeerError("the other side is gone")
        if not files:
            raise OSError(errno.EMFILE, "no descriptor came: too many files are open")
        return files[0]

    def _when_ready(self, event: int, action: Callable[[], _T]) -> _T:
        while True:
            try:
                return action()
            except BlockingIOError:
                self._wait(event)
            except ConnectionError as error:
                raise LostPeerError(str(error)) from error
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
                raise LostPeerError("this side was closed") from error

    def _wait(self, event: int) -> None:
        poller = select.poll()
        poller.register(self._socket, event)
        while not poller.poll(_LOOKS_EVERY):
            # what it sent before it died is there still
            if not self._is_peer_alive() and not poller.poll(0):
                raise LostPeerError("the other side is gone")

    def close(self) -> None:
        """Close the connection, also where a forked process has inherited this end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def forget(self) -> None:
        """Close this process's descriptor of an end that is another process's."""
        self._socket.close()


class _StatePickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=5)
        self.slabs: dict[int, Slab] = {}

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if kind is torch.Tensor:
            return self._tensor(value)
        if kind is torch.nn.Parameter:
            return _parameter, (value.detach(), value.requires_grad)
        if kind is torch.UntypedStorage:
            return self._storage(value)
        if kind is DTensor:
            return _dtensor, (value._local_tensor, value._spec, value.requires_grad)
        if kind is ShardedTensor:
            shards = [(shard.tensor, shard.metadata) for shard in value.local_shards()]
            return _sharded_tensor, (shards, value.metadata(), value.sharding_spec())
        return NotImplemented

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            return NotImplemented
        if has_lost_memory(tensor):
            raise PlanError(f"a tensor of shape {tuple(tensor.shape)}: {NO_MEMORY}")
        plain = tensor.detach().cpu().resolve_conj().resolve_neg()
        place = (plain.storage_offset(), tuple(plain.shape), plain.stride())
        return _tensor, (plain.untyped_storage(), plain.dtype, *place, tensor.requires_grad)

    def _storage(self, storage: torch.UntypedStorage) -> Any:
        slab = _slab_of(storage)
        if slab is None:
            return _storage_of, (bytes(_bytes_of(storage).numpy()),)
        self.slabs[slab.number] = slab
        return _storage_at, (slab.number, storage.data_ptr() - slab.address, storage.nbytes())


def _slab_of(storage: torch.UntypedStorage) -> Slab | None:
    return shared_slab_at(storage.data_ptr()) if storage.device.type == "cpu" else None


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def is_in_shared_memory(tensor: torch.Tensor) -> bool:
    """Whether another process can be given a tensor without its bytes."""
    return _slab_of(tensor.untyped_storage()) is not None


def dump_state(value: Any) -> tuple[bytes, Mapping[int, Slab]]:
    """Pickle a value; also return the slabs that hold its tensors, by number."""
    stream = io.BytesIO()
    pickler = _StatePickler(stream)
    pickler.dump(value)
    return stream.getvalue(), pickler.slabs


_memory: Mapping[int, npt.NDArray[np.uint8]] = {}


def set_memory(memory: Mapping[int, npt.NDArray[np.uint8]]) -> None:
    """Say where `load_state` finds the memory of tensors, by the slabs' numbers."""
    global _memory
    _memory = memory


class _StateUnpickler(pickle.Unpickler):
    """Finds classes of the main script in either process.

    The saving process imports the script only if something comes from there, and under the
    name ``__mp_main__``, as `multiprocessing` does.
    """

    def __init__(self, stream: io.BytesIO, prepare: Callable[[str], None] | None) -> None:
        super().__init__(stream)
        self._prepare = prepare

    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__" and self._prepare is not None:
            self._prepare(name)
        if module == "__mp_main__" and self._prepare is None:
            module = "__main__"
        if module in ("__main__", "__mp_main__"):
            importlib.import_module(module)
        return super().find_class(module, name)


def load_state(message: bytes, main: Mapping[str, Any] | None) -> Any:
    """Undo `dump_state`.

    Parameters
    ----------
    main
        In the saving process, how to import the main script; None in the other.
    """
    prepare = None
    if main is not None:
        given = dict(main)

        def prepare(name: str) -> None:
            if not {"init_main_from_name", "init_main_from_path"} & set(given):
                raise NotSupportedError(
                    f"the saving process needs {name!r}, which was typed in or piped to the "
                    f"interpreter: put it into a module, or save in the thread form"
                )
            multiprocessing.spawn.prepare(given)

    return _StateUnpickler(io.BytesIO(message), prepare).load()


def _storage_at(number: int, offset: int, length: int) -> torch.UntypedStorage:
    memory = _memory[number]
    data = torch.frombuffer(memory, dtype=torch.uint8, count=length, offset=offset)
    return data.untyped_storage()


def _storage_of(data: bytes) -> torch.UntypedStorage:
    own = bytearray(data)
    plain = torch.frombuffer(own, dtype=torch.uint8) if own else torch.empty(0, dtype=torch.uint8)
    return plain.untyped_storage()


def _tensor(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
) -> torch.Tensor:
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)
    return tensor.requires_grad_(requires_grad)


def _parameter(tensor: torch.Tensor, requires_grad: bool) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad)


def _dtensor(local: torch.Tensor, spec: Any, requires_grad: bool) -> Any:
    return DTensor(local, spec, requires_grad=requires_grad)  # type: ignore[no-untyped-call]


def _sharded_tensor(shards: list[tuple[Any, Any]], metadata: Any, spec: Any) -> ShardedTensor:
    return sharded_tensor_of([Shard(*shard) for shard in shards], metadata, spec, None)
