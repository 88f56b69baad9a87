"""Tiny models that several test files of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import Whole, save_whole


@pytest.fixture(scope="session")
def make_whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Whole]:
    """Makes a tiny model once for each family and set of changes, saved as safetensors."""
    made: dict[str, Whole] = {}

    def make(model_type: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Whole:
        key = f"{model_type} {dtype} {sorted(changes.items())}"
        if key not in made:
            made[key] = save_whole(model_type, tmp_path_factory.mktemp(model_type), dtype=dtype, **changes)
        return made[key]

    return make
