"""The benchmark runs all contenders, and says at once what it cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_CASES = "small,open-64,metadata,plan-64"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, _ROOT / "benchmarks" / "run.py", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )


def test_cases_run_with_all_contenders(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    sizes = ("--rounds", "1", "--size-mb", "16", "--small", "20", "--tensors", "5")
    place = tmp_path / "place"
    place.mkdir()
    ran = _run("--cases", _CASES, *sizes, "--json", str(results), "--folder", str(place))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(results.read_text())
    assert found["failures"] == []
    assert list(place.iterdir()) == []
    by_operation = {
        (operation["case"], operation["operation"]): [
            contender["contender"] for contender in operation["contenders"]
        ]
        for operation in found["operations"]
    }
    everyone = ["torch", "torch_checkpointing", "shardpoint", "safetensors", "raw"]
    if find_spec("torch_checkpointing") is None:
        everyone.remove("torch_checkpointing")
        assert "torch_checkpointing is not installed" in ran.stderr
    assert by_operation["small", "save"] == by_operation["small", "load"] == everyone
    assert by_operation["plan-64", "coordinator's plan"] == ["torch", "shardpoint"]
    assert {case for case, _ in by_operation} == set(_CASES.split(","))
    for operation in found["operations"]:
        for contender in operation["contenders"]:
            assert len(contender["rounds"]) == 1
            assert contender["seconds"] == contender["rounds"][0]["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "'0' is not a number of at least 1"),
        (("--size-mb", "20"), "a multiple of 16"),
        (("--folder", "no-such-folder"), "there is no folder 'no-such-folder'"),
        (("--json", "no-such-folder/results.json"), "is a folder, or in none"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(
    arguments: tuple[str, ...], message: str
) -> None:
    ran = _run(*arguments)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert ran.stdout == ""
