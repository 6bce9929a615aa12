"""Medians, ratios, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from measuring import Measurement

__all__ = ["Row", "Rows", "render", "summarize"]

_REFERENCES = ("torch", "torch, extrapolated")
_LIMIT = "raw"


@dataclass
class Row:
    """One contender in one operation of a case.

    Attributes
    ----------
    seconds, processor_seconds
        Medians.
    best_seconds
        The fastest round.
    times_faster
        Than torch: median of the rounds' ratios, so that a slow minute of the machine, which
        both saw, does not count.
    of_limit
        Seconds of the raw limit through seconds of this; likewise.
    peak_bytes, read_ratio, disk_ratio
        Medians: memory beyond the state, bytes read over bytes needed, and those of them that
        came from the disk.
    sent_bytes
        Median of what one rank exchanges with the others, where that was counted.
    """

    contender: str
    seconds: float
    best_seconds: float
    processor_seconds: float
    times_faster: float | None
    of_limit: float | None
    peak_bytes: float | None
    read_ratio: float | None
    disk_ratio: float | None
    sent_bytes: float | None
    rounds: list[Measurement] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return everything, each round as well."""
        return {**vars(self), "rounds": [vars(m) for m in self.rounds]}


@dataclass
class Rows:
    """One operation of a case; `title` is the case's."""

    case: str
    title: str
    operation: str
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        return {
            "case": self.case,
            "title": self.title,
            "operation": self.operation,
            "contenders": [row.as_json() for row in self.rows],
        }


def summarize(case: str, title: str, operation: str, results: dict[str, list[Measurement]]) -> Rows:
    """Return the rows of an operation from each contender's rounds."""
    reference = next((results[name] for name in _REFERENCES if name in results), None)
    limit = results.get(_LIMIT)
    rows = []
    for contender, rounds in results.items():
        rows.append(
            Row(
                contender,
                median(m.seconds for m in rounds),
                min(m.seconds for m in rounds),
                median(m.processor_seconds for m in rounds),
                _ratio(reference, rounds),
                _ratio(limit, rounds),
                _median([m.peak_bytes for m in rounds]),
                _median([_through(m.read_bytes, m.needed_bytes) for m in rounds]),
                _median([_through(m.disk_bytes, m.needed_bytes) for m in rounds]),
                _median([m.sent_bytes for m in rounds]),
                rounds,
            )
        )
    return Rows(case, title, operation, rows)


def _ratio(other: list[Measurement] | None, own: list[Measurement]) -> float | None:
    if other is None:
        return None
    return median(a.seconds / b.seconds for a, b in zip(other, own, strict=True))


def _through(read: int | None, needed: int | None) -> float | None:
    return read / needed if read is not None and needed else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def render(operations: Sequence[Rows], *, with_disk: bool) -> str:
    """Return the table, in Markdown that can be read as it is."""
    header = [
        "operation",
        "contender",
        "seconds",
        "best",
        "cpu s",
        "x torch",
        "of raw",
        "peak MiB",
        "read/needed",
        "sent bytes",
        *(["disk/needed"] if with_disk else []),
    ]
    lines = [header]
    for operation in operations:
        for number, row in enumerate(operation.rows):
            lines.append(
                [
                    f"{operation.title}: {operation.operation}" if number == 0 else "",
                    row.contender,
                    _seconds(row.seconds),
                    _seconds(row.best_seconds),
                    _seconds(row.processor_seconds),
                    _number(row.times_faster, "{:.2f}"),
                    _number(row.of_limit, "{:.2f}"),
                    _number(row.peak_bytes, "{:,.1f}", 1 << 20),
                    _number(row.read_ratio, "{:.3f}"),
                    _number(row.sent_bytes, "{:,.0f}"),
                    *([_number(row.disk_ratio, "{:.3f}")] if with_disk else []),
                ]
            )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(_lines(lines, widths))


def _lines(lines: list[list[str]], widths: list[int]) -> list[str]:
    def joined(line: list[str]) -> str:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [
        "-" * width if column < 2 else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    return [joined(lines[0]), joined(rule), *map(joined, lines[1:])]


def _seconds(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _number(value: float | None, form: str, unit: int = 1) -> str:
    return "-" if value is None else form.format(value / unit)
