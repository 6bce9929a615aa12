"""Saving and loading a state dict with each library, in the same terms."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import raw
import torch
from states import buffers_of

__all__ = ["LIBRARIES", "load", "save", "warm_up"]

LIBRARIES = ("torch", "shardpoint")
"""Those with the interface of torch.distributed.checkpoint."""


def library(name: str) -> ModuleType:
    """Return the module that a contender is."""
    import torch.distributed.checkpoint as torch_dcp

    import shardpoint.dcp as shardpoint_dcp

    return {"torch": torch_dcp, "shardpoint": shardpoint_dcp}[name]


def save(contender: str, state: dict[str, Any], folder: Path, *, sync: bool, rank: int = 0) -> None:
    """Save a state into a folder."""
    if contender in LIBRARIES:
        module = library(contender)
        module.save(state, storage_writer=module.FileSystemWriter(folder, sync_files=sync))
    elif contender == "torch_checkpointing":
        if sync:
            raise ValueError("torch_checkpointing has no way to ask for synced files")
        with closing(_manager()) as manager:
            manager.save(str(folder), {"state": state})
    elif contender == "safetensors":
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        path = folder / "model.safetensors"
        save_file(state, path)
        if sync:
            _sync(path)
            _sync(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        raw.write(folder / f"raw{rank}", buffers_of(state), sync=sync)


def load(
    contender: str, state: dict[str, Any], folder: Path, *, rank: int = 0, **options: Any
) -> Any:
    """Load a whole state in place; tensors keep the memory that they have.

    Returns what the library's own ``load`` does, if it has one: shardpoint's a report.
    """
    if contender in LIBRARIES:
        return library(contender).load(state, checkpoint_id=folder, **options)
    if contender == "torch_checkpointing":
        with closing(_manager()) as manager:
            state.update(manager.load(str(folder), into={"state": state})["state"])
    elif contender == "safetensors":
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", framework="pt") as file:
            for key, tensor in state.items():
                tensor.copy_(file.get_tensor(key))
    else:
        raw.read(folder / f"raw{rank}", buffers_of(state))
    return None


def _manager() -> Any:
    """Return Meta's successor of torch's package; direct I/O off, which ext4 refuses here."""
    from torch_checkpointing.checkpoint_manager import CheckpointManager
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    config = CheckpointManager.Config.with_sync_save()
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return config.build()


def warm_up(contender: str, folder: Path) -> None:
    """Save and load something tiny: modules that are imported late are then there."""
    state: dict[str, Any] = {"tensor": torch.ones(2)}
    if contender in LIBRARIES:
        state["object"] = 1.0
    save(contender, state, folder, sync=False)
    load(contender, state, folder, **({"no_dist": True} if contender in LIBRARIES else {}))


def _sync(path: Path) -> None:
    import os

    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
