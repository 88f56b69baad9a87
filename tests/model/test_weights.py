"""Loading a stage: all stages together hold the whole model's state, bit for bit, as `transformers` loads it."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, initialization

from shardwright.errors import CheckpointError
from shardwright.model.checkpoint import LocalTensors, open_checkpoint
from shardwright.model.weights import load_weights, stage_tensor_names

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": GROUPED | {"rope_parameters": LLAMA3_ROPE},
    "mistral": GROUPED | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "qwen2": GROUPED | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "qwen3": GROUPED | {"head_dim": 16, "tie_word_embeddings": True},
    "gemma": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8},
    "gemma3_text": GROUPED | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "granite": GROUPED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "gpt_neox": SIZES,
    "qwen3_moe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "gpt_oss": GROUPED
    | {"head_dim": 8, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v3": SIZES
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


class Cut(NamedTuple):
    start: int
    end: int


CUTS = (Cut(0, 1), Cut(1, 3), Cut(3, 4))
WHOLE = Cut(0, 4)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def write_model(folder: Path, model_type: str, **changes) -> Path:
    """A tiny random model on disk, in several files."""
    config = AutoConfig.for_model(model_type, **(FAMILIES[model_type] | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n in model.state_dict())):
            tensor.normal_()
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def read_config(checkpoint):
    fields = json.loads(checkpoint.config_json)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def cut_model(config, cut: Cut, dtype: torch.dtype) -> nn.Module:
    """A meta model without the parameters of other stages."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    base = model.base_model
    for index in range(len(base.layers)):
        if not cut.start <= index < cut.end:
            base.layers[index] = nn.Identity()
    if cut.start > 0:
        model.set_input_embeddings(nn.Identity())
    if cut.end < len(base.layers):
        model.set_output_embeddings(nn.Identity())
        setattr(base, "norm" if hasattr(base, "norm") else "final_layer_norm", nn.Identity())
    return model


def ignore(_):
    """What a caller does who needs no notice."""


def load_cut(checkpoint, cut: Cut, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    config = read_config(checkpoint)
    model = cut_model(config, cut, dtype)
    names = stage_tensor_names(model, config, checkpoint.tensors, checkpoint.format)
    raw = LocalTensors(checkpoint, names)
    load_weights(model, config, raw, dtype=dtype, device=CPU, finish=ignore, progress=ignore)
    return model, names


def assert_equal(ours: dict, theirs: dict) -> None:
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.device == CPU, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stages_together_hold_the_whole_models_state(model_type, dtype, tmp_path):
    """Also every buffer that no checkpoint holds: rotary frequencies, embedding scales; and each one's dtype."""
    checkpoint = open_checkpoint(write_model(tmp_path, model_type))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    held, used = set(), set()
    for cut in CUTS:
        stage, names = load_cut(checkpoint, cut, dtype)
        assert_equal(stage.state_dict(), reference.state_dict())
        assert_equal(dict(stage.named_buffers()), dict(reference.named_buffers()))
        held |= set(stage.state_dict())
        used |= set(names)
    assert held == set(reference.state_dict())
    assert used == set(checkpoint.tensors)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_one_stage_in_float32_is_the_saved_model(model_type, tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path, model_type))
    stage, _ = load_cut(checkpoint, WHOLE, torch.float32)
    assert_equal(stage.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())


def test_a_stage_asks_for_its_own_tensors_alone(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path, "qwen3_moe"))
    _, names = load_cut(checkpoint, Cut(1, 3), torch.float32)
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    assert sum("experts" in name for name in names) == 2 * 4 * 3  # layers, experts, projections


def test_tied_ends_share_one_tensor_and_a_last_stage_gets_the_embedding(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path, "gemma"))
    assert "lm_head.weight" not in checkpoint.tensors
    whole, _ = load_cut(checkpoint, WHOLE, torch.float32)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    last, names = load_cut(checkpoint, Cut(3, 4), torch.float32)
    assert "model.embed_tokens.weight" in names
    assert torch.equal(last.lm_head.weight, whole.lm_head.weight)


