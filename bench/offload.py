"""What it costs to stream layers from disk: decode with all weights in memory, with half of them, with hardly any.

A model of random weights is answered by one local worker, with less and less memory; each row says what the disk had to
give for a token, at which rate it gave it, and the most memory that the worker's process ever had.

    .venv/bin/python bench/offload.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from orderly import end_in_order
from safetensors.torch import save_file
from transformers import LlamaConfig

from shardwright.runtime.offload_tier import find_tier

MIB = 1024**2
GIB = 1024**3


def make_model(folder: Path) -> int:
    """A checkpoint of 16 layers of random weights; gives their bytes in float32."""
    config = LlamaConfig(
        hidden_size=1024, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=4, intermediate_size=4096,
        vocab_size=8000, max_position_embeddings=2048, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    hidden, wide = config.hidden_size, config.intermediate_size
    tensors = {
        "model.embed_tokens.weight": random(config.vocab_size, hidden),
        "lm_head.weight": random(config.vocab_size, hidden),
        "model.norm.weight": random(hidden),
    }
    for layer in range(config.num_hidden_layers):
        for name, shape in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (256, hidden), "self_attn.v_proj": (256, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
        }.items():  # fmt: skip
            tensors[f"model.layers.{layer}.{name}.weight"] = random(*shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return 4 * sum(tensor.numel() for tensor in tensors.values())


def run(*command: str) -> tuple[dict[str, Any], int]:
    """What a command of ours prints as JSON, and the most memory that a process it started had."""
    argv = [sys.executable, "-m", "shardwright", *command, "--json"]
    with tempfile.TemporaryFile("w+") as output:
        peak = 0
        process = psutil.Popen(argv, stdout=output, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            for child in process.children():
                try:
                    status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
                except OSError:
                    continue
                peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)])
            time.sleep(0.05)
        assert process.returncode == 0, f"{argv} ended with {process.returncode}"
        output.seek(0)
        found: dict[str, Any] = json.load(output)
        return found, peak * 1024


def measure(options: Sequence[str], *, rounds: int, new_tokens: int) -> str:
    """One row of the table."""
    planned, _ = run("plan", *options)
    offloaded = planned["stages"][0]["offloaded_bytes"]
    rates, peaks, tokens = [], [], set()
    for _ in range(rounds):
        answer, peak = run(
            "generate", *options, "--prompt-ids", "5,17,3", "--max-new-tokens", str(new_tokens), "--ignore-eos"
        )
        rates.append((new_tokens - 1) / answer["decode_s"])
        peaks.append(peak)
        tokens.add(tuple(answer["token_ids"]))
    assert len(tokens) == 1, "the answer changed"
    rate = statistics.median(rates)
    given = f"{rate * offloaded / 1e9:.2f} GB/s" if offloaded else "-"
    predicted = 1 / planned["latency_s"]
    return (
        f"| {offloaded / MIB:.0f} | {rate:.2f} ({min(rates):.2f} to {max(rates):.2f}) | {predicted:.2f} | {given} "
        f"| {max(peaks) / MIB:.0f} | {sum(next(iter(tokens)))} |"
    )


def main() -> None:
    """Measure and print a table."""
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure (default: the system's)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        weights = make_model(folder / "model")
        bandwidth = find_tier("nvme", torch.device("cpu"), folder / "cache").bandwidth
        print(f"{weights / MIB:.0f} MiB of weights in float32; the disk reads {bandwidth / 1e9:.2f} GB/s")
        print("| offloaded MiB | tokens/s | predicted | from disk | peak MiB | answer |\n|---|---|---|---|---|---|")
        common = ["--model", str(folder / "model"), "--dtype", "float32", "--local-workers", "1", "--kv-tokens", "512"]
        common += ["--cache-dir", str(folder / "cache")]
        for part in (None, 1 / 2, 1 / 3):
            memory = [] if part is None else ["--memory-gib", str(weights * part / GIB), "--offload", "nvme"]
            print(measure([*common, *memory], rounds=asked.rounds, new_tokens=asked.new_tokens), flush=True)


if __name__ == "__main__":
    main()
