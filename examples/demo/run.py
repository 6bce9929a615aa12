"""Trains a small transformer, saves it, kills the job, and goes on with fewer processes.

    python examples/demo/run.py [--keep]

Everything is real: FSDP2 (`fully_shard`) and AdamW on separate processes, SIGKILL, and the text
of this repository's documentation. Each claim that is printed has been checked; the exit code
is 1 if one of them does not hold. Takes less than a minute on two free processors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from digests import differences
from job import DemoError, Job

_HERE = Path(__file__).resolve().parent
_REPOSITORY = _HERE.parents[1]
_STEPS = 48
_FIRST_SAVE = 16
_KILL_AFTER = 20
_SECOND_SAVE = 32
_SHOWN_STEPS = (1, 8, 16, 17, 24, 32, 33, 40, 48)
_TOLERANCE = 1e-9  # relative; in double precision, over all steps
_JOB_SECONDS = 240.0


@dataclass
class Outcome:
    """What one job told: by step its loss, and what it said of loading and saving."""

    losses: dict[int, float] = field(default_factory=dict)
    ready: dict[str, Any] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)
    saved: dict[str, Any] = field(default_factory=dict)
    killed: bool = False

    def note(self, event: dict[str, Any]) -> None:
        """Remember one event."""
        if event["event"] == "step":
            self.losses[event["step"]] = event["loss"]
        else:
            setattr(self, event["event"], event)


class Demo:
    """The account: one method a chapter, each of which prints what it has checked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._text = folder / "text"

    def run(self) -> None:
        """Go through all chapters.

        Raises
        ------
        DemoError
            If anything is not as it should be.
        """
        self._collect_text()
        reference = self._train_without_a_break()
        on_4 = self._train_until_killed(reference)
        on_2 = self._resume(2, _FIRST_SAVE, on_4, reference, until=_SECOND_SAVE)
        on_1 = self._resume(1, _SECOND_SAVE, on_2, reference, until=_STEPS)
        _print_losses(
            reference, [(4, _FIRST_SAVE, on_4), (2, _SECOND_SAVE, on_2), (1, _STEPS, on_1)]
        )
        self._look_from_outside(
            "open_without_torch.py",
            f"The checkpoint of step {_FIRST_SAVE} where torch cannot be imported",
            _FIRST_SAVE,
            on_4,
        )
        self._look_from_outside(
            "load_with_torch.py",
            f"The checkpoint of step {_FIRST_SAVE} loaded by torch.distributed.checkpoint",
            _FIRST_SAVE,
            on_4,
        )

    def _collect_text(self) -> None:
        files = [_REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
        files += sorted((_REPOSITORY / "docs").glob("*.md"))
        text = b"\n".join(path.read_bytes() for path in files if path.exists())
        self._text.write_bytes(text)
        print(f"Text: {len(text):,} bytes of this repository's documentation ({len(files)} files)")

    def _train(
        self,
        name: str,
        processes: int,
        *,
        until: int,
        save_at: int | None = None,
        resume_from: Path | None = None,
        kill_after: int | None = None,
    ) -> Outcome:
        arguments = ["--text", str(self._text), "--processes", str(processes)]
        arguments += ["--steps", str(_STEPS), "--until", str(until)]
        if save_at is not None:
            arguments += ["--save-at", str(save_at), "--save-to", str(self._checkpoint(save_at))]
        if resume_from is not None:
            arguments += ["--resume-from", str(resume_from)]
        outcome = Outcome()
        with Job(self._folder / name, arguments=arguments, seconds=_JOB_SECONDS) as job:
            for event in job.events():
                outcome.note(event)
                if kill_after is not None and event.get("step") == kill_after:
                    for last_word in job.kill():
                        outcome.note(last_word)
                    outcome.killed = True
                    break
        return outcome

    def _checkpoint(self, step: int) -> Path:
        return self._folder / f"step-{step}"

    def _train_without_a_break(self) -> Outcome:
        with _chapter(f"{_STEPS} steps without a break on 4 processes, for comparison"):
            outcome = self._train("without-a-break", 4, until=_STEPS)
            print(
                f"  transformer of {outcome.ready['parameters']:,} parameters in float64, AdamW, "
                f"{outcome.ready['batches']} batches an epoch"
            )
            first, last = outcome.losses[1], outcome.losses[_STEPS]
            if not last < first:
                raise DemoError(f"nothing was learned: loss {first} at first, {last} at last")
            print(f"  loss {first:.4f} at step 1, {last:.4f} at step {_STEPS}")
        return outcome

    def _train_until_killed(self, reference: Outcome) -> Outcome:
        with _chapter(f"The same on 4 processes, saved at step {_FIRST_SAVE}, then killed"):
            outcome = self._train(
                "killed", 4, until=_STEPS, save_at=_FIRST_SAVE, kill_after=_KILL_AFTER
            )
            last = max(outcome.losses)
            if not outcome.killed or last == _STEPS:
                raise DemoError(f"the job was not killed on its way, but came to step {last}")
            self._describe_checkpoint(_FIRST_SAVE, outcome)
            print(f"  losses: {_compare(reference, outcome)}")
            print(
                f"  SIGKILL to the whole process group after step {last}, all processes gone; "
                f"steps {_FIRST_SAVE + 1} to {last} are lost"
            )
        return outcome

    def _resume(
        self, processes: int, step: int, before: Outcome, reference: Outcome, *, until: int
    ) -> Outcome:
        """Go on from the checkpoint of `before`; save again unless this is the end."""
        on_processes = f"on {processes} process{'' if processes == 1 else 'es'}"
        with _chapter(f"On from step {step} to {until}, {on_processes}"):
            save_at = until if until < _STEPS else None
            outcome = self._train(
                f"on-{processes}",
                processes,
                until=until,
                save_at=save_at,
                resume_from=self._checkpoint(step),
            )
            loaded = outcome.loaded
            if loaded["step"] != step:
                raise DemoError(f"went on from step {loaded['step']}, saved was step {step}")
            if wrong := differences(before.saved["digests"], loaded["digests"]):
                raise DemoError(f"after loading {on_processes}: {'; '.join(wrong[:5])}")
            print(
                f"  loaded: {_megabytes(loaded['bytes_read'])} read in {_ms(loaded['seconds'])}; "
                f"{len(loaded['digests'])} tensors of model and optimizer bit for bit as saved"
            )
            if sorted(outcome.losses) != list(range(step + 1, until + 1)):
                raise DemoError(f"trained steps {sorted(outcome.losses)} instead of the rest")
            print(f"  losses: {_compare(reference, outcome)}")
            if save_at is not None:
                self._describe_checkpoint(save_at, outcome)
        return outcome

    def _describe_checkpoint(self, step: int, outcome: Outcome) -> None:
        sizes = {path.name: path.stat().st_size for path in self._checkpoint(step).iterdir()}
        data = [size for name, size in sizes.items() if name.endswith(".distcp")]
        rest = [f"{name} {size / 1e3:.0f} kB" for name, size in sizes.items() if size not in data]
        print(
            f"  saved: {_megabytes(sum(data))} in {len(data)} data files, {', '.join(rest)}; "
            f"{_ms(outcome.saved['seconds'])}, synced to disk"
        )

    def _look_from_outside(self, script: str, title: str, step: int, outcome: Outcome) -> None:
        """Run a script on a checkpoint, with the fingerprints that training took of it."""
        with _chapter(title):
            expected = self._folder / f"step-{step}.expected.json"
            content = {"step": step, "digests": outcome.saved["digests"]}
            expected.write_text(json.dumps(content))
            arguments = [str(_HERE / script), str(self._checkpoint(step)), str(expected)]
            try:
                finished = subprocess.run(
                    [sys.executable, *arguments],
                    capture_output=True,
                    text=True,
                    timeout=_JOB_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise DemoError(f"{script} was not done after {_JOB_SECONDS:.0f} s") from error
            print("".join(f"  {line}\n" for line in finished.stdout.splitlines()), end="")
            if finished.returncode:
                raise DemoError(f"{script} failed:\n{finished.stderr.strip()}")


def _compare(reference: Outcome, outcome: Outcome) -> str:
    """Compare the losses of a run with those of the same steps without a break."""
    steps = sorted(outcome.losses)
    largest = max(_difference(reference, outcome, step) for step in steps)
    if not largest <= _TOLERANCE:
        raise DemoError(
            f"the losses of steps {steps[0]} to {steps[-1]} differ by up to {largest:.1e} "
            f"(relative) from those without a break; at most {_TOLERANCE:.0e} was expected"
        )
    how = "bit for bit the same" if largest == 0 else f"the same to {largest:.1e} (relative)"
    return f"steps {steps[0]} to {steps[-1]} {how} as without a break"


def _difference(reference: Outcome, outcome: Outcome, step: int) -> float:
    wanted = reference.losses[step]
    return abs(outcome.losses[step] - wanted) / abs(wanted)


def _print_losses(reference: Outcome, parts: list[tuple[int, int, Outcome]]) -> None:
    """Print some losses; each part is its number of processes, its last step, and the run."""
    print("\n  step   without a break       killed and resumed    processes   difference")
    for step in _SHOWN_STEPS:
        processes, outcome = next((n, run) for n, last, run in parts if step <= last)
        print(
            f"  {step:4}   {reference.losses[step]:.15f}     {outcome.losses[step]:.15f}"
            f"     {processes}           {_difference(reference, outcome, step):.1e}"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"


@contextmanager
def _chapter(title: str) -> Iterator[None]:
    print(f"\n{title}", flush=True)
    started = time.perf_counter()
    yield
    print(f"  ({time.perf_counter() - started:.1f} s)", flush=True)


@contextmanager
def _output_folder(keep: bool) -> Iterator[Path]:
    if not keep:
        with tempfile.TemporaryDirectory(prefix="shardpoint-demo-") as folder:
            yield Path(folder)
        return
    kept = _REPOSITORY / "demo-output"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    yield kept
    print(f"Kept: {kept}")


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description="Train, save, kill, resume.")
    parser.add_argument("--keep", action="store_true", help="leave everything in demo-output/")
    started = time.perf_counter()
    try:
        with _output_folder(parser.parse_args().keep) as folder:
            Demo(folder).run()
    except DemoError as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    print(f"\nAll of this was checked. {time.perf_counter() - started:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
