"""Tiny models cut into stages that a worker's ranks compute together; rank 0 is this process."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from split_models import SplitModel, even_cuts

from shardwright.model.checkpoint import open_weight_file
from shardwright.model.family_config import read_config
from shardwright.runtime.ranks import RankedStage, Ranks
from shardwright.runtime.tensor_hashes import FileIdentity
from shardwright.runtime.weight_receiver import ReceivedTensors
from shardwright.types import StageAssignment, StageLoad, TensorSpec


def tensors_of(folder: Path) -> ReceivedTensors:
    """A folder's tensors as a worker finds them in files of its own."""
    specs, ranges = [], {}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")]):
        for name, stored in open_weight_file(path).tensors.items():
            sha256 = hashlib.sha256(f"{path} {name}".encode()).hexdigest()
            spec = TensorSpec(
                name=name, dtype=stored.dtype, shape=stored.shape, num_bytes=stored.num_bytes, sha256=sha256
            )
            specs.append(dataclasses.asdict(spec))
            identity = dataclasses.asdict(FileIdentity.of(path))
            ranges[sha256] = {"path": str(path), "offset": stored.offset, "identity": identity}
    return ReceivedTensors.from_fields({"specs": specs, "ranges": ranges})


class RankedModel(SplitModel):
    """All stages of one model, each over all ranks; the ranks' processes hold one part of each."""

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        num_stages: int,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        dtype: str = "float32",
        config_json: str | None = None,
    ) -> None:
        config_json = config_json or (folder / "config.json").read_text()
        num_layers = read_config(config_json).get_text_config().num_hidden_layers
        raw = tensors_of(folder)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.progress = []
        self.steps = 0
        cuts = even_cuts(num_layers, num_stages)
        self.stages: list[RankedStage] = []
        for index, layers in enumerate(cuts):
            assignment = StageAssignment(
                epoch=1,
                stage_index=index,
                worker_id=f"worker-{index}",
                layers=layers,
                num_stages=num_stages,
                num_blocks=num_blocks,
                block_size=block_size,
                next_worker_id=None if index == num_stages - 1 else f"worker-{index + 1}",
            )
            load = StageLoad(
                assignment=assignment, model_config=config_json, dtype=dtype, tensors=(), file_hints=(), next_address=""
            )
            self.stages.append(
                ranks.build(load, tensors=raw.as_fields(), raw=raw, vocabulary=None, progress=self.progress.append)
            )

    def close(self) -> None:
        """Drop all parts on all ranks."""
        for stage in self.stages:
            stage.close()
