"""The planners that save and load use unless a program brings its own."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from shardpoint.dcp._load_plan import plan_load
from shardpoint.dcp._metadata_view import index_of, metadata_of
from shardpoint.dcp._objects import read_object, write_object
from shardpoint.dcp._paths import Paths
from shardpoint.dcp._state import flatten_state, materialize_meta_tensors, set_at
from shardpoint.dcp._torch_objects import is_torchs_object, torchs
from shardpoint.dcp._write_items import (
    WriteTable,
    columns_of,
    describe_state,
    sharded_properties,
)
from shardpoint.dcp.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from shardpoint.dcp.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from shardpoint.dcp.utils import find_state_dict_object
from shardpoint.errors import PlanError
from shardpoint.planning.save import merge, plan_writes
from shardpoint.tree import unflatten

__all__ = [
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "create_default_global_load_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_local_save_plan",
]

Narrowing = Literal["warn", "raise", "allow"]


class DefaultSavePlanner(SavePlanner):
    """Saves every value of a state dict under its flat key.

    Parameters
    ----------
    flatten_state_dict
        Turn nested dicts and lists into flat keys; without it, each value at the top is one
        item, and nested containers are stored as objects.
    flatten_sharded_tensors
        Accepted for torch's sake: every sharded tensor is always taken apart.
    dedup_replicated_tensors
        Without effect, as in torch.
    dedup_save_to_lowest_rank
        Give what several ranks hold to the lowest of them, instead of balancing by bytes.
    enable_plan_caching
        Let a class that overrides `create_global_plan` be passed over while no rank's plan has
        changed since the last save with this planner. Others are without being asked: their
        ranks exchange fingerprints of constant size instead of plans then.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.dedup_save_to_lowest_rank = dedup_save_to_lowest_rank
        self.enable_plan_caching = enable_plan_caching
        self.mappings: dict[str, tuple[str | int, ...]] = {}
        self.state_dict: STATE_DICT_TYPE = {}
        self.is_coordinator = False
        self._serves_torch = False

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        if self.flatten_state_dict:
            state_dict, self.mappings = flatten_state(state_dict)
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator
        # Then it is torch's save that calls, whose files must not name classes of ours.
        self._serves_torch = is_torchs_object(storage_meta)

    def create_local_plan(self) -> SavePlan:
        plan = create_default_local_save_plan(self.state_dict, self.is_coordinator)
        if self.flatten_state_dict:
            plan = dataclasses.replace(plan, planner_data=Paths(self.mappings))
        if self._serves_torch:
            plan = torchs(dataclasses.replace(plan, planner_data=self.mappings))
        self.plan = plan
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        columns = [columns_of(plan.items) for plan in all_plans]
        planned = plan_writes(
            columns,
            lowest_rank=self.dedup_save_to_lowest_rank,
            check_coverage=len(all_plans) > 1,
        )
        self.global_plan = [
            dataclasses.replace(
                plan, items=WriteTable.from_columns(rows.with_hint(hint).take(keep))
            )
            for plan, rows, hint, keep in zip(
                all_plans, columns, planned.hints, planned.kept, strict=True
            )
        ]
        metadata = metadata_of(planned.index, None)
        if self.flatten_state_dict:
            paths: dict[str, tuple[str | int, ...]] = {}
            for mapping in reversed(_distinct(plan.planner_data for plan in all_plans)):
                paths.update(mapping)
            index = dataclasses.replace(index_of(metadata), paths=paths)
            metadata = metadata_of(index, None)
        self.metadata = metadata
        if self._serves_torch:
            self.global_plan, self.metadata = torchs(self.global_plan), torchs(metadata)
        return self.global_plan, self.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.plan = new_plan
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        found = self.lookup_object(write_item.index)
        resolved: torch.Tensor | io.BytesIO = self.transform_object(write_item, found)
        return resolved

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the value, or for tensors the local chunk, that an item names."""
        return find_state_dict_object(self.state_dict, index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Return what is written: tensors as they are, objects as a stream of their record."""
        if write_item.type.name == WriteItemType.BYTE_IO.name:
            return write_object(object)
        return object


