"""GGUF files: headers, configs, and values that equal those of `transformers`' own loader bit for bit."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from shardwright.config import default_cache_dir
from shardwright.errors import CheckpointError, UnsupportedModelError
from shardwright.model.checkpoint import LocalTensors, open_checkpoint
from shardwright.model.families import plan_family
from shardwright.model.family_config import read_config
from shardwright.model.gguf_file import gguf_config_json, read_gguf_header
from shardwright.model.rank_plan import apply_shapes, plan_ranks
from shardwright.model.weights import load_weights, stage_tensor_names
from shardwright.runtime.model_files import resolve_model

CPU = torch.device("cpu")
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, VOCABULARY, WIDTH, EXPERTS = 64, 3, 4, 2, 16, 320, 96, 4
QUANTISED = gguf.GGMLQuantizationType


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def layer_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD, HIDDEN),
        "attn_k": (KV_HEADS * HEAD, HIDDEN),
        "attn_v": (KV_HEADS * HEAD, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD),
        "ffn_norm": (HIDDEN,),
    }
    if architecture == "qwen3moe":
        return shapes | {
            "attn_q_norm": (HEAD,),
            "attn_k_norm": (HEAD,),
            "ffn_gate_inp": (EXPERTS, HIDDEN),
            "ffn_gate_exps": (EXPERTS, WIDTH, HIDDEN),
            "ffn_up_exps": (EXPERTS, WIDTH, HIDDEN),
            "ffn_down_exps": (EXPERTS, HIDDEN, WIDTH),
        }
    if architecture == "gemma2":
        shapes |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
    return shapes | {"ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH)}


def write_gguf(path: Path, architecture: str, kind: QUANTISED, *, head: bool = False, vocabulary: int = VOCABULARY):
    """A tiny random model as llama.cpp would write it: matrices quantised, norms in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "qwen3moe":
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(WIDTH)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{index}" for index in range(vocabulary)])
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(0)

    def add(name: str, shape: tuple[int, ...]) -> None:
        values = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (vocabulary, HIDDEN))
    for layer in range(LAYERS):
        for name, shape in layer_shapes(architecture).items():
            add(f"blk.{layer}.{name}.weight", shape)
        if architecture == "qwen2":
            for name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{layer}.{name}.bias", layer_shapes(architecture)[name][:1])
    add("output_norm.weight", (HIDDEN,))
    if head:
        add("output.weight", (vocabulary, HIDDEN))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference_state(path: Path, config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What `from_pretrained(gguf_file=...)` reads."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model, torch_dtype=dtype)["tensors"]


def ignore(_):
    """What a caller does who needs no notice."""


def load_stage(path: Path, dtype: torch.dtype, start: int = 0, end: int | None = None) -> nn.Module:
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config_json)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers = model.model.layers
    end = len(layers) if end is None else end
    for index in range(len(layers)):
        if not start <= index < end:
            layers[index] = nn.Identity()
    if start > 0:
        model.set_input_embeddings(nn.Identity())
    if end < len(layers):
        model.set_output_embeddings(nn.Identity())
        model.model.norm = nn.Identity()
    names = stage_tensor_names(model, config, checkpoint.tensors, checkpoint.format)
    raw = LocalTensors(checkpoint, names)
    load_weights(model, config, raw, dtype=dtype, device=CPU, finish=ignore, progress=ignore)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "kind", "head"),
    [
        ("llama", QUANTISED.Q4_1, False),
        ("llama", QUANTISED.F16, True),
        ("qwen2", QUANTISED.Q8_0, True),
        ("gemma2", QUANTISED.Q5_0, False),
        ("qwen3moe", QUANTISED.BF16, True),
    ],
)
def test_every_stage_holds_what_transformers_reads(architecture, kind, head, dtype, tmp_path):
    """Rotary rows are put back in order, norms lose their offset, experts are stacked."""
    path = write_gguf(tmp_path / "tiny.gguf", architecture, kind, head=head)
    expected = reference_state(path, read_config(open_checkpoint(path).config_json), dtype)
    held = set()
    for start, end in ((0, 1), (1, LAYERS), (0, LAYERS)):
        state = load_stage(path, dtype, start, end).state_dict()
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if not head else {}
        for name, tensor in state.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[tied.get(name, name)]), name
        held |= set(state) - set(tied)
    assert held == set(expected)


