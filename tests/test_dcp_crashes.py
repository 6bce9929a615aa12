"""A save that is killed or fails at any system call leaves the old or the new checkpoint.

Every test goes over all system calls of a save. Run with ``-s`` to see how many there are.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

import shardpoint.dcp as dcp
from crash_kills import RETURNED, Outcome, fail_one_of_two, kill_everywhere, kill_one_of_two
from crash_support import (
    NOTHING,
    STATES,
    Call,
    Failer,
    Trace,
    blank,
    files_of,
    interposed,
    named_files,
    save,
    short_transfers,
    state_at,
)
from power_loss import PowerLoss
from ranks import RankPool
from shardpoint.dcp._process_group import ProcessGroupCoordinator
from shardpoint.engine import committing
from shardpoint.errors import (
    CheckpointExistsError,
    CorruptionError,
    ShardpointError,
    StorageError,
)

TWO_FILES = {"thread_count": 2}
ALONE = {"use_collectives": False}
CLEANUP = {"list", "remove"}


def _report(what: str, kinds: Sequence[str]) -> None:
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(kinds).items()))
    print(f"\n{what}: {len(kinds)} system calls ({counts})")


def _check_kills(outcomes: Sequence[Outcome], count: int, before: str) -> None:
    *killed, finished = outcomes
    assert len(killed) == count
    assert all(outcome.killed for outcome in killed)
    assert not finished.killed
    assert finished.found == "new"
    found = [outcome.found for outcome in outcomes]
    # The old state up to one call, the new one from the next on.
    turn = found.index("new")
    assert 0 < turn < count
    assert found == [before] * turn + ["new"] * (len(found) - turn)
    assert [outcome.found_next for outcome in outcomes] == ["next"] * len(outcomes)
    assert [outcome.garbage for outcome in outcomes] == [()] * len(outcomes)


@pytest.mark.parametrize(
    ("overwrite", "torn", "options"),
    [
        (False, False, {}),
        (True, True, {}),
        (True, False, TWO_FILES),
        (True, False, ALONE),
    ],
    ids=["first", "overwrite-torn", "overwrite-two-files", "overwrite-alone"],
)
def test_a_kill_leaves_the_old_or_the_new_state(
    pool: RankPool, tmp_path: Path, overwrite: bool, torn: bool, options: dict[str, Any]
) -> None:
    ((kinds, outcomes),) = pool.run(1, kill_everywhere, str(tmp_path), overwrite, torn, options)
    _report("killed before each of", kinds)
    _check_kills(outcomes, len(kinds), "old" if overwrite else NOTHING)
    turn = [outcome.found for outcome in outcomes].index("new")
    assert kinds[turn - 1] == "rename"


@pytest.mark.parametrize("overwrite", [False, True], ids=["first", "overwrite"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_one_of_two_ranks_leaves_the_old_or_the_new_state(
    pool: RankPool, tmp_path: Path, victim: int, overwrite: bool
) -> None:
    (outcomes,) = pool.run(1, kill_one_of_two, str(tmp_path), victim, True, overwrite)
    print(f"\nrank {victim} of 2 killed before each of {len(outcomes) - 1} system calls")
    *killed, finished = outcomes
    assert len(killed) >= (6 if overwrite else 4)
    assert all(outcome.raised for outcome in killed)
    assert not finished.raised
    found = [outcome.found for outcome in outcomes]
    turn = found.index("new")
    before = "old" if overwrite else NOTHING
    assert found == [before] * turn + ["new"] * (len(found) - turn)
    # Only the coordinator commits: the other rank's death comes always before that.
    assert turn == len(killed) if victim else turn < len(killed)
    assert [outcome.found_next for outcome in outcomes] == ["next"] * len(outcomes)
    assert [outcome.garbage for outcome in outcomes] == [()] * len(outcomes)


@pytest.mark.parametrize(
    ("victim", "mode", "overwrite"),
    [(0, "before", True), (1, "before", True), (0, "after", False), (1, "from then on", False)],
)
def test_a_failing_call_on_one_of_two_ranks_is_an_error_on_both(
    pool: RankPool, tmp_path: Path, victim: int, mode: str, overwrite: bool
) -> None:
    (found,) = pool.run(1, fail_one_of_two, str(tmp_path), victim, mode, overwrite)
    *failed, (codes, state, extra) = found
    print(f"\nrank {victim} of 2 failed {mode} each of {len(failed)} system calls")
    assert len(failed) >= 4
    assert (codes, state, extra) == ([0, 0], "new", ())
    before = "old" if overwrite else NOTHING
    for number, (codes, state, extra) in enumerate(failed):
        if codes[victim] == RETURNED:  # only the cleanup did not go through: the next save's turn
            assert (codes[1 - victim], state) == (0, "new")
            continue
        assert codes == [3, 3], f"call {number}: {codes}"
        assert state in (before, "new")
        if mode == "before" and state == before:
            assert extra == (), f"call {number}"
    assert failed[0][1] == before


def _lose_contact(folder: str) -> str:
    """Save on two ranks, of which one stops waiting while the other is about to commit."""
    rank = dist.get_rank()
    state = {f"part{rank}": STATES["new"]["half"], "all": STATES["new"]["small"]}
    commit = committing.commit

    def late_commit(*arguments: Any, **keywords: Any) -> None:
        dist.barrier()  # the other rank has given up
        commit(*arguments, **keywords)

    def no_broadcast(_: Any, payload: bytes | None) -> bytes:
        if payload is None:
            raise ShardpointError("lost contact")
        return payload

    message = ""
    with (
        patch.object(committing, "commit", late_commit),
        patch.object(ProcessGroupCoordinator, "broadcast", no_broadcast),
    ):
        try:
            dcp.save(state, checkpoint_id=folder, timeout=1)
        except ShardpointError as error:
            message = str(error)
    if rank:
        dist.barrier()
    return message


def test_a_rank_that_gives_up_waiting_leaves_its_files_to_a_late_commit(
    pool: RankPool, tmp_path: Path
) -> None:
    messages = pool.run(2, _lose_contact, str(tmp_path / "ckpt"))
    assert "commit failed on rank 1" in messages[0]
    assert messages[1] == "lost contact"
    target = {key: blank(STATES["new"]["half"]) for key in ("part0", "part1")}
    dcp.load(target, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    for part in target.values():
        assert part.equal(STATES["new"]["half"])
    assert set(files_of(tmp_path / "ckpt")) == named_files(tmp_path / "ckpt")


class _Resources:
    """Counts threads and descriptors; nothing may be left of them."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._descriptors = self._open()

    @staticmethod
    def _open() -> list[str]:
        folder = "/proc/self/fd"
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []

    def check(self) -> None:
        assert set(threading.enumerate()) == self._threads
        assert self._open() == self._descriptors


