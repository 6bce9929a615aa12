"""Fuzzes the readers, guided by coverage (atheris), for a given time.

    python fuzz/run.py [--seconds N] [--targets a,b]

Targets take turns in processes of their own, each with its share of the time, 1 GiB of memory, and
10 seconds for one input. Starts from the seeds in ``corpus/``; what it comes to is kept
in a folder outside the repository (``--work``). Exit code 1 if there is a finding: its input then
lies in that folder, and its traceback is printed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_MEMORY_MB = 1024
_INPUT_SECONDS = 10
_MOST_BYTES = 64 << 10


def main() -> int:
    options = _options()
    if options.one is not None:
        return _fuzz(options.one, options.rest)
    from targets import CORPUS, TARGETS

    names = options.targets.split(",") if options.targets else list(TARGETS)
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise SystemExit(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    work = options.work or Path(tempfile.mkdtemp(prefix="shardpoint-fuzz-"))
    share = max(1, options.seconds // len(names))
    findings = []
    for name in names:
        grown = work / name
        grown.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        done = subprocess.run(
            [
                *(sys.executable, __file__, "--one", name, "--"),
                f"-max_total_time={share}",
                f"-rss_limit_mb={_MEMORY_MB}",
                f"-timeout={_INPUT_SECONDS}",
                f"-max_len={_MOST_BYTES}",
                f"-artifact_prefix={grown}/finding-",
                "-print_final_stats=1",
                *(str(grown), str(CORPUS / name)),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        runs = _statistic(done.stderr, "number_of_executed_units")
        peak = _statistic(done.stderr, "peak_rss_mb")
        good = done.returncode == 0
        print(
            f"{name}: {runs} inputs in {time.monotonic() - started:.0f} s, peak {peak} MB: "
            f"{'no finding' if good else 'FINDING'}",
            flush=True,
        )
        if not good:
            findings.append(name)
            print(done.stdout[-4000:], done.stderr[-8000:], sep="\n", flush=True)
    print(f"{len(findings)} findings; inputs are in {work}")
    return 1 if findings else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--targets", default="", help="names, with commas; all by default")
    parser.add_argument("--work", type=Path, help="where inputs are kept; a new folder by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def _statistic(output: str, name: str) -> str:
    for line in output.splitlines():
        if line.startswith(f"stat::{name}:"):
            return line.rpartition(":")[2].strip()
    return "?"


def _fuzz(name: str, arguments: list[str]) -> int:
    """Run one target in this process, with the arguments of libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["shardpoint"]):
        from targets import TARGETS

        from shardpoint.errors import ShardpointError
    target = TARGETS[name]

    def one_input(data: bytes) -> None:
        try:
            target(data)
        except ShardpointError:
            return

    atheris.Setup([sys.argv[0], *arguments], one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