def rewrite(folder: Path, change) -> None:
    """Replace a folder's weight files by one with the tensors that `change` gives."""
    tensors = {}
    for path in list(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("same", [True, False])
def test_tied_ends_that_are_both_stored_are_one_only_if_equal(same, tmp_path):
    write_model(tmp_path, "gemma")

    def store_both(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        return tensors | {"lm_head.weight": head if same else head + 1}

    rewrite(tmp_path, store_both)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole, _ = load_cut(open_checkpoint(tmp_path), WHOLE, torch.float32)
    assert_equal(whole.state_dict(), reference.state_dict())
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) is same


def test_a_head_alone_serves_as_the_embedding_of_a_tied_model(tmp_path):
    write_model(tmp_path, "gemma")
    rewrite(
        tmp_path,
        lambda t: {n.replace("model.embed_tokens", "lm_head"): tensor for n, tensor in t.items()},
    )
    first, names = load_cut(open_checkpoint(tmp_path), Cut(0, 1), torch.float32)
    assert "lm_head.weight" in names
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal(first.state_dict(), reference.state_dict())


def test_a_base_models_checkpoint_lacks_the_prefix_and_loads_all_the_same(tmp_path):
    write_model(tmp_path, "gemma")
    rewrite(tmp_path, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for cut in CUTS:
        stage, _ = load_cut(open_checkpoint(tmp_path), cut, torch.bfloat16)
        assert_equal(stage.state_dict(), reference.state_dict())


def test_tensors_that_no_parameter_wants_are_left_alone(tmp_path):
    """Old checkpoints carry rotary frequencies for each layer; some carry training state."""
    write_model(tmp_path, "llama")
    rewrite(tmp_path, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    _, names = load_cut(open_checkpoint(tmp_path), WHOLE, torch.float32)
    assert not any("inv_freq" in name for name in names)


def test_modules_finish_once_each_when_they_are_complete_and_may_be_replaced(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path, "qwen2"))
    finished = []
    config = read_config(checkpoint)
    model = cut_model(config, Cut(1, 3), torch.float32)

    def replace(name: str) -> None:
        module = model.get_submodule(name)
        assert not any(p.is_meta for p in module.parameters(recurse=False)), name
        finished.append(name)
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())

    owners = {name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    names = stage_tensor_names(model, config, checkpoint.tensors, checkpoint.format)
    counts = []
    raw = LocalTensors(checkpoint, names)
    load_weights(model, config, raw, dtype=torch.float32, device=CPU, finish=replace, progress=counts.append)
    assert sorted(finished) == sorted(owners)
    assert counts == sorted(counts)
    assert counts[-1] == sum(raw.specs[name].num_bytes for name in names)
    assert not any(isinstance(module, nn.Linear) for module in model.base_model.layers[1].modules())


@pytest.mark.parametrize("lost", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named_with_its_shape(lost, tmp_path):
    write_model(tmp_path, "llama")
    rewrite(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if name != lost})
    with pytest.raises(CheckpointError, match="the checkpoint lacks tensor") as caught:
        load_cut(open_checkpoint(tmp_path), WHOLE, torch.float32)
    assert repr(lost) in str(caught.value)
    assert "shape [" in str(caught.value)


def test_a_wrong_shape_is_told_with_both_shapes(tmp_path):
    write_model(tmp_path, "llama")
    rewrite(tmp_path, lambda t: t | {"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 31)})
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has the shape \[48, 31\].*\[48, 32\]"
    ):
        load_cut(open_checkpoint(tmp_path), WHOLE, torch.float32)


@pytest.mark.parametrize("shape", [(16, 31), (15, 32)])
def test_an_expert_of_the_wrong_shape_is_told(shape, tmp_path):
    write_model(tmp_path, "qwen3_moe")
    rewrite(tmp_path, lambda t: t | {"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_cut(open_checkpoint(tmp_path), WHOLE, torch.float32)


def test_a_missing_expert_is_told(tmp_path):
    write_model(tmp_path, "mixtral")
    gone = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    rewrite(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if name != gone})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_cut(open_checkpoint(tmp_path), WHOLE, torch.float32)


def test_bytes_that_are_fewer_than_announced_are_refused(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path, "llama"))

    class Short(LocalTensors):
        def read(self, name):
            return super().read(name)[:-2]

    config = read_config(checkpoint)
    model = cut_model(config, WHOLE, torch.float32)
    with pytest.raises(CheckpointError, match="were announced"):
        load_weights(
            model,
            config,
            Short(checkpoint, checkpoint.tensors),
            dtype=torch.float32,
            device=CPU,
            finish=ignore,
            progress=ignore,
        )


PEAK_SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from shardwright.model.checkpoint import LocalTensors, open_checkpoint
from shardwright.model.weights import load_weights
import json

checkpoint = open_checkpoint(Path(sys.argv[1]))
fields = json.loads(checkpoint.config_json)
config = AutoConfig.for_model(fields.pop("model_type"), **fields)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
raw = LocalTensors(checkpoint, checkpoint.tensors)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_weights(model, config, raw, dtype=torch.bfloat16, device=torch.device("cpu"),
             finish=lambda m: None, progress=lambda n: None)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_peak_memory_is_the_stage_and_a_little(model_type, tmp_path):
    """Loading float32 files into bfloat16, with experts merged, holds no second copy of the model."""
    large = {"hidden_size": 1024, "num_hidden_layers": 6, "intermediate_size": 4096, "vocab_size": 64}
    experts = {"num_experts": 8, "moe_intermediate_size": 512}
    config = AutoConfig.for_model(model_type, **(FAMILIES[model_type] | large | experts))
    with initialization.no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.float().save_pretrained(tmp_path)
    del model
    done = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    before, after = (int(word) * (1 if sys.platform == "darwin" else 1024) for word in done.stdout.split())
    assert num_bytes > 150e6
    assert after - before < num_bytes * 1.1 + 60e6
