"""What of a load says how its stage is built: the same for a worker alone, for rank 0 and, as JSON, for the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from shardwright.types import LayerRange, StageLoad

if TYPE_CHECKING:
    from shardwright.model.stage import Stage


def stage_fields(load: StageLoad) -> dict[str, Any]:
    """What every part of the stage is built by, as JSON knows it."""
    assignment = load.assignment
    return {
        "config_json": load.model_config,
        "layers": [assignment.layers.start, assignment.layers.end],
        "is_first": assignment.is_first,
        "is_last": assignment.is_last,
        "dtype": load.dtype,
        "num_blocks": assignment.num_blocks,
        "block_size": assignment.block_size,
    }


def stage_builder(fields: Mapping[str, Any]) -> partial[Stage]:
    """`build_stage` with what `stage_fields` gave; device, weights and all else are the caller's.

    Importing it takes seconds the first time: call it where stages compute.
    """
    from shardwright.model.stage import build_stage

    return partial(build_stage, **{**fields, "layers": LayerRange(*fields["layers"])})
