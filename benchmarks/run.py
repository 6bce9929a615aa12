"""Measures saving, loading, opening and planning against torch and against the machine.

    python benchmarks/run.py [--rounds N] [--size-mb N] [--cases a,b] [--json FILE] ...

Every contender does the same work, each turn in a fresh process, interleaved in rounds, and
every value that is loaded is compared with what was saved. The contenders are torch's own
torch.distributed.checkpoint, shardpoint.dcp, torch_checkpointing and safetensors where they can
do the same, and the raw limit: `os.pwritev` and `os.preadv` of the same bytes on the same file
system.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cases import Job
from measuring import Measurement, file_system_of
from processes import Listed, TurnError, list_cases, prepare, run_turn
from settings import Settings
from table import Rows, render, summarize

_PACKAGES = ("torch", "numpy", "shardpoint")
_CONTENDERS = ("torch_checkpointing", "safetensors")  # left out where they are not installed
_INTERRUPTED = 130


@dataclass
class _Run:
    """What came of the cases that were run.

    Attributes
    ----------
    operations
        What was measured.
    failures
        Contenders and cases that are not among that, and why.
    is_interrupted
        Whether cases or rounds are missing.
    """

    operations: list[Rows] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    is_interrupted: bool = False


def main() -> int:
    """Run the cases that were asked for, print the table; 1 where a turn failed."""
    options = _options()
    settings = Settings(
        size_mb=options.size_mb,
        small=options.small,
        llama_mb=options.llama_mb,
        tensors=options.tensors,
        cold=options.cold,
    )
    machine = _machine()
    cases = [_of_installed(case, machine) for case in _chosen(options.cases)]
    started = time.perf_counter()
    signal.signal(signal.SIGTERM, _interrupt)
    place = Path(tempfile.mkdtemp(prefix="shardpoint-bench-", dir=options.folder))
    machine["file_system"] = file_system_of(place)
    run = _Run()
    try:
        for case in cases:
            _run_case(run, case, settings, options.rounds, place / case.name)
    except KeyboardInterrupt:
        run.is_interrupted = True
    finally:
        shutil.rmtree(place, ignore_errors=True)
    _show(options, settings, machine, run, time.perf_counter() - started)
    if run.is_interrupted:
        return _INTERRUPTED
    return 1 if run.failures else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=_positive, default=3, help="turns of each contender")
    add("--size-mb", type=_positive, default=256, help="MiB of large tensors, in steps of 16")
    add("--small", type=_positive, default=20000, help="4 KiB tensors, and as many scalars")
    add("--llama-mb", type=_positive, default=384, help="MiB of model and optimizer, nearly")
    add("--tensors", type=_positive, default=1000, help="of the synthetic checkpoints")
    add("--cases", default="", help="names, with commas; all by default; 'list' names them")
    add("--cold", action="store_true", help="drop files from the page cache before reading them")
    add(
        "--folder", type=_folder, help="where to write; the system's for temporary files by default"
    )
    add("--json", type=_new_file, metavar="FILE", help="write every measurement")
    options = parser.parse_args()
    if options.size_mb % 16:
        parser.error("argument --size-mb: a multiple of 16: tensors have 16 MiB each")
    return options


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return path


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, or in none")
    return path


def _machine() -> dict[str, Any]:
    """Return what the figures depend on; say which contenders are not installed."""
    versions = {}
    for name in (*_PACKAGES, *_CONTENDERS):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            message = f"{name} is not installed; `make bench` installs it"
            if name in _PACKAGES:
                raise SystemExit(message) from None
            print(f"{message}; it is left out", file=sys.stderr)
    return {
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **versions,
    }


def _chosen(names: str) -> list[Listed]:
    try:
        cases = list_cases()
    except TurnError as error:
        raise SystemExit(str(error)) from None
    if not names:
        return cases
    known = {case.name: case for case in cases}
    if names == "list":
        width = max(map(len, known))
        print(*(f"{case.name:{width}}  {case.title}" for case in cases), sep="\n")
        raise SystemExit(0)
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"no case {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def _of_installed(case: Listed, machine: dict[str, Any]) -> Listed:
    missing = set(_CONTENDERS) - machine.keys()
    return replace(case, contenders=tuple(c for c in case.contenders if c not in missing))


def _run_case(run: _Run, case: Listed, settings: Settings, rounds: int, place: Path) -> None:
    """Run a case and add what came of it, also of a part of it."""
    print(f"{case.name} ...", end="", file=sys.stderr, flush=True)
    started = time.perf_counter()
    results: dict[str, dict[str, list[Measurement]]] = {}
    try:
        if case.is_prepared:
            prepare(case.name, settings, place / "prepared", case.prepare_world_size)
        _run_rounds(run, case, settings, rounds, place, results)
    except TurnError as error:
        run.failures.append(f"case {case.name}, which was not begun: {error}")
    finally:
        shutil.rmtree(place, ignore_errors=True)
        # Of an interrupted case the rounds that all contenders have gone through.
        for operation, found in results.items():
            whole = min(map(len, found.values()))
            if whole:
                kept = {c: found[c][:whole] for c in case.contenders if c in found}
                run.operations.append(summarize(case.name, case.title, operation, kept))
        print(f" {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _run_rounds(
    run: _Run,
    case: Listed,
    settings: Settings,
    rounds: int,
    place: Path,
    results: dict[str, dict[str, list[Measurement]]],
) -> None:
    contenders = list(case.contenders)
    chance = random.Random(case.name)
    for number in range(min(rounds, case.most_rounds or rounds)):
        # In another order each time: the one before leaves memory and caches as it does.
        chance.shuffle(contenders)
        for contender in list(contenders):
            folder = place / f"{number}-{contender.replace(' ', '-')}"
            job = Job(contender, settings, folder, place / "prepared", 0, case.world_size)
            try:
                measured = run_turn(case.name, job)
            except TurnError as error:
                run.failures.append(f"case {case.name}, {contender}, is left out: {error}")
                contenders.remove(contender)
                for found in results.values():
                    found.pop(contender, None)
                continue
            for operation, measurement in measured.items():
                by_contender = results.setdefault(operation, {})
                by_contender.setdefault(contender, []).append(measurement)


def _show(
    options: argparse.Namespace,
    settings: Settings,
    machine: dict[str, Any],
    run: _Run,
    seconds: float,
) -> None:
    print(render(run.operations, with_disk=settings.cold))
    print()
    print(f"{options.rounds} rounds, medians, {seconds:.0f} s; " + _listed(machine))
    print(_listed(vars(settings)))
    if run.is_interrupted:
        print("interrupted: not all cases and rounds are there")
    for failure in run.failures:
        print(failure, file=sys.stderr)
    if options.json is not None:
        content: dict[str, Any] = {
            "machine": machine,
            "settings": vars(settings),
            "rounds": options.rounds,
            "seconds": seconds,
            "is_interrupted": run.is_interrupted,
            "failures": run.failures,
            "operations": [rows.as_json() for rows in run.operations],
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
