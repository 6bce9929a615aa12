"""Distributed checkpoints from and to single ``torch.save`` files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from torch.futures import Future

from shardpoint.convert import to_checkpoint, to_torch_save
from shardpoint.dcp._broadcasting import broadcast_tensors
from shardpoint.dcp._layouts import shape_and_dtype
from shardpoint.dcp._process_group import coordinator_for
from shardpoint.dcp._safe_globals import with_safe_globals
from shardpoint.dcp.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from shardpoint.dcp.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from shardpoint.dcp.planner import LoadPlan, LoadPlanner
from shardpoint.dcp.state_dict_loader import _load_state_dict
from shardpoint.dcp.storage import StorageReader
from shardpoint.errors import PlanError, Problem

__all__ = [
    "BroadcastingTorchSaveReader",
    "DynamicMetaLoadPlanner",
    "dcp_to_torch_save",
    "torch_save_to_dcp",
]

# Programs import these from torch's module of this name.
_IMPORTED_BY_PROGRAMS = (_EmptyStateDictLoadPlanner, _load_state_dict)

Allowed = Mapping[str, Callable[..., Any]]


def dcp_to_torch_save(
    dcp_checkpoint_dir: str | os.PathLike[str],
    torch_save_path: str | os.PathLike[str],
    *,
    allowed: Allowed | None = None,
) -> None:
    """Write a checkpoint into one file, which ``torch.load`` reads.

    At most the largest tensor is in memory. Call it in one process.

    Parameters
    ----------
    dcp_checkpoint_dir
        The checkpoint's folder or URL.
    torch_save_path
        The file; replaced if it exists.
    allowed
        Classes that objects may hold beyond the closed list; see `shardpoint.open`.
    """
    to_torch_save(dcp_checkpoint_dir, torch_save_path, allowed=with_safe_globals(allowed))


def torch_save_to_dcp(
    torch_save_path: str | os.PathLike[str],
    dcp_checkpoint_dir: str | os.PathLike[str],
    *,
    allowed: Allowed | None = None,
) -> None:
    """Write what a ``torch.save`` file holds as a checkpoint.

    At most the largest tensor is in memory. Call it in one process. Nothing in the file can
    run code.

    Parameters
    ----------
    torch_save_path
        The file: a state dict.
    dcp_checkpoint_dir
        The checkpoint's folder or URL.
    allowed
        Classes that the file may hold beyond the closed list.
    """
    to_checkpoint(torch_save_path, dcp_checkpoint_dir, allowed=with_safe_globals(allowed))


class BroadcastingTorchSaveReader(StorageReader):
    """Loads a ``torch.save`` file on all ranks while only one of them reads it.

    That rank reads one tensor at a time and sends each rank the part it wants. To be used
    with `DynamicMetaLoadPlanner`; loads tensors only.

    Parameters
    ----------
    checkpoint_id
        The file; may also be given to `load`.
    coordinator_rank
        The rank that reads.
    """

    def __init__(
        self,
        checkpoint_id: str | os.PathLike[str] | None = None,
        coordinator_rank: int = 0,
    ) -> None:
        self.checkpoint_id = checkpoint_id
        self.coordinator_rank = coordinator_rank
        self.is_coordinator = False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return empty metadata: the planner makes its own from the state dict."""
        return Metadata(state_dict_metadata={})

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        if self.checkpoint_id is None:
            raise PlanError("BroadcastingTorchSaveReader needs a checkpoint_id")
        self.is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if self.checkpoint_id is None:
            raise PlanError("BroadcastingTorchSaveReader needs a checkpoint_id")
        coordinator = coordinator_for(None, self.coordinator_rank, False)
        broadcast_tensors(self.checkpoint_id, plan.items, planner, coordinator)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.checkpoint_id = checkpoint_id or self.checkpoint_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return os.path.isfile(checkpoint_id)


class DynamicMetaLoadPlanner(DefaultLoadPlanner):
    """Plans a load from the state dict alone, for formats whose metadata nobody has read.

    Every tensor of the state dict is wanted, and taken to be stored whole. Tensors only.
    """

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        described: dict[str, Any] = {}
        problems = []
        for key, value in self.state_dict.items():
            if not isinstance(value, torch.Tensor):
                problems.append(Problem(f"is no tensor but {type(value).__name__}", key))
                continue
            size, dtype = shape_and_dtype(value)
            whole = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))
            described[key] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(size), [whole]
            )
        if problems:
            raise PlanError(f"{type(self).__name__} loads tensors only", problems)
        self.metadata = Metadata(state_dict_metadata=described)


class _Mode(Enum):
    TORCH_TO_DCP = "torch_to_dcp"
    DCP_TO_TORCH = "dcp_to_torch"


def _main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert checkpoints from and to torch.save files."
    )
    parser.add_argument("mode", choices=[mode.value for mode in _Mode], help="what to convert")
    parser.add_argument("src", help="the file or folder to read")
    parser.add_argument("dst", help="the folder or file to write")
    arguments = parser.parse_args()
    convert = {
        _Mode.TORCH_TO_DCP.value: torch_save_to_dcp,
        _Mode.DCP_TO_TORCH.value: dcp_to_torch_save,
    }[arguments.mode]
    convert(arguments.src, arguments.dst)
    print(f"converted {arguments.src} to {arguments.dst} ({arguments.mode})")


if __name__ == "__main__":
    _main()
