"""Stages on a GPU give the whole model's tokens."""

import pytest
import split_models as lab
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Float32 as such: TF32 would round both sides alike, but not every batch alike."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "llama", "phi3", "qwen3", "mixtral"])
def test_greedy_tokens_on_a_gpu_are_the_whole_models(family, make_whole):
    """Ragged batches, chunks, scattered and reused blocks, in 1 and 3 stages, float32, whole model on the CPU."""
    whole = make_whole(family)
    expected = lab.whole_answers(whole.model, lab.RAGGED)
    for num_stages in (1, 3):
        split = lab.SplitModel(whole.folder, num_stages, device="cuda")
        assert lab.serve(split, lab.RAGGED, seed=num_stages) == expected, f"{num_stages} stages"


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
@pytest.mark.parametrize("family", ["gemma2", "llama", "mixtral"])
def test_greedy_tokens_on_a_gpu_with_offloaded_layers_are_the_whole_models(family, tier, make_whole, tmp_path):
    whole = make_whole(family)
    expected = lab.whole_answers(whole.model, lab.RAGGED)
    for step in (1, 2):
        split = lab.SplitModel(
            whole.folder,
            1,
            device="cuda",
            offload=lambda layers, step=step: lab.OffloadPlan(
                layers=tuple(range(layers.start, layers.end, step)), tier=tier, folder=tmp_path
            ),
        )
        assert lab.serve(split, lab.RAGGED) == expected, f"every layer of {step}"
        for stage in split.stages:
            stage.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_on_a_gpu(dtype, make_whole):
    whole = make_whole("llama", dtype=getattr(torch, dtype))
    split = lab.SplitModel(whole.folder, 2, dtype=dtype, device="cuda")
    answers = lab.serve(split, lab.RAGGED)
    assert [len(answer) for answer in answers] == [request.max_new_tokens for request in lab.RAGGED]
