"""The parser, the commands, and what becomes of errors."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from shardpoint import __version__
from shardpoint.checkpoint import open as open_checkpoint
from shardpoint.cli._facts import (
    ObjectFacts,
    gather_key,
    gather_listing,
    gather_overview,
)
from shardpoint.cli._json import JsonOutput
from shardpoint.cli._output import Output
from shardpoint.cli._text import one_line
from shardpoint.convert import to_checkpoint, to_safetensors, to_torch_save
from shardpoint.errors import ShardpointError
from shardpoint.transforms import AesGcm

__all__ = ["main"]

_CONVERSIONS: Mapping[str, Callable[..., None]] = {
    "dcp": to_checkpoint,
    "safetensors": to_safetensors,
    "torch": to_torch_save,
}

_FINE = 0
_PROBLEMS = 1
_FAILED = 2
_INTERRUPTED = 130  # what shells give for a command that the user stopped
_READER_GONE = 141  # and for one whose reader went away, such as `head`

_MOST_KEY_BYTES = 1 << 10
_EXIT_CODES = "exit code: 0 fine, 1 something is wrong with it, 2 it cannot be opened"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are the process's by default.

    Raises
    ------
    SystemExit
        After help, the version, or a message about wrong arguments.
    """
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        # A key may hold letters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        output = _output(json=options.json)
        if output is None:
            return _failed("tables need rich: pip install 'shardpoint[cli]' (or use --json)")
        code = _run(options, output)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except (ShardpointError, OSError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _failed(message: str) -> int:
    print(f"shardpoint: {one_line(message)}", file=sys.stderr)
    return _FAILED


def _output(*, json: bool) -> Output | None:
    """Return where results go, or None where rich is needed and is not installed."""
    if json:
        return JsonOutput(sys.stdout)
    try:
        from shardpoint.cli._console import ConsoleOutput
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "rich":
            raise
        return None
    return ConsoleOutput(sys.stdout, sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardpoint",
        description="Look into checkpoints, verify and convert them, without torch.",
    )
    parser.add_argument("--version", action="version", version=f"shardpoint {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("path", metavar="PATH", help="a checkpoint: a folder, a file or a URL")
    shared.add_argument("--json", action="store_true", help="write JSON")
    shared.add_argument(
        "--key-file",
        metavar="FILE",
        help="the key of an encrypted checkpoint: 16, 24 or 32 bytes, or their hexadecimal digits",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    listing = commands.add_parser("ls", parents=[shared], help="list the keys")
    listing.add_argument(
        "--prefix",
        metavar="P",
        default="",
        help="only the key P and keys that go on from it after a dot",
    )
    info = commands.add_parser(
        "info", parents=[shared], help="describe the checkpoint or one key", epilog=_EXIT_CODES
    )
    info.add_argument("key", metavar="KEY", nargs="?", help="a tensor or an object")
    verify = commands.add_parser(
        "verify", parents=[shared], help="find everything that is wrong", epilog=_EXIT_CODES
    )
    verify.add_argument(
        "--quick", action="store_true", help="only the structure and the sizes of the files"
    )
    convert = commands.add_parser(
        "convert", parents=[shared], help="write it in another format; encryption is undone"
    )
    convert.add_argument("target", metavar="TARGET", help="the folder or file to write")
    convert.add_argument(
        "--to",
        choices=sorted(_CONVERSIONS),
        required=True,
        help="dcp: torch.distributed.checkpoint; safetensors: one file with an index; "
        "torch: one torch.save file",
    )
    return parser


def _read_key(name: str) -> bytes:
    """Return a key that lies in a file, as it is or as hexadecimal digits."""
    with open(name, "rb") as file:
        key = file.read(_MOST_KEY_BYTES)
    try:
        return bytes.fromhex(key.decode("ascii"))
    except ValueError:
        return key


def _run(options: argparse.Namespace, output: Output) -> int:
    transforms = [] if options.key_file is None else [AesGcm(_read_key(options.key_file))]
    if options.command == "convert":
        _CONVERSIONS[options.to](options.path, options.target, transforms=transforms)
        output.converted(options.path, options.target, options.to)
        return _FINE
    with open_checkpoint(options.path, transforms=transforms) as checkpoint:
        if options.command == "ls":
            output.listing(gather_listing(checkpoint, options.path, options.prefix))
            return _FINE
        if options.command == "verify":
            with output.progress() as progress:
                report = checkpoint.verify(quick=options.quick, progress=progress)
            output.report(options.path, report, quick=options.quick)
            return _FINE if report.ok else _PROBLEMS
        if options.key is None:
            output.overview(gather_overview(checkpoint, options.path))
            return _FINE
        facts = gather_key(checkpoint, options.key)
        output.key(facts)
        undecoded = isinstance(facts, ObjectFacts) and facts.value_error is not None
        return _PROBLEMS if undecoded else _FINE