class DefaultLoadPlanner(LoadPlanner):
    """Fills every value of a state dict from its flat key.

    Parameters
    ----------
    flatten_state_dict
        As it was when the checkpoint was saved.
    flatten_sharded_tensors
        Accepted for torch's sake.
    allow_partial_load
        Leave values alone whose key the checkpoint does not have, instead of an error.
    on_narrowing
        What to do where a tensor's dtype cannot hold every saved value exactly: ``"warn"``
        (`NarrowingWarning`), ``"raise"`` or ``"allow"``.
    allowed
        Classes that objects may hold beyond the closed list, by qualified name; see
        `shardpoint.open`. What the program has told ``torch.serialization.add_safe_globals``
        or ``safe_globals`` is allowed as well.

    Attributes
    ----------
    missing, unexpected
        After planning: keys of the state dict that the checkpoint lacks, and the reverse.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        on_narrowing: Narrowing = "warn",
        allowed: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        if on_narrowing not in get_args(Narrowing):
            raise PlanError(f"on_narrowing is {on_narrowing!r}; one of {get_args(Narrowing)}")
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.allow_partial_load = allow_partial_load
        self.on_narrowing = on_narrowing
        self.allowed = dict(allowed or {})
        self.original_state_dict: STATE_DICT_TYPE = {}
        self.state_dict: STATE_DICT_TYPE = {}
        self.mappings: dict[str, tuple[str | int, ...]] = {}
        self.metadata: Metadata | None = None
        self.is_coordinator = False
        self.missing: tuple[str, ...] = ()
        self.unexpected: tuple[str, ...] = ()

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        materialize_meta_tensors(state_dict)
        self.original_state_dict = state_dict
        if self.flatten_state_dict:
            state_dict, self.mappings = flatten_state(state_dict)
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        if self.metadata is None:
            raise PlanError("set_up_planner was not given the checkpoint's metadata")
        index = index_of(self.metadata)
        saved = set(index.key_order)
        if self.flatten_state_dict and not saved <= self.state_dict.keys():
            self._use_old_keys(saved - self.state_dict.keys())
        plan, self.missing, self.unexpected = plan_load(
            self.state_dict,
            index,
            strict=not self.allow_partial_load,
            on_narrowing=self.on_narrowing,
        )
        return plan

    def _use_old_keys(self, unclaimed: set[str]) -> None:
        """Take the keys of torch 2.3 where they fit what the checkpoint has better."""
        old, mappings = flatten_state(self.original_state_dict, rules="2.3")
        if old.keys() & unclaimed:
            self.state_dict, self.mappings = old, mappings

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return create_default_global_load_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        return new_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        self.put_object(key, read_object(value, key=key, allowed=self.allowed))

    def put_object(self, key: str, value: Any) -> None:
        """Put a loaded object into the state dict."""
        self.state_dict[key] = value
        path = self.mappings[key] if self.flatten_state_dict else (key,)
        set_at(self.original_state_dict, path, value)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self.lookup_tensor(read_item.dest_index)
        return self.transform_tensor(read_item, tensor)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the local chunk that an item names."""
        found: torch.Tensor = find_state_dict_object(self.state_dict, index)
        return found

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        """Return the box of the local chunk that an item fills."""
        sizes = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        for axis, (start, length) in enumerate(sizes):
            if tensor.size(axis) != length:
                tensor = tensor.narrow(axis, start, length)
        return tensor


