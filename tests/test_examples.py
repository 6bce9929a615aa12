"""The example programs, with shardpoint and, by changing the import line, with torch."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardpoint
from dcp_states import differences
from ranks import RankPool

EXAMPLES = Path(__file__).parent.parent / "examples"
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
WAYS = ("shardpoint", "torch")
RENAMED = {
    "shardpoint.dcp.extension": "torch.distributed.checkpoint._extension",
    "shardpoint.dcp.sharding_spec": "torch.distributed._shard.sharding_spec",
    "shardpoint.dcp": "torch.distributed.checkpoint",
}


def _module(name: str, way: str) -> Any:
    """Import an example with the names of one package in its import lines, and nothing else."""
    path = EXAMPLES / f"{name}.py"
    lines = path.read_text().splitlines(keepends=True)
    for node in ast.walk(ast.parse("".join(lines))):
        if way == "torch" and isinstance(node, ast.Import | ast.ImportFrom):
            for old, new in RENAMED.items():
                lines[node.lineno - 1] = lines[node.lineno - 1].replace(old, new)
    module = types.ModuleType(f"{name}_with_{way}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # so that what it defines can be pickled
    exec(compile("".join(lines), str(path), "exec"), module.__dict__)
    return module


def _world_size(name: str) -> int:
    for node in ast.parse((EXAMPLES / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WORLD_SIZE":
            return int(ast.literal_eval(node.value))
    raise AssertionError(f"{name} does not say for how many ranks it is")


@contextmanager
def _warnings_of(way: str) -> Iterator[None]:
    """Make all warnings errors with shardpoint, torch's too; torch's package gives its own."""
    with warnings.catch_warnings():
        if way == "shardpoint":
            warnings.simplefilter("error")
        yield


def _run_both_ways(name: str, folder: str) -> list[str]:
    """Save with each package, load all with each; return how results differ from the first."""
    modules = {way: _module(name, way) for way in WAYS}
    exchanged = name != "custom_storage"  # a pickle of one package's own classes
    for way, module in modules.items():
        with _warnings_of(way):
            module.save(f"{folder}/{way}")
        dist.barrier()
    wrong: list[str] = []
    first: Any = None
    for saver in WAYS:
        for loader in WAYS if exchanged else (saver,):
            torch.manual_seed(0)
            with _warnings_of(loader):
                loaded = modules[loader].load(f"{folder}/{saver}")
            dist.barrier()
            if first is None:
                first = loaded
            wrong += [f"{saver} -> {loader}: {text}" for text in differences(loaded, first)]
    return wrong


@pytest.mark.parametrize("name", PROGRAMS)
def test_both_packages_do_the_same(own_pool: RankPool, tmp_path: Path, name: str) -> None:
    world_size = _world_size(name)
    found = own_pool.run(world_size, _run_both_ways, name, str(tmp_path))
    assert found == [[]] * world_size
    theirs, ours = (_checkpoints(tmp_path / way) for way in ("torch", "shardpoint"))
    assert theirs.keys() == ours.keys()
    for place, wanted in theirs.items():
        _compare_files(wanted, ours[place])


def _checkpoints(folder: Path) -> dict[str, Path]:
    found = [*folder.rglob(".metadata"), *folder.glob("*.safetensors.index.json")]
    return {str(path.parent.relative_to(folder)): path.parent for path in found}


def _compare_files(theirs: Path, ours: Path) -> None:
    """The same data files, metadata and values, whichever rank wrote what several ranks have."""
    names = {path.name for path in theirs.iterdir() if path.is_file()}
    assert names <= {path.name for path in ours.iterdir()}
    if ".metadata" in names and not _compare_metadata(theirs, ours):
        return
    with shardpoint.open(theirs) as first, shardpoint.open(ours) as second:
        assert second.verify().ok
        assert set(first.keys()) == set(second.keys())
        for key in first:
            value, other = first[key], second[key]
            if hasattr(value, "tobytes"):
                assert value.dtype == other.dtype
                assert value.tobytes() == other.tobytes()
            else:
                assert repr(value) == repr(other)


def _compare_metadata(theirs: Path, ours: Path) -> bool:
    """Return whether the values can be read without the program's own transforms."""
    wanted, found = (pickle.loads((path / ".metadata").read_bytes()) for path in (theirs, ours))
    assert found.planner_data == wanted.planner_data
    assert found.state_dict_metadata.keys() == wanted.state_dict_metadata.keys()
    assert found.storage_data.keys() == wanted.storage_data.keys()
    is_known = True
    for item, place in wanted.storage_data.items():
        descriptors = place.transform_descriptors
        assert found.storage_data[item].transform_descriptors == descriptors
        if not descriptors:
            assert found.storage_data[item].length == place.length
        is_known &= all(name.startswith("stream.zstd") for name in descriptors or ())
    return is_known


def test_an_example_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "1", str(EXAMPLES / "custom_planner.py"), str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "'grown'" in done.stdout
    assert (tmp_path / "c" / "adapters" / ".metadata").exists()
