"""Python objects to torch.save records, and safely back."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.dcp._safe_globals import with_safe_globals
from shardpoint.dcp._tensors import dtype_of_array, wrap
from shardpoint.dtypes import DType
from shardpoint.engine.objects import read_object_records, read_objects
from shardpoint.errors import FormatError, ShardpointError
from shardpoint.formats.number_pickles import UNKNOWN_PICKLE, number_of
from shardpoint.formats.object_decoder import (
    DeviceValue,
    DTypeValue,
    LayoutValue,
    MemoryFormatValue,
    ObjectFactory,
    TensorSize,
    decode_object,
)
from shardpoint.formats.torch_record import object_record, read_object_pickle
from shardpoint.index import CheckpointIndex
from shardpoint.storage.base import Storage
from shardpoint.transforms import TransformFinder

__all__ = [
    "TorchFactory",
    "object_pickle",
    "object_streams",
    "read_object",
    "stored_objects",
    "write_object",
]

_PLAIN = (type(None), bool, int, float, str)
_MOST_PLAIN_DEPTH = 8


def write_object(value: Any) -> io.BytesIO:
    """Return the record that torch.save writes for an object, as a stream at its start."""
    pickled = object_pickle(value)
    if pickled is not None:
        return io.BytesIO(object_record(pickled))
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def object_pickle(value: Any) -> bytes | None:
    """Return what torch.save puts into ``data.pkl``; None where that takes more than pickling."""
    return pickle.dumps(value, protocol=2) if _is_plain(value, _MOST_PLAIN_DEPTH) else None


def _is_plain(value: Any, depth: int) -> bool:
    """Whether plain pickling gives what torch.save would put into ``data.pkl``."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if depth == 0:
        return False
    if kind in (list, tuple):
        return all(_is_plain(item, depth - 1) for item in value)
    if kind is dict:
        return all(_is_plain(k, depth - 1) and _is_plain(v, depth - 1) for k, v in value.items())
    return False


def read_object(stream: io.BytesIO, *, key: str, allowed: Mapping[str, Callable[..., Any]]) -> Any:
    """Decode an object's record; nothing in it can run code.

    Raises
    ------
    ForbiddenContentError
        If it holds a class that is neither on the closed list nor `allowed`, nor among torch's
        safe globals.
    CorruptionError, FormatError
        If it is damaged.
    """
    data, load_storage = read_object_pickle(stream.getbuffer(), file="(object)", key=key)
    number = number_of(data)
    if number is not UNKNOWN_PICKLE:
        return number
    return decode_object(
        data,
        load_storage=load_storage,
        source=f"key {key!r}",
        factory=TorchFactory(),
        allowed=with_safe_globals(allowed),
    )


def stored_objects(
    index: CheckpointIndex,
    storage: Storage,
    rows: Sequence[int],
    *,
    factory: ObjectFactory,
    allowed: Mapping[str, Callable[..., Any]],
    verify: bool,
    finder: TransformFinder,
) -> Iterator[tuple[int, Any]]:
    """Yield rows of objects with their values.

    Raises
    ------
    ForbiddenContentError
        If one holds a class that is neither on the closed list nor `allowed`, nor among
        torch's safe globals.
    CorruptionError, FormatError
        If one is damaged.
    """
    given = index.objects.values
    for row, value in read_objects(
        index,
        storage,
        rows,
        factory=factory,
        allowed=with_safe_globals(allowed),
        verify=verify,
        finder=finder,
    ):
        key = index.objects.keys[row]
        yield row, _given(key, value) if key in given else value


def object_streams(
    index: CheckpointIndex,
    storage: Storage,
    rows: Sequence[int],
    *,
    verify: bool,
    finder: TransformFinder,
) -> Iterator[tuple[int, io.BytesIO]]:
    """Yield rows of objects with their records, as planners expect them.

    An object that the container's own header gave (a ``torch.save`` file's) is made into one.
    """
    values, keys = index.objects.values, index.objects.keys
    given = [row for row in rows if keys[row] in values]
    for row in given:
        yield row, write_object(_given(keys[row], values[keys[row]]))
    stored = [row for row in rows if keys[row] not in values]
    for row, record in read_object_records(index, storage, stored, verify=verify, finder=finder):
        yield row, io.BytesIO(record)


def _given(key: str, value: Any) -> Any:
    """Turn a value of the container's own header into torch's.

    Raises
    ------
    FormatError
        If torch has no such value: a device of a kind that it does not know, say.
    """
    try:
        return _to_torch(value)
    except ShardpointError:
        raise
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"key {key!r}: holds what torch cannot make: {error}") from error


def _to_torch(value: Any) -> Any:
    """Turn the torch-free decoder's values into torch's."""
    factory = TorchFactory()
    kind = type(value)
    if kind is np.ndarray:
        return factory.tensor(value, dtype_of_array(value.dtype), False)
    if kind is DTypeValue:
        return factory.dtype(value.name)
    if kind is DeviceValue:
        return factory.device(value.type, value.index)
    if kind is TensorSize:
        return torch.Size(value)
    if kind is LayoutValue:
        return factory.layout(value.name)
    if kind is MemoryFormatValue:
        return factory.memory_format(value.name)
    if isinstance(value, dict):
        items = [(_to_torch(key), _to_torch(item)) for key, item in value.items()]
        return OrderedDict(items) if kind is OrderedDict else dict(items)
    if kind in (list, tuple, set, frozenset):
        return kind(_to_torch(item) for item in value)
    return value


class TorchFactory:
    """Makes torch's own values of what the closed decoder finds."""

    def tensor(
        self, array: npt.NDArray[np.generic], dtype: DType, requires_grad: bool
    ) -> torch.Tensor:
        tensor = wrap(array if array.flags.writeable else array.copy(order="K"), dtype)
        return tensor.requires_grad_() if requires_grad else tensor

    def parameter(self, tensor: torch.Tensor, requires_grad: bool) -> torch.nn.Parameter:
        return torch.nn.Parameter(tensor, requires_grad)

    def size(self, sizes: tuple[int, ...]) -> torch.Size:
        return torch.Size(sizes)

    def dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = _named(name, torch.dtype)
        return found

    def layout(self, name: str) -> torch.layout:
        found: torch.layout = _named(name, torch.layout)
        return found

    def memory_format(self, name: str) -> torch.memory_format:
        found: torch.memory_format = _named(name, torch.memory_format)
        return found

    def device(self, kind: str, index: int | None) -> torch.device:
        return torch.device(kind) if index is None else torch.device(kind, index)


def _named(name: str, kind: type[Any]) -> Any:
    value: Any = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(value, kind):
        raise ValueError(f"torch {torch.__version__} has no {kind.__name__} {name!r}")
    return value