class _EmptyStateDictLoadPlanner(DefaultLoadPlanner):
    """Fills an empty dict with what the checkpoint holds.

    Parameters
    ----------
    keys
        Only these: flat keys, or dotted beginnings of paths. None is everything.
    """

    def __init__(self, keys: set[str] | None = None, *args: Any, **kwargs: Any) -> None:
        self.keys = keys
        super().__init__(*args, **kwargs)

    def _should_include_key(self, key: str, metadata: Metadata) -> bool:
        if self.keys is None or key in self.keys:
            return True
        path = (metadata.planner_data or {}).get(key, ())
        return any(
            ".".join(map(str, path[:depth])) in self.keys for depth in range(1, len(path) + 1)
        )

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        if state_dict:
            raise PlanError("the state dict to load everything into must be empty")
        if metadata is None:
            raise PlanError("loading into an empty state dict needs the checkpoint's metadata")
        self.state_dict = {}
        for key, value in metadata.state_dict_metadata.items():
            if self._should_include_key(key, metadata):
                self.state_dict[key] = (
                    torch.empty(value.size, dtype=value.properties.dtype)
                    if isinstance(value, TensorStorageMetadata)
                    else value
                )
        paths = metadata.planner_data or {}
        self.mappings = {key: paths.get(key, (key,)) for key in self.state_dict}
        self.flatten_state_dict = True
        state_dict.update(unflatten(self.state_dict, self.mappings))
        self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator


def create_default_local_save_plan(state_dict: dict[str, Any], is_coordinator: bool) -> SavePlan:
    """Return what this rank would write of a flat state dict.

    Every rank plans all it holds; which of them writes what several hold is decided
    globally, whatever `is_coordinator` says.

    Raises
    ------
    PlanError
        If values cannot be stored; names all of them.
    """
    return SavePlan(describe_state(state_dict))


def create_default_global_save_plan(
    all_plans: list[SavePlan], rewrite_index_hints: bool = True
) -> tuple[list[SavePlan], Metadata]:
    """Return the plans and the metadata of the checkpoint that they make up.

    Parameters
    ----------
    rewrite_index_hints
        Set each item's index hint to the chunk's place in the metadata.

    Raises
    ------
    PlanError
        If chunks overlap or, with several plans, leave gaps.
    """
    columns = [columns_of(plan.items) for plan in all_plans]
    hints, index = merge(columns, check_coverage=len(all_plans) > 1)
    if rewrite_index_hints:
        all_plans = [
            dataclasses.replace(plan, items=WriteTable.from_columns(rows.with_hint(hint)))
            for plan, rows, hint in zip(all_plans, columns, hints, strict=True)
        ]
    return all_plans, metadata_of(index, None)


def create_default_local_load_plan(
    state_dict: dict[str, Any], metadata: Metadata, strict: bool = True
) -> LoadPlan:
    """Return what this rank reads to fill a flat state dict.

    Raises
    ------
    PlanError
        If keys are missing (with `strict`), or shapes or kinds differ; names all of them.
    """
    return plan_load(state_dict, index_of(metadata), strict=strict, on_narrowing="allow")[0]


def create_default_global_load_plan(all_plans: list[LoadPlan]) -> list[LoadPlan]:
    """Return the plans as they are: every rank knows by itself what it reads."""
    return all_plans


def _create_default_local_metadata(state_dict: STATE_DICT_TYPE) -> Metadata:
    """Return the metadata of a flat state dict as this rank alone can tell it, without a save.

    A `ShardedTensor` knows the shards of all ranks, so these are all in it; of a `DTensor`
    there is this rank's part.
    """
    plan = create_default_local_save_plan(state_dict, is_coordinator=True)
    described = create_default_global_save_plan([plan])[1].state_dict_metadata
    for key, value in state_dict.items():
        if isinstance(value, ShardedTensor):
            known = value.metadata()
            described[key] = TensorStorageMetadata(
                properties=sharded_properties(value),
                size=known.size,
                chunks=[
                    ChunkStorageMetadata(torch.Size(box.shard_offsets), torch.Size(box.shard_sizes))
                    for box in known.shards_metadata
                ],
            )
    return Metadata({key: described[key] for key in state_dict if key in described})


def _distinct(mappings: Iterable[Mapping[str, Any] | None]) -> list[Mapping[str, Any]]:
    """Leave out mappings that say what an earlier one said: ranks are mostly alike."""
    kept: list[Mapping[str, Any]] = []
    for mapping in mappings:
        if mapping is not None and mapping not in kept[:8]:
            kept.append(mapping)
    return kept
