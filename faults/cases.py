"""The faults: each does the same to either package, and says in a few words what came of it."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from package import PACKAGES, RANK_SECONDS, found_by, in_group, load, save, state_of
from processes import Ended, run_all, run_one

__all__ = ["FAULTS", "Fault"]

SECONDS = 30.0
"""What hangs longer is killed."""

CHANGES = frozenset({"open", "os.rename", "os.remove", "os.mkdir"})
"""What Python tells audit hooks of, and changes a folder; opening counts if it is for writing."""


@dataclass(frozen=True)
class Fault:
    """One row of the table: what is done, and what gives a package's cell."""

    title: str
    run: Callable[[str, Path], str]


def _saved(package: str, folder: Path, number: float, **options: Any) -> None:
    """Save, in a process of its own, what must not fail."""
    ended = run_one(lambda: save(package, folder, state_of(number), **options), limit=SECONDS)
    if ended.how != "returned":
        raise RuntimeError(f"preparing failed: {ended}")


def _loads(package: str, folder: Path) -> str:
    """Say what a load finds now."""
    ended = run_one(lambda: found_by(package, folder), limit=SECONDS)
    if ended.how != "returned":
        return f"then a load {_refused(ended)}"
    found = {"1": "the old state", "2": "the new state"}.get(ended.value, ended.value)
    return f"then a load gives {found}"


