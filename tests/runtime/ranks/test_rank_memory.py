"""A rank never holds more than its part of the weights."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from ranked_models import RankedModel
from transformers import AutoConfig, AutoModelForCausalLM

MIB = 1024 * 1024
CONFIG = AutoConfig.for_model(
    "llama",
    vocab_size=24000,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


def write_hollow_model(folder: Path) -> int:
    """A folder with a model of zeros, in a file that was never written; gives its bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    header, offset = {}, 0
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(CONFIG.to_json_string(use_diff=False))
    return offset


def figure(pid: int, name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_ranks_peak_memory_is_its_part_of_the_weights(ranks, tmp_path):
    """Embedding and head included; columns pass through 16 MiB."""
    num_bytes = write_hollow_model(tmp_path)
    assert num_bytes > 400 * MIB
    (pid,) = ranks.pids
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
    before = figure(pid, "VmRSS")
    split = RankedModel(ranks, tmp_path, 1, num_blocks=4)
    grown = figure(pid, "VmHWM") - before
    split.close()
    assert 0.4 * num_bytes < grown < 0.5 * num_bytes + 60 * MIB
