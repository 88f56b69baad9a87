"""Every family's stages on a GPU that is not there: where tensors lie, and when the host would wait."""

from __future__ import annotations

import pytest
import torch
from every_family import small_config
from fake_gpu import CUDA, HostReads, HostWaitedError, HostWatch, fake_gpu, fake_stages
from torch import nn

from shardwright.model.sampler_state import SequenceState
from shardwright.model.sampling import sample, score
from shardwright.model.stage import StageOutput
from shardwright.model.supported import SPLITTABLE_FAMILIES
from shardwright.types import SamplingParams, SequenceSetup, SequenceSlice, StepInput, TokenRules

GREEDY = SamplingParams()

QUICK = ("gemma3_text", "gpt_oss", "llama", "qwen3_moe")
"""Windows, soft caps, sinks and experts; the others are slow together."""

WAITING = ("phimoe",)
"""Their own code makes a table of frequencies on the CPU for each step, before the layers; with a long context's table
beside it, it chooses between them by the largest position, on the host.
"""


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
        assert stage.progress.begun % len(stage.layers) == 0
        assert stage.progress.begun > 0, "every layer is marked"
    return output


def plain_config(family):
    config = small_config(family)
    if family in WAITING:
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    return config


def check_family(family, *, num_stages=3, steps=("ragged",)):
    with fake_gpu():
        watch = HostWatch(allow_outside=family in WAITING)
        stages = fake_stages(plain_config(family), num_stages, dtype=torch.bfloat16, watch=watch)
        for name in steps:
            output = run(stages, STEPS[name], watch)
            assert len(output.tokens) == sum(s.sampling is not None for s in STEPS[name])
        assert bool(watch.waits_outside) == (family in WAITING), "else the list is out of date"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", QUICK)
def test_layers_stay_on_the_gpu_and_the_host_reads_only_tokens(family):
    check_family(family)


@pytest.mark.filterwarnings("default")
def test_every_kind_of_step_stays_on_the_gpu():
    """Also in one stage, and with decodes side by side and alone."""
    check_family("llama", num_stages=1, steps=STEPS)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", [f for f in SPLITTABLE_FAMILIES if f not in QUICK])
def test_every_familys_layers_stay_on_the_gpu(family):
    check_family(family)


# --- what the host waits for all the same ------------------------------------------------------------


def first_wait(family, *, dtype=torch.bfloat16, **gpu):
    with fake_gpu(**gpu):
        watch = HostWatch()
        stages = fake_stages(small_config(family), 1, dtype=dtype, watch=watch)
        with pytest.raises(HostWaitedError) as caught:
            run(stages, STEPS["one"], watch)
        return str(caught.value)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", WAITING)
def test_those_that_wait_do_so_before_the_layers(family):
    assert "layer" not in first_wait(family)


@pytest.mark.filterwarnings("default")
def test_experts_wait_in_float32_and_on_gpus_before_ampere():
    """Torch's grouped product has a kernel that reads the groups' sizes on the GPU for bfloat16 from Ampere on."""
    assert "grouped_mm in layer 0 has a kernel" in first_wait("qwen3_moe", dtype=torch.float32)
    assert "grouped_mm_fallback in layer 0" in first_wait("qwen3_moe", dtype=torch.float16, capability=(7, 5))


# --- the checks can fail -----------------------------------------------------------------------------


def makes_a_cpu_tensor(hidden):
    torch.zeros(3)
    return hidden


def mixes_devices(hidden):
    return hidden + torch.zeros(hidden.shape[-1])


def copies_to_the_gpu(hidden):
    return hidden * torch.tensor([2.0]).to(hidden.device)


def asks_for_an_item(hidden):
    return hidden * hidden.max().item()


def branches(hidden):
    return hidden if hidden.max() > 0 else -hidden


def looks_for_nonzero(hidden):
    return hidden + len(hidden.flatten().nonzero())


def takes_a_mask(hidden):
    hidden[hidden > 0] = hidden[hidden > 0] * 2
    return hidden


def copies_to_the_host(hidden):
    return hidden + hidden.cpu().to(hidden.device)


PLANTED = [
    (makes_a_cpu_tensor, "in layer 1 has a tensor [3] on cpu"),
    (mixes_devices, "in layer 1 has a tensor"),
    (copies_to_the_gpu, "in layer 1"),
    (asks_for_an_item, "in layer 1 makes the host wait"),
    (branches, "in layer 1 makes the host wait"),
    (looks_for_nonzero, "in layer 1 makes the host wait"),
    (takes_a_mask, "in layer 1 takes a mask as index"),
    (copies_to_the_host, "in layer 1 copies"),
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("fault", "message"), PLANTED, ids=[f.__name__ for f, _ in PLANTED])
def test_a_faulty_layer_is_found(fault, message, monkeypatch):
    class Faulty(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return fault(self.inner(hidden))

    with fake_gpu():
        watch = HostWatch()
        (stage,) = fake_stages(small_config("llama"), 1, dtype=torch.bfloat16, watch=watch)
        layer = stage._model.model.layers[1]
        layer.mlp = Faulty(layer.mlp)
        with watch, pytest.raises(HostWaitedError) as caught:
            stage.forward(StepInput(epoch=1, step=1, slices=STEPS["one"]), {})
    assert message in str(caught.value)


# --- sampling ----------------------------------------------------------------------------------------

VOCABULARY = 5000


def count_reads(params, states=()):
    with fake_gpu(reads_real_tensors=True):
        logits = torch.empty(len(params), VOCABULARY, device=CUDA)
        reads = HostReads()
        with HostWatch(), reads.counting():
            picks = sample(logits, params, list(range(len(params))), states)
    assert len(picks) == len(params)
    return reads.count


def remembering(params, **rules):
    setup = SequenceSetup(num_prompt_tokens=1, tokens=(4, 5), rules=TokenRules(**rules), stop_token_ids=frozenset({2}))
    return SequenceState(1, setup, vocabulary=VOCABULARY, counted=params.has_penalties, matcher=None)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(
    ("params", "most"),
    [
        (SamplingParams(), 1),
        (SamplingParams(num_top_logprobs=3), 2),  # and the likeliest
        (SamplingParams(temperature=0.8, seed=3), 3),  # and the chunks' sums, and the chunks that were hit
        (SamplingParams(temperature=0.8, top_k=40, seed=3), 2),  # and the candidates
        (SamplingParams(temperature=0.8, top_p=0.9, seed=3), 3),  # and the whole rows' sums
    ],
)
def test_sampling_reads_as_often_for_many_rows_as_for_one(rows, params, most):
    assert count_reads([params] * rows) == most


def test_penalties_and_rules_read_nothing_more():
    params = [SamplingParams(frequency_penalty=0.5), SamplingParams(), SamplingParams(repetition_penalty=1.3)]
    states = [remembering(params[0]), None, remembering(params[2], logit_bias=((7, 2.0),), min_new_tokens=9)]
    assert count_reads(params, states) == 1


def test_all_kinds_of_sampling_together_read_a_bounded_number_of_times():
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.5),
    ]
    assert count_reads(kinds * 5) == 5


def test_scores_of_a_prompt_read_once_for_each_32_tokens():
    with fake_gpu(reads_real_tensors=True):
        reads = HostReads()
        with HostWatch(), reads.counting():
            score(torch.empty(70, VOCABULARY, device=CUDA), [1] * 70, [0] * 70)
    assert reads.count == 3
