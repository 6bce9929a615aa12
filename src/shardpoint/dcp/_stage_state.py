"""Copies of whole state dicts that no later change of the state can reach."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.tensor import DTensor

from shardpoint.dcp._slabs import Lease, lease
from shardpoint.dcp._stage_copy import copy_tensors, lay_out
from shardpoint.dcp._tensors import has_lost_memory
from shardpoint.errors import PlanError

__all__ = ["StateStager", "memory_of", "sharded_tensor_of"]

_ATOMS = frozenset(
    [
        *(type(None), bool, int, float, complex, str, bytes, type, range),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    ]
)
_PLAIN_TENSORS = frozenset([torch.Tensor, torch.nn.Parameter])
_DICTS = frozenset([dict, OrderedDict, defaultdict])


class StateStager:
    """Copies state dicts into memory that is used again.

    Parameters
    ----------
    shared, pinned
        The kind of memory; see `lease`.
    keep
        Hold on to the memory: each call overwrites the copy that the one before returned.
    type_check
        Refuse objects other than numbers, strings, bytes, None and containers of them.

    Attributes
    ----------
    last
        With `keep`, the last copy.
    """

    def __init__(self, *, shared: bool, pinned: bool, keep: bool, type_check: bool) -> None:
        self.shared = shared
        self.pinned = pinned
        self.keep = keep
        self.type_check = type_check
        self.last: dict[str, Any] | None = None
        self._kept: Lease | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None, "last": None}

    def stage(self, state: Mapping[str, Any], *, non_blocking: bool) -> dict[str, Any]:
        """Return a copy of a state dict on the host; containers and objects are copied too.

        Raises
        ------
        PlanError
            If a value cannot be copied.
        """
        walk = _Walk(self.type_check)
        with torch.no_grad():
            walk.collect(state)
            layout = lay_out(walk.tensors, clone_small=not self.shared)
            lease = self._lease(layout.size)
            walk.copies = iter(copy_tensors(walk.tensors, layout, lease, non_blocking=non_blocking))
            staged: dict[str, Any] = walk.build(state)
        if self.keep:
            self.last = staged
        return staged

    def _lease(self, size: int) -> Lease:
        kept = self._kept
        if kept is None or kept.slab.size < size or kept.slab.shared != self.shared:
            self._kept = self.last = kept = None  # before a new one is made
            kept = lease(size, shared=self.shared, pinned=self.pinned)
            if self.keep:
                self._kept = kept
        return kept

    def close(self) -> None:
        """Let go of the memory."""
        self._kept = self.last = None


def memory_of(state: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the plain tensors that hold a state dict's values on this rank."""
    walk = _Walk(type_check=False)
    walk.collect(state)
    return walk.tensors


