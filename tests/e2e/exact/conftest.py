"""Whole models and running sessions of them, whose workers live in this process and speak over the memory transport."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import transformers
from live_sessions import Silence
from tiny_models import save_whole

from shardwright.config import MasterConfig
from shardwright.runtime.measure import Speed
from shardwright.runtime.verify import local_session


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def _equal_machines(monkeypatch):
    """Workers take a told speed and one thread for their own.

    What they measure is another test's matter, and takes a second each; threads of several stages would wait for each
    other's cores.
    """
    speed = Speed(read_bandwidth=1e10, matrix_rate=1e11)
    monkeypatch.setattr("shardwright.runtime.probe.measure_speed", lambda *_, **__: speed)
    monkeypatch.setattr("shardwright.runtime.probe.usable_cores", lambda: 1)


@pytest.fixture(scope="session")
def make_whole(tmp_path_factory):
    """Makes a tiny model once for each family and set of changes."""
    made = {}

    def make(family, **changes):
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            made[key] = save_whole(family, tmp_path_factory.mktemp(family), **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tensor_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def open_split(_equal_machines, tensor_cache):
    """Opens a session on a model's folder, cut into a number of stages; keyword arguments are the master's settings."""

    @contextlib.asynccontextmanager
    async def open_(folder: Path, num_stages: int, **settings):
        defaults = {"dtype": "float32", "block_size": 4, "token_budget": 64, "kv_tokens": 1024}
        config = MasterConfig(model=str(folder), cache_dir=tensor_cache, **(defaults | settings))
        async with local_session(config, num_stages=num_stages, listener=Silence()) as session:
            assert len(session.stages) == num_stages, "every worker holds a stage"
            yield session

    return open_
