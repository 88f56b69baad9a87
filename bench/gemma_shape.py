"""Writes a checkpoint of Gemma-2B's shape with random bfloat16 weights, 5 GB, one file a few layers long at a time.

It comes with a tokenizer of as many words, so that its answers are text like any other model's.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import GemmaConfig, PreTrainedTokenizerFast

LAYERS_PER_FILE = 3
SEED = 2
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def gemma_2b_config() -> GemmaConfig:
    """Gemma-2B as published: 18 layers of 2048, 8 heads and 1 KV head of 256, 16384 wide, 256000 words."""
    return GemmaConfig(
        hidden_size=2048,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        intermediate_size=16384,
        vocab_size=256000,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        architectures=["GemmaForCausalLM"],
        dtype="bfloat16",
    )


def make_gemma_2b(folder: Path) -> Path:
    """The checkpoint's folder; made once, then kept."""
    config = gemma_2b_config()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer_config.json").exists():
        write_tokenizer(folder, config.vocab_size)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(SEED)
    weight_map: dict[str, str] = {}
    total = 0

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    hidden, wide = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    save(
        "embedding.safetensors",
        {"model.embed_tokens.weight": random(config.vocab_size, hidden), "model.norm.weight": random(hidden)},
    )
    for first in range(0, config.num_hidden_layers, LAYERS_PER_FILE):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(first, min(first + LAYERS_PER_FILE, config.num_hidden_layers)):
            prefix = f"model.layers.{layer}."
            tensors |= {
                prefix + "self_attn.q_proj.weight": random(queries, hidden),
                prefix + "self_attn.k_proj.weight": random(keys, hidden),
                prefix + "self_attn.v_proj.weight": random(keys, hidden),
                prefix + "self_attn.o_proj.weight": random(hidden, queries),
                prefix + "mlp.gate_proj.weight": random(wide, hidden),
                prefix + "mlp.up_proj.weight": random(wide, hidden),
                prefix + "mlp.down_proj.weight": random(hidden, wide),
                prefix + "input_layernorm.weight": random(hidden),
                prefix + "post_attention_layernorm.weight": random(hidden),
            }
        save(f"layers-{first:02d}.safetensors", tensors)
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


def write_tokenizer(folder: Path, num_words: int) -> None:
    """A tokenizer as Gemma's is made: byte fallback, spaces as bars; its words are `a`, `b`, ... `aa`, and so on."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [f"▁{_word(number)}" for number in range(num_words - len(names))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL[3], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pad, end, begin, unknown = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, bos_token=begin, unk_token=unknown
    ).save_pretrained(folder)


def _word(number: int) -> str:
    """The words in order, the shorter ones first: 0 is a, 25 is z, 26 is aa."""
    word = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, len(LETTERS))
        word = LETTERS[letter] + word
    return word
