"""Settings for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from ranks import RankPool

# Machines that run the tests differ in speed: an example that takes long is no failure.
settings.register_profile("default", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Gloo workers that all tests of this process share."""
    started = RankPool()
    yield started
    started.close()


@pytest.fixture(scope="module")
def own_pool() -> Iterator[RankPool]:
    """Workers for one module: torch remembers, by mesh, process groups that are gone."""
    started = RankPool()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _nothing_is_run(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test in a folder of its own, where code in a hostile file would leave a mark."""
    monkeypatch.chdir(tmp_path)
