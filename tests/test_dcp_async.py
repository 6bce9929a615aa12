"""Asynchronous saves: the files hold what the state was when it was copied, on any rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import async_jobs
import shardpoint.dcp as dcp
from dcp_states import KINDS, values
from ranks import RankPool
from shardpoint.dcp.state_dict_saver import AsyncCheckpointerType

FORMS = [form.value for form in AsyncCheckpointerType]
FOUR_RANK_CASES = [(kind, form, "default") for kind in KINDS for form in FORMS] + [
    ("dtensor_2d", form, stager) for form in FORMS for stager in ("shared", "writer")
]


def test_one_rank_saves_what_was_there_before_the_change(tmp_path: Path, pool: RankPool) -> None:
    cases = [(kind, form, "default") for kind in KINDS for form in FORMS]
    cases += [("plain", form, stager) for form in FORMS for stager in ("shared", "writer")]
    (found,) = pool.run(1, async_jobs.all_kinds, str(tmp_path), cases)
    assert found == {" ".join(case): [] for case in cases}


def test_four_ranks_save_what_was_there_before_the_change(tmp_path: Path, pool: RankPool) -> None:
    for found in pool.run(4, async_jobs.all_kinds, str(tmp_path), FOUR_RANK_CASES):
        assert found == {" ".join(case): [] for case in FOUR_RANK_CASES}


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """Nested states whose tensors overlap, have holes, are empty, or lie at odd places."""
    base = values("base", 400)
    tensors = []
    for number in range(draw(st.integers(1, 6))):
        source = draw(st.sampled_from(["base", "own", "int", "odd"]))
        if source == "own":
            whole = values(f"own {number}", 40)
        elif source == "int":
            whole = base.view(torch.int16)[:80]
        elif source == "odd":
            data = torch.arange(200, dtype=torch.uint8).clone()
            whole = torch.frombuffer(data.numpy(), dtype=torch.float32, offset=1, count=40)
        else:
            whole = base
        offset = draw(st.integers(0, 20))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
        strides = tuple(draw(st.integers(0, 4)) for _ in shape)
        tensors.append(torch.as_strided(whole, shape, strides, offset))
    wrapped = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=8))
    leaves: list[Any] = [*wrapped, draw(st.integers()), [1, {"k": tensors[0]}], {1, 2}, ("t", [3])]
    return {"a": {str(i): leaf for i, leaf in enumerate(leaves)}, "list": [tensors[-1], 5]}


@pytest.mark.parametrize("form", AsyncCheckpointerType)
def test_any_state_is_saved_as_it_was_before_the_change(
    tmp_path: Path, form: AsyncCheckpointerType
) -> None:
    @settings(max_examples=25)
    @given(state=states())
    def check(state: dict[str, Any]) -> None:
        dcp.save(state, checkpoint_id=tmp_path / "sync")
        future = dcp.async_save(
            state, checkpoint_id=tmp_path / "async", async_checkpointer_type=form
        )
        async_jobs.scramble(state)
        future.result()
        one, other = _raw(tmp_path / "sync"), _raw(tmp_path / "async")
        assert one == other

    check()


def _raw(folder: Path) -> list[bytes]:
    """The data files, which hold no names or times of the save."""
    return [path.read_bytes() for path in sorted(folder.glob("*.distcp"))]
