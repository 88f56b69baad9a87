"""Measures one model three ways, side by side in one run: `transformers`, one stage, two stages. Prints ratios.

    python bench/compare.py                     Gemma-2B's shape (random weights, bfloat16) and SmolLM2-135M
    python bench/compare.py --model smollm2     one of them
    python bench/compare.py --json out.json     the figures for machines

All three are loaded at once and measured in turn, round after round, so that drift of the machine hits all alike.
Rates are medians over the rounds; so are ratios, each taken within its round. Needs about 20 GB of memory for
Gemma-2B's shape.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from shardwright.cli import aio
from shardwright.config import MasterConfig, default_cache_dir
from shardwright.engine import TokenEvent
from shardwright.runtime.launcher import LocalWorkers
from shardwright.runtime.model_files import resolve_model
from shardwright.runtime.session import Session, open_session
from shardwright.transport.grpc import GrpcTransport
from shardwright.types import SamplingParams, StopConditions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gemma_shape import make_gemma_2b  # noqa: E402
from hop import measure_hop  # noqa: E402
from orderly import end_in_order  # noqa: E402

PREFILL_TOKENS = 512
SHORT_PROMPT = 26
CONCURRENT = 8
READ_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One way's rates in tokens/s."""

    prefill: float  # one prompt of PREFILL_TOKENS, to its first token
    decode_1: float  # one sequence, after its first token
    total_8: float  # CONCURRENT requests: all new tokens over the whole time, prompts included


class Quiet:
    """A listener that says nothing."""

    def _hear(self, *_: object) -> None:
        pass

    downloading = hashing = loading = ready = _hear


class WholeModel:
    """The child process with `transformers`."""

    def __init__(self, path: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "whole_model.py"), str(path), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Wait for an answer, after sending the request if there is one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if request is not None:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the transformers process ended with exit code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.wait()


class Prompts:
    """Seeded prompts, no two of which share a first token, so that no prefix is reused."""

    def __init__(self, vocabulary: int) -> None:
        self._random = random.Random(1)
        self._vocabulary = vocabulary

    def make(self, count: int, length: int) -> list[tuple[int, ...]]:
        """`count` prompts of `length` tokens."""
        return [tuple(self._random.randrange(10, self._vocabulary - 10) for _ in range(length)) for _ in range(count)]


@dataclass(slots=True)
class Run:
    """When one request's tokens came."""

    began: float
    times: list[float]


async def ask(session: Session, prompts: list[tuple[int, ...]], new_tokens: int) -> list[Run]:
    """All prompts at once."""

    async def one(prompt: tuple[int, ...]) -> Run:
        run = Run(time.perf_counter(), [])
        _, events = await session.submit(prompt, SamplingParams(), StopConditions(max_new_tokens=new_tokens))
        async for event in events:
            if isinstance(event, TokenEvent):
                run.times.append(time.perf_counter())
        assert len(run.times) == new_tokens, "a request ended early"
        return run

    return await asyncio.gather(*(one(prompt) for prompt in prompts))


async def measure_split(session: Session, prompts: Prompts, new_tokens: int) -> Figures:
    """One round on a session."""
    run = (await ask(session, prompts.make(1, PREFILL_TOKENS), 1))[0]
    prefill = PREFILL_TOKENS / (run.times[0] - run.began)
    run = (await ask(session, prompts.make(1, SHORT_PROMPT), new_tokens))[0]
    decode_1 = (new_tokens - 1) / (run.times[-1] - run.times[0])
    runs = await ask(session, prompts.make(CONCURRENT, SHORT_PROMPT), new_tokens)
    took = max(r.times[-1] for r in runs) - min(r.began for r in runs)
    return Figures(prefill=prefill, decode_1=decode_1, total_8=CONCURRENT * new_tokens / took)


def measure_whole(whole: WholeModel, prompts: Prompts, new_tokens: int) -> Figures:
    """One round on `transformers`: eight requests go one after the other, of which two are timed."""
    answer = whole.ask({"prompts": prompts.make(1, PREFILL_TOKENS), "new_tokens": 2})
    prefill = PREFILL_TOKENS / answer["prefill_s"]
    answer = whole.ask({"prompts": prompts.make(2, SHORT_PROMPT), "new_tokens": new_tokens})
    return Figures(
        prefill=prefill,
        decode_1=(new_tokens - 1) / answer["decode_s"],
        total_8=answer["tokens"] / answer["total_s"],
    )


