"""A short run of what ``make fuzz`` does for long: seeds, old findings, and inputs made of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shardpoint.errors import ShardpointError

sys.path.insert(0, str(Path(__file__).parent.parent / "fuzz"))

from targets import CORPUS, TARGETS

NAMES = sorted(TARGETS)
SEEDS = {name: sorted((CORPUS / name).iterdir()) for name in NAMES}

edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "put", "cut", "insert", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=9),
    ),
    max_size=4,
)


def mutated(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, new in changes:
        at = int(where * len(data))
        end = min(len(data), at + len(new))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (new[0] or 1)]) + data[at + 1 :]
        elif kind == "put":
            data = data[:at] + new[: end - at] + data[end:]
        elif kind == "cut":
            data = data[:at] + data[end:] if new[0] & 1 else data[:at]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        else:
            data = data[:at] + data[at : at + 8 * len(new)] + data[at:]
    return data


def feed(name: str, data: bytes) -> None:
    """Nothing but a shardpoint error may come out."""
    try:
        TARGETS[name](data)
    except ShardpointError:
        return


def test_there_are_seeds_for_every_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(NAMES)
    assert all(len(paths) >= 4 for paths in SEEDS.values())


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_old_findings(name: str) -> None:
    accepted = 0
    for path in SEEDS[name]:
        try:
            TARGETS[name](path.read_bytes())
        except ShardpointError:
            continue
        accepted += 1
    assert accepted  # not everything is refused, so the mutations below get somewhere


@pytest.mark.parametrize("name", NAMES)
def test_changed_inputs_give_a_value_or_a_shardpoint_error(name: str) -> None:
    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(SEEDS[name]) - 1), edits)
    @example(0, [("cut", 0.0, b"\0")])
    def run(seed: int, changes: list[tuple[str, float, bytes]]) -> None:
        feed(name, mutated(SEEDS[name][seed].read_bytes(), changes))

    run()
