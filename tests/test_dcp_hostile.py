"""Checkpoints that were tampered with, through `shardpoint.dcp.load`."""

from __future__ import annotations

import io
import multiprocessing
import resource
import sys
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import shardpoint
import shardpoint.dcp as dcp
from dcp_states import differences
from fixture_support import HostileFixture, hostile_fixtures
from shardpoint.dcp._objects import read_object
from shardpoint.dcp.api import CheckpointException
from shardpoint.errors import FormatError
from test_dcp_fixtures import blanked, wanted

TAMPERED = hostile_fixtures()
LIMIT_SECONDS = 10
LIMIT_BYTES = 1 << 30


def attempt(fixture: HostileFixture, state: dict[str, Any]) -> Any:
    """Return what a flat state loads as, or the error that the load was refused with."""
    try:
        dcp.load(
            state,
            checkpoint_id=fixture.checkpoint,
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
        )
    except CheckpointException as error:
        return error
    return state


def _opens(fixture: HostileFixture) -> bool:
    try:
        shardpoint.open(fixture.checkpoint)
    except shardpoint.ShardpointError:
        return False
    return True


@pytest.mark.parametrize("fixture", TAMPERED, ids=str)
def test_a_load_gives_what_was_saved_or_is_refused(fixture: HostileFixture) -> None:
    expectation = fixture.expectation
    values = wanted(fixture.base)
    names = [*values, *(path.name for path in fixture.checkpoint.rglob("*")), "outside"]
    # a damaged safetensors file, or metadata that is refused as a whole, may take all keys along
    may_fail_whole = fixture.base.expected["format"] == "hf" or not _opens(fixture)
    assert may_fail_whole or expectation["stage"] != "open"
    wrong = expectation.get("keys", ())
    looked_at = sorted(values, key=lambda key: key not in wrong)
    for key in looked_at[: len(wrong) + 1] if may_fail_whole else looked_at:
        value, is_wrong = values[key], key in wrong
        found = attempt(fixture, {key: blanked(value)})
        if isinstance(found, Exception):
            assert any(name in str(found) for name in names), str(found)
            assert is_wrong or may_fail_whole, f"{key}: {found}"
            assert not is_wrong or expectation["expect"] != "ok"
            continue
        if is_wrong and expectation["stage"] != "unflatten":
            assert expectation["expect"] in ("ok", "ok-or-refuse"), f"{key} gave {found!r}"
        expected = value
        if is_wrong and expectation.get("values") == "1.5":
            expected = torch.full_like(value, 1.5)
        assert differences(found, {key: expected}) == []
    assert not Path("PWNED").exists()
    assert not (fixture.checkpoint / "PWNED").exists()
    assert not {"acme", "myproject", "hubconf"} & set(sys.modules)


@pytest.mark.parametrize(
    "call",
    [
        (torch.device, ("evil",)),
        (torch.device, ("cuda", -1)),
        (torch._utils._rebuild_parameter, (torch.arange(3), True, OrderedDict())),
    ],
    ids=["device", "index", "parameter"],
)
def test_what_torch_cannot_make_is_an_error_of_the_checkpoint(call: Any, tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(Reduced(*call), stream)
    record = io.BytesIO(stream.getvalue())
    with pytest.raises(FormatError, match=r"key 'odd'.*RuntimeError"):
        read_object(record, key="odd", allowed={})


@pytest.mark.parametrize(
    "call",
    [(torch.device, ("evil",)), (torch.serialization._get_layout, ("torch.nn",))],
    ids=["device", "layout"],
)
def test_so_it_is_in_a_file_of_torch_save(call: Any, tmp_path: Path) -> None:
    torch.save({"odd": Reduced(*call)}, tmp_path / "saved.pt")
    with pytest.raises(CheckpointException, match="key 'odd': holds what torch") as caught:
        dcp.load({"odd": None}, checkpoint_id=tmp_path / "saved.pt", no_dist=True)
    assert isinstance(caught.value.causes[0], FormatError)


class Reduced:
    """Pickles as a call that nothing real is saved as."""

    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> Any:
        return self._call


def _load_all(sender: Any) -> None:
    """Load all keys of each one, with little memory to spare; send the longest time."""
    warnings.simplefilter("ignore")
    # the address space that torch has reserved already is not what is being measured
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    longest = 0.0
    for fixture in TAMPERED:
        state = {key: blanked(value) for key, value in wanted(fixture.base).items()}
        started = time.monotonic()
        attempt(fixture, state)
        longest = max(longest, time.monotonic() - started)
    sender.send((longest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_time_and_memory_of_a_load_stay_bounded() -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_load_all, args=(sender,))
    process.start()
    sender.close()
    try:
        assert receiver.poll(LIMIT_SECONDS * len(TAMPERED)), "a load hangs"
        longest, peak = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert longest < LIMIT_SECONDS
    assert peak < LIMIT_BYTES
