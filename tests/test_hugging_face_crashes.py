"""A save of safetensors files counts as a whole, whatever call of the storage it ends at.

With ``SHARDPOINT_ALL_FAULTS`` (as ``make faults`` sets it) every call is tried, of every kind of
save; else those of some kinds that change which files there are. Run with ``-s`` to see how
many there are.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

import shardpoint.dcp as dcp
from crash_hugging_face import HuggingFaceJob, found_in
from crash_kills import RETURNED, fail_one_of_two, kill_everywhere, kill_one_of_two
from crash_support import LOOKS, NOTHING, Failer, Trace, check_turn, interposed
from power_loss import PowerLoss
from ranks import RankPool
from shardpoint.errors import ShardpointError, StorageError

ALL = "SHARDPOINT_ALL_FAULTS" in os.environ
SKIP = (
    frozenset[str]()
    if ALL
    else LOOKS | {"close", "sync", "sync folder", "write", "reserve", "make folder"}
)
TWO_RANKS_SKIP = (SKIP | LOOKS | {"close"}) if ALL else SKIP | {"create", "remove"}


KINDS = [
    ("full", True),
    ("full", False),
    ("one", False),
    ("one", True),
    ("shards", False),
    ("shards", True),
    ("others", True),
    ("conversion", False),
    ("conversion", True),
]
CASES = KINDS if ALL else KINDS[:1]
TWO_RANKS = [
    (kind, victim, overwrite)
    for kind, overwrite in (("full", True), ("full", False), ("shards", True), ("shards", False))
    for victim in (0, 1)
]


def _report(what: str, kinds: Sequence[str]) -> None:
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(kinds).items()))
    print(f"\n{what}: {len(kinds)} calls ({counts})")


@pytest.mark.parametrize(("kind", "overwrite"), CASES)
def test_a_kill_leaves_the_old_or_the_new_files(
    pool: RankPool, tmp_path: Path, kind: str, overwrite: bool
) -> None:
    job = HuggingFaceJob(kind)
    ((kinds, outcomes),) = pool.run(
        1, kill_everywhere, str(tmp_path), overwrite, ALL, {}, job, SKIP
    )
    _report(f"{kind}: killed before each of", kinds)
    assert all(outcome.killed for outcome in outcomes[:-1])
    check_turn(outcomes, "old" if overwrite else NOTHING)
    turn = [outcome.found for outcome in outcomes].index("new")
    assert kinds[turn - 1] == "rename"


@pytest.mark.parametrize(("kind", "victim", "overwrite"), TWO_RANKS if ALL else TWO_RANKS[:1])
def test_a_kill_of_one_of_two_ranks_leaves_the_old_or_the_new_files(
    pool: RankPool, tmp_path: Path, kind: str, victim: int, overwrite: bool
) -> None:
    job = HuggingFaceJob(kind)
    (outcomes,) = pool.run(
        1, kill_one_of_two, str(tmp_path), victim, ALL, overwrite, {}, job, TWO_RANKS_SKIP
    )
    print(f"\n{kind}: rank {victim} of 2 killed before each of {len(outcomes) - 1} calls")
    assert len(outcomes) > 3
    assert all(outcome.raised for outcome in outcomes[:-1])
    check_turn(outcomes, "old" if overwrite else NOTHING)


@pytest.mark.skipif(not ALL, reason="takes long: make faults")
@pytest.mark.parametrize("mode", Failer.MODES)
@pytest.mark.parametrize(("kind", "victim", "overwrite"), TWO_RANKS)
def test_a_failing_call_on_one_of_two_ranks_is_an_error_on_both(
    pool: RankPool, tmp_path: Path, kind: str, victim: int, mode: str, overwrite: bool
) -> None:
    job = HuggingFaceJob(kind)
    (found,) = pool.run(1, fail_one_of_two, str(tmp_path), victim, mode, overwrite, {}, job)
    *failed, last = found
    print(f"\n{kind}: rank {victim} of 2 failed {mode} each of {len(failed)} calls")
    assert len(failed) >= 4
    assert last == ([0, 0], "new", ())
    before = "old" if overwrite else NOTHING
    for number, (codes, state, extra) in enumerate(failed):
        if codes[victim] == RETURNED:
            assert (codes[1 - victim], state) == (0, "new"), f"call {number}"
            continue
        assert codes == [3, 3], f"call {number}: {codes}"
        assert state in (before, "new"), f"call {number}"
        if mode == "before" and state == before:
            assert extra == (), f"call {number}"
    assert failed[0][1] == before


@pytest.mark.parametrize("mode", Failer.MODES if ALL else Failer.MODES[:2])
@pytest.mark.parametrize(("kind", "overwrite"), CASES)
def test_a_failing_call_leaves_the_old_or_the_new_files(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    overwrite: bool,
    mode: str,
) -> None:
    caplog.set_level(logging.CRITICAL)
    job = HuggingFaceJob(kind)
    if overwrite:
        job.save(tmp_path / "old", "old", {})
    before = _contents(tmp_path / "old")
    found = []
    for number in range(1000):
        place = tmp_path / f"{number}"
        if overwrite:
            shutil.copytree(tmp_path / "old", place)
        threads = set(threading.enumerate())
        failer = Failer(number, mode, skip=SKIP)
        raised = None
        try:
            with interposed(failer):
                job.save(place, "new", {})
        except dcp.CheckpointException as error:
            raised = error.causes[0]
        except ShardpointError as error:
            raised = error
        assert set(threading.enumerate()) == threads
        if failer.failed is None:
            assert raised is None
            break
        if raised is None:  # only what counts no more could not be removed
            assert failer.failed.kind in ("remove", "list")
        else:
            assert isinstance(raised, StorageError)
        after = _contents(place)
        if after == before:
            found.append("old" if overwrite else NOTHING)
        else:
            found.append(found_in(place))
            assert mode != "before" or found[-1] == "new", failer.failed
        with interposed(Trace()):
            job.save(place, "next", {})
        assert found_in(place) == "next"
        assert job.garbage(place) == (), failer.failed
        shutil.rmtree(place)
    print(f"\n{kind}: failed {mode} each of {number} calls: {Counter(found)}")
    assert len(found) >= 5
    turn = found.index("new")
    assert found == ["old" if overwrite else NOTHING] * turn + ["new"] * (len(found) - turn)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(("kind", "overwrite"), KINDS[:3] if ALL else KINDS[2:3])
def test_a_power_loss_leaves_the_old_or_the_new_files(
    tmp_path: Path, kind: str, overwrite: bool
) -> None:
    job = HuggingFaceJob(kind)
    folder = tmp_path / "ckpt"
    if overwrite:
        job.save(folder, "old", {})
    before = "old" if overwrite else NOTHING
    disk = PowerLoss(folder)
    with interposed(disk):
        job.save(folder, "new", {})
    print(f"\npower lost after {disk.calls} calls: {len(disk.states)} contents of the disk")
    found = {}
    for number, (state, at) in enumerate(disk.states.items()):
        place = tmp_path / f"state{number}"
        place.mkdir()
        for name, content in state:
            (place / name).write_bytes(content)
        found[state] = found_in(place)
        assert found[state] in (before, "new"), f"at {at}: {sorted(name for name, _ in state)}"
        shutil.rmtree(place)
    assert {found[frozenset(state.items())] for state in disk.last} == {"new"}
    assert disk.folder_is_durable
    assert set(found.values()) == {before, "new"}
