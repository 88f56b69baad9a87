"""Every family's stages on a GPU that is not there: where tensors lie, and when the host would wait."""

from __future__ import annotations

import pytest
import torch
from every_family import small_config
from fake_gpu import CUDA, HostReads, HostWaited, HostWatch, fake_gpu, fake_stages
from torch import nn

from shardwright.model.sampler_state import SequenceState
from shardwright.model.sampling import sample, score
from shardwright.model.stage import StageOutput
from shardwright.model.supported import SPLITTABLE_FAMILIES
from shardwright.types import SamplingParams, SequenceSetup, SequenceSlice, StepInput, TokenRules

GREEDY = SamplingParams()

QUICK = ("gemma3_text", "gpt_oss", "llama", "qwen3_moe")
"""Windows, soft caps, sinks and experts; the others are slow together."""

WAITING: dict[str, str] = {}
"""Families with layers in which the host waits for a GPU whatever we do, and why."""


def part(seq_id, start, count, table, *, sampled=True):
    tokens = tuple(range(3, 3 + count))
    return SequenceSlice(
        seq_id=seq_id,
        start_position=start,
        token_ids=tokens,
        block_table=table,
        sampling=GREEDY if sampled else None,
    )


STEPS = {
    "ragged": (
        part(1, 0, 9, (3, 9, 1)),  # a whole prompt in scattered blocks, longer than the windows
        part(2, 4, 11, (5, 6, 7, 20), sampled=False),  # a chunk in the middle of one
        part(3, 12, 1, (30, 12, 31, 8)),  # decodes, not side by side
        part(4, 0, 5, (50, 51)),  # a prompt in blocks that follow each other
        part(5, 17, 1, (40, 41, 42, 43, 44)),
    ),
    "decode": (part(3, 12, 1, (30, 12, 31, 8)), part(5, 17, 1, (40, 41, 42, 43, 44))),
    "one": (part(5, 17, 1, (40, 41, 42, 43, 44)),),
}


def run(stages, slices, watch):
    """One step through all stages, with activations that come from the CPU as workers have them."""
    step = StepInput(epoch=1, step=1, slices=slices)
    output = StageOutput(tensors={}, tokens=())
    reads = HostReads()
    for stage in stages:
        arriving = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in output.tensors.items()}
        before = watch.copies_in
        with watch, reads.counting():
            output = stage.forward(step, arriving)
        assert watch.copies_in - before == 1 + len(arriving), "one copy for all of a step's integers"
        assert all(t.device == CUDA for t in output.tensors.values())
        assert bool(output.tensors) != stage.is_last
        assert reads.count == int(stage.is_last), "the host reads once, the tokens"
    return output


def check_family(family):
    with fake_gpu():
        for num_stages in (1, 3):
            watch = HostWatch()
            stages = fake_stages(small_config(family), num_stages, dtype=torch.bfloat16, watch=watch)
            for slices in STEPS.values():
                output = run(stages, slices, watch)
                assert len(output.tokens) == sum(s.sampling is not None for s in slices)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", QUICK)
def test_layers_stay_on_the_gpu_and_the_host_reads_only_tokens(family):
    check_family(family)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", [f for f in SPLITTABLE_FAMILIES if f not in QUICK])
def test_every_familys_layers_stay_on_the_gpu(family):
    check_family(family)
