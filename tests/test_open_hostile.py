"""Checkpoints that were tampered with: refused with our own errors, and nothing is run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shardpoint
from fixture_support import (
    HOSTILE,
    HostileFixture,
    assert_same_array,
    assert_same_object,
    decode_object,
    hostile_fixtures,
)
from shardpoint import ShardpointError, UnsafePathError
from shardpoint.formats.object_decoder import DeviceValue, DTypeValue, TensorSize

TAMPERED = hostile_fixtures()
AT_OPEN = [f for f in TAMPERED if f.expectation["stage"] == "open"]
AT_READ = [f for f in TAMPERED if f.expectation["stage"] == "read"]
AT_UNFLATTEN = [f for f in TAMPERED if f.expectation["stage"] == "unflatten"]


def test_every_fixture_is_tested() -> None:
    assert len(AT_OPEN) + len(AT_READ) + len(AT_UNFLATTEN) == len(TAMPERED) == 60


def assert_nothing_ran(fixture: HostileFixture) -> None:
    assert not Path("PWNED").exists()
    assert not (fixture.checkpoint / "PWNED").exists()
    assert not {"acme", "myproject", "hubconf"} & set(sys.modules)


def attempt(action: Callable[[], Any]) -> Any:
    """Return what the action gives, or the error it was refused with."""
    try:
        return action()
    except ShardpointError as error:
        return error


def assert_as_in_the_base(fixture: HostileFixture, key: str, found: Any) -> None:
    base = fixture.base
    if key in base.tensors:
        expected = base.tensors[key]
        if fixture.expectation.get("values") == "1.5" and key in fixture.expectation["keys"]:
            expected = np.full_like(expected, 1.5)
        assert_same_array(found, expected, key)
    else:
        expected = decode_object(
            base.objects[key], size=TensorSize, dtype=DTypeValue, device=DeviceValue
        )
        assert_same_object(found, expected, key)


@pytest.mark.parametrize("fixture", AT_OPEN, ids=str)
def test_opening_is_refused(fixture: HostileFixture) -> None:
    with pytest.raises(ShardpointError) as caught:
        shardpoint.open(fixture.checkpoint)
    assert ".metadata" in str(caught.value)
    assert_nothing_ran(fixture)


@pytest.mark.parametrize("fixture", AT_READ, ids=str)
def test_reading_is_refused_and_other_keys_are_not_affected(fixture: HostileFixture) -> None:
    wrong = fixture.expectation["keys"]
    checkpoint = attempt(lambda: shardpoint.open(fixture.checkpoint))
    if isinstance(checkpoint, ShardpointError):
        assert names_a_place(checkpoint, fixture.base.keys, fixture), str(checkpoint)
        assert_nothing_ran(fixture)
        return
    for key in fixture.base.keys:
        if key in wrong:
            check_wrong_key(checkpoint, fixture, key)
        elif key in checkpoint or fixture.base.expected["format"] != "hf":
            try:
                assert_as_in_the_base(fixture, key, checkpoint[key])
            except ShardpointError:
                # A damaged safetensors file may take all of its keys along.
                assert fixture.base.expected["format"] == "hf"
    assert_nothing_ran(fixture)


def check_wrong_key(checkpoint: Any, fixture: HostileFixture, key: str) -> None:
    value = attempt(lambda: checkpoint[key])
    if isinstance(value, ShardpointError):
        assert names_a_place(value, [key], fixture), str(value)
    else:
        assert fixture.expectation["expect"] in ("ok", "ok-or-refuse"), f"{key} gave {value!r}"
        assert_as_in_the_base(fixture, key, value)


def names_a_place(error: ShardpointError, keys: Any, fixture: HostileFixture) -> bool:
    """Whether the message names a key or a file."""
    files = [str(path.name) for path in fixture.checkpoint.rglob("*")]
    return any(name in str(error) for name in [*keys, *files, "outside"])


@pytest.mark.parametrize("fixture", AT_UNFLATTEN, ids=str)
def test_paths_that_form_no_tree_leave_the_flat_keys_readable(fixture: HostileFixture) -> None:
    checkpoint = shardpoint.open(fixture.checkpoint)
    with pytest.raises(ShardpointError) as caught:
        checkpoint.tree()
    assert any(key in str(caught.value) for key in fixture.expectation["keys"])
    for key in fixture.base.keys:
        assert_as_in_the_base(fixture, key, checkpoint[key])


@pytest.mark.parametrize(
    "fixture", [f for f in AT_READ if f.expectation["expect"] == "refuse"], ids=str
)
def test_verify_finds_it(fixture: HostileFixture) -> None:
    try:
        report = shardpoint.open(fixture.checkpoint).verify()
    except ShardpointError:
        return  # refused when opened, which the test above looks at
    assert report.problems
    assert all(problem.key is not None or problem.file is not None for problem in report.problems)


def test_links_that_lead_outside_are_not_followed(tmp_path: Path) -> None:
    """The fixture holds the link's text: links do not survive every way of copying."""
    fixture = next(f for f in TAMPERED if f.name == "path_symlink")
    place = tmp_path / "deep" / "ckpt"
    shutil.copytree(fixture.checkpoint, place)
    shutil.copy(HOSTILE / "outside.distcp", tmp_path)
    data = place / "__0_0.distcp"
    link = data.read_text()
    data.unlink()
    data.symlink_to(link)
    assert data.resolve() == (tmp_path / "outside.distcp").resolve()
    checkpoint = shardpoint.open(place)
    for key in fixture.expectation["keys"]:
        with pytest.raises(UnsafePathError, match=r"__0_0\.distcp"):
            checkpoint[key]
    assert_as_in_the_base(fixture, "ema", checkpoint["ema"])


LIMITED = """
import resource, sys, time
import shardpoint
from fixture_support import hostile_fixtures

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for fixture in hostile_fixtures():
    started = time.monotonic()
    try:
        checkpoint = shardpoint.open(fixture.checkpoint, threads=2)
    except shardpoint.ShardpointError:
        continue
    finally:
        assert time.monotonic() - started < 20, fixture.name
    for key in checkpoint:
        try:
            checkpoint[key]
        except shardpoint.ShardpointError:
            pass
    try:
        checkpoint.tree()
    except shardpoint.ShardpointError:
        pass
    assert time.monotonic() - started < 20, fixture.name
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_time_stay_bounded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) < 1024
