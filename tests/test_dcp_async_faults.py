"""Asynchronous saves when the saving process, the training or the storage fails at any call.

The tests take every third or fourth call; ``make faults`` takes every one, and starts every saving
process anew instead of as a fork. Run with ``-s`` to see how many calls there are.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from async_faults import (
    Outcome,
    fail_everywhere,
    kill_saver_of_two,
    kill_savers,
    kill_training,
    odd_moments,
)
from crash_support import NOTHING, check_turn
from ranks import RankPool
from shardpoint.dcp import _async_process, _pending
from shardpoint.dcp._saver_channel import Channel, LostPeerError

ALL = os.environ.get("SHARDPOINT_ALL_FAULTS") == "1"
SECONDS = 900 if ALL else 120

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")


def _report(what: str, outcomes: Sequence[Outcome], stride: int) -> None:
    kinds = Counter(call.lstrip("!") for call in outcomes[-1].calls)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    which = "each" if stride == 1 else f"one in {stride}"
    print(f"\n{what} {len(outcomes) - 1} times, at {which} of {kinds.total()} calls ({counts})")


@pytest.mark.parametrize(("overwrite", "torn"), [(False, False), (True, True)])
def test_a_killed_saving_process_is_told_by_the_next_save_and_by_the_future(
    own_pool: RankPool, tmp_path: Path, overwrite: bool, torn: bool
) -> None:
    stride = 1 if ALL else 3
    ((outcomes, more),) = own_pool.run(
        1, kill_savers, str(tmp_path), overwrite, torn, stride, ALL, timeout=SECONDS
    )
    _report(f"overwrite={overwrite}: saving process killed", outcomes, stride)
    *killed, finished = outcomes
    assert len(killed) * stride >= 30
    assert (finished.told, finished.told_next) == ("", "")
    for number, outcome in enumerate(killed):
        why = f"the saving process {outcome.saver} ended by signal 9 before the save was done"
        assert why in outcome.told
        assert f"this save was not begun: the asynchronous save to {tmp_path}" in outcome.told_next
        assert why in outcome.told_next
        assert len(outcome.calls) == number * stride + 1  # it died of this call
        assert outcome.left is False, "it is a zombie, or still there"
    check_turn(outcomes, "old" if overwrite else NOTHING)
    kilobytes = more.pop("kilobytes")
    assert not any(count > 0 for count in more.values()), more
    assert kilobytes < 16 << 10


@pytest.mark.parametrize(
    ("victim", "overwrite"), [(0, True), (1, False), *([(0, False), (1, True)] if ALL else [])]
)
def test_a_killed_saving_process_of_one_of_two_ranks_is_named_on_both(
    own_pool: RankPool, tmp_path: Path, victim: int, overwrite: bool
) -> None:
    stride = 1 if ALL else 4
    by_rank = own_pool.run(
        2, kill_saver_of_two, str(tmp_path), victim, overwrite, stride, timeout=SECONDS
    )
    _report(f"rank {victim} of 2, overwrite={overwrite}: its saver killed", by_rank[victim], stride)
    for outcomes in by_rank:
        *killed, finished = outcomes
        assert len(killed) >= 2
        assert (finished.told, finished.told_next, finished.found) == ("", "", "new")
        for outcome, own in zip(killed, by_rank[victim], strict=False):
            why = f"the saving process {own.saver} ended by signal 9 before the save was done"
            assert f"save failed on rank {victim}" in outcome.told
            assert why in outcome.told
            assert "this save was not begun" in outcome.told_next
            assert why in outcome.told_next
        if victim == 0 or ALL:
            check_turn(outcomes, "old" if overwrite else NOTHING)
        assert [outcome.garbage for outcome in outcomes] == [()] * len(outcomes)


@pytest.mark.parametrize("overwrite", [False, True], ids=["first", "overwrite"])
def test_a_killed_training_leaves_no_saving_process_and_a_whole_checkpoint(
    own_pool: RankPool, tmp_path: Path, overwrite: bool
) -> None:
    stride = 1 if ALL else 4
    (outcomes,) = own_pool.run(
        1, kill_training, str(tmp_path), overwrite, stride, ALL, timeout=SECONDS
    )
    _report(f"overwrite={overwrite}: training killed", outcomes, stride)
    *killed, finished = outcomes
    assert len(killed) * stride >= 30
    assert not finished.told
    assert {outcome.told for outcome in killed} == {"killed by signal 9"}
    assert {outcome.left for outcome in killed} <= {0, 1}
    check_turn(outcomes, "old" if overwrite else NOTHING)


CASES = [
    *(("process", mode, mode == "before") for mode in ("before", "after", "from then on")),
    ("thread", "before", True),
    ("thread", "from then on", False),
]
MORE_CASES = [
    (form, mode, overwrite)
    for form in ("thread", "process")
    for mode in ("before", "after", "from then on")
    for overwrite in (False, True)
]


@pytest.mark.parametrize(("form", "mode", "overwrite"), MORE_CASES if ALL else CASES)
def test_a_failing_call_is_told_and_leaves_the_old_or_the_new_state(
    own_pool: RankPool, tmp_path: Path, form: str, mode: str, overwrite: bool
) -> None:
    stride = 1 if ALL else 4
    ((outcomes, more),) = own_pool.run(
        1, fail_everywhere, str(tmp_path), form, mode, overwrite, stride, timeout=SECONDS
    )
    _report(f"{form}, {mode}, overwrite={overwrite}: a call failed", outcomes, stride)
    *failed, finished = outcomes
    assert len(failed) * stride >= 30
    assert finished.told == finished.told_next == ""
    before = "old" if overwrite else NOTHING
    for outcome in failed:
        first = next(call for call in outcome.calls if call.startswith("!"))
        if not outcome.told:  # it counts; only what it replaces could not be removed
            assert first in ("!list", "!remove")
            assert outcome.found == "new"
        else:
            assert "save failed on rank 0: " not in outcome.told_next
            assert "this save was not begun" in outcome.told_next
            assert "StorageError" in outcome.told
            assert "[Errno 5]" in outcome.told or "[Errno 28]" in outcome.told
            assert outcome.found in (before, "new")
            if mode != "from then on" and outcome.found == before:
                assert outcome.untouched, first
        assert outcome.found_next == "next"
        assert outcome.garbage == ()
    assert failed[0].found == before
    # A saving process that lived through a failure holds what it held before.
    for outcome in outcomes:
        assert outcome.left == outcomes[0].left, [call for call in outcome.calls if "!" in call]
    kilobytes = more.pop("kilobytes")
    assert not any(count > 0 for count in more.values()), more
    assert kilobytes < 16 << 10


def test_rare_moments_of_the_saving_process(own_pool: RankPool, tmp_path: Path) -> None:
    (found,) = own_pool.run(1, odd_moments, str(tmp_path))
    assert found["signals"] == ""  # it ends with the training, not before
    assert found["records"] == ("", 800)
    assert "a filter of the program fails" in found["half-way"]
    assert (found["after that"], found["state"]) == ("", "new")
    assert (found["started"], found["children"]) == (1, 1)


# How the two processes speak


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_messages_of_many_threads_arrive_whole(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = (Channel(end, lambda: True) for end in ends)
    messages = [bytes([number]) * (70_000 + number) for number in range(8)]

    def send(message: bytes) -> None:
        for _ in range(20):
            here.send(message)

    threads = [threading.Thread(target=send, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    received = Counter(there.receive() for _ in range(20 * len(messages)))
    for thread in threads:
        thread.join()
    assert received == dict.fromkeys(messages, 20)


@pytest.mark.parametrize("sends", [False, True])
def test_a_process_that_is_gone_is_noticed_where_another_holds_its_end(
    ends: tuple[socket.socket, socket.socket], sends: bool
) -> None:
    channel = Channel(ends[0], lambda: False)
    with pytest.raises(LostPeerError):
        channel.send(bytes(64 << 20)) if sends else channel.receive()


def test_what_a_process_said_before_its_end_is_heard(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    there = Channel(ends[1], lambda: True)

    def is_alive() -> bool:
        there.send(b"last words")
        return False

    assert Channel(ends[0], is_alive).receive() == b"last words"


def test_closing_is_noticed_where_a_forked_process_holds_this_end(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    with ends[0].dup():
        channel = Channel(ends[0], lambda: True)
        channel.close()
        with pytest.raises(LostPeerError):
            channel.receive()
        with pytest.raises(LostPeerError):
            Channel(ends[1], lambda: True).receive()


def test_a_script_that_has_ended_is_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    path = {"init_main_from_path": "train.py"}
    monkeypatch.setattr(_async_process, "_main", {})
    monkeypatch.setattr(_async_process, "_main_script", lambda: path)
    assert _async_process._remembered_main() == path
    monkeypatch.setattr(_async_process, "_main_script", dict)
    assert _async_process._remembered_main() == path


def test_an_interrupted_exit_says_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Interrupted(_pending.PendingSave):
        def wait(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(_pending, "_last", Interrupted("/runs/step-7"))
    with pytest.raises(KeyboardInterrupt):
        _pending.wait_at_exit()
    assert "asynchronous save to /runs/step-7 was done: it does not count" in caplog.text
    _pending.wait_at_exit()  # whoever interrupted does not want to wait again
