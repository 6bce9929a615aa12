"""The command line, in process and as a command of its own. Runs without torch."""

from __future__ import annotations

import datetime
import importlib
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardpoint
from fixture_support import HOSTILE, PUBLIC, hostile_fixtures, public_fixtures
from shardpoint.cli import main
from shardpoint.cli._text import one_line, printable, with_unit
from shardpoint.cli._values import KIND, simplify, value_text
from shardpoint.formats.object_decoder import DeviceValue, DTypeValue, TensorSize

ROOT = Path(__file__).parent.parent
PLAIN = PUBLIC / "2.13.0" / "plain_w1" / "ckpt"
SHARDED = PUBLIC / "2.13.0" / "dtensor_2d_w4" / "ckpt"
PLACES = [(fixture, place) for fixture in public_fixtures() for place in fixture.places]
every_place = pytest.mark.parametrize(
    ("fixture", "place"), PLACES, ids=[f"{fixture}-{place.name}" for fixture, place in PLACES]
)

Captured = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Terminal:
    """Send standard output to a terminal; no fixture, since pytest sets it between the two."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def run_json(capsys: Captured, *arguments: object, code: int = 0) -> Any:
    assert run(*arguments, "--json") == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out, parse_constant=no_constant)


def run_python(
    code: str, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error", **environment},
    )


def without(*modules: str) -> str:
    """Code that runs the command line where these modules cannot be imported."""
    return (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({modules!r}))\n"
        "from shardpoint.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )


def write_safetensors(path: Path, keys: Sequence[str]) -> None:
    """Write a file with one float32 for each key."""
    header = json.dumps(
        {
            key: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
            for i, key in enumerate(keys)
        }
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * len(keys)))


def changed(tmp_path: Path, key: str) -> Path:
    """A copy of the plain checkpoint in which one bit of a tensor differs."""
    place = tmp_path / "changed"
    shutil.copytree(PLAIN, place)
    wanted = shardpoint.open(PLAIN)[key].tobytes()
    data = bytearray((place / "__0_0.distcp").read_bytes())
    data[data.find(wanted)] ^= 1
    (place / "__0_0.distcp").write_bytes(data)
    return place


@every_place
def test_listing_has_every_key_with_its_facts(fixture: Any, place: Path, capsys: Captured) -> None:
    listing = run_json(capsys, "ls", place)
    checkpoint = shardpoint.open(place)
    assert [entry["key"] for entry in listing["entries"]] == list(checkpoint)
    for entry in listing["entries"]:
        info = checkpoint.info(entry["key"])
        if isinstance(info, shardpoint.TensorInfo):
            assert entry["kind"] == "tensor"
            assert (entry["dtype"], entry["nbytes"]) == (info.dtype, info.nbytes)
            assert (entry["shape"], entry["chunks"]) == (list(info.shape), len(info.chunks))
        else:
            assert (entry["kind"], entry["shape"], entry["dtype"]) == ("object", None, None)
            assert entry["nbytes"] == (None if info.file is None else info.nbytes)
    assert listing["tensors"] == len(fixture.tensors)
    assert listing["objects"] == len(fixture.objects)


@every_place
def test_overview_and_verification_of_what_torch_wrote(
    fixture: Any, place: Path, capsys: Captured
) -> None:
    overview = run_json(capsys, "info", place)
    assert overview["source"] == shardpoint.open(place).index.source
    assert (overview["tensors"], overview["objects"]) == (
        len(fixture.tensors),
        len(fixture.objects),
    )
    assert overview["tensor_bytes"] == sum(a.nbytes for a in fixture.tensors.values())
    folder = place if place.is_dir() else place.parent
    sizes = {file["name"]: file["nbytes"] for file in overview["files"]}
    assert sizes
    assert sizes == {name: (folder / name).stat().st_size for name in sizes}
    assert overview["file_bytes"] == sum(sizes.values())
    report = run_json(capsys, "verify", place)
    assert report["ok"] is True
    assert report["problems"] == []
    assert report["quick"] is False


@every_place
def test_every_key_can_be_described(fixture: Any, place: Path, capsys: Captured) -> None:
    keys = sorted(fixture.keys)
    for key in keys[:: len(keys) // 10 + 1]:
        facts = run_json(capsys, "info", place, key)
        assert facts["key"] == key
        if facts["kind"] == "object":
            assert facts["value_error"] is None
        assert run("info", place, key) == 0
        assert key in capsys.readouterr().out.replace("\\\\", "\\")


def test_table_of_a_listing(capsys: Captured) -> None:
    assert run("ls", SHARDED) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "kind", "dtype", "shape", "bytes", "chunks"]
    assert lines[1].split() == ["s0_s1", "tensor", "float32", "[5,", "9]", "180", "4"]
    assert any(line.split() == ["meta.mesh", "object", "-", "-", "1,261", "-"] for line in lines)
    assert lines[-1].startswith("8 tensors in 25 chunks, 1 object, 2,149 bytes (2.0 KiB)")


def test_prefix_ends_at_a_dot(capsys: Captured) -> None:
    keys = ["layers.1", "layers.1.weight", "layers.10.weight", "layers"]
    write_safetensors(Path("model.safetensors"), keys)

    def listed(prefix: str) -> set[str]:
        listing = run_json(capsys, "ls", "model.safetensors", "--prefix", prefix)
        return {entry["key"] for entry in listing["entries"]}

    assert listed("layers.1") == {"layers.1", "layers.1.weight"}
    assert listed("layers.1.") == {"layers.1.weight"}
    assert listed("layers") == listed("") == set(keys)
    assert run("ls", "model.safetensors", "--prefix", "layer") == 2
    assert "'layer'" in capsys.readouterr().err


def test_overview_for_people(capsys: Captured) -> None:
    assert run("info", PLAIN) == 0
    shown = capsys.readouterr().out
    assert "torch.distributed.checkpoint (DCP)" in shown
    assert "1.0.0" in shown
    assert "__0_0.distcp  128,439" in shown
    assert "50, 2,547 bytes (2.4 KiB)" in shown


def test_tensor_with_its_chunks_and_spans(capsys: Captured) -> None:
    facts = run_json(capsys, "info", SHARDED, "s0_s1")
    info = shardpoint.open(SHARDED).info("s0_s1")
    assert isinstance(info, shardpoint.TensorInfo)
    assert facts["shape"] == [5, 9]
    assert [chunk["record_offset"] for chunk in facts["chunks"]] == [
        chunk.record_offset for chunk in info.chunks
    ]
    assert run("info", SHARDED, "s0_s1") == 0
    shown = capsys.readouterr().out
    for chunk in info.chunks:
        assert f"{chunk.record_offset:,}" in shown
        assert str(list(chunk.offsets)) in shown
        assert chunk.file is not None
        assert chunk.file in shown


def test_objects_are_shown_where_they_are_simple(capsys: Captured) -> None:
    checkpoint = shardpoint.open(PLAIN)
    facts = run_json(capsys, "info", PLAIN, "top_int")
    assert facts["value"] == checkpoint["top_int"]
    assert run("info", PLAIN, "top_int") == 0
    assert str(checkpoint["top_int"]) in capsys.readouterr().out.splitlines()[-1]


def test_object_that_is_not_on_the_closed_list(capsys: Captured) -> None:
    place = HOSTILE / "bytes_unknown_class" / "ckpt"
    facts = run_json(capsys, "info", place, "cfg.name", code=1)
    assert facts["value"] is None
    assert "myproject.config.Config" in facts["value_error"]
    assert facts["record_length"] == 825
    assert run("info", place, "cfg.name") == 1
    assert "myproject.config.Config" in capsys.readouterr().out


def test_verify_lists_problems_and_exits_with_1(tmp_path: Path, capsys: Captured) -> None:
    place = changed(tmp_path, "dtypes.float64")
    report = run_json(capsys, "verify", place, code=1)
    assert report["ok"] is False
    [problem] = report["problems"]
    assert problem["key"] == "dtypes.float64"
    assert problem["file"] == "__0_0.distcp"
    assert problem["offset"] == 50270
    assert run("verify", place) == 1
    shown = capsys.readouterr().out
    assert "key dtypes.float64, file __0_0.distcp, byte 50,270\n" in shown
    assert shown.endswith("1 problem\n")


def test_conversions(tmp_path: Path, capsys: Captured) -> None:
    files = PUBLIC / "2.13.0" / "hf_dist_mapped_w2" / "ckpt"
    for form, target in (("dcp", "a"), ("torch", "b.pt"), ("safetensors", "c")):
        done = run_json(capsys, "convert", "--to", form, files, tmp_path / target)
        assert done["format"] == form
        assert run("verify", tmp_path / target) == 0
        capsys.readouterr()
        listed = run_json(capsys, "ls", tmp_path / target)
        keys = {entry["key"] for entry in listed["entries"]}
        assert keys == {entry["key"] for entry in run_json(capsys, "ls", files)["entries"]}
    assert run("convert", "--to", "torch", tmp_path / "a", tmp_path / "d.pt") == 0
    assert "written as torch" in capsys.readouterr().out
    assert run("convert", "--to", "safetensors", PLAIN, tmp_path / "e") == 2
    assert "safetensors holds tensors only" in capsys.readouterr().err


def test_quick_verification_looks_at_sizes_only(tmp_path: Path, capsys: Captured) -> None:
    place = changed(tmp_path, "dtypes.float64")
    report = run_json(capsys, "verify", "--quick", place)
    assert report["quick"] is True
    assert (report["chunks_read"], report["bytes_read"]) == (0, 0)
    assert run("verify", place, "--quick") == 0
    assert "data not read" in capsys.readouterr().out
    file = place / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1)
    report = run_json(capsys, "verify", "--quick", place, code=1)
    assert {problem["file"] for problem in report["problems"]} == {"__0_0.distcp"}


@pytest.mark.parametrize("fixture", hostile_fixtures(), ids=str)
def test_tampered_checkpoints_give_codes_and_never_a_traceback(
    fixture: Any, capsys: Captured
) -> None:
    for command in (["ls"], ["info"], ["verify"], ["verify", "--quick"]):
        for form in ([], ["--json"]):
            code = run(*command, fixture.checkpoint, *form)
            captured = capsys.readouterr()
            assert code in (0, 1, 2)
            assert (captured.out == "") == (code == 2)
            assert captured.err.count("\n") == (1 if code == 2 else 0)
            if form and code != 2:
                json.loads(captured.out, parse_constant=no_constant)
    for key in fixture.expectation.get("keys", []):
        assert run("info", fixture.checkpoint, key) in (0, 1, 2)
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "nothing-here"],
        ["ls", ""],
        ["info", "nul\0byte"],
        ["verify", "x" * 5000],
        ["verify", "s3://bucket/checkpoint"],
        ["info", PLAIN, "no such\nkey"],
        ["info", PLAIN, "\ud800"],
        ["ls", PLAIN, "--prefix", "\x1b[2J"],
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_what_cannot_be_opened_gives_one_line_and_2(
    arguments: Sequence[object], form: list[str], capsys: Captured
) -> None:
    assert run(*arguments, *form) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("shardpoint: ")
    assert captured.err.count("\n") == 1
    assert "\x1b" not in captured.err


def test_an_error_of_many_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def refuse(path: str, **options: object) -> None:
        raise shardpoint.PlanError("wrong\x1b[2J", [shardpoint.Problem("first"), problem])

    problem = shardpoint.Problem("second", key="a.b")
    monkeypatch.setattr("shardpoint.cli._main.open_checkpoint", refuse)
    assert run("ls", "anything") == 2
    expected = "shardpoint: wrong\\x1b[2J - first - key 'a.b': second\n"
    assert capsys.readouterr().err == expected


def test_wrong_arguments_exit_with_2(capsys: Captured) -> None:
    for arguments in ([], ["ls"], ["write", "x"], ["ls", "x", "--no-such-option"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert shardpoint.__version__ in capsys.readouterr().out


EVIL_KEYS = ["\x1b]0;owned\x07\x1b[2J", "line\nbreak\rand\ttab", "\u202etxt.exe", "back\\slash"]


@pytest.mark.parametrize("on_terminal", [True, False])
def test_control_characters_in_keys_are_escaped(
    on_terminal: bool, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "evil\x1b[31m.safetensors"
    write_safetensors(Path(name), [*EVIL_KEYS, "[bold]markup[/bold]", "重み"])
    stream = use_terminal(monkeypatch, 200) if on_terminal else None
    shown = ""
    for arguments in (["ls"], ["info"], ["verify"], ["info", EVIL_KEYS[0]]):
        command, *key = arguments
        assert run(command, name, *key) == 0
        shown += capsys.readouterr().out if stream is None else stream.getvalue()
    for harmful in ("\x1b]0", "\x1b[2J", "\x1b[31m", "\x07", "\r", "\t", "\u202e"):
        assert harmful not in shown
    assert on_terminal or "\x1b" not in shown
    assert "\\x1b]0;owned\\x07\\x1b[2J" in shown
    assert "line\\nbreak\\rand\\ttab" in shown
    assert "\\u202etxt.exe" in shown
    assert "back\\\\slash" in shown
    assert "[bold]markup[/bold]" in shown
    assert "重み" in shown


def test_json_keeps_such_keys_as_they_are_in_ascii(capsys: Captured) -> None:
    write_safetensors(Path("evil.safetensors"), EVIL_KEYS)
    assert run("ls", "evil.safetensors", "--json") == 0
    text = capsys.readouterr().out
    assert text.isascii()
    assert "\x1b" not in text
    assert [entry["key"] for entry in json.loads(text)["entries"]] == EVIL_KEYS


def test_tables_fit_a_terminal_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch, 60)
    key = "decoder." + "x" * 100
    write_safetensors(Path("long.safetensors"), [key])
    assert run("ls", "long.safetensors") == 0
    table = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).split("1 tensor in")[0]
    assert all(len(line) <= 60 for line in table.splitlines())
    assert table.count("x") == 100


@pytest.mark.parametrize("width", [80, 250])
def test_chunks_are_not_torn_in_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = use_terminal(monkeypatch, width)
    info = shardpoint.open(SHARDED).info("s0_s1")
    assert isinstance(info, shardpoint.TensorInfo)
    assert run("info", SHARDED, "s0_s1") == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert all(len(line) <= width for line in shown.splitlines())
    assert ("chunk at" in shown) == (width == 80)
    for chunk in info.chunks:
        facts = (chunk.file, f"{chunk.record_offset:,}", f"{chunk.record_length:,}")
        assert all(fact in shown for fact in (*facts, str(list(chunk.offsets)))), facts


def test_long_listings_are_plain_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch, 60)
    write_safetensors(Path("many.safetensors"), [f"key.{i}" for i in range(1500)])
    assert run("ls", "many.safetensors") == 0
    assert "key.1499  tensor  float32  [1]        4       1\n" in terminal.getvalue()


def test_progress_is_shown_only_where_errors_go_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_terminal(monkeypatch, 60)
    for stream, form, expected in (
        (Terminal(), [], True),
        (io.StringIO(), [], False),
        (Terminal(), ["--json"], False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        assert run("verify", PLAIN, *form) == 0
        assert ("verifying" in stream.getvalue()) == expected


def test_an_encoding_that_lacks_a_letter_is_no_error() -> None:
    write_safetensors(Path("model.safetensors"), ["重み"])
    done = run_python(without("torch"), "ls", "model.safetensors", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\u91cd\\u307f" in done.stdout


def test_torch_is_not_needed() -> None:
    for arguments in (["ls", PLAIN], ["info", PLAIN, "top_int"], ["verify", PLAIN]):
        done = run_python(without("torch"), *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert done.stdout


def test_without_rich_tables_say_what_to_install_and_json_works() -> None:
    code = without("torch", "rich")
    done = run_python(code, "ls", PLAIN)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'shardpoint[cli]'" in done.stderr
    assert done.stderr.count("\n") == 1
    done = run_python(code, "ls", PLAIN, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["entries"]) == len(shardpoint.open(PLAIN))


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_a_reader_that_goes_away_is_no_traceback(form: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "shardpoint.cli", "ls", str(PLAIN), *form],
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_installed_command_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, name = project["scripts"]["shardpoint"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.dates()
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers() | st.just(KIND), inner)
        | st.tuples(inner, inner)
    ),
)


@given(values)
def test_any_value_becomes_json_and_a_line(value: Any) -> None:
    simple = simplify(value)
    text = json.dumps(simple, allow_nan=False)
    assert json.loads(text) == simple
    assert one_line(value_text(simple)).isprintable()


@given(st.recursive(st.integers(-(2**63), 2**63) | st.text(), st.lists, max_leaves=20))
def test_short_simple_values_stay_themselves(value: Any) -> None:
    simple = simplify(value)
    assert simple == value or "length" in json.dumps(simple)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, {KIND: "float", "text": "nan"}),
        (-math.inf, {KIND: "float", "text": "-inf"}),
        pytest.param(1 << 20000, {KIND: "int", "bits": 20001}, id="more digits than print"),
        (np.float32(1.5), 1.5),
        (np.float64("inf"), {KIND: "float", "text": "inf"}),
        (np.zeros((2, 3), "f4"), {KIND: "array", "dtype": "float32", "shape": [2, 3]}),
        (b"abc", {KIND: "bytes", "length": 3}),
        ({1: "a"}, {KIND: "dict", "items": [[1, "a"]]}),
        ({KIND: "array"}, {KIND: "dict", "items": [[KIND, "array"]]}),
        (list(range(1000)), {KIND: "list", "length": 1000}),
        ({"betas": (0.9, 0.95)}, {"betas": [0.9, 0.95]}),
        ({7}, {KIND: "set", "items": [7]}),
        (TensorSize((2, 3)), [2, 3]),
        (DTypeValue("bfloat16"), {KIND: "dtype", "text": "bfloat16"}),
        (DeviceValue("cuda", 1), {KIND: "device", "text": "cuda:1"}),
        (datetime.date(2024, 5, 1), {KIND: "date", "text": "2024-05-01"}),
        (PurePosixPath("/a"), {KIND: "PurePosixPath", "text": "/a"}),
        (range(10**6), {KIND: "range"}),
        (1j, {KIND: "complex", "text": "1j"}),
    ],
)
def test_what_json_lacks_is_described(value: Any, expected: Any) -> None:
    assert simplify(value) == expected
    json.dumps(simplify(value), allow_nan=False)


def test_values_that_unfold_without_end_are_cut_short() -> None:
    value: Any = "ha"
    for _ in range(60):
        value = [value] * 10
    assert len(json.dumps(simplify(value))) < 50_000


def test_text_helpers() -> None:
    assert printable("plain key.ä") == "plain key.ä"
    assert printable("\ud800\\") == "\\ud800\\\\"
    assert one_line("first\n  - second\x1b") == "first - second\\x1b"
    assert with_unit(1) == "1 byte"
    assert with_unit(1023) == "1,023 bytes"
    assert with_unit(3 << 29) == "1,610,612,736 bytes (1.5 GiB)"
    assert with_unit(10**400).endswith("EiB)")