def _trace(folder: Path, options: dict[str, Any]) -> list[Call]:
    trace = Trace()
    with interposed(trace):
        save(folder, STATES["new"], **options)
    return trace.calls


def _fail_one(
    folder: Path, failer: Failer, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> str:
    """Run one save that is to fail; return which state is there then, checked."""
    before = files_of(folder)
    resources = _Resources()
    caplog.clear()
    raised: dcp.CheckpointException | None = None
    try:
        with interposed(failer):
            save(folder, STATES["new"], **options)
    except dcp.CheckpointException as error:
        raised = error
    resources.check()
    call = failer.failed
    assert call is not None
    after = files_of(folder)
    untouched = "old" if before else NOTHING
    found = untouched if after == before else state_at(folder, STATES)
    if raised is None:
        # The checkpoint counts; only the cleanup did not go through.
        assert call.kind in CLEANUP
        assert found == "new"
        assert "files remain" in caplog.text
        return found
    assert "failed on rank 0" in str(raised)
    assert list(raised.causes) == [0]
    assert isinstance(raised.causes[0], StorageError)
    assert raised.causes[0].errno in (28, 5)
    # Of two threads that both fail, either one may be the first to say so.
    assert any((failed.target or failed.path) in str(raised) for failed in failer.all_failed)
    if found == "new":
        assert call.kind in ("rename", "sync folder", "open folder", "close")
        kept = before.keys() - named_files(folder)
        assert after.keys() == kept | named_files(folder)
    else:
        assert found == untouched
        assert {name: after.get(name) for name in before} == before
    return found


@pytest.mark.parametrize(
    ("mode", "overwrite", "options"),
    [
        *((mode, False, {}) for mode in Failer.MODES),
        *((mode, True, TWO_FILES) for mode in Failer.MODES),
        ("before", True, ALONE),
    ],
)
def test_a_failing_call_leaves_the_old_or_the_new_state(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    overwrite: bool,
    options: dict[str, Any],
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    if overwrite:
        with interposed(Trace()):
            save(model, STATES["old"], **options)
    shutil.copytree(model, tmp_path / "traced")
    calls = _trace(tmp_path / "traced", options)
    _report(f"failed {mode} each of", [call.kind for call in calls])
    states = Counter()
    folder = tmp_path / "ckpt"
    for number in range(len(calls)):
        if not folder.exists():
            shutil.copytree(model, folder)
        clean = files_of(folder)
        found = _fail_one(folder, Failer(number, mode), options, caplog)
        states[found] += 1
        if mode == "from then on" or found == "new":
            with interposed(Trace()):
                save(folder, STATES["next"], **options)
            assert set(files_of(folder)) == named_files(folder)
            assert state_at(folder, STATES) == "next"
            shutil.rmtree(folder)
        else:
            assert files_of(folder) == clean
    assert set(states) == {"old" if overwrite else NOTHING, "new"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Give what mounts a file system of so many KiB, or makes the mounted one that large."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o"]

    def resize(kibibytes: int) -> Path:
        again = "remount," if place.is_mount() else ""
        done = subprocess.run(
            [*command, f"{again}size={kibibytes}k", "tmpfs", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return place

    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    yield resize
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("options", [{}, TWO_FILES], ids=["one-file", "two-files"])
def test_a_disk_that_is_really_full_keeps_the_old_checkpoint(
    small_disk: Callable[[int], Path], options: dict[str, Any]
) -> None:
    folder = small_disk(64 << 10) / "ckpt"
    save(folder, STATES["old"], **options)
    before = files_of(folder)
    used = sum(-(-len(content) // 4096) * 4 for content in before.values())
    failed = 0
    for room in range(4, used + 40, 96):
        small_disk(used + room)
        resources = _Resources()
        raised: dcp.CheckpointException | None = None
        try:
            save(folder, STATES["new"], **options)
        except dcp.CheckpointException as error:
            raised = error
        resources.check()
        if raised is None:
            break
        assert isinstance(raised.causes[0], StorageError)
        assert raised.causes[0].errno == errno.ENOSPC
        assert files_of(folder) == before
        failed += 1
    print(f"\nthe disk was full in {failed} saves")
    assert failed >= 5
    small_disk(64 << 10)
    save(folder, STATES["new"], **options)
    assert state_at(folder, STATES) == "new"
    assert set(files_of(folder)) == named_files(folder)


@pytest.mark.parametrize("kind", ["write", "read"])
def test_a_transfer_without_progress_is_an_error(tmp_path: Path, kind: str) -> None:
    def stuck(call: Call, do: Any) -> Any:
        return 0 if call.kind == kind else do()

    action = save if kind == "write" else _load_new
    if kind == "read":
        save(tmp_path, STATES["new"])
    resources = _Resources()
    with interposed(stuck), pytest.raises(dcp.CheckpointException) as raised:
        action(tmp_path, STATES["new"])
    resources.check()
    kinds = {"write": StorageError, "read": CorruptionError}
    assert isinstance(raised.value.causes[0], kinds[kind])
    assert kind == "read" or not files_of(tmp_path)


def _load_new(folder: Path, state: dict[str, Any]) -> None:
    dcp.load(blank(state), checkpoint_id=folder, no_dist=True)


def test_a_failing_call_of_a_load_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, STATES["new"], thread_count=2)
    trace = Trace()
    with interposed(trace):
        _load_new(tmp_path, STATES["new"])
    # The close of what was only read has no way to fail.
    kinds = [call.kind for call in trace.calls if call.kind != "close"]
    _report("load failed before each of", kinds)
    for number in range(len(kinds)):
        resources = _Resources()
        failer = Failer(number, "before", skip=frozenset({"close"}))
        with interposed(failer), pytest.raises(dcp.CheckpointException, match="rank 0") as raised:
            _load_new(tmp_path, STATES["new"])
        resources.check()
        assert isinstance(raised.value.causes[0], StorageError), failer.failed
        assert state_at(tmp_path, STATES) == "new"


@pytest.mark.parametrize(("seed", "most"), [(1, 1 << 14), (2, 3 << 16), (3, 1 << 30)])
@pytest.mark.parametrize("options", [{}, TWO_FILES], ids=["one-file", "two-files"])
def test_short_writes_and_reads_are_continued(
    tmp_path: Path, seed: int, most: int, options: dict[str, Any]
) -> None:
    save(tmp_path / "whole", STATES["new"], **options)
    with interposed(short_transfers(seed, most)):
        save(tmp_path / "short", STATES["new"], **options)
        assert state_at(tmp_path / "whole", STATES) == "new"
        assert state_at(tmp_path / "short", STATES) == "new"
    whole, short = files_of(tmp_path / "whole"), files_of(tmp_path / "short")
    # These have the number of the save in them.
    named = (".metadata", ".index")
    contents = [
        {name: content for name, content in files.items() if not name.endswith(named)}
        for files in (whole, short)
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) == options.get("thread_count", 1)


@pytest.mark.parametrize("overwrite", [False, True], ids=["first", "overwrite"])
@pytest.mark.parametrize("options", [{}, TWO_FILES, ALONE], ids=["one-file", "two-files", "alone"])
def test_a_power_loss_leaves_the_old_or_the_new_state(
    tmp_path: Path, overwrite: bool, options: dict[str, Any]
) -> None:
    folder = tmp_path / "ckpt"
    if overwrite:
        save(folder, STATES["old"], **options)
    before = "old" if overwrite else NOTHING
    disk = PowerLoss(folder)
    with interposed(disk):
        save(folder, STATES["new"], **options)
    print(f"\npower lost after {disk.calls} calls: {len(disk.states)} contents of the disk")
    found = {}
    for number, (state, at) in enumerate(disk.states.items()):
        place = tmp_path / f"state{number}"
        place.mkdir()
        for name, content in state:
            (place / name).write_bytes(content)
        found[state] = state_at(place, STATES)
        assert found[state] in (before, "new"), f"at {at}: {sorted(name for name, _ in state)}"
        shutil.rmtree(place)
    # What a finished save reported is there to stay.
    assert {found[frozenset(state.items())] for state in disk.last} == {"new"}
    assert disk.folder_is_durable
    assert set(found.values()) == {before, "new"}


def test_a_save_without_collectives_does_not_break_one_with(tmp_path: Path) -> None:
    save(tmp_path, STATES["old"])
    before = files_of(tmp_path)
    with pytest.raises(dcp.CheckpointException) as raised:
        save(tmp_path, STATES["new"], use_collectives=False)
    assert isinstance(raised.value.causes[0], CheckpointExistsError)
    assert files_of(tmp_path) == before


def test_a_save_with_collectives_replaces_one_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    save(tmp_path, STATES["old"], use_collectives=False)
    save(tmp_path, STATES["new"])
    assert state_at(tmp_path, STATES) == "new"
    assert set(files_of(tmp_path)) == named_files(tmp_path)
    assert not caplog.records
