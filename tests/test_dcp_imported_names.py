"""Names beyond the public ones that programs import from torch's package: they are here too."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import shardpoint.dcp as dcp
from dcp_states import differences

NAMES = {
    "_consolidate_hf_safetensors": [
        "consolidate_safetensors_files",
        "consolidate_safetensors_files_on_every_rank",
    ],
    "_extension": ["Extension", "ExtensionRegistry", "StreamTransformExtension", "ZStandard"],
    "_fsspec_filesystem": ["FsspecReader", "FsspecWriter"],
    "_nested_dict": ["FLATTEN_MAPPING", "flatten_state_dict", "unflatten_state_dict"],
    "_traverse": ["OBJ_PATH", "get_element", "print_tensor", "set_element", "traverse_state_dict"],
    "default_planner": ["_EmptyStateDictLoadPlanner", "_create_default_local_metadata"],
    "filesystem": ["DEFAULT_SUFFIX", "_StorageInfo", "_StoragePrefix", "_metadata_fn"],
    "format_utils": ["_EmptyStateDictLoadPlanner", "_load_state_dict"],
    "planner_helpers": ["_create_read_items", "_create_write_items", "_create_chunk_list"],
    "state_dict": ["_get_fqns", "_init_optim_state", "_patch_model_state_dict"],
    "state_dict_loader": ["_load_state_dict", "_load_state_dict_from_keys"],
    "state_dict_saver": ["_save_state_dict"],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_programs_import_them_from(module: str) -> None:
    theirs = importlib.import_module(f"torch.distributed.checkpoint.{module}")
    ours = importlib.import_module(f"shardpoint.dcp.{module}")
    for name in NAMES[module]:
        assert hasattr(theirs, name), name
        assert hasattr(ours, name), name


def test_modules_are_attributes_of_the_package() -> None:
    """In a process of its own, where nothing else has imported them."""
    lines = ["import shardpoint.dcp as dcp", *(f"dcp.{module}" for module in NAMES)]
    lines += ["dcp.planner_helpers._create_read_items", "dcp.resharding", "dcp.metadata"]
    lines += ["assert not hasattr(dcp, 'no_such_module')"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)


def test_a_name_that_torch_does_not_have_is_missing() -> None:
    with pytest.raises(ImportError):
        from shardpoint.dcp.state_dict import _no_such_name  # noqa: F401


STATES: list[dict[str, Any]] = [
    {"a": {"b": [torch.ones(1), {"c": 2}], "e": (1, 2)}, "z": 3, 4: {5: torch.zeros(2)}},
    {"list": [[1, 2], [[torch.ones(1)]], "x"], "plain": [1, [2]], "empty": {}, "none": None},
]


@pytest.mark.parametrize("state", STATES)
def test_nested_state_is_walked_as_torch_does(state: dict[str, Any]) -> None:
    found = []
    for package in ("torch.distributed.checkpoint", "shardpoint.dcp"):
        nested = importlib.import_module(f"{package}._nested_dict")
        traverse = importlib.import_module(f"{package}._traverse")
        flat, paths = nested.flatten_state_dict(state)
        seen: list[Any] = []
        traverse.traverse_state_dict(state, lambda path, value, seen=seen: seen.append(path))
        opened: list[Any] = []
        traverse.traverse_state_dict(
            state,
            lambda path, value, opened=opened: opened.append(path),
            lambda value: value == "x",
        )
        rebuilt = nested.unflatten_state_dict(flat, paths)
        made: dict[str, Any] = {}
        for path in [("x", 1, "y"), ("x", 0), ("x", 1, "z", 2), ("v",), ("x", 0)]:
            traverse.set_element(made, path, len(path))
        got = [
            traverse.get_element(made, path, "none")
            for path in [("x", 1, "y"), ("x", 7), ("q", "r"), ("v", "w"), ("v", 0), ("x", "y")]
            if path != ("x", 7)  # torch fails here: it looks for a position too far
        ]
        found.append([flat, paths, rebuilt, seen, opened, made, got])
    theirs, ours = found
    assert differences(dict(enumerate(theirs)), dict(enumerate(ours))) == []


def test_states_are_saved_and_loaded_by_the_inner_functions(tmp_path: Path) -> None:
    """As programs do that merge the files of a sharded model, without a process group."""
    from shardpoint.dcp import format_utils
    from shardpoint.dcp.state_dict_saver import _save_state_dict

    state = {"model": {"w": torch.ones(3), "n": 4}}
    metadata = _save_state_dict(state, dcp.FileSystemWriter(tmp_path), no_dist=True)
    assert sorted(metadata.state_dict_metadata) == ["model.n", "model.w"]
    for reader in (dcp.FileSystemReader(tmp_path), torch_dcp.FileSystemReader(tmp_path)):
        merged: dict[str, Any] = {}
        format_utils._load_state_dict(
            merged,
            storage_reader=reader,
            planner=format_utils._EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
        assert differences(merged, state) == []
    apart = tmp_path / "apart"
    _save_state_dict(state, dcp.FileSystemWriter(apart), no_dist=True, use_collectives=False)
    assert (apart / "__0.metadata").exists()
