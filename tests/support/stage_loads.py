"""A whole model as one stage, as a master would give it, without a hint where the worker may find the file."""

from pathlib import Path

from shardwright.model.checkpoint import Checkpoint
from shardwright.runtime.tensor_hashes import hash_tensors
from shardwright.types import LayerRange, StageAssignment, StageLoad


def open_weights(folder: Path) -> Checkpoint:
    """The weights of a model in one file."""
    return Checkpoint.open((folder / "model.safetensors",))


def whole_stage(folder: Path, *, epoch: int, cache_dir: Path, num_blocks: int = 8, num_layers: int = 5) -> StageLoad:
    """All layers on one worker, in float32."""
    checkpoint = open_weights(folder)
    return StageLoad(
        assignment=StageAssignment(
            epoch=epoch, worker_id="w", stage_index=0, num_stages=1, layers=LayerRange(0, num_layers),
            num_blocks=num_blocks, block_size=16, next_worker_id=None,
        ),
        model_config=(folder / "config.json").read_text(encoding="utf-8"),
        dtype="float32",
        tensors=hash_tensors(checkpoint, checkpoint.tensors, cache_dir=cache_dir),
        file_hints=(),
        next_address="",
    )  # fmt: skip
