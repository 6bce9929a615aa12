"""Saving and loading a state dict with each library, in the same terms."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import raw
import torch
from states import buffers_of

__all__ = ["LIBRARIES", "SEVERAL_FILES", "given", "load", "save", "warm_up"]

LIBRARIES = ("torch", "shardpoint")
"""Those with the interface of torch.distributed.checkpoint."""

_FILES = min(4, os.cpu_count() or 1)

SEVERAL_FILES = tuple(f"{name}, {_FILES} files" for name in (*LIBRARIES, "raw") if _FILES > 1)
"""Contenders that write a file, in a thread of its own, for each processor."""


def library(name: str) -> ModuleType:
    """Return the module that a contender is."""
    import torch.distributed.checkpoint as torch_dcp

    import shardpoint.dcp as shardpoint_dcp

    return {"torch": torch_dcp, "shardpoint": shardpoint_dcp}[name]


def given(contender: str, state: dict[str, Any]) -> Any:
    """Return what `save` and `load` are given of a state; to make it is not measured.

    The raw limit gets bare memory: to find that in tensors is no part of the machine's work.
    """
    return buffers_of(state) if _name_of(contender) == "raw" else state


def save(contender: str, state: Any, folder: Path, *, sync: bool, rank: int = 0) -> None:
    """Save a state, as `given` returns it, into a folder."""
    name, files = _name_of(contender), _files_of(contender)
    if name in LIBRARIES:
        module = library(name)
        writer = module.FileSystemWriter(folder, sync_files=sync, thread_count=files)
        module.save(state, storage_writer=writer)
    elif name == "torch_checkpointing":
        if sync:
            raise ValueError("torch_checkpointing has no way to ask for synced files")
        with closing(_manager()) as manager:
            manager.save(str(folder), {"state": state})
    elif name == "safetensors":
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        path = folder / "model.safetensors"
        save_file(state, path)
        if sync:
            _sync(path)
            _sync(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _each_file(partial(raw.write, sync=sync), folder, state, rank, files)


def load(contender: str, state: Any, folder: Path, *, rank: int = 0, **options: Any) -> Any:
    """Load a whole state, as `given` returns it; tensors keep the memory that they have.

    Returns what the library's own ``load`` does, if it has one: shardpoint's a report.
    """
    name, files = _name_of(contender), _files_of(contender)
    if name in LIBRARIES:
        return library(name).load(state, checkpoint_id=folder, **options)
    if name == "torch_checkpointing":
        with closing(_manager()) as manager:
            state.update(manager.load(str(folder), into={"state": state})["state"])
    elif name == "safetensors":
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", framework="pt") as file:
            for key, tensor in state.items():
                tensor.copy_(file.get_tensor(key))
    else:
        _each_file(raw.read, folder, state, rank, files)
    return None


def _name_of(contender: str) -> str:
    return contender.partition(", ")[0]


def _files_of(contender: str) -> int:
    return _FILES if contender in SEVERAL_FILES else 1


def _each_file(move: Any, folder: Path, buffers: Sequence[memoryview], rank: int, n: int) -> None:
    """Write or read one file of all buffers, or several that have every n-th, side by side."""
    if n == 1:
        move(folder / f"raw{rank}", buffers)
        return
    with ThreadPoolExecutor(n) as pool:
        paths = [folder / f"raw{rank}_{number}" for number in range(n)]
        list(pool.map(move, paths, [buffers[number::n] for number in range(n)]))


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
    options = {}
    if _name_of(contender) in LIBRARIES:
        state["object"] = 1.0
        options["no_dist"] = True
    tiny = given(contender, state)
    save(contender, tiny, folder, sync=False)
    load(contender, tiny, folder, **options)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
