"""Asynchronous saves: the files hold what the state was when it was copied, on any rank."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import async_jobs
import shardpoint
import shardpoint.dcp as dcp
from async_jobs import PROCESS, THREAD
from dcp_states import KINDS, values
from ranks import RankPool
from shardpoint.dcp import _async_process
from shardpoint.dcp._saver_channel import load_state
from shardpoint.dcp.format_utils import dcp_to_torch_save
from shardpoint.dcp.staging import DefaultStager
from shardpoint.dcp.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from shardpoint.errors import NotSupportedError, PlanError
from shardpoint.storage.local import LocalStorage

FORMS = [form.value for form in AsyncCheckpointerType]
FOUR_RANK_CASES = [(kind, form, "default") for kind in KINDS for form in FORMS] + [
    ("dtensor_2d", form, stager) for form in FORMS for stager in ("shared", "writer")
]


def test_one_rank_saves_what_was_there_before_the_change(
    tmp_path: Path, own_pool: RankPool
) -> None:
    cases = [(kind, form, "default") for kind in KINDS for form in FORMS]
    cases += [("plain", form, stager) for form in FORMS for stager in ("shared", "writer")]
    (found,) = own_pool.run(1, async_jobs.all_kinds, str(tmp_path), cases)
    assert found == {" ".join(case): [] for case in cases}


def test_four_ranks_save_what_was_there_before_the_change(
    tmp_path: Path, own_pool: RankPool
) -> None:
    for found in own_pool.run(4, async_jobs.all_kinds, str(tmp_path), FOUR_RANK_CASES):
        assert found == {" ".join(case): [] for case in FOUR_RANK_CASES}


def test_any_state_of_four_ranks_is_saved_as_it_was_before_the_change(
    tmp_path: Path, own_pool: RankPool
) -> None:
    for found in own_pool.run(4, async_jobs.any_states, str(tmp_path)):
        assert found == []


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """Nested states whose tensors overlap, have holes, are empty, or lie at odd places."""
    base = values("base", 400)
    tensors = []
    for number in range(draw(st.integers(1, 6))):
        source = draw(st.sampled_from(["base", "own", "int", "odd"]))
        if source == "own":
            whole = values(f"own {number}", 48)
        elif source == "int":
            whole = base.view(torch.int16)[3:90]
        elif source == "odd":
            data = torch.arange(200, dtype=torch.uint8).clone()
            whole = torch.frombuffer(data.numpy(), dtype=torch.float32, offset=1, count=48)
        else:
            whole = base
        offset = draw(st.integers(0, 20))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
        strides = tuple(draw(st.integers(0, 4)) for _ in shape)
        tensors.append(torch.as_strided(whole, shape, strides, offset))
    wrapped = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=8))
    leaves: list[Any] = [*wrapped, draw(st.integers()), [1, {"k": tensors[0]}], {1, 2}, ("t", [3])]
    return {"a": {str(i): leaf for i, leaf in enumerate(leaves)}, "list": [tensors[-1], 5]}


@pytest.mark.parametrize("form", AsyncCheckpointerType)
def test_any_state_is_saved_as_it_was_before_the_change(
    tmp_path: Path, form: AsyncCheckpointerType
) -> None:
    @settings(max_examples=25)
    @given(state=states())
    def check(state: dict[str, Any]) -> None:
        dcp.save(state, checkpoint_id=tmp_path / "sync")
        future = dcp.async_save(
            state, checkpoint_id=tmp_path / "async", async_checkpointer_type=form
        )
        async_jobs.scramble(state)
        future.result()
        one, other = _raw(tmp_path / "sync"), _raw(tmp_path / "async")
        assert one == other

    check()


def _raw(folder: Path) -> list[bytes]:
    """The data files, which hold no names or times of the save."""
    return [path.read_bytes() for path in sorted(folder.glob("*.distcp"))]


class Gate:
    """Holds up the writing of files until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()

    def __enter__(self) -> Gate:
        create = LocalStorage.create

        def late(*arguments: Any, **keywords: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return create(*arguments, **keywords)

        self._patch = patch.object(LocalStorage, "create", late)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.set()
        self._patch.stop()


def in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Run in a thread that is left to itself."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ask", [True, False], ids=["asked", "not asked"])
def test_failure_is_told_by_the_future_and_else_by_the_next_save(
    tmp_path: Path, own_pool: RankPool, form: str, ask: bool
) -> None:
    for first, second, third in own_pool.run(
        2, async_jobs.failing_write, str(tmp_path), form, 1, ask
    ):
        told = first if ask else second
        assert "rank 1: Trouble: no data today" in told
        if not ask:
            assert "this save was not begun: the asynchronous save to" in told
            assert str(tmp_path / "bad") in told
        assert [first, second, third].count("") == 2