@pytest.mark.parametrize(
    ("architecture", "kind", "head"),
    [("llama", QUANTISED.Q4_1, False), ("gemma2", QUANTISED.Q8_0, False), ("qwen2", QUANTISED.BF16, True)],
)
def test_ranks_hold_parts_that_put_together_are_what_transformers_reads(architecture, kind, head, tmp_path):
    """Columns too, which lie across quantised blocks, and llama's rotary rows, which GGUF keeps in another order."""
    path = write_gguf(tmp_path / "tiny.gguf", architecture, kind, head=head)
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config_json)
    plan = plan_family(config)
    expected = reference_state(path, config, torch.float32)
    parts: list[dict[str, torch.Tensor]] = []
    for rank in range(2):
        shards = plan_ranks(config, plan, rank=rank, num_ranks=2).shards
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        apply_shapes(model, shards)
        names = stage_tensor_names(model, config, checkpoint.tensors, checkpoint.format)
        load_weights(
            model, config, LocalTensors(checkpoint, names), dtype=torch.float32, device=CPU, finish=ignore,
            progress=ignore, shards=shards,
        )  # fmt: skip
        parts.append(model.state_dict())
    assert set(expected) <= set(parts[0])
    divided = set()
    for name, whole in expected.items():
        first, second = parts[0][name], parts[1][name]
        if first.shape == whole.shape:
            assert torch.equal(first, whole), name
            assert torch.equal(second, whole), name
            continue
        dim = next(d for d in range(whole.dim()) if first.shape[d] != whole.shape[d])
        assert torch.equal(torch.cat((first, second), dim=dim), whole), name
        assert (first.numel() * 2, second.numel() * 2) == (whole.numel(), whole.numel()), name
        divided.add((name.removesuffix(".weight").rpartition(".")[2], dim))
    assert {("q_proj", 0), ("k_proj", 0), ("o_proj", 1), ("down_proj", 1), ("embed_tokens", 0)} <= divided
    assert (("lm_head", 0) in divided) == head


def test_a_large_matrix_is_dequantised_a_few_rows_at_a_time(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", QUANTISED.Q4_0)
    monkeypatch.setattr("shardwright.model.gguf_map._CHUNK_VALUES", 7 * HIDDEN)
    expected = reference_state(path, read_config(open_checkpoint(path).config_json), torch.float32)
    state = load_stage(path, torch.float32).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


def test_the_header_tells_what_the_full_reader_tells(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", QUANTISED.Q4_1, vocabulary=6000)
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert header.architecture == "llama"
    assert header.array_lengths["tokenizer.ggml.tokens"] == 6000
    assert [(t.name, t.type_name, t.offset, t.num_bytes) for t in header.tensors] == [
        (t.name, t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    assert [t.shape for t in header.tensors] == [tuple(reversed(t.shape.tolist())) for t in reader.tensors]
    scalars = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == {key: value for key, value in scalars.items() if key != "tokenizer.ggml.tokens"}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3moe"])
def test_the_config_is_the_one_that_transformers_derives(architecture, tmp_path):
    """Also where the vocabulary is too long to be kept."""
    path = write_gguf(tmp_path / "tiny.gguf", architecture, QUANTISED.Q4_1, vocabulary=6000)
    config = json.loads(gguf_config_json(read_gguf_header(path)))
    expected = load_gguf_checkpoint(str(path))["config"]
    expected.pop("_model_name_or_path", None)
    if architecture == "qwen3moe":
        expected["moe_intermediate_size"] = WIDTH  # transformers leaves it at the default
    assert config == expected
    assert config["vocab_size"] == 6000
    assert config["tie_word_embeddings"] is True


def test_a_truncated_gguf_is_refused_with_the_missing_byte_count(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", QUANTISED.Q4_1)
    end = max(t.offset + t.num_bytes for t in read_gguf_header(path).tensors)
    path.write_bytes(path.read_bytes()[: end - 7])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: the file is 7 bytes short .*: download it again"):
        open_checkpoint(path)


@pytest.mark.parametrize("keep", [6, 30, 400, 3000])
def test_a_gguf_that_ends_inside_its_header_is_refused(keep, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", QUANTISED.Q4_1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="ends inside its header"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"", "not a GGUF file"), (b"GGUF\x63" + bytes(40), "GGUF version")]
)
def test_what_is_no_gguf_file_is_refused(content, complaint, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("architecture", ["nonesuch", "lfm2"])
def test_a_family_that_can_not_be_read_from_gguf_is_named(architecture, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", architecture, QUANTISED.Q4_1)
    with pytest.raises(UnsupportedModelError, match=architecture):
        open_checkpoint(path)


def test_a_gguf_without_a_tensor_is_told_which(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", QUANTISED.Q4_1)
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config_json)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = [name for name in checkpoint.tensors if name != "blk.1.ffn_up.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        stage_tensor_names(model, config, names, "gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_bundled_models_load_bit_for_bit(name):
    files = resolve_model(name, cache_dir=default_cache_dir(), progress=lambda what, done, total: None)  # noqa: ARG005
    config = read_config(files.config_json)
    expected = reference_state(files.weights[0], config, torch.float32)
    model = load_stage(files.weights[0], torch.float32)
    state = model.state_dict()
    assert set(expected) == set(state) - {"lm_head.weight"}
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.device("cpu"):
        built = AutoModelForCausalLM.from_config(config)
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[key], buffer) for key, buffer in built.named_buffers())
