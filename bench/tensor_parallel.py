"""Two ranks of one thread against one rank of two threads, on layers of Gemma-2B's shape; what adding up costs of it.

    python bench/tensor_parallel.py [--layers 18] [--dtype float32] [--all-reduce shm]

The whole model (or, with fewer layers, a stage of middle ones) computes decode steps of 1 and 8 sequences and a prompt.
Its weights are zeros, read from a file with holes: neither speed nor memory depends on them. One rank is measured
before and after two ranks, and its times are the mean of both. The time of the sums is rank 0's, from the moment when
its own part is done: what it waits for the other rank is in it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orderly import end_in_order

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


def write_hollow_checkpoint(path: Path, layers: range, dtype: str, *, is_whole: bool) -> None:
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
    named = {f"model.layers.{layer}.{name}.weight": shape for layer in layers for name, shape in shapes.items()}
    if is_whole:
        named |= {"model.embed_tokens.weight": (GEMMA_2B["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    header, offset = {}, 0
    for name, shape in named.items():
        size = itemsize * math.prod(shape)
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def hollow_tensors(path: Path) -> Any:
    """The file's tensors as a worker and its ranks find them."""
    from shardwright.model.checkpoint import open_weight_file
    from shardwright.runtime.tensor_hashes import FileIdentity
    from shardwright.runtime.weight_receiver import ReceivedTensors

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
    return ReceivedTensors.from_fields({"specs": specs, "ranges": ranges})


def steps(kind: str, *, is_whole: bool) -> Any:
    """The step that is timed."""
    from shardwright.types import SamplingParams, SequenceSlice, StepInput

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
                sampling=SamplingParams() if is_whole else None,
            )
            for index in range(count)
        ),
    )


def measure(stage: Any, dtype: str, sums: list[float], repeats: int, *, is_whole: bool) -> dict[str, dict[str, float]]:
    """Median times of each kind of step, and of the sums in it."""
    import torch

    found = {}
    for kind in ("decode 1", "decode 8", "prompt 128"):
        step = steps(kind, is_whole=is_whole)
        hidden = torch.zeros((step.num_tokens, GEMMA_2B["hidden_size"]), dtype=getattr(torch, dtype))
        inputs = {} if is_whole else {"hidden": hidden}
        times, of_sums = [], []
        for _ in range(repeats + 2):
            sums.clear()
            began = time.perf_counter()
            stage.forward(step, inputs)
            times.append(time.perf_counter() - began)
            of_sums.append(sum(sums))
        found[kind] = {"step_s": statistics.median(times[2:]), "sums_s": statistics.median(of_sums[2:])}
    return found


def main() -> None:
    """Measure both and print a table."""
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=18, choices=[*range(1, 17), 18], metavar="N",
        help="18: the whole model, with embedding and head; up to 16: so many middle layers, in less memory and time",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=sorted(BYTES), default="float32")
    parser.add_argument("--all-reduce", choices=["auto", "shm", "gloo"], default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    import torch

    from shardwright.model.stage import build_stage
    from shardwright.runtime.ranks import Ranks
    from shardwright.types import LayerRange, StageAssignment, StageLoad

    is_whole = options.layers == GEMMA_2B["num_hidden_layers"]
    layers = LayerRange(0, options.layers) if is_whole else LayerRange(2, 2 + options.layers)
    kernels = KernelCache(default_cache_dir())
    config_json = json.dumps(GEMMA_2B)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_hollow_checkpoint(path, range(layers.start, layers.end), options.dtype, is_whole=is_whole)
        raw = hollow_tensors(path)
        blocks = 8 * CONTEXT // BLOCK_SIZE

        def measure_alone() -> dict[str, dict[str, float]]:
            torch.set_num_threads(2)
            alone = build_stage(
                config_json=config_json, layers=layers, is_first=is_whole, is_last=is_whole, dtype=options.dtype,
                device="cpu", num_blocks=blocks, block_size=BLOCK_SIZE, raw=raw, progress=lambda _: None,
                kernel_dir=kernels.folder,
            )  # fmt: skip
            found = measure(alone, options.dtype, [], options.repeats, is_whole=is_whole)
            alone.close()
            return found

        before = measure_alone()
        ranks = Ranks(devices=["cpu", "cpu"], threads=1, on_lost=print, say=print)
        try:
            ranks.join(kernels=kernels.deepspeed_folder, all_reduce=options.all_reduce, kernel_dir=kernels.folder)
            sums: list[float] = []
            time_sums(sums)
            assignment = StageAssignment(
                epoch=1, worker_id="a", stage_index=0 if is_whole else 1, num_stages=1 if is_whole else 3,
                layers=layers, num_blocks=blocks, block_size=BLOCK_SIZE,
                next_worker_id=None if is_whole else "b",
            )  # fmt: skip
            load = StageLoad(
                assignment=assignment, model_config=config_json, dtype=options.dtype, tensors=(), file_hints=(),
                next_address="",
            )  # fmt: skip
            stage = ranks.build(load, tensors=raw.as_fields(), raw=raw, vocabulary=None, progress=lambda _: None)
            two_ranks = measure(stage, options.dtype, sums, options.repeats, is_whole=is_whole)
            stage.close()
            all_reduce = ranks.all_reduce
        finally:
            ranks.close()
        after = measure_alone()
    what = "Gemma-2B's shape" if is_whole else f"{options.layers} layers of Gemma-2B's shape"
    print(f"{what}, {options.dtype}, sums by {all_reduce}")
    print(f"{'step':12} {'1 rank x 2 threads':>20} {'2 ranks x 1 thread':>20} {'ratio':>7} {'sums of it':>12}")
    for kind, found in two_ranks.items():
        alone_s = (before[kind]["step_s"] + after[kind]["step_s"]) / 2
        print(
            f"{kind:12} {alone_s * 1e3:17.2f} ms {found['step_s'] * 1e3:17.2f} ms"
            f" {alone_s / found['step_s']:7.2f} {found['sums_s'] * 1e3:9.2f} ms"
        )


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
