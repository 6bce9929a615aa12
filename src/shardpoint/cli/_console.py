"""Results for people, with rich. The only module that imports it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from shardpoint._info import ChunkInfo
from shardpoint.cli._facts import Listing, ObjectFacts, Overview, TensorFacts
from shardpoint.cli._text import counted, one_line, printable, sizes_text, with_unit
from shardpoint.cli._values import value_text
from shardpoint.errors import Problem
from shardpoint.verify import Progress, VerifyReport

__all__ = ["ConsoleOutput"]

_SOURCES = {
    "dcp": "torch.distributed.checkpoint (DCP)",
    "dcp-per-rank": "torch.distributed.checkpoint (DCP), metadata of each rank",
    "huggingface": "safetensors",
    "torch": "torch.save",
}
_NOTHING = "-"
_GAP = 3  # between two columns of rich's table
_FOLDING = ("key", "file", "shape")  # columns that may take several lines; numbers stay whole
_MOST_RICH_ROWS = 1000  # rich takes about a millisecond a row: a listing may have 100,000


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the error through: rich would exit with 1, which says something else here."""
        raise


class ConsoleOutput:
    """Tables and lines. On a terminal they are styled and fit its width; elsewhere a row is one
    line, however long.
    """

    def __init__(self, stream: TextIO, error_stream: TextIO) -> None:
        self._stream = stream
        self._error_stream = error_stream
        self._console = _Console(file=stream, markup=False, highlight=False, emoji=False)

    def listing(self, listing: Listing) -> None:
        rows = [
            (
                printable(entry.key),
                entry.kind,
                entry.dtype or _NOTHING,
                _NOTHING if entry.shape is None else sizes_text(entry.shape),
                _NOTHING if entry.nbytes is None else f"{entry.nbytes:,}",
                _NOTHING if entry.chunks is None else f"{entry.chunks:,}",
            )
            for entry in listing.entries
        ]
        columns = ("key", "kind", "dtype", "shape", "bytes", "chunks")
        self._table(columns, rows, right=("bytes", "chunks"))
        self._line(
            f"{counted(listing.tensors, 'tensor')} in {counted(listing.chunks, 'chunk')}, "
            f"{counted(listing.objects, 'object')}, {with_unit(listing.nbytes)}"
        )

    def overview(self, overview: Overview) -> None:
        self._fields(
            ("path", printable(overview.path)),
            ("format", _SOURCES.get(overview.source, printable(overview.source))),
            ("metadata version", printable(overview.metadata_version or "none stored")),
            ("opened by", printable(", ".join(overview.metadata_files)) or _NOTHING),
            ("saved", "nested" if overview.nested else "flat"),
            ("tensors", f"{overview.tensors:,}, {with_unit(overview.tensor_bytes)}"),
            ("chunks", f"{overview.chunks:,}"),
            ("objects", f"{overview.objects:,}, {with_unit(overview.object_bytes)}"),
            ("stored as", printable(", ".join(overview.transforms)) or "plain bytes"),
            ("files", f"{len(overview.files):,}, {with_unit(overview.file_bytes)}"),
        )
        rows = [
            (printable(file.name), "missing" if file.nbytes is None else f"{file.nbytes:,}")
            for file in overview.files
        ]
        self._table(("file", "bytes"), rows, right=("bytes",))

    def key(self, facts: TensorFacts | ObjectFacts) -> None:
        fields = [
            ("key", printable(facts.key)),
            ("kind", facts.kind),
            ("path", _NOTHING if facts.path is None else one_line(value_text(facts.path))),
        ]
        if isinstance(facts, TensorFacts):
            self._fields(
                *fields,
                ("dtype", facts.dtype),
                ("shape", sizes_text(facts.shape)),
                ("bytes", with_unit(facts.nbytes)),
                ("requires grad", "yes" if facts.requires_grad else "no"),
                ("layout", facts.layout),
                ("chunks", f"{len(facts.chunks):,}"),
            )
            self._chunks(facts.chunks)
            return
        if facts.file is None:
            stored = [("file", "in the index itself")]
        else:
            stored = [
                ("file", printable(facts.file)),
                ("first byte", f"{facts.record_offset:,}"),
                ("bytes", with_unit(facts.record_length)),
                ("stored as", printable(", ".join(facts.transforms)) or "plain bytes"),
                ("CRC-32", _checksum_text(facts.record_checksum)),
            ]
        if facts.value_error is None:
            value = ("value", one_line(value_text(facts.value)))
        else:
            value = ("not decoded", one_line(facts.value_error))
        self._fields(*fields, *stored, value)

    def report(self, path: str, report: VerifyReport, *, quick: bool) -> None:
        looked_at = (
            "data not read"
            if quick
            else f"{counted(report.chunks_read, 'chunk')} read, {with_unit(report.bytes_read)}"
        )
        self._line(
            f"{printable(path)}: {counted(report.tensors, 'tensor')} in "
            f"{counted(report.chunks, 'chunk')}, {counted(report.objects, 'object')}; "
            f"{looked_at}, in {report.seconds:.1f} s"
        )
        for problem in report.problems:
            self._problem(problem)
        for note in report.notes:
            self._line(f"note: {one_line(note)}")
        found = counted(len(report.problems), "problem") if report.problems else "no problems"
        self._line(found, style="bold red" if report.problems else "bold green")

    def converted(self, path: str, target: str, form: str) -> None:
        self._line(f"{printable(path)}: written as {form} to {printable(target)}")

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        if not self._error_stream.isatty():
            yield None
            return
        columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(binary_units=True))
        console = _Console(file=self._error_stream)
        with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def _chunks(self, chunks: Sequence[ChunkInfo]) -> None:
        rows = [
            (
                sizes_text(chunk.offsets),
                sizes_text(chunk.sizes),
                _NOTHING if chunk.file is None else printable(chunk.file),
                f"{chunk.record_offset:,}",
                f"{chunk.record_length:,}",
                _NOTHING if chunk.payload_offset is None else f"{chunk.payload_offset:,}",
                _checksum_text(chunk.checksum),
                _checksum_text(chunk.record_checksum),
                printable(", ".join(chunk.transforms)) or _NOTHING,
            )
            for chunk in chunks
        ]
        columns = (
            *("offsets", "sizes", "file", "first byte", "bytes"),
            *("elements at", "their CRC-32", "record's CRC-32", "stored as"),
        )
        width = sum(_widths(columns, rows)) + _GAP * len(columns)
        is_few = len(rows) <= _MOST_RICH_ROWS
        if self._console.is_terminal and is_few and width > self._console.width:
            self._narrow_chunks(rows)
        else:
            self._table(columns, rows, right=("first byte", "bytes", "elements at"))

    def _narrow_chunks(self, rows: Sequence[Sequence[str]]) -> None:
        """Write some short lines for each chunk: nine columns in 80 would be torn to pieces."""
        for offsets, sizes, file, first, nbytes, elements, theirs, records, transforms in rows:
            self._line(f"\nchunk at {offsets} of {sizes}", style="bold")
            self._fields(
                ("  record", f"{file}, byte {first}, {nbytes} bytes, CRC-32 {records}"),
                ("  elements", f"at byte {elements}, CRC-32 {theirs}"),
                ("  stored as", "plain bytes" if transforms == _NOTHING else transforms),
            )

    def _problem(self, problem: Problem) -> None:
        where = [
            *([] if problem.key is None else [f"key {printable(problem.key)}"]),
            *([] if problem.file is None else [f"file {printable(problem.file)}"]),
            *([] if problem.offset is None else [f"byte {problem.offset:,}"]),
        ]
        self._line(", ".join(where) or "the checkpoint", style="bold")
        self._line(f"  {one_line(problem.message)}")

    def _line(self, text: str, style: str = "") -> None:
        # Soft wrapping is the terminal's own: what is copied from there has no line ends in it.
        self._console.print(Text(text, style), soft_wrap=True)

    def _fields(self, *fields: tuple[str, str]) -> None:
        width = max(len(name) for name, _ in fields)
        for name, value in fields:
            line = Text.assemble((name.ljust(width), "bold"), "  ", value)
            self._console.print(line, soft_wrap=True)

    def _table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str]
    ) -> None:
        if not self._console.is_terminal or len(rows) > _MOST_RICH_ROWS:
            self._plain_table(columns, rows, right=right)
            return
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in columns:
            table.add_column(
                name,
                justify="right" if name in right else "left",
                overflow="fold",
                no_wrap=name not in _FOLDING,
            )
        for row in rows:
            table.add_row(*map(Text, row))
        self._console.print(table)

    def _plain_table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str]
    ) -> None:
        widths = _widths(columns, rows)
        for row in (columns, *rows):
            cells = [
                " " * (width - cell_len(cell)) + cell
                if name in right
                else cell + " " * (width - cell_len(cell))
                for name, cell, width in zip(columns, row, widths, strict=True)
            ]
            self._stream.write("  ".join(cells).rstrip() + "\n")


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(cell_len, column)) for column in zip(columns, *rows, strict=True)]


def _checksum_text(checksum: int | None) -> str:
    return _NOTHING if checksum is None else f"{checksum:08x}"
