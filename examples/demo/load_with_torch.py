"""Loads the demo's checkpoint with torch's own package; fails if a value is not as saved."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from digests import differences, digest
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


def main(folder: str, expected_file: str) -> None:
    """Load every key by its flat name; compare every tensor with its fingerprint."""
    expected = json.loads(Path(expected_file).read_text())
    metadata = FileSystemReader(folder).read_metadata()
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for key, entry in metadata.state_dict_metadata.items()
    }
    started = time.perf_counter()
    with warnings.catch_warnings():  # torch warns of what no_dist=True asks for
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(state, checkpoint_id=folder, no_dist=True)
    seconds = time.perf_counter() - started
    print(f"torch {torch.__version__}: {len(state)} keys loaded in {1e3 * seconds:.0f} ms")
    if state["step"] != expected["step"]:
        raise SystemExit(f"step is {state['step']!r}, saved was {expected['step']!r}")
    found = {key: digest(state[key].numpy()) for key in expected["digests"] if key in state}
    if wrong := differences(expected["digests"], found):
        raise SystemExit("loaded by torch: " + "; ".join(wrong[:5]))
    print(f"{len(found)} tensors of model and optimizer: bit for bit as they were in training")


if __name__ == "__main__":
    main(*sys.argv[1:])
