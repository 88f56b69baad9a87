"""Measures a model as it is served, in parts, against limits of the machine that are measured in the same run.

    python bench/serve_speed.py                            all parts, Gemma-2B's shape and SmolLM2-135M
    python bench/serve_speed.py --part http --part gap     some of them
    python bench/serve_speed.py --model smollm2            one model; also a folder, a GGUF file or a hub id
    python bench/serve_speed.py --json out.json            the figures for machines, written after each part
    python bench/serve_speed.py --quick                    short prompts and answers, only to see that it runs

Parts (docs/performance.md says how each is measured): http, pinned, single, prefill, overlap, delay, gap, prefix,
master-cost. A figure is the median over the rounds, after a round that warms up. Floors and aims are for a machine of
two cores; on a larger one, run it under `taskset -c 0,1`. Needs about 16 GB of memory for Gemma-2B's shape.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from compare import Prompts, Quiet, ask  # noqa: E402
from gemma_shape import make_gemma_2b  # noqa: E402
from http_load import Answer, complete, tokens_per_s  # noqa: E402
from machine_limits import decode_weight_bytes, matrix_rate, prefill_operations, read_bandwidth  # noqa: E402
from orderly import end_in_order  # noqa: E402
from serving import (  # noqa: E402
    Server,
    delayed_session,
    pinned_workers,
    server_on,
    session_on,
    sharing_workers,
)

from shardwright.cli import aio  # noqa: E402
from shardwright.cli.bench_report import percentile  # noqa: E402
from shardwright.config import MasterConfig, default_cache_dir  # noqa: E402
from shardwright.engine import TokenEvent  # noqa: E402
from shardwright.runtime.session import OpenModel, Session, open_model  # noqa: E402
from shardwright.types import SamplingParams, StopConditions  # noqa: E402

PARTS = ("http", "pinned", "single", "prefill", "overlap", "delay", "gap", "prefix", "master-cost")
GEMMA_2B = "Gemma-2B's shape"
SMOLLM2 = "SmolLM2-135M"
KV_TOKENS = 16384
WATCH_INTERVAL_S = 0.1

# What vLLM's CPU build reached of the same limit with SmolLM2 and 8 requests on a machine of 2 cores (235 and 169
# tokens/s at 31 GB/s and 0.269 GB): as one process of two threads, and cut in two with a thread each.
VLLM_SHARED = 0.255
VLLM_PINNED = 0.183


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is asked; lengths in tokens."""

    short_prompt: int = 26
    new_tokens: int = 128
    single_tokens: int = 64
    prefill_tokens: int = 512
    overlap_prompts: int = 16
    delay_requests: int = 16
    delay_tokens: int = 64
    burst_prompts: int = 8
    burst_tokens: int = 1000
    gaps_alone: int = 40  # of the running sequence, before the burst
    system_prompt: int = 1000
    question: int = 16
    cost_requests: int = 32
    cost_tokens: int = 128


