"""Saves of safetensors files, to be killed and to fail; see `crash_support.Job`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import shardpoint
import shardpoint.dcp as dcp
from crash_support import NOTHING, Trace, blank, interposed
from shardpoint.convert import to_safetensors
from shardpoint.errors import CheckpointNotFoundError
from shardpoint.formats.huggingface_journal import JOURNAL_NAME, decode_journal
from shardpoint.formats.huggingface_writing import INDEX_NAME

__all__ = ["MAPPINGS", "TENSORS", "HuggingFaceJob", "found_in"]


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.rand(70_000, generator=generator),
        "half": torch.rand(9, generator=generator).bfloat16(),
        "ids": torch.arange(5) + seed,
        "small": torch.rand(3, 2, generator=generator),
    }


TENSORS = {"old": _tensors(1), "new": _tensors(2), "next": _tensors(3)}

MAPPINGS = {
    "old": {"large": 1, "half": 2, "ids": 3, "small": 3},
    # another number of files: some names are replaced, some are not needed any more
    "new": {"large": 1, "half": 2, "ids": 2, "small": 2},
    "next": {"large": 1, "half": 2, "ids": 3, "small": 3},
}


def found_in(place: str | Path) -> str:
    """Return which state is there, as all readers have it; `NOTHING`; or what else was found."""
    answers = {_found_by_core(place), _found_by_load(place)}
    return answers.pop() if len(answers) == 1 else f"readers differ: {answers}"


def _found_by_core(place: str | Path) -> str:
    try:
        checkpoint = shardpoint.open(place)
    except CheckpointNotFoundError:
        return NOTHING
    except shardpoint.ShardpointError as error:
        return f"broken: {error!r}"
    with checkpoint:
        arrays = {key: checkpoint[key] for key in checkpoint}
        if not checkpoint.verify().ok:
            return f"broken: {checkpoint.verify().problems}"
    for name, state in TENSORS.items():
        if arrays.keys() == state.keys() and all(
            np.array_equal(arrays[key].view(np.uint8), value.view(torch.uint8).numpy())
            for key, value in state.items()
        ):
            return name
    return "a mixture"


def _found_by_load(place: str | Path) -> str:
    target = blank(TENSORS["old"])
    try:
        reader = dcp.HuggingFaceStorageReader(place)
        dcp.load(target, storage_reader=reader, no_dist=True)
    except dcp.CheckpointException as error:
        if isinstance(error.causes[0], CheckpointNotFoundError):
            return NOTHING
        return f"broken: {error}"
    for name, state in TENSORS.items():
        if all(torch.equal(target[key], value) for key, value in state.items()):
            return name
    return "a mixture"


class HuggingFaceJob:
    """Saves with the writer, or a conversion.

    Parameters
    ----------
    kind
        ``"full"``: full files, of more than one file. ``"one"``: one full file. ``"shards"``:
        each rank's own. ``"others"``: full files over a file that other software wrote.
        ``"conversion"``: full files by `to_safetensors`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def writer(self, place: str | Path, name: str) -> dcp.HuggingFaceStorageWriter:
        return dcp.HuggingFaceStorageWriter(
            place,
            fqn_to_index_mapping=None if self.kind == "one" else MAPPINGS[name],
            save_distributed=self.kind == "shards",
        )

    def save(self, place: Path, name: str, options: dict[str, Any]) -> None:
        if self.kind == "others" and name == "old":
            place.mkdir()
            save_file(TENSORS[name], place / "model.safetensors")
        elif self.kind == "conversion":
            to_safetensors(self._source(place.parent, name), place, file_numbers=MAPPINGS[name])
        else:
            dcp.save(TENSORS[name], storage_writer=self.writer(place, name), no_dist=True)

    def _source(self, folder: Path, name: str) -> Path:
        for each, state in TENSORS.items():
            if not (folder / f"source-{each}").exists():
                with interposed(Trace()):
                    dcp.save(state, checkpoint_id=folder / f"source-{each}", no_dist=True)
        return folder / f"source-{name}"

    def save_part(self, place: Path, name: str, rank: int, options: dict[str, Any]) -> None:
        keys = ("half", "small", "ids") if rank else ("large", "ids")
        mine = {key: TENSORS[name][key] for key in keys}
        dcp.save(mine, storage_writer=self.writer(place, name), **options)

    def found(self, place: Path) -> str:
        return found_in(place)

    def garbage(self, place: Path) -> tuple[str, ...]:
        present = {
            path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()
        }
        if JOURNAL_NAME in present:
            journal = decode_journal((place / JOURNAL_NAME).read_bytes())
            named = {JOURNAL_NAME, *journal.files, *journal.finals, *journal.removed}
            return tuple(sorted(present - named))
        if self.found(place) == NOTHING:
            return tuple(sorted(present))
        with shardpoint.open(place) as checkpoint:
            named = set(checkpoint.index.files)
        if self.kind != "shards" and INDEX_NAME in present:
            named.add(INDEX_NAME)
            weight_map = json.loads((place / INDEX_NAME).read_bytes())["weight_map"]
            assert set(weight_map.values()) == set(checkpoint.index.files)
        return tuple(sorted(present - named))