def test_ranks_that_save_in_different_forms_are_told_so(tmp_path: Path, own_pool: RankPool) -> None:
    for told, later in own_pool.run(4, async_jobs.in_different_forms, str(tmp_path)):
        assert "the ranks are not doing the same: rank 1 is in step" in told
        assert "in the process form" in told
        assert "in the thread form" in told
        assert later == ""


def test_sync_save_tells_of_a_failed_asynchronous_one(tmp_path: Path) -> None:
    planner = async_jobs.FailingPlanner()
    dcp.async_save({"x": torch.ones(1)}, checkpoint_id=tmp_path / "a", planner=planner)
    with pytest.raises(dcp.CheckpointException, match=r"asynchronous save to .* before it"):
        dcp.save({"x": torch.ones(1)}, checkpoint_id=tmp_path / "b")
    dcp.save({"x": torch.ones(1)}, checkpoint_id=tmp_path / "b")


def test_killed_saving_process_is_named_on_every_rank_and_replaced(
    tmp_path: Path, own_pool: RankPool
) -> None:
    for first, second, errors, third in own_pool.run(2, async_jobs.dying_process, str(tmp_path), 1):
        assert "save failed on rank 1" in first
        assert "ended by signal 9 before the save was done" in first
        assert (second, third) == ("", "")
        assert errors == ""  # in a process that was forked meanwhile, say to load data


@pytest.mark.parametrize("form", FORMS)
def test_rank_that_cannot_copy_fails_the_save_of_all(
    tmp_path: Path, own_pool: RankPool, form: str
) -> None:
    ok, bad = own_pool.run(2, async_jobs.failing_stage, str(tmp_path), form, 1)
    assert bad.startswith("call: a ")
    assert "Uncopyable cannot be copied" in bad
    assert ok.startswith("future: ")
    assert "rank 1: PlanError" in ok


def test_training_may_use_the_group_during_a_save(tmp_path: Path, own_pool: RankPool) -> None:
    assert own_pool.run(2, async_jobs.mixed_with_training, str(tmp_path), 3) == [120.0, 120.0]


def test_save_ends_well_after_the_group_is_destroyed(tmp_path: Path, own_pool: RankPool) -> None:
    own_pool.run(2, async_jobs.group_destroyed, str(tmp_path))
    target = {"x": torch.zeros(4)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("form", FORMS)
def test_hundred_saves_of_which_some_fail_leave_nothing_behind(
    tmp_path: Path, own_pool: RankPool, form: str
) -> None:
    for training, saver in own_pool.run(2, async_jobs.residue, str(tmp_path), form, 100):
        assert saver or form != PROCESS.value
        for more in filter(None, (training, saver)):
            kilobytes = more.pop("kilobytes")
            assert {"TCP sockets", "children", "descriptors", "threads"} <= set(more)
            assert not any(count > 0 for count in more.values()), more
            assert kilobytes < 4096  # one copy of the state each would be 8 MB


def test_second_save_waits_for_the_first(tmp_path: Path) -> None:
    with Gate() as gate:
        first = dcp.async_save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "1")
        second = in_thread(
            lambda: dcp.async_save({"x": torch.zeros(2)}, checkpoint_id=tmp_path / "2")
        )
        sync = in_thread(lambda: dcp.save({"x": torch.zeros(2)}, checkpoint_id=tmp_path / "3"))
        assert gate.reached.wait(30)
        time.sleep(0.05)
        assert not first.done()
        assert not second.done()
        assert not sync.done()
        gate.opened.set()
        first.result()
        second.result().result()
        sync.result()
    target = {"x": torch.zeros(2)}
    dcp.load(target, checkpoint_id=tmp_path / "1")
    assert target["x"].tolist() == [1, 1]