def read_bandwidth(threads: int) -> float:
    """Bytes/s of a streaming sum, the best of five."""
    torch.set_num_threads(threads)
    data = torch.ones(READ_BYTES // 4)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return READ_BYTES / best


@contextlib.asynccontextmanager
async def split(config: MasterConfig, stages: int, options: list[str]) -> AsyncIterator[Session]:
    """A session over `stages` worker processes."""
    async with (
        LocalWorkers(stages, options=options) as workers,
        open_session(config, workers.entries, listener=Quiet(), transport=GrpcTransport(), write_metrics=False) as s,
    ):
        yield s


async def compare(name: str, path: Path, rounds: int, new_tokens: int, options: list[str]) -> dict[str, Any]:
    """Measure one model; gives everything as plain data."""
    threads = len(os.sched_getaffinity(0))
    config = MasterConfig(model=str(path), dtype="bfloat16", kv_tokens=16384)
    print(f"\n{name}: loading three times", file=sys.stderr)
    whole = WholeModel(path, threads)
    try:
        whole.ask()
        async with split(config, 1, options) as one, split(config, 2, options) as two:
            prompts = Prompts(one.vocab_size)
            figures: dict[str, list[Figures]] = {"transformers": [], "one stage": [], "two stages": []}
            for number in range(rounds + 1):
                print(f"{name}: round {number} of {rounds}", file=sys.stderr)
                results = {
                    "transformers": await asyncio.to_thread(measure_whole, whole, prompts, new_tokens),
                    "one stage": await measure_split(one, prompts, new_tokens),
                    "two stages": await measure_split(two, prompts, new_tokens),
                }
                if number > 0:  # the first warms up
                    for way, result in results.items():
                        figures[way].append(result)
            weight_bytes = sum(row.weights_bytes for row in one.stages)
            hidden = one.model.costs.hidden_size
    finally:
        whole.close()
    bandwidth = read_bandwidth(threads)
    hop = await measure_hop(hidden)
    medians = {
        way: {field: statistics.median(getattr(f, field) for f in all_of) for field in Figures.__dataclass_fields__}
        for way, all_of in figures.items()
    }
    return {
        "model": name,
        "weight_bytes": weight_bytes,
        "read_bandwidth": bandwidth,
        "decode_limit": bandwidth / weight_bytes,
        "hop_median_s": hop,
        "medians": medians,
        "rounds": {way: [asdict(f) for f in all_of] for way, all_of in figures.items()},
        "new_tokens": new_tokens,
    }


def ratio(result: dict[str, Any], field: str, way: str, to: str) -> float:
    """The median over the rounds of one way's figure over another's in the same round."""
    pairs = zip(result["rounds"][way], result["rounds"][to], strict=True)
    return statistics.median(mine[field] / its[field] for mine, its in pairs)


def show(result: dict[str, Any]) -> None:
    """Print one model's table with ratios and floors."""
    whole, one, two = (result["medians"][way] for way in ("transformers", "one stage", "two stages"))
    print(f"\n{result['model']}: weights {result['weight_bytes'] / 1e9:.2f} GB, {result['new_tokens']} new tokens")
    print(f"{'tokens/s':<28}{'transformers':>14}{'one stage':>12}{'two stages':>12}{'one/whole':>11}{'two/one':>9}")
    rows = (
        (f"prefill of {PREFILL_TOKENS}", "prefill"),
        ("decode, 1 sequence", "decode_1"),
        (f"{CONCURRENT} requests at once", "total_8"),
    )
    for title, field in rows:
        print(
            f"{title:<28}{whole[field]:>14.1f}{one[field]:>12.1f}{two[field]:>12.1f}"
            f"{ratio(result, field, 'one stage', 'transformers'):>11.2f}"
            f"{ratio(result, field, 'two stages', 'one stage'):>9.2f}"
        )
    limit = result["decode_limit"]
    print(
        f"memory-bandwidth limit of decode, 1 sequence: {limit:.1f} tokens/s "
        f"({result['read_bandwidth'] / 1e9:.1f} GB/s read); one stage reaches {one['decode_1'] / limit:.2f}, "
        f"two {two['decode_1'] / limit:.2f} of it"
    )
    print(f"hop of one decode step's activation, there and acknowledged: {result['hop_median_s'] * 1e3:.2f} ms")
    floors = (
        ("two stages / one stage, 1 sequence", ("decode_1", "two stages", "one stage"), 0.9),
        ("two stages / one stage, 8 requests", ("total_8", "two stages", "one stage"), 1.0),
        ("one stage / transformers, 1 sequence", ("decode_1", "one stage", "transformers"), 1.0),
        ("one stage / transformers, 8 requests", ("total_8", "one stage", "transformers"), 4.0),
    )
    for title, (field, way, to), floor in floors:
        value = ratio(result, field, way, to)
        print(f"  {title:<40}{value:>6.2f}  floor {floor:.1f}  {'reached' if value >= floor else 'MISSED'}")


def main() -> None:
    """Read the command line, measure, print."""
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["gemma-2b", "smollm2", "all"], default="all")
    parser.add_argument(
        "--rounds",
        type=int,
        default=0,
        help="measured rounds after one that warms up (default: 3 for Gemma-2B, 9 for SmolLM2, whose steps are short)",
    )
    parser.add_argument("--new-tokens", type=int, default=0, help="per request (default: 32 for Gemma-2B, 64 else)")
    parser.add_argument("--worker-threads", type=int, default=0, help="threads of each worker (default: all cores)")
    parser.add_argument("--json", type=Path, default=None, help="write all figures here")
    arguments = parser.parse_args()
    options = ["--threads", str(arguments.worker_threads)] if arguments.worker_threads else []
    cpu = platform.processor() or platform.machine()
    print(
        f"{psutil.cpu_count()} cores ({cpu}), {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"torch {torch.__version__}"
    )
    results = []
    if arguments.model in ("smollm2", "all"):
        files = resolve_model("smollm2-135m", cache_dir=default_cache_dir(), progress=Quiet().downloading)
        results.append(
            aio.run(
                compare("SmolLM2-135M", files.weights[0], arguments.rounds or 9, arguments.new_tokens or 64, options)
            )
        )
        show(results[-1])
    if arguments.model in ("gemma-2b", "all"):
        folder = make_gemma_2b(default_cache_dir() / "bench" / "gemma-2b-shape")
        results.append(
            aio.run(compare("Gemma-2B's shape", folder, arguments.rounds or 3, arguments.new_tokens or 32, options))
        )
        show(results[-1])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
