"""Planners and storage that extend the classes of torch's own package, beside ours.

Each part sees objects of the package that it was written for alone: where a planner and a storage
are of different ones, the stranger is wrapped, and what passes is translated.
Where both are torch's, nothing is.
"""

from __future__ import annotations

import io
import os
from dataclasses import replace
from typing import Any, cast

import torch
from torch.futures import Future

from shardpoint.dcp._signatures import accepted
from shardpoint.dcp._torch_objects import TORCHS_PACKAGE, ours, torchs
from shardpoint.dcp.metadata import STATE_DICT_TYPE, Metadata, StorageMeta
from shardpoint.dcp.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from shardpoint.dcp.storage import StorageReader, StorageWriter, WriteResult

__all__ = ["is_torchs", "loading_parts", "saving_parts"]

_INTERFACES = {
    f"{TORCHS_PACKAGE}.planner": {"SavePlanner", "LoadPlanner"},
    f"{TORCHS_PACKAGE}.storage": {"StorageWriter", "StorageReader"},
}
_OURS = (SavePlanner, LoadPlanner, StorageWriter, StorageReader)


def is_torchs(part: object) -> bool:
    """Whether a planner or storage extends torch's interface, and not ours."""
    return not isinstance(part, _OURS) and any(
        base.__name__ in _INTERFACES.get(base.__module__, ()) for base in type(part).__mro__
    )


def saving_parts(planner: SavePlanner, writer: StorageWriter) -> tuple[SavePlanner, StorageWriter]:
    """Return a planner and a writer that understand each other."""
    if is_torchs(planner) is is_torchs(writer):
        return planner, writer
    if is_torchs(planner):
        return _TorchsSavePlanner(planner), writer
    return planner, _TorchsWriter(writer)


def loading_parts(planner: LoadPlanner, reader: StorageReader) -> tuple[LoadPlanner, StorageReader]:
    """Return a planner and a reader that understand each other."""
    if is_torchs(planner) is is_torchs(reader):
        return planner, reader
    if is_torchs(planner):
        return _TorchsLoadPlanner(planner), reader
    return planner, _TorchsReader(reader)


class _Wrapped:
    """Has all that the part has, beyond what is translated."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        if name == "_part":  # not made yet: there is nothing to look into
            raise AttributeError(name)
        return getattr(self._part, name)


class _TorchsSavePlanner(_Wrapped, SavePlanner):
    """A planner of torch's for a writer of ours."""

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        set_up = self._part.set_up_planner
        meta = accepted(set_up, storage_meta=torchs(storage_meta))
        set_up(state_dict, is_coordinator=is_coordinator, **meta)

    def create_local_plan(self) -> SavePlan:
        return cast(SavePlan, ours(self._part.create_local_plan()))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = self._part.create_global_plan(torchs(list(all_plans)))
        return ours(plans), ours(metadata)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        finished = cast(SavePlan, ours(self._part.finish_plan(torchs(new_plan))))
        # One that says "as last time" is answered with last time's, whose files have other names.
        return (
            finished if new_plan.usable else replace(finished, storage_data=new_plan.storage_data)
        )

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return cast(torch.Tensor | io.BytesIO, self._part.resolve_data(torchs(write_item)))


class _TorchsLoadPlanner(_Wrapped, LoadPlanner):
    """A planner of torch's for a reader of ours."""

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self._part.set_up_planner(state_dict, torchs(metadata), is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        return cast(LoadPlan, ours(self._part.create_local_plan()))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return cast(list[LoadPlan], ours(self._part.create_global_plan(torchs(list(global_plan)))))

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return cast(LoadPlan, ours(self._part.finish_plan(torchs(central_plan))))

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self._part.load_bytes(torchs(read_item), value)

    def resolve_bytes(self, read_item: ReadItem) -> io.BytesIO:
        return cast(io.BytesIO, self._part.resolve_bytes(torchs(read_item)))

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return cast(torch.Tensor, self._part.resolve_tensor(torchs(read_item)))

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self._part.commit_tensor(torchs(read_item), tensor)


class _OurSavePlanner(_Wrapped):
    """A planner of ours, as a writer of torch's asks it."""

    def resolve_data(self, write_item: Any) -> Any:
        return self._part.resolve_data(ours(write_item))


class _OurLoadPlanner(_Wrapped):
    """A planner of ours, as a reader of torch's asks it."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self._part.load_bytes(ours(read_item), value)

    def resolve_bytes(self, read_item: Any) -> Any:
        return self._part.resolve_bytes(ours(read_item))

    def resolve_tensor(self, read_item: Any) -> Any:
        return self._part.resolve_tensor(ours(read_item))

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self._part.commit_tensor(ours(read_item), tensor)


class _TorchsWriter(_Wrapped, StorageWriter):
    """A writer of torch's for a planner of ours."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._part.reset(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        set_up = self._part.set_up_storage_writer
        set_up(is_coordinator, *args, **accepted(set_up, **kwargs))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return cast(SavePlan, ours(self._part.prepare_local_plan(torchs(plan))))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return cast(list[SavePlan], ours(self._part.prepare_global_plan(torchs(list(plans)))))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        return cast(
            Future[list[WriteResult]],
            self._part.write_data(torchs(plan), _OurSavePlanner(planner)),
        )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        given = torchs(metadata)
        self._part.finish(given, results)
        # Also what shows it as the columns that it came from: the writer has added to it.
        vars(metadata).clear()
        vars(metadata).update(vars(ours(given)))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True  # the part that is wrapped was made for its place already

    def storage_meta(self) -> StorageMeta | None:
        return cast(StorageMeta | None, ours(self._part.storage_meta()))


class _TorchsReader(_Wrapped, StorageReader):
    """A reader of torch's for a planner of ours."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._part.reset(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        read = self._part.read_metadata
        return cast(Metadata, ours(read(*args, **accepted(read, **kwargs))))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        set_up = self._part.set_up_storage_reader
        set_up(torchs(metadata), is_coordinator, *args, **accepted(set_up, **kwargs))

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return cast(LoadPlan, ours(self._part.prepare_local_plan(torchs(plan))))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return cast(list[LoadPlan], ours(self._part.prepare_global_plan(torchs(list(plans)))))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return cast(Future[None], self._part.read_data(torchs(plan), _OurLoadPlanner(planner)))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True  # the part that is wrapped was made for its place already
