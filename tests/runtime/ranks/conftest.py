"""One worker's two ranks, that all tests of this folder share: their second process takes seconds to start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import Whole, save_whole

from shardwright.runtime.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks of one thread that sum over Gloo."""
    lost: list[str] = []
    two = Ranks(devices=["cpu", "cpu"], threads=1, on_lost=lost.append, say=print)
    try:
        two.join(
            kernels=tmp_path_factory.mktemp("kernels"), all_reduce="gloo", kernel_dir=tmp_path_factory.mktemp("linear")
        )
        yield two
    finally:
        two.close()
    assert lost == []


@pytest.fixture(scope="session")
def make_whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Whole]:
    """Makes a tiny model, saved as safetensors."""

    def make(model_type: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Whole:
        return save_whole(model_type, tmp_path_factory.mktemp(model_type), dtype=dtype, **changes)

    return make