QUICK = Sizes(
    new_tokens=12,
    single_tokens=8,
    prefill_tokens=64,
    overlap_prompts=4,
    delay_requests=4,
    delay_tokens=8,
    burst_prompts=2,
    burst_tokens=128,
    gaps_alone=8,
    system_prompt=200,
    cost_requests=4,
    cost_tokens=12,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a figure should reach, or with `is_most` stay below."""

    floor: float | None = None
    aim: float | None = None
    is_most: bool = False

    def verdict(self, value: float) -> str:
        """In words."""

        def is_met(bound: float) -> bool:
            return value <= bound if self.is_most else value >= bound

        words = []
        if self.floor is not None:
            words.append("reached" if is_met(self.floor) else "MISSED")
        if self.aim is not None:
            words.append(f"aim {'reached' if is_met(self.aim) else 'missed'}")
        return ", ".join(words)

    def __str__(self) -> str:
        kinds = (("most" if self.is_most else "floor", self.floor), ("aim", self.aim))
        return ", ".join(f"{kind} {bound:g}" for kind, bound in kinds if bound is not None)


NO_BOUND = Bound()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number."""

    part: str
    model: str
    what: str
    value: float
    unit: str  # empty: a ratio
    bound: Bound = NO_BOUND
    rounds: tuple[float, ...] = ()  # what `value` is the median of, where it is one
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Everything, and the verdict."""
        return asdict(self) | {"verdict": self.bound.verdict(self.value)}

    def __str__(self) -> str:
        number = f"{self.value:.3f}" if abs(self.value) < 10 else f"{self.value:.1f}"
        note = f"  ({self.note})" if self.note else ""
        return (
            f"  {self.what:<58}{number:>9} {self.unit:<9} {self.bound!s:<20} "
            f"{self.bound.verdict(self.value)}{note}".rstrip()
        )


@dataclass(slots=True)
class Bench:
    """All parts for one model. A part adds its figures."""

    name: str
    model: OpenModel
    config: MasterConfig
    sizes: Sizes
    num_rounds: int
    delay_s: float
    figures: list[Figure] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _prompts: Prompts = field(init=False)
    _weight_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self._prompts = Prompts(self.model.files.vocab_size)
        self._weight_bytes = decode_weight_bytes(self.model.costs)

    # --- running -----------------------------------------------------------------------------------

    async def run(self, parts: Sequence[str], after_each: Callable[[], None]) -> None:
        """Measure these parts; one that fails is told and the others go on."""
        setups: tuple[tuple[Callable[[set[str]], Coroutine[Any, Any, None]], set[str]], ...] = (
            (self._on_server, {"http", "prefix", "master-cost"}),
            (self._on_sessions, {"single", "prefill", "gap", "master-cost"}),
            (self._on_pinned_server, {"pinned"}),
            (self._overlap, {"overlap"}),
            (self._delay, {"delay"}),
        )
        for measure, its_parts in setups:
            wanted = its_parts & set(parts)
            if not wanted:
                continue
            names = ", ".join(part for part in PARTS if part in wanted)
            before = len(self.figures)
            self._say(f"{names}: loading")
            await self._try(names, measure(wanted))
            for part in PARTS:
                found = [figure for figure in self.figures[before:] if figure.part == part]
                if found:
                    print(f"\n{self.name}: {part}")
                    print("\n".join(map(str, found)), flush=True)
            after_each()

    async def _try(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """What fails is told and kept; the other parts' figures are worth having."""
        try:
            await work
        except Exception as exc:  # noqa: BLE001  the top of a part
            traceback.print_exc()
            self.failures.append(f"{self.name}: {what}: {exc!r}")

    def _say(self, what: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {self.name}: {what}", file=sys.stderr, flush=True)

    def _add(
        self, part: str, what: str, values: Sequence[float], unit: str = "", *, bound: Bound = NO_BOUND, note: str = ""
    ) -> None:
        self.figures.append(
            Figure(
                part=part,
                model=self.name,
                what=what,
                value=statistics.median(values),
                unit=unit,
                bound=bound,
                rounds=tuple(values),
                note=note,
            )
        )

    def _if_gemma(self, floor: float | None = None, aim: float | None = None) -> Bound:
        """A bound that is asked of Gemma-2B's shape alone."""
        return Bound(floor=floor, aim=aim) if self.name == GEMMA_2B else NO_BOUND

    def _rounds(self, what: str) -> AsyncRounds:
        return AsyncRounds(self.num_rounds, lambda number: self._say(f"{what}: round {number} of {self.num_rounds}"))

    # --- what is up meanwhile ----------------------------------------------------------------------

    async def _on_server(self, parts: set[str]) -> None:
        async with server_on(self.config, None) as server:
            bound = Bound(aim=VLLM_SHARED) if self.name == SMOLLM2 else self._if_gemma(0.6, 0.75)
            work = {
                "http": lambda: self._requests("http", server, bound),
                "prefix": lambda: self._prefix(server),
                "master-cost": lambda: self._cost_with_http(server),
            }
            await self._try_each(work, parts)

    async def _on_pinned_server(self, _: set[str]) -> None:
        async with pinned_workers() as entries, server_on(self.config, entries) as server:
            bound = Bound(aim=VLLM_PINNED) if self.name == SMOLLM2 else self._if_gemma(0.34, 0.38)
            await self._requests("pinned", server, bound)

    async def _on_sessions(self, parts: set[str]) -> None:
        async with sharing_workers(2) as workers, session_on(self.config, self.model, workers) as two:
            if parts & {"single", "prefill"}:
                async with sharing_workers(1) as worker, session_on(self.config, self.model, worker) as one:
                    ways = {"one stage": one, "two stages": two}
                    work = {"single": lambda: self._single(ways), "prefill": lambda: self._prefill(ways)}
                    await self._try_each(work, parts)
            work = {"gap": lambda: self._gap(two), "master-cost": lambda: self._cost_without_http(two)}
            await self._try_each(work, parts)

    async def _try_each(self, work: dict[str, Callable[[], Coroutine[Any, Any, None]]], parts: set[str]) -> None:
        for part, measure in work.items():
            if part in parts:
                await self._try(part, measure())

    # --- parts -------------------------------------------------------------------------------------

    async def _requests(self, part: str, server: Server, bound_of_8: Bound) -> None:
        """Throughput of requests that are sent at once, and its part of so many times one sequence's limit."""
        sizes = self.sizes
        for count in (8,) if self.name == GEMMA_2B else (8, 16):
            rates, limits = [], []
            async for is_measured in self._rounds(f"{part}, {count} requests"):
                limit = read_bandwidth() / self._weight_bytes
                prompts = self._prompts.make(count, sizes.short_prompt)
                answers = await self._complete(server, prompts, sizes.new_tokens)
                if is_measured:
                    rates.append(tokens_per_s(answers))
                    limits.append(limit)
            asked = f"{count} requests, {sizes.short_prompt} + {sizes.new_tokens} tokens"
            self._add(part, asked, rates, "tokens/s")
            self._add(part, "one sequence's limit (bandwidth over weights)", limits, "tokens/s")
            ratios = [rate / (count * limit) for rate, limit in zip(rates, limits, strict=True)]
            self._add(
                part, f"{count} requests / ({count} x limit)", ratios, bound=bound_of_8 if count == 8 else NO_BOUND
            )

    async def _complete(self, server: Server, prompts: list[tuple[int, ...]], new_tokens: int) -> list[Answer]:
        """Streamed answers. Without a tokenizer there is no text to stream: then the tokens' scores are."""
        is_textless = self.model.files.tokenizer is None
        return await complete(server.url, prompts, new_tokens=new_tokens, each_token=is_textless)

    async def _single(self, ways: dict[str, Session]) -> None:
        rates: dict[str, list[float]] = {way: [] for way in ways}
        limits = []
        async for is_measured in self._rounds("single"):
            limit = read_bandwidth() / self._weight_bytes
            found = {}
            for way, session in ways.items():
                (run,) = await ask(session, self._prompts.make(1, self.sizes.short_prompt), self.sizes.single_tokens)
                found[way] = (self.sizes.single_tokens - 1) / (run.times[-1] - run.times[0])
            if is_measured:
                limits.append(limit)
                for way, rate in found.items():
                    rates[way].append(rate)
        self._add("single", "limit (bandwidth over weights)", limits, "tokens/s")
        for way, found_rates in rates.items():
            self._add("single", f"{way}, one sequence", found_rates, "tokens/s")
            ratios = [rate / limit for rate, limit in zip(found_rates, limits, strict=True)]
            self._add("single", f"{way} / limit", ratios, bound=self._if_gemma(0.65, 0.8))

    async def _prefill(self, ways: dict[str, Session]) -> None:
        count = self.sizes.prefill_tokens
        operations = prefill_operations(self.model.costs, num_tokens=count)
        times: dict[str, list[float]] = {way: [] for way in ways}
        limits, products = [], []
        async for is_measured in self._rounds("prefill"):
            limit = matrix_rate(self.model.config_json, num_tokens=count)
            found = {}
            for way, session in ways.items():
                (run,) = await ask(session, self._prompts.make(1, count), 1)
                found[way] = run.times[0] - run.began
            if is_measured:
                limits.append(limit.operations_per_s)
                products.append(limit.product)
                for way, took in found.items():
                    times[way].append(took)
        self._add("prefill", "matrix rate", [limit / 1e12 for limit in limits], "TFLOP/s", note=products[-1])
        for way, took_all in times.items():
            self._add("prefill", f"{way}, prompt of {count}", [count / took for took in took_all], "tokens/s")
            ratios = [operations / took / limit for took, limit in zip(took_all, limits, strict=True)]
            self._add("prefill", f"{way} / matrix rate", ratios, bound=self._if_gemma(0.5, 0.7))

    async def _overlap(self, _: set[str]) -> None:
        """Prompts alone, with as many steps in flight as the master chooses and with one."""
        sizes = self.sizes
        config = replace(self.config, typical_prompt_tokens=sizes.prefill_tokens, typical_new_tokens=1)
        single_file = replace(config, steps_in_flight=1)
        async with (
            pinned_workers() as some,
            pinned_workers() as others,
            session_on(config, self.model, some) as chosen,
            session_on(single_file, self.model, others) as one,
        ):
            gains, rates, one_rates, steps = [], [], [], []
            busy: dict[int, list[float]] = {}
            async for is_measured in self._rounds("overlap"):
                prompts = self._prompts.make(sizes.overlap_prompts, sizes.prefill_tokens)
                one_s = await prompts_s(one, prompts)
                prompts = self._prompts.make(sizes.overlap_prompts, sizes.prefill_tokens)
                async with watched_stages(chosen) as seen:
                    chosen_s = await prompts_s(chosen, prompts)
                if is_measured:
                    num_tokens = sizes.overlap_prompts * sizes.prefill_tokens
                    gains.append(one_s / chosen_s)
                    rates.append(num_tokens / chosen_s)
                    one_rates.append(num_tokens / one_s)
                    steps.append(seen.steps_in_flight)
                    for stage, ratio in seen.busy.items():
                        busy.setdefault(stage, []).append(ratio)
        asked = f"{sizes.overlap_prompts} prompts of {sizes.prefill_tokens}"
        self._add("overlap", f"{asked}, one step in flight", one_rates, "tokens/s")
        self._add("overlap", f"{asked}, steps in flight as chosen", rates, "tokens/s")
        self._add("overlap", "steps in flight, as chosen", steps, "steps")
        self._add("overlap", "as chosen / one step in flight", gains, bound=self._if_gemma(1.7))
        for stage, ratios in sorted(busy.items()):
            self._add("overlap", f"stage {stage} busy, by its own clock", ratios, bound=self._if_gemma(0.85))

    async def _delay(self, _: set[str]) -> None:
        sizes = self.sizes
        async with (
            pinned_workers() as some,
            pinned_workers() as others,
            session_on(self.config, self.model, some) as direct,
            delayed_session(self.config, self.model, others, delay_s=self.delay_s) as (delayed, relays),
        ):
            ways = {"without delay": direct, f"{self.delay_s * 1e3:g} ms each way": delayed}
            rates: dict[str, list[float]] = {way: [] for way in ways}
            steps: dict[str, list[float]] = {way: [] for way in ways}
            async for is_measured in self._rounds("delay"):
                for way, session in ways.items():
                    prompts = self._prompts.make(sizes.delay_requests, sizes.short_prompt)
                    async with watched_stages(session) as seen:
                        runs = await ask(session, prompts, sizes.delay_tokens)
                    if is_measured:
                        took = max(run.times[-1] for run in runs) - min(run.began for run in runs)
                        rates[way].append(sizes.delay_requests * sizes.delay_tokens / took)
                        steps[way].append(seen.steps_in_flight)
            relayed = [await relay.num_bytes() for relay in relays]
        if not any(relayed):
            raise RuntimeError("no byte went through the relays: the delay was on no link")
        for way, found in rates.items():
            self._add("delay", f"{sizes.delay_requests} sequences, {way}", found, "tokens/s")
            self._add("delay", f"steps in flight, {way}", steps[way], "steps")
        before, after = rates.values()
        self._add(
            "delay",
            "with delay / without",
            [late / early for early, late in zip(before, after, strict=True)],
            bound=self._if_gemma(0.9),
            note=f"{sum(relayed) / 1e6:.1f} MB through the relay",
        )

    async def _gap(self, session: Session) -> None:
        largest, p99, alone_s, under_s = [], [], [], []
        async for is_measured in self._rounds("gap"):
            alone, under = await self._gaps_under_a_burst(session)
            if is_measured:
                usual = statistics.median(alone)
                alone_s.append(usual)
                under_s.append(max(under))
                largest.append(max(under) / usual)
                p99.append(percentile(sorted(under), 99) / usual)
        sizes = self.sizes
        self._add("gap", "gap of a sequence alone, median", [1e3 * seconds for seconds in alone_s], "ms")
        burst = f"{sizes.burst_prompts} prompts of {sizes.burst_tokens}"
        self._add("gap", f"largest gap under {burst}", [1e3 * seconds for seconds in under_s], "ms")
        bound = Bound(floor=3.0, is_most=True)
        self._add("gap", "p99 under the burst / alone", p99, bound=bound)
        self._add(
            "gap", "largest under the burst / alone", largest, bound=bound, note=f"worst round {max(largest):.2f}"
        )

    async def _gaps_under_a_burst(self, session: Session) -> tuple[list[float], list[float]]:
        """Seconds between a running sequence's tokens: before other prompts came, and from then until they are done."""
        (prompt,) = self._prompts.make(1, self.sizes.short_prompt)
        room = session.context_length - len(prompt)
        seq_id, events = await session.submit(prompt, SamplingParams(), StopConditions(max_new_tokens=room))
        times: list[float] = []
        is_settled = asyncio.Event()

        async def follow() -> None:
            async for event in events:
                if isinstance(event, TokenEvent):
                    times.append(time.perf_counter())
                    if len(times) > self.sizes.gaps_alone:
                        is_settled.set()
            is_settled.set()

        following = asyncio.create_task(follow())
        await is_settled.wait()
        began = time.perf_counter()
        await ask(session, self._prompts.make(self.sizes.burst_prompts, self.sizes.burst_tokens), 1)
        ended = time.perf_counter()
        if following.done():
            raise RuntimeError(f"the running sequence ended after {len(times)} tokens, before the burst was over")
        await session.engine.abort(seq_id)
        await following
        gaps = list(itertools.pairwise(times))
        alone = [after - before for before, after in gaps if after <= began]
        return alone, [after - before for before, after in gaps if after > began and before < ended]

    async def _prefix(self, server: Server) -> None:
        sizes = self.sizes
        first_s, second_s, cached = [], [], []
        async for is_measured in self._rounds("prefix"):
            (system,) = self._prompts.make(1, sizes.system_prompt)
            questions = self._prompts.make(2, sizes.question)
            first, second = [
                (await complete(server.url, [system + question], new_tokens=2, each_token=True))[0]
                for question in questions
            ]
            if is_measured:
                first_s.append(first.first_token_s)
                second_s.append(second.first_token_s)
                cached.append(second.usage.num_cached)
        asked = f"{sizes.system_prompt} + {sizes.question} tokens"
        self._add("prefix", f"first token, {asked}", [1e3 * seconds for seconds in first_s], "ms")
        self._add("prefix", "first token, same system prompt", [1e3 * seconds for seconds in second_s], "ms")
        self._add("prefix", "of its prompt cached", cached, "tokens")
        ratios = [first / second for first, second in zip(first_s, second_s, strict=True)]
        self._add("prefix", "sooner by the factor", ratios, bound=Bound(floor=5.0))

    async def _cost_with_http(self, server: Server) -> None:
        async def work(prompts: list[tuple[int, ...]]) -> None:
            await self._complete(server, prompts, self.sizes.cost_tokens)

        await self._cost("through HTTP", work, server.cpu_s)

    async def _cost_without_http(self, session: Session) -> None:
        async def work(prompts: list[tuple[int, ...]]) -> None:
            await ask(session, prompts, self.sizes.cost_tokens)

        await self._cost("without HTTP", work, time.process_time)

    async def _cost(
        self,
        way: str,
        work: Callable[[list[tuple[int, ...]]], Coroutine[Any, Any, None]],
        cpu_s: Callable[[], float],
    ) -> None:
        """The master's CPU time for a token; its part of a step's time is that of the run's, one step or many."""
        sizes = self.sizes
        costs, shares = [], []
        async for is_measured in self._rounds(f"master-cost {way}"):
            prompts = self._prompts.make(sizes.cost_requests, sizes.short_prompt)
            cpu, began = cpu_s(), time.perf_counter()
            await work(prompts)
            took, spent = time.perf_counter() - began, cpu_s() - cpu
            if is_measured:
                costs.append(1e3 * spent / (sizes.cost_requests * sizes.cost_tokens))
                shares.append(100 * spent / took)
        what = f"{way}, {sizes.cost_requests} sequences"
        self._add("master-cost", f"{what}: CPU for a token", costs, "ms", bound=Bound(floor=0.3, is_most=True))
        self._add("master-cost", f"{what}: part of a step's time", shares, "%", bound=Bound(floor=5.0, is_most=True))


class AsyncRounds:
    """Counts rounds for `async for`; gives whether the round is measured, which the first is not.

    Asynchronous so that what the last round left to do on the event loop is done before the next begins.
    """

    def __init__(self, num_rounds: int, say: Callable[[int], None]) -> None:
        self._num_rounds = num_rounds
        self._say = say

    async def __aiter__(self) -> AsyncIterator[bool]:
        for number in range(self._num_rounds + 1):
            await asyncio.sleep(0.1)
            self._say(number)
            yield number > 0


async def prompts_s(session: Session, prompts: list[tuple[int, ...]]) -> float:
    """Seconds until each of these prompts has its first token."""
    runs = await ask(session, prompts, 1)
    return max(run.times[0] for run in runs) - min(run.began for run in runs)


@dataclass(slots=True)
class Seen:
    """What a session's stages did meanwhile."""

    busy: dict[int, float] = field(default_factory=dict)  # by stage: part of the time, by the worker's clock
    steps_in_flight: float = 0.0  # that the master meant to have, the median


@contextlib.asynccontextmanager
async def watched_stages(session: Session) -> AsyncIterator[Seen]:
    """Fills in what it saw when the block ends."""
    seen = Seen()
    steps: list[int] = []

    async def sample() -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            snapshot = session.engine.snapshot()
            if snapshot.num_running:
                steps.append(snapshot.max_steps_in_flight)

    before = await stage_clocks(session)
    sampling = asyncio.create_task(sample())
    try:
        yield seen
    finally:
        sampling.cancel()
    after = await stage_clocks(session)
    seen.busy = {
        stage: (busy - before[stage][0]) / (uptime - before[stage][1]) for stage, (busy, uptime) in after.items()
    }
    seen.steps_in_flight = statistics.median(steps) if steps else 0.0


async def stage_clocks(session: Session) -> dict[int, tuple[float, float]]:
    """Each stage's compute time and its time in all, since it was loaded, as its worker says now."""
    await session.refresh()
    snapshot = session.engine.snapshot()
    reports = {worker.worker_id: worker.report for worker in snapshot.workers}
    found = {}
    for stage in snapshot.stages:
        report = reports[stage.worker_id]
        assert report is not None, "a worker that was just asked has answered"
        found[stage.stage_index] = (report.busy_s, report.uptime_s)
    return found


# --- the command -------------------------------------------------------------------------------------


def subjects(model: str) -> list[tuple[str, str]]:
    """Names and locations of the models to measure; made where they are not there yet."""
    found = []
    if model in ("gemma-2b", "all"):
        found.append((GEMMA_2B, str(make_gemma_2b(default_cache_dir() / "bench" / "gemma-2b-shape"))))
    if model in ("smollm2", "all"):
        found.append((SMOLLM2, "smollm2-135m"))
    if not found:
        is_here = Path(model).exists()
        found.append((Path(model).name if is_here else model, str(Path(model).resolve()) if is_here else model))
    return found


async def run(arguments: argparse.Namespace) -> list[str]:
    """Measure everything that was asked for; gives what failed."""
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    print("{cores} cores, {memory_gib} GiB, torch {torch}, load average {load_average:.2f} before".format(**machine))
    if machine["load_average"] > 0.5:
        print("Other programs are busy: the figures will be too low.")
    if machine["cores"] != 2:
        print("Floors and aims are for two cores: run it under `taskset -c 0,1` to compare with them.")
    if arguments.quick:
        print("Short prompts and answers: the figures and verdicts mean nothing.")
    parts = arguments.part or PARTS
    benches: list[Bench] = []

    def write_json() -> None:
        if arguments.json is not None:
            content = {
                "machine": machine,
                "quick": arguments.quick,
                "sizes": asdict(QUICK if arguments.quick else Sizes()),
                "rounds": arguments.rounds,
                "delay_s": arguments.delay_ms / 1e3,
                "figures": [figure.as_json() for bench in benches for figure in bench.figures],
                "failures": [failure for bench in benches for failure in bench.failures],
            }
            arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    for name, path in subjects(arguments.model):
        # A session that is up but not being measured must compute nothing.
        config = MasterConfig(model=path, dtype="bfloat16", kv_tokens=KV_TOKENS, probe_interval_s=0.0)
        bench = Bench(
            name=name,
            model=await open_model(config, Quiet()),
            config=config,
            sizes=QUICK if arguments.quick else Sizes(),
            num_rounds=arguments.rounds,
            delay_s=arguments.delay_ms / 1e3,
        )
        benches.append(bench)
        await bench.run(parts, write_json)
    return [failure for bench in benches for failure in bench.failures]


def main() -> None:
    """Read the command line, measure, print. Exit code 1 when a part could not be measured."""
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated (default: all)")
    parser.add_argument("--model", default="all", help="gemma-2b, smollm2, all, or what `shardwright serve` takes")
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds after one that warms up")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="part delay: one way on the link of the workers")
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--json", type=Path, default=None, help="write all figures here")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; it must be at least 1")
    failures = aio.run(run(arguments))
    if failures:
        print("\nCould not be measured:", *failures, sep="\n  ")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
