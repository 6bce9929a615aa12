"""The same faults for torch's own checkpoint package and for shardpoint, side by side.

Prints a table in Markdown. Every cell is what happened just now, in processes made for it.
Usage: ``python faults/compare.py [FAULT ...]``; ``make compare-faults`` runs all.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import torch  # noqa: E402
from cases import FAULTS, SECONDS  # noqa: E402
from package import PACKAGES  # noqa: E402

import shardpoint  # noqa: E402


def main() -> int:
    """Run the faults that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", metavar="FAULT", nargs="*", help=", ".join(FAULTS))
    chosen = parser.parse_args().faults or list(FAULTS)
    unknown = [name for name in chosen if name not in FAULTS]
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # forks must not inherit threads
    started = time.monotonic()
    names = [f"torch {torch.__version__.split('+')[0]}", f"shardpoint {shardpoint.__version__}"]
    print(f"| fault | {' | '.join(names)} |\n|---|---|---|", flush=True)
    failed = False
    for name in chosen:
        cells = []
        for package in PACKAGES:
            scratch = Path(tempfile.mkdtemp(prefix=f"fault-{name}-"))
            try:
                cells.append(FAULTS[name].run(package, scratch / "ckpt"))
            except Exception as error:  # noqa: BLE001  one fault must not end the report
                failed = True
                cells.append(f"(the comparison itself failed: {error!r})")
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        row = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        print(f"| {FAULTS[name].title} | {' | '.join(row)} |", flush=True)
    print(
        f"\n{len(chosen)} faults in {time.monotonic() - started:.0f} s; what hung was killed after "
        f"{SECONDS:.0f} s.",
        file=sys.stderr,
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