def _on_change(folder: Path, action: Callable[[int], None]) -> None:
    """Call an action before each change to the folder, with its number."""
    lock = threading.Lock()
    count = 0
    place = os.path.realpath(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if not os.path.realpath(arguments[0]).startswith(place):
            return
        with lock:
            number = count
            count += 1
        action(number)

    sys.addaudithook(hook)


# Writing


def _with_little_room(action: Callable[[], None], nbytes: int) -> None:
    """Let no file become longer: a write past that fails, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
    action()


def failing_writer_thread(package: str, folder: Path) -> str:
    """Fail one of two files, of which a thread each writes one; which thread has it varies."""
    found: Counter[str] = Counter()
    for number in range(6):
        place = folder / str(number)
        action = partial(save, package, place, state_of(2), thread_count=2)
        ended = run_one(lambda action=action: _with_little_room(action, 1_800_000), limit=SECONDS)
        found[f"{_refused(ended)}; {_loads(package, place)}"] += 1
    return ", ".join(f"{count} x save {what}" for what, count in found.most_common())


def full_disk(package: str, folder: Path) -> str:
    _saved(package, folder, 1)
    action = partial(save, package, folder, state_of(2))
    ended = run_one(lambda: _with_little_room(action, 1_000_000), limit=SECONDS)
    return f"save {_refused(ended)}; {_loads(package, folder)}"


def killed_everywhere(package: str, folder: Path) -> str:
    """Kill an overwrite before each of its changes to the folder."""
    found: Counter[str] = Counter()
    for number in range(1000):
        place = folder / str(number)
        _saved(package, place, 1, thread_count=2)

        def action(place: Path = place, last: int = number) -> None:
            _on_change(place, lambda at: os.kill(os.getpid(), signal.SIGKILL) if at == last else 0)
            save(package, place, state_of(2), thread_count=2)

        ended = run_one(action, limit=SECONDS)
        if ended.how == "returned":
            break
        found[_loads(package, place).removeprefix("then a load ")] += 1
    counts = ", ".join(f"{count} x {what}" for what, count in found.most_common())
    return f"{found.total()} kills; a load then: {counts}"


def two_savers(package: str, folder: Path) -> str:
    """Stop one saver before its second file until another has saved there."""
    _saved(package, folder, 3)
    done = folder.parent / "done"

    def slow() -> None:
        def wait(number: int) -> None:
            deadline = time.monotonic() + 10
            while number == 1 and not done.exists() and time.monotonic() < deadline:
                time.sleep(0.01)

        _on_change(folder, wait)
        save(package, folder, state_of(1), thread_count=2)

    def quick() -> None:
        time.sleep(2)
        try:
            save(package, folder, state_of(2), thread_count=2)
        finally:
            done.touch()

    one, other = run_all([slow, quick], limit=SECONDS)
    loads = (
        _loads(package, folder).replace("the old", "the first's").replace("the new", "the other's")
    )
    return f"the first {_refused(one)}, the other {_refused(other)}; {loads}"


def overtaken_reader(package: str, folder: Path) -> str:
    """Overwrite while a reader has read the metadata and the first of two data files."""
    _saved(package, folder, 1, thread_count=2)
    opened: list[str] = []
    done, reading = folder.parent / "done", folder.parent / "reading"

    def read() -> str:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event != "open" or not str(arguments[0]).endswith(".distcp"):
                return
            opened.append(arguments[0])
            if len(set(opened)) == 2 and not reading.exists():
                reading.touch()
                while not done.exists():
                    time.sleep(0.01)

        sys.addaudithook(hook)
        return found_by(package, folder)

    def write() -> None:
        while not reading.exists():
            time.sleep(0.01)
        try:
            save(package, folder, state_of(2), thread_count=2)
        finally:
            done.touch()

    reader, _ = run_all([read, write], limit=SECONDS)
    if reader.how == "returned":
        return {"1": "the old state", "2": "the new state"}.get(reader.value, str(reader.value))
    return _refused(reader)


# Ranks


class _Odd:
    """An object that cannot be saved, in one of several ways."""

    def __init__(self, way: str) -> None:
        self.way = way

    def __reduce__(self) -> Any:
        if self.way == "raises":
            raise ValueError("cannot be pickled")
        if self.way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.way == "exits":
            os._exit(3)
        time.sleep(3600)
        return (str, ())


def lost_rank(way: str, package: str, folder: Path) -> str:
    """Have rank 1 of 2 raise, exit, die or hang when it pickles an object of its own."""
    options = {"timeout": RANK_SECONDS} if package == "shardpoint" else {}

    def action(rank: int) -> None:
        state: dict[str, Any] = {f"part{rank}": torch.ones(1000)}
        if rank:
            state["odd"] = _Odd(way)
        PACKAGES[package].save(state, checkpoint_id=folder, **options)

    survivor, _ = run_all(
        [in_group(rank, 2, folder.parent / "store", partial(action, rank)) for rank in range(2)],
        limit=SECONDS,
    )
    if survivor.how == "raised":
        kind, message = survivor.value
        is_named = "rank 1" in message or "dict_keys([1])" in message
        names = "names rank 1" if is_named else "names no rank"
        return f"the other raises {kind} after {survivor.seconds:.0f} s; it {names}"
    return f"the other {survivor}"


def unlike_ranks(package: str, folder: Path) -> str:
    """Give the ranks different shapes under one key."""

    def action(rank: int) -> None:
        PACKAGES[package].save({"w": torch.ones(3 + rank)}, checkpoint_id=folder)

    one, _ = run_all(
        [in_group(rank, 2, folder.parent / "store", partial(action, rank)) for rank in range(2)],
        limit=SECONDS,
    )
    return f"save {_refused(one)}"


# Damage


def _data_file(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)


def damaged(change: Callable[[Path], None], package: str, folder: Path) -> str:
    """Change the largest data file, then load."""
    _saved(package, folder, 1, thread_count=2)
    change(_data_file(folder))
    ended = run_one(lambda: found_by(package, folder), limit=SECONDS)
    if ended.how == "returned":
        return "right values" if ended.value == "1" else "wrong values, no error"
    return _refused(ended)


def _refused(ended: Ended) -> str:
    if ended.how != "raised":
        return str(ended)
    message = ended.value[1]
    named = [what for what in ("key", "file") if f"{what} '" in message]
    named += ["CRC-32"] if "CRC-32" in message else []
    inner = re.search(r"\w+Error\b", message)
    name = ended.value[0] + (f" ({inner[0]})" if inner else "")
    return f"raises {name}" + (f" that names {', '.join(named)}" if named else "")


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def cut_in_half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def swap_files(package: str, folder: Path) -> str:
    """Swap the files of two ranks with the same layout."""

    def action(rank: int) -> None:
        PACKAGES[package].save(
            {f"part{rank}": torch.full((1000,), float(rank))}, checkpoint_id=folder
        )

    run_all(
        [in_group(rank, 2, folder.parent / "store", partial(action, rank)) for rank in range(2)],
        limit=SECONDS,
    )
    one, other = sorted(folder.glob("*.distcp"))
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)

    def read() -> bool:
        target = {"part0": torch.full((1000,), -1.0), "part1": torch.full((1000,), -1.0)}
        load(package, folder, target)
        return all(target[f"part{rank}"].eq(rank).all() for rank in range(2))

    ended = run_one(read, limit=SECONDS)
    if ended.how == "returned":
        return "right values" if ended.value else "wrong values, no error"
    return _refused(ended)


def unflattened(package: str, folder: Path) -> str:
    """Save and load with ``flatten_state_dict=False``, where objects are loaded as they are."""
    module = PACKAGES[package]

    def action() -> bool:
        state = {"w": torch.ones(5), "model": {"bias": torch.ones(3), "step": 7}, "n": 3}
        planner = module.DefaultSavePlanner(flatten_state_dict=False)
        module.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
        target = {"w": torch.zeros(5), "model": {"bias": torch.zeros(3), "step": 0}, "n": 0}
        planner = module.DefaultLoadPlanner(flatten_state_dict=False)
        module.load(target, checkpoint_id=folder, planner=planner, no_dist=True)
        return (
            target["n"] == 3
            and target["model"]["step"] == 7  # type: ignore[index]
            and bool(target["w"].eq(1).all())  # type: ignore[union-attr]
        )

    ended = run_one(action, limit=SECONDS)
    if ended.how == "returned":
        return "right values" if ended.value else "wrong values, no error"
    return str(ended)


# Hostile checkpoints

MEMORY = 4 << 30


def _hostile(package: str, fixture: Any, scratch: Path) -> str:
    """Load everything from one hostile checkpoint; say what came of it."""
    from dcp_states import differences
    from test_dcp_fixtures import blanked, wanted

    scratch.mkdir()

    def action() -> str:
        os.chdir(scratch)
        values = wanted(fixture.base)
        state = {key: blanked(value) for key, value in values.items()}
        module = PACKAGES[package]
        planner = module.DefaultLoadPlanner(flatten_state_dict=False)
        load(package, fixture.checkpoint, state, planner=planner)
        # Objects are left out: that torch leaves them as they were is a row of its own.
        keys = [key for key, value in values.items() if isinstance(value, torch.Tensor)]
        wrong = differences({key: state[key] for key in keys}, {key: values[key] for key in keys})
        return "loads with wrong tensors" if wrong else "loads with right tensors"

    ended = run_one(action, limit=10, memory=MEMORY)
    if any(scratch.iterdir()) or (fixture.checkpoint / "PWNED").exists():
        return "runs code"
    if ended.how == "died":
        return f"crash ({ended.value})"
    if ended.how == "hung":
        return "hangs"
    if ended.how == "raised":
        if "MemoryError" in str(ended.value) or "allocate" in str(ended.value):
            return "asks for too much memory"
        return "refused"
    return str(ended.value)


def hostile(only: Sequence[str] | None, package: str, folder: Path) -> str:
    """Load the hostile checkpoints that tests have, each with 10 s and 4 GiB."""
    from fixture_support import hostile_fixtures

    found: dict[str, list[str]] = {}
    for fixture in hostile_fixtures():
        name = fixture.name
        if fixture.base.expected["format"] != "fs" or (only is not None and name not in only):
            continue
        outcome = _hostile(package, fixture, folder.parent / name)
        found.setdefault(outcome, []).append(name)
    parts = []
    for outcome, names in sorted(found.items(), key=lambda item: -len(item[1])):
        listed = f" ({', '.join(names)})" if len(names) <= 6 or outcome == "runs code" else ""
        parts.append(f"{len(names)} {outcome}{listed}")
    return "; ".join(parts)


FAULTS: dict[str, Fault] = {
    "thread": Fault("one of two writer threads fails (file too large)", failing_writer_thread),
    "full": Fault("the disk is full half-way through an overwrite", full_disk),
    "kill": Fault(
        "SIGKILL before each change to the folder, during an overwrite", killed_everywhere
    ),
    "savers": Fault("two savers at one place at once", two_savers),
    "reader": Fault(
        "an overwrite while a reader is between its first and its second file", overtaken_reader
    ),
    "raises": Fault("one of two ranks raises while it writes", partial(lost_rank, "raises")),
    "killed": Fault("one of two ranks is killed while it writes", partial(lost_rank, "killed")),
    "exits": Fault("one of two ranks exits while it writes", partial(lost_rank, "exits")),
    "hangs": Fault(
        f"one of two ranks hangs while it writes (timeout: {RANK_SECONDS} s where there is one)",
        partial(lost_rank, "hangs"),
    ),
    "unlike": Fault("ranks with different shapes under one key", unlike_ranks),
    "flip": Fault("a bit of a tensor is flipped", partial(damaged, flip_a_byte)),
    "cut": Fault("a data file is cut in half", partial(damaged, cut_in_half)),
    "missing": Fault("a data file is missing", partial(damaged, Path.unlink)),
    "swapped": Fault("the files of two ranks are swapped", swap_files),
    "unflattened": Fault("objects with flatten_state_dict=False", unflattened),
    "paths": Fault(
        "file names that lead out of the folder",
        partial(hostile, ("path_absolute", "path_parent", "path_symlink", "path_special")),
    ),
    "hostile": Fault("hostile checkpoints through load (10 s, 4 GiB each)", partial(hostile, None)),
}