def test_load_waits_for_a_save_to_the_same_place_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "other")
    with Gate() as gate:
        dcp.async_save({"x": torch.full((2,), 5.0)}, checkpoint_id=tmp_path / "new")
        target = {"x": torch.zeros(2)}
        assert gate.reached.wait(30)
        dcp.load(target, checkpoint_id=tmp_path / "other")
        assert target["x"].tolist() == [1, 1]
        load = in_thread(lambda: dcp.load(target, storage_reader=dcp.FileSystemReader("new")))
        time.sleep(0.05)
        assert not load.done()
        gate.opened.set()
        load.result()
    assert target["x"].tolist() == [5, 5]


def _read_metadata(place: str) -> Any:
    return dcp.FileSystemReader(place).read_metadata()


@pytest.mark.parametrize(
    "read",
    [shardpoint.open, _read_metadata, lambda place: dcp_to_torch_save(place, f"{place}.pt")],
    ids=["open", "reader", "convert"],
)
def test_whatever_reads_waits_for_a_save_to_the_same_place(
    tmp_path: Path, read: Callable[[str], Any]
) -> None:
    with Gate() as gate:
        dcp.async_save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "new")
        assert gate.reached.wait(30)
        reading = in_thread(lambda: read(str(tmp_path / "new")))
        time.sleep(0.05)
        assert not reading.done()
        gate.opened.set()
        reading.result()


def test_a_save_that_looks_at_its_own_place_does_not_wait_for_itself(tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path)

    class Adding(dcp.DefaultSavePlanner):
        """Adds what the checkpoint before has to what is saved."""

        def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
            with shardpoint.open(tmp_path) as before:
                state_dict["x"] += torch.from_numpy(before["x"])
            super().set_up_planner(state_dict, *args, **kwargs)

    future: Any = dcp.async_save(
        {"x": torch.full((2,), 4.0)}, checkpoint_id=tmp_path, planner=Adding()
    )
    future.result(30)
    with shardpoint.open(tmp_path) as checkpoint:
        assert checkpoint["x"].tolist() == [5, 5]


def test_save_cannot_be_cancelled(tmp_path: Path) -> None:
    with Gate() as gate:
        future = dcp.async_save({"x": torch.ones(2)}, checkpoint_id=tmp_path)
        assert not future.cancel()
        gate.opened.set()
        assert isinstance(future.result(), dcp.Metadata)


def test_interrupted_copy_leaves_the_next_save_as_it_should_be(tmp_path: Path) -> None:
    class Interrupting:
        def state_dict(self) -> dict[str, Any]:
            raise KeyboardInterrupt

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise NotImplementedError

    with pytest.raises(KeyboardInterrupt):
        dcp.async_save({"x": Interrupting()}, checkpoint_id=tmp_path)
    assert isinstance(
        dcp.async_save({"x": torch.ones(1)}, checkpoint_id=tmp_path).result(), dcp.Metadata
    )


def test_stateful_is_asked_before_the_call_returns(tmp_path: Path) -> None:
    class Counter:
        def __init__(self) -> None:
            self.asked_by = ""
            self.values = {"count": torch.ones(3)}

        def state_dict(self) -> dict[str, Any]:
            self.asked_by = threading.current_thread().name
            return self.values

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.values = state_dict

    counter = Counter()
    future = dcp.async_save({"counter": counter}, checkpoint_id=tmp_path)
    counter.values["count"].zero_()
    assert counter.asked_by == threading.current_thread().name
    future.result()
    dcp.load({"counter": counter}, checkpoint_id=tmp_path)
    assert counter.values["count"].tolist() == [1, 1, 1]