class _Walk:
    """Two walks over a state dict, in the same order: tensors out, copies in.

    They open what planners open. What lies in tuples and other objects is copied with them.
    """

    def __init__(self, type_check: bool) -> None:
        self._type_check = type_check
        self.tensors: list[torch.Tensor] = []
        self.copies: Iterator[torch.Tensor] = iter(())

    def collect(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN_TENSORS:
            if _is_memory(value):
                self.tensors.append(_physical(value))
        elif kind in _ATOMS:
            return
        elif isinstance(value, Mapping):
            for item in value.values():
                self.collect(item)
        elif isinstance(value, list):
            for item in value:
                self.collect(item)
        elif isinstance(value, torch.Tensor):
            for part in _parts(value):
                self.collect(part)

    def build(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN_TENSORS:
            if not _is_memory(value):
                return value
            copied = next(self.copies)
            is_parameter = kind is torch.nn.Parameter
            return torch.nn.Parameter(copied, value.requires_grad) if is_parameter else copied
        if kind in _ATOMS:
            return value
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, list):
            return self._list(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if self._type_check:
            raise PlanError(f"a {kind.__qualname__} cannot be staged with type_check=True")
        return _copied_object(value)

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        kind = type(value)
        items = {key: self.build(item) for key, item in value.items()}
        if kind is dict:
            return items
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, items)
        if kind is OrderedDict:
            return OrderedDict(items)
        try:
            made: Any = copy.copy(value)
            for key, item in items.items():
                made[key] = item
        except Exception:  # noqa: BLE001  a mapping that cannot be changed or copied
            return items
        return made

    def _list(self, value: list[Any]) -> list[Any]:
        items = [self.build(item) for item in value]
        if type(value) is list:
            return items
        made = copy.copy(value)
        made[:] = items
        return made

    def _tensor(self, value: torch.Tensor) -> Any:
        if isinstance(value, DTensor):
            local = self.build(_local(value))
            return DTensor(local, value._spec, requires_grad=value.requires_grad)  # type: ignore[no-untyped-call]
        if isinstance(value, ShardedTensor):
            shards = [
                Shard(self.build(shard.tensor), copy.deepcopy(shard.metadata))
                for shard in value.local_shards()
            ]
            return sharded_tensor_of(
                shards, copy.deepcopy(value.metadata()), value.sharding_spec(), value
            )
        if hasattr(value, "__tensor_flatten__"):
            names, context = value.__tensor_flatten__()
            inner = {name: self.build(getattr(value, name)) for name in names}
            return type(value).__tensor_unflatten__(  # type: ignore[attr-defined]
                inner, context, value.shape, value.stride()
            )
        if _is_wrapper(value):
            return _wrapper_like(value, {k: self.build(v) for k, v in vars(value).items()})
        return _copied_object(value)


def _is_wrapper(value: torch.Tensor) -> bool:
    """Whether a tensor subclass has no memory but that of its attributes."""
    with torch._C.DisableTorchFunctionSubclass():
        return value.numel() > 0 and value.data_ptr() == 0 and not value.is_meta


def _wrapper_like(value: torch.Tensor, attributes: dict[str, Any]) -> torch.Tensor:
    """Return a wrapper like another, without asking its class, which may know no copying."""
    with torch._C.DisableTorchFunctionSubclass():
        made: torch.Tensor = torch.Tensor._make_wrapper_subclass(
            type(value),
            value.size(),
            strides=value.stride(),
            dtype=value.dtype,
            device=value.device,
            requires_grad=value.requires_grad,
        )
    vars(made).update(attributes)
    return made


def _parts(value: torch.Tensor) -> list[Any]:
    """Return the tensors that a tensor subclass is made of, in the order of building."""
    if isinstance(value, DTensor):
        return [_local(value)]
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    if hasattr(value, "__tensor_flatten__"):
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return list(vars(value).values()) if _is_wrapper(value) else []


def _local(tensor: DTensor) -> torch.Tensor:
    local = tensor._local_tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _is_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor has plain memory; others cannot be saved, which the planner says."""
    return (
        tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized)
        and not has_lost_memory(tensor)
    )


def _physical(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose memory holds its values as they are."""
    if tensor.is_conj() or tensor.is_neg():
        return tensor.resolve_conj().resolve_neg()
    return tensor


def _copied_object(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception as first:  # noqa: BLE001  whatever an object's own copying raises
        try:
            return pickle.loads(pickle.dumps(value))  # noqa: S301  our own bytes
        except Exception:  # noqa: BLE001
            raise PlanError(
                f"a {type(value).__module__}.{type(value).__qualname__} cannot be copied for an "
                f"asynchronous save: {first}"
            ) from first


def sharded_tensor_of(
    shards: list[Shard], metadata: Any, spec: Any, like: ShardedTensor | None
) -> ShardedTensor:
    """Return a `ShardedTensor` of these shards, without speaking to other ranks."""
    properties = metadata.tensor_properties
    # not through its constructors: they speak to the other ranks, or look at the group
    made: ShardedTensor = torch.Tensor._make_wrapper_subclass(
        ShardedTensor,
        metadata.size,
        dtype=properties.dtype,
        layout=properties.layout,
        pin_memory=properties.pin_memory,
        requires_grad=properties.requires_grad,
    )
    if like is not None:
        vars(made).update(vars(like))
    made._sharded_tensor_id = None
    made._sharding_spec = spec
    made._local_shards = shards
    made._metadata = metadata
    return made
