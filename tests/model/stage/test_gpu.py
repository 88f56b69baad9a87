"""Stages on a GPU give the whole model's tokens, don't wait inside layers, and take the memory that was planned."""

import itertools

import pytest
import split_models as lab
import torch
from tiny_models import FAMILIES, VOCABULARY

from shardwright.model.devices import half_dtype
from shardwright.types import SamplingParams, SequenceSlice, StepInput

pytestmark = pytest.mark.gpu

CUDA = "cuda:0"
ROUNDINGS = 8
"""Distance of two logits, in roundings of the largest, within which half precision may pick either."""


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 as such: TF32 would round both sides alike, but not every batch alike."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.fixture
def whole_on_gpu(make_whole):
    """Makes a tiny whole model and lends it to the GPU."""
    lent = []

    def make(family, dtype=torch.float32):
        whole = make_whole(family, dtype=dtype)
        lent.append(whole.model.to(CUDA))
        return whole

    yield make
    for model in lent:
        model.to("cpu")


def answer_on_gpu(model, prompt, max_new_tokens):
    ids = torch.tensor([list(prompt)], device=CUDA)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_tokens_on_a_gpu_are_the_whole_models_on_that_gpu(family, whole_on_gpu):
    """Ragged batches, chunks, scattered and reused blocks, in 1 and 3 stages, float32."""
    whole = whole_on_gpu(family)
    expected = [answer_on_gpu(whole.model, r.prompt, r.max_new_tokens) for r in lab.RAGGED]
    for num_stages in (1, 3):
        split = lab.SplitModel(whole.folder, num_stages, device=CUDA)
        assert lab.serve(split, lab.RAGGED, seed=num_stages) == expected, f"{num_stages} stages"


@pytest.mark.parametrize("family", ["gemma", "gemma3_text", "llama", "qwen3_moe"])
def test_greedy_tokens_on_a_gpu_are_those_on_a_cpu(family, make_whole):
    whole = make_whole(family)
    expected = lab.whole_answers(whole.model, lab.RAGGED)
    assert lab.serve(lab.SplitModel(whole.folder, 2, device=CUDA), lab.RAGGED) == expected


def first_stage_is_elsewhere(whole):
    """A model's first stage on one device and its second on another."""
    split = lab.SplitModel(whole.folder, 2, device=CUDA)
    split.stages[0] = lab.SplitModel(whole.folder, 2, device="cpu").stages[0]
    return split


def test_a_cpu_and_a_gpu_share_a_model(make_whole):
    whole = make_whole("llama")
    assert lab.serve(first_stage_is_elsewhere(whole), lab.RAGGED) == lab.whole_answers(whole.model, lab.RAGGED)


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
@pytest.mark.parametrize("family", ["gemma2", "llama", "mixtral"])
def test_greedy_tokens_on_a_gpu_with_offloaded_layers_are_the_whole_models(family, tier, make_whole, tmp_path):
    whole = make_whole(family)
    expected = lab.whole_answers(whole.model, lab.RAGGED)
    for step in (1, 2):
        split = lab.SplitModel(
            whole.folder,
            1,
            device=CUDA,
            offload=lambda layers, step=step: lab.OffloadPlan(
                layers=tuple(range(layers.start, layers.end, step)), tier=tier, folder=tmp_path
            ),
        )
        assert lab.serve(split, lab.RAGGED) == expected, f"every layer of {step}"
        for stage in split.stages:
            stage.close()


