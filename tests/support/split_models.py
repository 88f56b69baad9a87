"""Tiny models cut into stages in one process, and a small scheduler that drives them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tiny_models import greedy_answer, prompt_of
from transformers import AutoConfig, PreTrainedModel

from shardwright.model.offload import OffloadPlan
from shardwright.model.stage import Stage, StageOutput, build_stage
from shardwright.types import LayerRange, SamplingParams, SequenceSlice, StepInput, TensorSpec, TokenOut

GREEDY = SamplingParams()


@dataclass
class MemoryTensors:
    """A checkpoint's raw tensors, read from the safetensors files of a folder."""

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    data: dict[str, memoryview] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, folder: Path) -> MemoryTensors:
        tags = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
        raw = cls()
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  safetensors' file is no mapping
                    tensor = tensors.get_tensor(name).contiguous()
                    data = memoryview(tensor.view(-1).view(torch.uint8).numpy()).cast("B")
                    sha256 = hashlib.sha256(data).hexdigest()
                    raw.specs[name] = TensorSpec(
                        name=name,
                        dtype=tags[tensor.dtype],
                        shape=tuple(tensor.shape),
                        num_bytes=len(data),
                        sha256=sha256,
                    )
                    raw.data[name] = data
        return raw

    def read(self, name: str) -> memoryview:
        return self.data[name]


def even_cuts(num_layers: int, num_stages: int) -> list[LayerRange]:
    """Stages of nearly equal numbers of layers."""
    edges = [num_layers * i // num_stages for i in range(num_stages + 1)]
    return [LayerRange(a, b) for a, b in pairwise(edges)]


class SplitModel:
    """All stages of one model in this process."""

    def __init__(
        self,
        folder: Path,
        num_stages: int,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        dtype: str = "float32",
        device: str = "cpu",
        vocabulary: bytes | None = None,
        offload: Callable[[LayerRange], OffloadPlan | None] = lambda layers: None,  # noqa: ARG005
        kernel_dir: Path | None = None,
    ) -> None:
        config_json = (folder / "config.json").read_text()
        num_layers = AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers
        raw = MemoryTensors.of_folder(folder)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.progress: list[int] = []
        self.stages: list[Stage] = [
            build_stage(
                config_json=config_json,
                layers=layers,
                is_first=layers.start == 0,
                is_last=layers.end == num_layers,
                dtype=dtype,
                device=device,
                num_blocks=num_blocks,
                block_size=block_size,
                raw=raw,
                progress=self.progress.append,
                vocabulary=vocabulary,
                offload=offload(layers),
                kernel_dir=kernel_dir,
            )
            for layers in even_cuts(num_layers, num_stages)
        ]
        self.steps = 0

    def step(self, *slices: SequenceSlice) -> tuple[TokenOut, ...]:
        """Send one step through all stages."""
        self.steps += 1
        step = StepInput(epoch=1, step=self.steps, slices=slices)
        output = StageOutput(tensors={}, tokens=())
        for stage in self.stages:
            output = stage.forward(step, output.tensors)
        return output.tokens


@dataclass
class Asked:
    """One request: when it joins (in steps), and with what."""

    prompt: Sequence[int]
    max_new_tokens: int
    joins_at: int = 0
    sampling: SamplingParams = GREEDY


def serve(split: SplitModel, requests: Sequence[Asked], *, budget: int = 11, seed: int = 0) -> list[list[int]]:
    """Generate for all requests with chunked prompts, scattered and reused blocks; as a scheduler would."""
    shuffle = np.random.default_rng(seed)
    free = list(range(split.num_blocks))
    shuffle.shuffle(free)
    tokens = {i: list(r.prompt) for i, r in enumerate(requests)}
    tables: dict[int, list[int]] = {i: [] for i in tokens}
    computed = dict.fromkeys(tokens, 0)
    open_ids = set(tokens)
    now = 0
    while open_ids:
        slices, left = [], budget
        for i in sorted(open_ids):
            if requests[i].joins_at > now or left == 0:
                continue
            count = min(left, len(tokens[i]) - computed[i])
            left -= count
            end = computed[i] + count
            while len(tables[i]) * split.block_size < end:
                tables[i].append(free.pop(int(shuffle.integers(len(free)))))
            slices.append(
                SequenceSlice(
                    seq_id=i,
                    start_position=computed[i],
                    token_ids=tuple(tokens[i][computed[i] : end]),
                    block_table=tuple(tables[i]),
                    sampling=requests[i].sampling if end == len(tokens[i]) else None,
                )
            )
            computed[i] = end
        shuffle.shuffle(slices)
        now += 1
        if not slices:
            continue
        for out in split.step(*slices):
            i = out.seq_id
            tokens[i].append(out.token_id)
            if len(tokens[i]) == len(requests[i].prompt) + requests[i].max_new_tokens:
                open_ids.remove(i)
                free.extend(tables.pop(i))
    return [tokens[i][len(r.prompt) :] for i, r in enumerate(requests)]


def whole_answers(model: PreTrainedModel, requests: Iterable[Asked]) -> list[list[int]]:
    """What `transformers` generates greedily with the whole model, one request after the other."""
    return [greedy_answer(model, request.prompt, request.max_new_tokens) for request in requests]


RAGGED = [
    Asked(prompt=prompt_of(23, 1), max_new_tokens=12),
    Asked(prompt=prompt_of(1, 2), max_new_tokens=17),
    Asked(prompt=prompt_of(9, 3), max_new_tokens=5),
    Asked(prompt=prompt_of(14, 4), max_new_tokens=8, joins_at=6),
    Asked(prompt=prompt_of(4, 5), max_new_tokens=9, joins_at=9),
]
"""Unlike lengths; two join while others are under way, and each leaves at another time."""


def are_within_rounding(model: PreTrainedModel, requests: Sequence[Asked], answers: Sequence[list[int]]) -> bool:
    """Whether greedy answers of a model of 16-bit weights are right as far as its own rounding lets anybody tell.

    A token other than the best in float32 is right where the whole model's rounding moves logits as far as the two lie
    apart. The model is turned to float32.
    """
    rounded = [_answer_logits(model, request, answer) for request, answer in zip(requests, answers, strict=True)]
    exact_model = model.float()
    for request, answer, logits in zip(requests, answers, rounded, strict=True):
        exact = _answer_logits(exact_model, request, answer)
        moved = (logits - exact).abs().max(dim=-1).values
        chosen = exact.gather(1, torch.tensor(answer)[:, None])[:, 0]
        if not bool((exact.max(dim=-1).values - chosen <= 2 * moved).all()):
            return False
    return True


def _answer_logits(model: PreTrainedModel, request: Asked, answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*request.prompt, *answer]])
    with torch.no_grad():
        return model(ids).logits[0, len(request.prompt) - 1 : -1].float()
