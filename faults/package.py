"""The two packages behind one face, and what is saved with them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp

import shardpoint.dcp as shardpoint_dcp

__all__ = ["PACKAGES", "RANK_SECONDS", "found_by", "in_group", "load", "save", "state_of"]

PACKAGES: dict[str, ModuleType] = {"torch": torch_dcp, "shardpoint": shardpoint_dcp}

RANK_SECONDS = 10
"""The time that shardpoint is told to wait for lost ranks; torch waits for its group's."""

SIZES = {"large": 500_000, "other": 400_000, "small": 5}


def state_of(number: float) -> dict[str, Any]:
    """Return a state of which every value tells its number."""
    state: dict[str, Any] = {key: torch.full((size,), float(number)) for key, size in SIZES.items()}
    return {**state, "number": float(number)}


def _blank() -> dict[str, Any]:
    state: dict[str, Any] = {key: torch.full((size,), -1.0) for key, size in SIZES.items()}
    return {**state, "number": -1.0}


def save(package: str, folder: Path, state: dict[str, Any], **options: Any) -> None:
    """Save with a writer; `options` are the writer's."""
    module = PACKAGES[package]
    writer = module.FileSystemWriter(folder, **options)
    module.save(state, storage_writer=writer, no_dist=not dist.is_initialized())


def load(package: str, folder: Path, state: dict[str, Any], **options: Any) -> None:
    """Load into a state."""
    PACKAGES[package].load(
        state, checkpoint_id=folder, no_dist=not dist.is_initialized(), **options
    )


def found_by(package: str, folder: Path) -> str:
    """Load all of it, and return which state that was: its number, or a mixture."""
    target = _blank()
    load(package, folder, target)
    numbers = {float(target["number"])}
    for key in SIZES:
        numbers |= set(target[key].unique().tolist())
    if len(numbers) > 1:
        return "a mixture"
    return f"{numbers.pop():g}"


def in_group(
    rank: int, world_size: int, store: Path, action: Callable[[], Any], *, seconds: float = 600
) -> Callable[[], Any]:
    """Return an action that first joins a gloo group of that timeout."""

    def run() -> Any:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=seconds),
        )
        return action()

    return run