class OldStager:
    """A stager as programs write them: it inherits nothing of ours."""

    _synchronize_after_execute = True

    def __init__(self, as_future: bool) -> None:
        self.as_future = as_future
        self.calls: list[str] = []

    @property
    def should_synchronize_after_execute(self) -> bool:
        return self._synchronize_after_execute

    def stage(self, state_dict: dict[str, Any]) -> Any:
        self.calls.append("stage")
        staged = {key: value.clone() for key, value in state_dict.items()}
        if not self.as_future:
            return staged
        future: Future[Any] = Future()
        future.set_result(staged)
        return future

    def synchronize_staging(self) -> None:
        self.calls.append("synchronize")

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("form", AsyncCheckpointerType)
@pytest.mark.parametrize("as_future", [False, True])
def test_programs_own_stagers_are_used_as_by_torch(
    tmp_path: Path, form: AsyncCheckpointerType, as_future: bool
) -> None:
    stager: Any = OldStager(as_future)
    state = {"x": torch.ones(5)}
    found = dcp.async_save(
        state, checkpoint_id=tmp_path, async_stager=stager, async_checkpointer_type=form
    )
    state["x"].zero_()
    if as_future:
        assert isinstance(found, AsyncSaveResponse)
        found.staging_completion.result()
        found.upload_completion.result()
    else:
        found.result()
    assert stager.calls == (["stage"] if as_future else ["stage", "synchronize"])
    dcp.load(state, checkpoint_id=tmp_path)
    assert state["x"].tolist() == [1] * 5


