"""Results as JSON, for programs."""

from __future__ import annotations

import dataclasses
import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO

from shardpoint.cli._facts import Listing, ObjectFacts, Overview, TensorFacts
from shardpoint.verify import Progress, VerifyReport

__all__ = ["JsonOutput"]


class JsonOutput:
    """One JSON object a run. Fields are those of the dataclasses; bytes are plain numbers.

    Only ASCII is written, everything else as ``\\u`` escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def listing(self, listing: Listing) -> None:
        self._write(dataclasses.asdict(listing))

    def overview(self, overview: Overview) -> None:
        self._write(dataclasses.asdict(overview))

    def key(self, facts: TensorFacts | ObjectFacts) -> None:
        self._write(dataclasses.asdict(facts))

    def report(self, path: str, report: VerifyReport, *, quick: bool) -> None:
        fields = dataclasses.asdict(report)
        self._write({"path": path, "ok": report.ok, "quick": quick, **fields})

    def converted(self, path: str, target: str, form: str) -> None:
        self._write({"path": path, "target": target, "format": form})

    def progress(self) -> AbstractContextManager[Progress | None]:
        return nullcontext()

    def _write(self, fields: dict[str, Any]) -> None:
        # allow_nan=False: NaN and Infinity are no JSON; none can be left in the facts.
        json.dump(fields, self._stream, indent=2, allow_nan=False)
        self._stream.write("\n")