@pytest.mark.parametrize("family", ["gemma2", "llama", "mixtral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_picks_what_the_whole_model_picks_but_for_rounding(family, dtype, whole_on_gpu):
    if dtype == "bfloat16" and half_dtype(torch.device(CUDA)) != dtype:
        pytest.skip("this GPU does not compute in bfloat16")
    torch_dtype = getattr(torch, dtype)
    whole = whole_on_gpu(family, torch_dtype)
    answers = lab.serve(lab.SplitModel(whole.folder, 2, dtype=dtype, device=CUDA), lab.RAGGED)
    for request, answer in zip(lab.RAGGED, answers, strict=True):
        assert len(answer) == request.max_new_tokens
        ids = torch.tensor([[*request.prompt, *answer]], device=CUDA)
        with torch.inference_mode():
            logits = whole.model(ids).logits[0, len(request.prompt) - 1 : -1].float()
        picked = logits.gather(1, torch.tensor(answer, device=CUDA)[:, None])[:, 0]
        margins = logits.max(dim=-1).values - picked
        allowed = ROUNDINGS * torch.finfo(torch_dtype).eps * logits.abs().max(dim=-1).values
        assert bool((margins <= allowed).all()), f"{(margins / allowed).max():.2f} times what rounding explains"


# --- the host ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), [("gemma3_text", "float32"), ("llama", "half"), ("qwen3_moe", "half")])
def test_the_host_never_waits_inside_a_layer(family, dtype, make_whole):
    """Whatever waits for the GPU raises, in this mode of torch's."""
    name = half_dtype(torch.device(CUDA)) if dtype == "half" else dtype
    if family == "qwen3_moe" and name != "bfloat16":
        pytest.skip("torch's grouped product reads the groups' sizes on the host before Ampere")
    whole = make_whole(family, dtype=getattr(torch, name))
    split = lab.SplitModel(whole.folder, 2, dtype=name, device=CUDA)
    running = []
    for stage in split.stages:
        for index in range(stage.layers.start, stage.layers.end):
            layer = stage._model.get_submodule(f"{stage._plan.layers}.{index}")
            layer.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"), prepend=True)
            layer.register_forward_hook(lambda *_: running.append(torch.cuda.set_sync_debug_mode("default")))
    try:
        lab.serve(split, lab.RAGGED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert running, "no layer ran"


def test_torch_tells_when_the_host_waits():
    """What the test above relies on."""
    number = torch.ones(1, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            number.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stage_tells_which_layers_its_gpu_has_finished(make_whole):
    split = lab.SplitModel(make_whole("llama").folder, 1, device=CUDA)
    (stage,) = split.stages
    lab.serve(split, lab.RAGGED)
    torch.cuda.synchronize(CUDA)
    assert stage.progress.finished() == stage.progress.begun == split.steps * len(stage.layers)
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    stage.progress.mark()
    assert stage.progress.finished() == stage.progress.begun - 1
    torch.cuda.synchronize(CUDA)
    assert stage.progress.finished() == stage.progress.begun


# --- memory ------------------------------------------------------------------------------------------


def test_a_stage_takes_the_memory_that_it_says(make_whole):
    """After loading: weights and KV. torch rounds each of some hundred tensors up to 512 bytes."""
    whole = make_whole("llama")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(CUDA)
    split = lab.SplitModel(whole.folder, 1, num_blocks=20_000, block_size=16, device=CUDA)
    held = torch.cuda.memory_allocated(CUDA) - before
    (stage,) = split.stages
    said = stage.weight_bytes + stage.kv_bytes
    assert said <= held + 64 * 1024
    assert held <= said + 1024 * 1024
    stage.close()
    del split, stage
    assert torch.cuda.memory_allocated(CUDA) <= before + 1024 * 1024


def test_steps_leave_no_memory_behind(make_whole):
    split = lab.SplitModel(make_whole("gemma3_text").folder, 2, device=CUDA)
    lab.serve(split, lab.RAGGED)
    before = torch.cuda.memory_allocated(CUDA)
    lab.serve(split, lab.RAGGED)
    assert torch.cuda.memory_allocated(CUDA) == before


# --- sampling ----------------------------------------------------------------------------------------


def test_seeded_samples_do_not_depend_on_the_batch(make_whole):
    split = lab.SplitModel(make_whole("llama").folder, 1, device=CUDA)
    kinds = itertools.cycle(
        [SamplingParams(temperature=0.8, seed=5), SamplingParams(temperature=1.0, top_p=0.8, top_k=50, seed=9)]
    )

    def slice_of(seq_id, params):
        tokens = tuple((seq_id * 7 + i) % (VOCABULARY - 3) + 3 for i in range(5 + seq_id))
        table = tuple(range(seq_id * 4, seq_id * 4 + 4))
        return SequenceSlice(seq_id=seq_id, start_position=0, token_ids=tokens, block_table=table, sampling=params)

    slices = [slice_of(seq_id, next(kinds)) for seq_id in range(8)]
    together = split.step(*slices)
    (stage,) = split.stages
    for number, (part, out) in enumerate(zip(slices, together, strict=True)):
        (alone,) = stage.forward(StepInput(epoch=1, step=100 + number, slices=(part,)), {}).tokens
        assert alone.token_id == out.token_id
