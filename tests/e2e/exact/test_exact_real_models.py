"""Two small real models, cut in two: float32 token for token, bfloat16 but for roundings."""

import math

import pytest
import torch
from live_sessions import Silence

from shardwright.config import MasterConfig, default_cache_dir
from shardwright.model import reference
from shardwright.runtime.verify import verify

pytestmark = pytest.mark.slow

PROMPTS = ("The capital of France is", "def fibonacci(n):")
BFLOAT16_DIGITS = 8


@pytest.fixture(scope="module")
def dequantised():
    """What `transformers` dequantised, by file: 1.6 GB, instead of a quarter of a minute each time."""
    return {}


@pytest.fixture
def _dequantise_once(dequantised, monkeypatch):
    """Dequantise a file for both dtypes at once: values are float32 first in any case, and rounded then."""
    load = reference.load_gguf_checkpoint

    def load_once(path, *, return_tensors, model_to_load, torch_dtype):
        if path not in dequantised:
            found = load(path, return_tensors=return_tensors, model_to_load=model_to_load, torch_dtype=torch.float32)
            dequantised[path] = found["tensors"]
        return {"tensors": {name: tensor.to(torch_dtype) for name, tensor in dequantised[path].items()}}

    monkeypatch.setattr(reference, "load_gguf_checkpoint", load_once)


@pytest.mark.usefixtures("_equal_machines", "_dequantise_once")
@pytest.mark.timeout(900)  # the first run downloads the models
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
async def test_a_real_models_answers_are_the_whole_models(name, dtype):
    """Prompts in chunks, both at once; the whole model answers one after the other through `transformers`' `generate`.

    In bfloat16 each difference must lie where the whole model's logits for both tokens are within four units in
    the last place, and the comparison goes on behind it.
    """
    config = MasterConfig(model=name, dtype=dtype, cache_dir=default_cache_dir(), token_budget=6, kv_tokens=2048)
    model, verdicts = await verify(config, num_stages=2, max_new_tokens=20, listener=Silence(), prompts=PROMPTS)
    assert model.dtype == dtype
    assert [len(verdict.prompt) > 3 for verdict in verdicts] == [True, True]
    for verdict in verdicts:
        assert len(set(verdict.split_tokens)) > 5
        if dtype == "float32":
            assert verdict.difference is None
            assert verdict.split_tokens == verdict.whole_tokens
        elif verdict.difference is not None:
            assert verdict.passed
            largest = verdict.difference.rounding / 2**-6
            unit = 2.0 ** (math.floor(math.log2(largest)) - (BFLOAT16_DIGITS - 1))
            assert verdict.difference.margin <= 4 * unit


@pytest.mark.usefixtures("_dequantise_once")
@pytest.mark.timeout(900)  # the first run downloads the models
@pytest.mark.parametrize(("name", "num_ranks"), [("smollm2-135m", 3), ("gemma3-270m", 2)])
async def test_a_real_model_over_ranks_gives_the_whole_models_answers(name, num_ranks):
    """Two workers of as many ranks as divide the model's heads."""
    config = MasterConfig(model=name, dtype="float32", cache_dir=default_cache_dir(), token_budget=6, kv_tokens=2048)
    _, verdicts = await verify(
        config, num_stages=2, num_ranks=num_ranks, max_new_tokens=8, listener=Silence(), prompts=PROMPTS
    )
    assert [verdict.split_tokens for verdict in verdicts] == [verdict.whole_tokens for verdict in verdicts]
