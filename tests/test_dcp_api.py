"""Every public name of torch's package, with its methods and parameters."""

from __future__ import annotations

import sys

import pytest

import api_diff


def test_nothing_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["api_diff.py"])
    assert api_diff.main() == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("0 differences")
    assert int(last.split()[0]) >= 98
