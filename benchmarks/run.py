"""Measures saving, loading, opening and planning against torch and against the machine.

    python benchmarks/run.py [--rounds N] [--size-mb N] [--cases a,b] [--json FILE] ...

Every contender does the same work, each turn in a fresh process, interleaved in rounds, and
every value that is loaded is compared with what was saved. The contenders are torch's own
torch.distributed.checkpoint, shardpoint.dcp, safetensors where it can do the same, and the
raw limit: `os.pwritev` and `os.preadv` of the same bytes on the same file system.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cases import Job
from measuring import Measurement
from processes import Listed, TurnError, list_cases, prepare, run_turn
from settings import Settings
from table import Rows, render, summarize

_OTHER_LIBRARIES = ("torch", "torch_checkpointing", "safetensors", "numpy")


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
    started = time.perf_counter()
    place = Path(tempfile.mkdtemp(prefix="shardpoint-bench-", dir=options.folder))
    operations: list[Rows] = []
    failures: list[str] = []
    try:
        for case in _chosen(options.cases):
            try:
                operations += _run_case(case, settings, options.rounds, place / case.name)
            except TurnError as error:
                failures.append(f"case {case.name}: {error}")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    _show(options, settings, operations, time.perf_counter() - started)
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--size-mb", type=int, default=256, help="MiB of large tensors")
    parser.add_argument("--small", type=int, default=20000, help="4 KiB tensors, and scalars")
    parser.add_argument("--llama-mb", type=int, default=384, help="MiB of model and optimizer")
    parser.add_argument("--tensors", type=int, default=1000, help="of the synthetic checkpoints")
    parser.add_argument("--cases", default="", help="names, with commas; all by default")
    parser.add_argument("--cold", action="store_true", help="read files out of the page cache")
    parser.add_argument("--folder", type=Path, help="where to write; the system's by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement")
    return parser.parse_args()


def _chosen(names: str) -> list[Listed]:
    cases = list_cases()
    if not names:
        return cases
    known = {case.name: case for case in cases}
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"no case {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def _run_case(case: Listed, settings: Settings, rounds: int, place: Path) -> list[Rows]:
    name, contenders = case.name, case.contenders
    print(f"{name} ...", end="", file=sys.stderr, flush=True)
    started = time.perf_counter()
    results: dict[str, dict[str, list[Measurement]]] = {}
    if case.is_prepared:
        prepare(name, settings, place / "prepared", case.prepare_world_size)
    for number in range(min(rounds, case.most_rounds or rounds)):
        # Each round begins with another contender, so that none is always the first.
        shift = number % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            folder = place / f"{number}-{contender.replace(' ', '-')}"
            job = Job(contender, settings, folder, place / "prepared", 0, case.world_size)
            for operation, measured in run_turn(name, job).items():
                results.setdefault(operation, {}).setdefault(contender, []).append(measured)
    shutil.rmtree(place, ignore_errors=True)
    print(f" {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return [
        summarize(f"{case.title}: {operation}", {c: found[c] for c in contenders if c in found})
        for operation, found in results.items()
    ]


def _show(
    options: argparse.Namespace, settings: Settings, operations: list[Rows], seconds: float
) -> None:
    versions = {name: version(name) for name in (*_OTHER_LIBRARIES, "shardpoint")}
    machine = {
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions,
    }
    print(render(operations))
    print()
    print(f"{options.rounds} rounds, medians, {seconds:.0f} s; " + _listed(machine))
    print(_listed(vars(settings)))
    if options.json is not None:
        content: dict[str, Any] = {
            "machine": machine,
            "settings": vars(settings),
            "rounds": options.rounds,
            "operations": [
                {"title": o.title, "contenders": [row.as_json() for row in o.rows]}
                for o in operations
            ],
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