def test_storage_writer_that_is_a_stager_stages(tmp_path: Path) -> None:
    class Writer(dcp.FileSystemWriter):
        def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            return super().stage({**state_dict, "added": torch.ones(2)})

    dcp.async_save({"x": torch.ones(2)}, storage_writer=Writer(tmp_path)).result()
    target = {"added": torch.zeros(2)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["added"].tolist() == [1, 1]


class Waiting(DefaultStager):
    """Copies in the background, when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()

    def _stage(self, *arguments: Any) -> Any:
        assert self.let.wait(60)
        return super()._stage(*arguments)


@pytest.mark.parametrize("form", AsyncCheckpointerType)
@pytest.mark.parametrize("by_writer", [False, True])
def test_relative_place_is_that_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: AsyncCheckpointerType, by_writer: bool
) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "before")
    stager = Waiting()
    place: dict[str, Any] = {"checkpoint_id": "saved"}
    if by_writer:
        place = {"storage_writer": dcp.FileSystemWriter("saved")}
    found: Any = dcp.async_save(
        {"x": torch.ones(2)}, async_stager=stager, async_checkpointer_type=form, **place
    )
    monkeypatch.chdir(tmp_path / "after")
    stager.let.set()
    found.upload_completion.result()
    stager.close()
    assert list((tmp_path / "after").iterdir()) == []
    target = {"x": torch.zeros(2)}
    dcp.load(target, checkpoint_id=tmp_path / "before" / "saved")
    assert target["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("file://{folder}/x", "{folder}/x"),
        ("{folder}/x", "local://{folder}/x/"),
        ("memory://test-async/x/", "memory:///test-async/x"),
    ],
)
def test_load_waits_however_the_place_is_spelled(tmp_path: Path, saved: str, loaded: str) -> None:
    stager = Waiting()
    dcp.async_save(
        {"x": torch.ones(2)}, checkpoint_id=saved.format(folder=tmp_path), async_stager=stager
    )
    target = {"x": torch.zeros(2)}
    load = in_thread(lambda: dcp.load(target, checkpoint_id=loaded.format(folder=tmp_path)))
    time.sleep(0.05)
    assert not load.done()
    stager.let.set()
    load.result()
    stager.close()
    assert target["x"].tolist() == [1, 1]


def test_saving_process_does_not_save_to_a_memory_of_its_own() -> None:
    future: Any = dcp.async_save(
        {"x": torch.ones(2)},
        checkpoint_id="memory://test-async/process",
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    )
    with pytest.raises(dcp.CheckpointException, match="memory of one process"):
        future.result()


def test_closed_stager_is_refused(tmp_path: Path) -> None:
    stager = DefaultStager()
    stager.close()
    with pytest.raises(PlanError, match="the stager was closed"):
        dcp.async_save({"x": torch.ones(2)}, checkpoint_id=tmp_path, async_stager=stager)


def test_classes_that_the_saving_process_cannot_import_are_named() -> None:
    with pytest.raises(NotSupportedError, match="needs 'Mine', which was typed in or piped"):
        load_state(b"c__main__\nMine\n.", {"sys_path": sys.path})


def test_script_that_is_no_file_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "<stdin>", raising=False)
    assert not {"init_main_from_path", "init_main_from_name"} & set(_async_process._main_script())


def test_unknown_form_is_refused(tmp_path: Path) -> None:
    form: Any = "thread"
    with pytest.raises(PlanError, match="must be an AsyncCheckpointerType, not 'thread'"):
        dcp.async_save({}, checkpoint_id=tmp_path, async_checkpointer_type=form)


SCRIPT = """
    import sys, threading, torch
    import shardpoint.dcp as dcp
    from shardpoint.dcp.state_dict_saver import AsyncCheckpointerType
    from shardpoint.dcp import _async_process

    class Planner(dcp.DefaultSavePlanner):
        def lookup_object(self, index):
            return super().lookup_object(index)

    if __name__ == "__main__":
        form = AsyncCheckpointerType(sys.argv[2])
        state = {"x": torch.arange(300000.0)}
        future = dcp.async_save(
            state, checkpoint_id=sys.argv[1], planner=Planner(), async_checkpointer_type=form
        )
        state["x"].zero_()
        if _async_process._process is not None:
            print(_async_process._process._process.pid)
"""
BREAK_THE_END = """
    def broken():
        raise ValueError("another package's")

    threading._register_atexit(broken)
"""


@pytest.mark.parametrize("form", FORMS)
def test_leaving_the_program_finishes_the_save_and_ends_its_process(
    tmp_path: Path, form: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", script, tmp_path / "saved", form],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    target = {"x": torch.zeros(300000)}
    dcp.load(target, checkpoint_id=tmp_path / "saved")
    assert torch.equal(target["x"], torch.arange(300000.0))
    if form == PROCESS.value:
        assert not Path("/proc", done.stdout.strip()).exists()


@pytest.mark.parametrize("form", [THREAD.value])
def test_what_other_packages_do_at_the_end_does_not_lose_the_save(
    tmp_path: Path, form: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(BREAK_THE_END))
    done = subprocess.run(
        [sys.executable, script, tmp_path / "saved", form],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert "another package's" in done.stderr
    target = {"x": torch.zeros(300000)}
    dcp.load(target, checkpoint_id=tmp_path / "saved")
    assert torch.equal(target["x"], torch.arange(300000.0))


def test_killed_program_leaves_no_saving_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(SCRIPT)
        + "    future.result()\n    import os\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-u", script, tmp_path / "saved", PROCESS.value],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -9
    child = Path("/proc", done.stdout.strip())
    for _ in range(600):
        if not child.exists() or " Z " in (child / "stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the saving process is still there")


def test_leaving_the_program_tells_of_a_save_that_failed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            import shardpoint.dcp as dcp

            class Failing(dcp.DefaultSavePlanner):
                def finish_plan(self, new_plan):
                    raise ValueError("no room")

            state = {"x": torch.ones(3)}
            future = dcp.async_save(state, checkpoint_id=sys.argv[1], planner=Failing())
            """
        )
    )
    done = subprocess.run(
        [sys.executable, script, tmp_path / "saved"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "the asynchronous save to" in done.stderr
    assert "no room" in done.stderr
