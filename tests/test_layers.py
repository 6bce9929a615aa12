"""What may import what, and the names that are public."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import shardpoint
from fixture_support import PUBLIC

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "shardpoint"
CORE = sorted(p for p in SOURCES.rglob("*.py") if "dcp" not in p.relative_to(SOURCES).parts)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_layers_hold() -> None:
    pytest.importorskip("importlinter")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("module", CORE, ids=lambda path: str(path.relative_to(SOURCES)))
def test_no_module_of_the_core_imports_torch_anywhere(module: Path) -> None:
    """Inside functions as well, which an import at start-up would not show."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            named.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            named.add(node.module or "")
    roots = {name.split(".")[0] for name in named}
    assert "torch" not in roots
    assert not any(name.startswith("shardpoint.dcp") for name in named)


def test_importing_the_core_leaves_torch_out() -> None:
    names = [".".join(p.relative_to(SOURCES.parent).with_suffix("").parts) for p in CORE]
    done = run_python(
        "import sys, importlib\n"
        "for name in sys.argv[1:]: importlib.import_module(name.removesuffix('.__init__'))\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in ('torch', 'safetensors')))\n",
        *names,
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "place",
    ["plain_w1/ckpt", "torch_save_w1/ckpt/full.pt", "hf_dist_w2/ckpt", "noflatten_w1/ckpt"],
)
def test_reading_everything_leaves_torch_out(place: str) -> None:
    done = run_python(
        "import sys, shardpoint\n"
        "checkpoint = shardpoint.open(sys.argv[1])\n"
        "for key in checkpoint: checkpoint[key]\n"
        "checkpoint.tree(); checkpoint.verify()\n"
        "assert len(checkpoint) > 2\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in ('torch', 'safetensors')))\n",
        str(PUBLIC / "2.13.0" / place),
    )
    assert done.stdout == "[]\n", done.stderr


def test_public_names_are_these() -> None:
    assert set(shardpoint.__all__) == {
        "Checkpoint",
        "CheckpointExistsError",
        "CheckpointKeyError",
        "CheckpointNotFoundError",
        "ConcurrentSaveError",
        "ChunkInfo",
        "CorruptionError",
        "DamagedCheckpointError",
        "ForbiddenContentError",
        "FormatError",
        "LimitExceededError",
        "NarrowingWarning",
        "NotSupportedError",
        "ObjectInfo",
        "PlanError",
        "Problem",
        "RankFailedError",
        "RankLostError",
        "ShardpointError",
        "ShardpointWarning",
        "StorageError",
        "TensorInfo",
        "UnknownExtensionError",
        "UnsafePathError",
        "VerifyReport",
        "__version__",
        "allowing",
        "open",
    }
    assert all(hasattr(shardpoint, name) for name in shardpoint.__all__)


def test_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert shardpoint.__version__ == project["version"]


def test_every_error_is_of_the_one_tree() -> None:
    for name in shardpoint.errors.__all__:
        found = getattr(shardpoint.errors, name)
        if isinstance(found, type) and issubclass(found, Exception):
            root = (
                shardpoint.ShardpointWarning
                if issubclass(found, Warning)
                else shardpoint.ShardpointError
            )
            assert issubclass(found, root)
            assert name in shardpoint.__all__
