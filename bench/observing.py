"""What being watched costs a decode step: all that lets people see against nothing of it, in the same processes.

A pipeline of two worker processes, each with a core and a thread, and its master with the HTTP server decode in blocks
of some seconds; the mode changes from block to block:

    off     workers keep no traces and time no link, the master notes nothing and asks for no traces, no file is
            written, nobody looks
    seen    all of that is on; a reader follows /api/events as the dashboard does and scrapes /metrics every 5 s
    traced  the same, and each request's spans go to an OTLP collector

One set of processes for all modes: two sets never lie in memory alike, and differ by more than what is looked for. The
order turns from round to round. A mode's cost is the mean over rounds of its time for a token against `off`'s in the
same round, with a bootstrap interval. Readers and collector run on this machine too, at the lowest priority.

    python bench/observing.py [--rounds 30] [--seconds 6] [--concurrency 1] [--model smollm2-135m] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from orderly import end_in_order

MODES = ("off", "seen", "traced")
TOKENS = 48  # of each request
PROMPT = 24
SETTLE_S = 0.3
SCRAPE_INTERVAL_S = 5.0  # as `shardwright grafana export` sets Prometheus
NEVER = 2**62  # a trace's number that no worker reaches


# --- the processes around the master -----------------------------------------------------------------


def run_worker_process() -> None:
    """A worker that SIGUSR1 has watched and SIGUSR2 left alone."""
    from shardwright.cli import aio
    from shardwright.cli.cluster import serve_worker
    from shardwright.config import WorkerConfig
    from shardwright.errors import LinkLostError
    from shardwright.runtime import held_stage, worker
    from shardwright.runtime.step_recorder import StepRecorder

    is_on = True

    def switch(number: int, _: object) -> None:
        nonlocal is_on
        is_on = number == signal.SIGUSR1

    class Switched(StepRecorder):
        def record(self, *args: Any) -> None:
            if is_on:
                super().record(*args)

    ping = held_stage.round_trip

    async def switched_ping(client: Any) -> float:
        if is_on:
            return await ping(client)
        raise LinkLostError("nobody looks")  # what a ping that fails raises

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, switch)
    worker.StepRecorder = Switched
    held_stage.round_trip = switched_ping
    config = WorkerConfig(host="127.0.0.1", port=0, threads=1)
    serving = serve_worker(config, announce=lambda address, *_: print(address.rpartition(":")[2], flush=True))
    aio.run(aio.until_stdin_closes(serving))


async def run_reader_process(url: str) -> None:
    """Looks as a dashboard and a Prometheus do while it is told `on`."""
    import httpx

    os.nice(19)
    looking: list[asyncio.Task[None]] = []

    async def follow(client: httpx.AsyncClient, seen: asyncio.Event) -> None:
        async with client.stream("GET", "/api/events") as events:
            async for _ in events.aiter_raw():
                seen.set()

    async def scrape(client: httpx.AsyncClient) -> None:
        while True:
            (await client.get("/metrics")).raise_for_status()
            await asyncio.sleep(SCRAPE_INTERVAL_S)

    async with httpx.AsyncClient(base_url=url, timeout=3600.0) as client:
        while command := (await asyncio.to_thread(sys.stdin.readline)).strip():
            for task in looking:
                task.cancel()
            await asyncio.gather(*looking, return_exceptions=True)
            looking = []
            if command == "on":
                seen = asyncio.Event()
                looking = [asyncio.create_task(follow(client, seen)), asyncio.create_task(scrape(client))]
                first = asyncio.create_task(seen.wait())
                await asyncio.wait((*looking, first), return_when=asyncio.FIRST_COMPLETED)
                for task in looking:
                    if task.done():
                        task.result()
            print(command, flush=True)
        for task in looking:
            task.cancel()
        await asyncio.gather(*looking, return_exceptions=True)


def run_collector_process() -> None:
    """Takes spans and counts them."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service

    os.nice(19)
    count = 0

    class Collector(service.TraceServiceServicer):
        def Export(self, request: Any, _: object) -> Any:  # noqa: N802  gRPC's name
            nonlocal count
            count += sum(len(scope.spans) for each in request.resource_spans for scope in each.scope_spans)
            return messages.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    service.add_TraceServiceServicer_to_server(Collector(), server)
    print(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    server.start()
    sys.stdin.read()
    server.stop(0).wait()
    print(count, flush=True)


@contextlib.asynccontextmanager
async def process(*arguments: str, **environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """This file as another process, until the block ends."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **environ},
    )
    try:
        yield child
    finally:
        if child.stdin is not None:
            child.stdin.close()
        try:
            async with asyncio.timeout(10.0):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()


async def line_of(child: asyncio.subprocess.Process) -> str:
    """The next line that it says."""
    assert child.stdout is not None
    line = (await child.stdout.readline()).decode().strip()
    if not line:
        raise RuntimeError("a process of the benchmark ended; its error stands above")
    return line


async def tell(child: asyncio.subprocess.Process, command: str) -> None:
    """Say something to it and wait until it did it."""
    assert child.stdin is not None
    child.stdin.write(f"{command}\n".encode())
    await child.stdin.drain()
    assert await line_of(child) == command


# --- switching ---------------------------------------------------------------------------------------


class Switch:
    """Turns watching on and off in all processes, between blocks."""

    def __init__(self, session: Any, workers: Sequence[int], reader: asyncio.subprocess.Process) -> None:
        from shardwright.runtime import session as sessions

        self._observatory = session.engine.observatory
        self._log = self._observatory._requests  # noqa: SLF001  the switch is this benchmark's alone
        self._traced = {name: getattr(self._observatory, name) for name in ("submitted", "rejected", "finished")}
        self._workers = workers
        self._reader = reader
        self._writes = True
        files = sessions._MetricsFiles  # noqa: SLF001
        write = files._write  # noqa: SLF001

        async def switched(each: Any) -> None:
            if self._writes:
                await write(each)

        files._write = switched  # noqa: SLF001

    async def set(self, mode: str) -> None:
        """All that belongs to the mode, and nothing else."""
        is_on = mode != "off"
        self._writes = is_on
        observatory, log = self._observatory, self._log
        for name in ("step_sent", "step_returned", "look", "asking", "token", *self._traced):
            vars(observatory).pop(name, None)
        if not is_on:
            for name in ("step_sent", "step_returned", "look", "token", *self._traced):
                setattr(observatory, name, _nothing)
            observatory.asking = lambda _: NEVER
        else:
            observatory.token = log.token
            for name, traced in self._traced.items():
                setattr(observatory, name, traced if mode == "traced" else getattr(log, name))
        for pid in self._workers:
            os.kill(pid, signal.SIGUSR1 if is_on else signal.SIGUSR2)
        await tell(self._reader, "on" if is_on else "off")
        await asyncio.sleep(SETTLE_S)


def _nothing(*_: object, **__: object) -> None:
    """What a master does that does not look."""


# --- measuring ---------------------------------------------------------------------------------------


async def block(engine: Any, vocabulary: int, *, seconds: float, concurrency: int, seed: int) -> np.ndarray:
    """The gaps between the tokens of requests that follow each other for so long."""
    from shardwright.engine import FinishEvent, TokenEvent
    from shardwright.types import GREEDY, StopConditions

    gaps: list[float] = []
    rng = np.random.default_rng(seed)
    ends = time.perf_counter() + seconds
    stop = StopConditions(max_new_tokens=TOKENS)

    async def client() -> None:
        while time.perf_counter() < ends:
            prompt = tuple(int(token) for token in rng.integers(3, vocabulary, size=PROMPT))
            over = asyncio.Event()
            last = 0.0

            def sink(events: Sequence[object], over: asyncio.Event = over) -> None:
                nonlocal last
                for event in events:
                    if isinstance(event, TokenEvent):
                        now = time.perf_counter()
                        if last:
                            gaps.append(now - last)
                        last = now
                    elif isinstance(event, FinishEvent):
                        over.set()

            engine.start(prompt, GREEDY, stop, sink)
            await over.wait()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return np.asarray(gaps)


@dataclass(frozen=True)
class Figure:
    """A statistic of all blocks of a mode, and its change against `off`."""

    name: str
    of: Callable[[np.ndarray], float]


FIGURES = (
    Figure("mean", lambda gaps: float(gaps.mean())),
    Figure("median", lambda gaps: float(np.median(gaps))),
    Figure("p99", lambda gaps: float(np.quantile(gaps, 0.99))),
)


def change(rounds: Sequence[dict[str, float]], mode: str) -> tuple[float, float, float]:
    """Mean change against `off` in percent over the rounds, and its 95 % interval by bootstrap."""
    ratios = np.asarray([100.0 * (each[mode] / each["off"] - 1.0) for each in rounds])
    rng = np.random.default_rng(1)
    means = rng.choice(ratios, size=(4000, len(ratios))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(ratios.mean()), float(low), float(high)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Bring everything up, run all rounds, and give the figures."""
    from serving import separate_cores

    from shardwright.runtime.threads import worker_environment

    async with contextlib.AsyncExitStack() as stack:
        workers = []
        for core in separate_cores(2):
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {core})  # its children begin with it
            try:
                workers.append(await stack.enter_async_context(process("worker", **worker_environment())))
            finally:
                os.sched_setaffinity(0, before)
        collector = await stack.enter_async_context(process("collector"))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        session = await _open_session(stack, workers, await line_of(collector), Path(folder), options.model)
        url = await _serve(stack, session)
        reader = await stack.enter_async_context(process("reader", url))
        switch = Switch(session, [worker.pid for worker in workers], reader)

        async def one(mode: str, seed: int, seconds: float) -> np.ndarray:
            await switch.set(mode)
            before = max((step.number for step in session.engine.observatory.steps()), default=0)
            gaps = await block(
                session.engine, session.vocab_size, seconds=seconds, concurrency=options.concurrency, seed=seed
            )
            steps = session.engine.observatory.steps(before)
            is_seen = any(step.returned_at is not None and step.stages for step in steps)
            if is_seen != (mode != "off"):
                raise RuntimeError(f"{len(steps)} steps were seen in a block with watching {mode}")
            return gaps

        for mode in MODES:
            await one(mode, 0, min(options.seconds, 3.0))  # warm up
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(options.rounds):
            order = MODES if number % 2 == 0 else MODES[::-1]
            turn = number // 2 % len(order)
            found = {}
            for mode in (*order[turn:], *order[:turn]):
                gaps = await one(mode, number + 1, options.seconds)
                found[mode] = {figure.name: figure.of(gaps) for figure in FIGURES} | {"tokens": len(gaps)}
            rounds.append(found)
            print(".", end="", flush=True, file=sys.stderr)
        print(file=sys.stderr)
    return _summary(options, rounds, num_spans=int(await line_of(collector)))


async def _open_session(
    stack: contextlib.AsyncExitStack, workers: Sequence[Any], collector: str, folder: Path, model: str
) -> Any:
    from serving import Quiet

    from shardwright.config import MasterConfig
    from shardwright.runtime.registry import WorkerEntry
    from shardwright.runtime.session import open_session
    from shardwright.transport.grpc import GrpcTransport

    entries = [
        WorkerEntry(username=f"w{index}", ip="127.0.0.1", port=int(await line_of(worker)))
        for index, worker in enumerate(workers)
    ]
    config = MasterConfig(
        model=model,
        metrics=folder / "metrics.json",
        probe_interval_s=0.0,
        prefix_cache=False,  # every block computes its prompts
        otlp_endpoint=collector,
    )
    return await stack.enter_async_context(open_session(config, entries, listener=Quiet(), transport=GrpcTransport()))


async def _serve(stack: contextlib.AsyncExitStack, session: Any) -> str:
    from shardwright.api.app import create_app
    from shardwright.api.server import listen, serve
    from shardwright.config import ServeConfig

    config = ServeConfig(port=0, shutdown_timeout_s=0.5)
    listener = stack.enter_context(contextlib.closing(listen(config)))
    stop, listening = asyncio.Event(), asyncio.Event()
    app = create_app(session.serve_as("bench"), config)
    serving = asyncio.create_task(
        serve(app, config, stop=stop, listener=listener, on_listening=lambda _: listening.set())
    )

    async def end() -> None:
        stop.set()
        await serving

    stack.push_async_callback(end)
    await listening.wait()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def _summary(
    options: argparse.Namespace, rounds: Sequence[dict[str, dict[str, float]]], *, num_spans: int
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "model": options.model,
        "rounds": len(rounds),
        "seconds": options.seconds,
        "concurrency": options.concurrency,
        "spans": num_spans,
        "modes": {},
    }
    for mode in MODES:
        told: dict[str, Any] = {"tokens": int(sum(each[mode]["tokens"] for each in rounds))}
        for figure in FIGURES:
            told[f"{figure.name}_ms"] = 1000 * statistics.median(each[mode][figure.name] for each in rounds)
            if mode != "off":
                values = [{name: each[name][figure.name] for name in MODES} for each in rounds]
                percent, low, high = change(values, mode)
                told[f"{figure.name}_change_percent"] = {"mean": percent, "low": low, "high": high}
        summary["modes"][mode] = told
    return summary


def show(summary: dict[str, Any]) -> None:
    """The figures as a table."""
    print(
        f"{summary['model']}, two workers with a core each, {summary['concurrency']} at once, "
        f"{summary['rounds']} rounds of {summary['seconds']:g} s for each mode, {summary['spans']} spans collected"
    )
    print(f"{'':8}{'ms/token':>10}{'median':>10}{'p99':>10}   change of the mean (95 %)      of the median (95 %)")
    for mode, told in summary["modes"].items():
        row = f"{mode:8}{told['mean_ms']:10.2f}{told['median_ms']:10.2f}{told['p99_ms']:10.2f}"
        if mode != "off":
            for name in ("mean", "median"):
                each = told[f"{name}_change_percent"]
                row += f"   {each['mean']:+6.2f} % ({each['low']:+.2f} to {each['high']:+.2f})"
        print(row)


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        run_worker_process()
        return
    if sys.argv[1:2] == ["reader"]:
        asyncio.run(run_reader_process(sys.argv[2]))
        return
    if sys.argv[1:2] == ["collector"]:
        run_collector_process()
        return
    from shardwright.cli import aio

    end_in_order()
    parser = argparse.ArgumentParser(description="What being watched costs a decode step.")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each block")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at once")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    summary = aio.run(measure(options))
    show(summary)
    if options.json is not None:
        options.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
