"""Two ranks of one thread against one rank of two threads, on layers of Gemma-2B's shape; what adding up costs of it.

    python bench/tensor_parallel.py [--layers 4] [--dtype float32] [--all-reduce shm]

A stage of the model's middle layers computes decode steps of 1 and 8 sequences and a prompt's chunk. Its weights are
zeros, read from a file with holes: neither speed nor memory depends on them. The time of the sums is rank 0's, from
the moment when its own part is done: what it waits for the other rank is in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwright.config import default_cache_dir
from shardwright.runtime.kernel_cache import KernelCache

GEMMA_2B = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
}
BYTES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
CONTEXT = 256
BLOCK_SIZE = 16


def write_hollow_checkpoint(path: Path, layers: range, dtype: str) -> None:
    """A safetensors file whose tensors were never written."""
    tag, itemsize = BYTES[dtype]
    hidden, inner = GEMMA_2B["hidden_size"], GEMMA_2B["intermediate_size"]
    heads, kv = GEMMA_2B["num_attention_heads"] * 256, GEMMA_2B["num_key_value_heads"] * 256
    shapes = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    header, offset = {}, 0
    for layer in layers:
        for name, shape in shapes.items():
            size = itemsize
            for extent in shape:
                size *= extent
            header[f"model.layers.{layer}.{name}.weight"] = {
                "dtype": tag,
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def steps(kind: str) -> Any:
    """The step that is timed."""
    from shardwright.types import SequenceSlice, StepInput

    blocks = CONTEXT // BLOCK_SIZE
    if kind.startswith("decode"):
        count, start, tokens = int(kind.split()[1]), CONTEXT - 1, 1
    else:
        count, start, tokens = 1, 0, int(kind.split()[1])
    return StepInput(
        epoch=1,
        step=1,
        slices=tuple(
            SequenceSlice(
                seq_id=index + 1,
                start_position=start,
                token_ids=(5,) * tokens,
                block_table=tuple(range(index * blocks, (index + 1) * blocks)),
                sampling=None,
            )
            for index in range(count)
        ),
    )


def measure(stage: Any, dtype: str, sums: list[float], repeats: int) -> dict[str, dict[str, float]]:
    """Median times of each kind of step, and of the sums in it."""
    import torch

    found = {}
    for kind in ("decode 1", "decode 8", "prompt 128"):
        step = steps(kind)
        hidden = torch.zeros((step.num_tokens, GEMMA_2B["hidden_size"]), dtype=getattr(torch, dtype))
        times, of_sums = [], []
        for _ in range(repeats + 2):
            sums.clear()
            began = time.perf_counter()
            stage.forward(step, {"hidden": hidden})
            times.append(time.perf_counter() - began)
            of_sums.append(sum(sums))
        found[kind] = {"step_s": statistics.median(times[2:]), "sums_s": statistics.median(of_sums[2:])}
    return found


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the model's 18; memory and time rise with them")
    parser.add_argument("--dtype", choices=sorted(BYTES), default="float32")
    parser.add_argument("--all-reduce", choices=["auto", "shm", "gloo"], default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    import torch

    from shardwright.model.checkpoint import open_weight_file
    from shardwright.model.stage import build_stage
    from shardwright.runtime.ranks import Ranks
    from shardwright.runtime.tensor_hashes import FileIdentity
    from shardwright.runtime.weight_receiver import ReceivedTensors
    from shardwright.types import LayerRange, StageAssignment, StageLoad

    layers = LayerRange(2, 2 + options.layers)
    config_json = json.dumps(GEMMA_2B)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_hollow_checkpoint(path, range(layers.start, layers.end), options.dtype)
        file = open_weight_file(path)
        specs, ranges = [], {}
        identity = vars_of(FileIdentity.of(path))
        for number, (name, stored) in enumerate(file.tensors.items()):
            key = f"{number:064x}"
            specs.append(
                {
                    "name": name,
                    "dtype": stored.dtype,
                    "shape": stored.shape,
                    "num_bytes": stored.num_bytes,
                    "sha256": key,
                }
            )
            ranges[key] = {"path": str(path), "offset": stored.offset, "identity": identity}
        raw = ReceivedTensors.from_fields({"specs": specs, "ranges": ranges})
        blocks = 8 * CONTEXT // BLOCK_SIZE

        torch.set_num_threads(2)
        alone = build_stage(
            config_json=config_json, layers=layers, is_first=False, is_last=False, dtype=options.dtype, device="cpu",
            num_blocks=blocks, block_size=BLOCK_SIZE, raw=raw, progress=lambda _: None,
        )  # fmt: skip
        one_rank = measure(alone, options.dtype, [], options.repeats)
        alone.close()
        del alone

        ranks = Ranks(devices=["cpu", "cpu"], threads=1, on_lost=print, say=print)
        try:
            ranks.join(kernels=KernelCache(default_cache_dir()).deepspeed_folder, all_reduce=options.all_reduce)
            sums: list[float] = []
            time_sums(sums)
            assignment = StageAssignment(
                epoch=1, worker_id="a", stage_index=1, num_stages=3, layers=layers, num_blocks=blocks,
                block_size=BLOCK_SIZE, next_worker_id="b",
            )  # fmt: skip
            load = StageLoad(
                assignment=assignment, model_config=config_json, dtype=options.dtype, tensors=(), file_hints=(),
                next_address="",
            )  # fmt: skip
            stage = ranks.build(load, tensors=raw.as_fields(), raw=raw, vocabulary=None, progress=lambda _: None)
            two_ranks = measure(stage, options.dtype, sums, options.repeats)
            print(f"{options.layers} layers of Gemma-2B's shape, {options.dtype}, sums by {ranks.all_reduce}")
            print(f"{'step':12} {'1 rank x 2 threads':>20} {'2 ranks x 1 thread':>20} {'ratio':>7} {'sums of it':>12}")
            for kind, alone_found in one_rank.items():
                found = two_ranks[kind]
                print(
                    f"{kind:12} {alone_found['step_s'] * 1e3:17.2f} ms {found['step_s'] * 1e3:17.2f} ms"
                    f" {alone_found['step_s'] / found['step_s']:7.2f} {found['sums_s'] * 1e3:9.2f} ms"
                )
            stage.close()
        finally:
            ranks.close()


def vars_of(identity: Any) -> dict[str, Any]:
    """A file's identity as JSON."""
    import dataclasses

    return dataclasses.asdict(identity)


def time_sums(sums: list[float]) -> None:
    """Note how long each sum takes on rank 0."""
    from deepspeed import comm

    inner: Callable[..., Any] = comm.inference_all_reduce

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = inner(*args, **kwargs)
        sums.append(time.perf_counter() - began)
        return result

    comm.inference_all_reduce = timed


if __name__ == "__main__":
    main()
