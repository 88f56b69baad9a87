"""The commands about workers: be one, register one, list them with their live state."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from shardwright import __version__
from shardwright.cli import aio, figures, options
from shardwright.cli.console import one_sentence, say, stdout_console, warn
from shardwright.config import DEFAULT_PORT, GIB, MasterConfig, WorkerConfig
from shardwright.errors import ShardwrightError
from shardwright.runtime.registry import Change, Registry, WorkerEntry
from shardwright.runtime.threads import short_waiting
from shardwright.types import HeartbeatReport, WorkerDescription

if TYPE_CHECKING:
    from shardwright.transport.base import Transport

PROBE_TIMEOUT_S = 3.0


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands under the application."""
    app.command("worker")(worker)
    app.command("register")(register)
    app.command("workers")(workers)


def worker(
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: 0.0.0.0).", metavar="HOST")] = None,
    port: Annotated[
        int | None, typer.Option(help=f"Port to listen on; 0: a free one (default: {DEFAULT_PORT}).", metavar="PORT")
    ] = None,
    device: options.Device = None,
    threads: options.Threads = None,
    tensor_parallel: options.TensorParallel = None,
    all_reduce: Annotated[
        str | None,
        typer.Option(
            "--all-reduce",
            metavar="HOW",
            help="How CPU ranks add up: shm (DeepSpeed's kernel; needs g++ and ninja), gloo, auto (default: auto).",
        ),
    ] = None,
    memory_gib: options.MemoryGib = None,
    offload: options.Offload = None,
    cache_dir: options.CacheDir = None,
    otlp_endpoint: options.OtlpEndpoint = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port", metavar="PORT", help="Answer Prometheus at this port; 0: a free one (default: at none)."
        ),
    ] = None,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
    config: options.ConfigFile = None,
    debug: options.Debug = False,
) -> None:
    """Offer this machine as a worker until Ctrl-C.

    Traffic is not encrypted: listen only where you trust everybody who can connect.

    [cyan]shardwright worker[/cyan]

    [cyan]shardwright worker --port 50052 --device cuda:1[/cyan]

    [cyan]shardwright worker --tensor-parallel 2[/cyan]

    [cyan]shardwright worker --offload nvme[/cyan]   for a model larger than all memory: slow, bound by the disk
    """
    settings = options.worker_config(
        config,
        host=host,
        port=port,
        device=device,
        threads=threads,
        tensor_parallel=tensor_parallel,
        all_reduce=all_reduce,
        memory_bytes=None if memory_gib is None else int(memory_gib * GIB),
        offload=offload,
        cache_dir=cache_dir,
        otlp_endpoint=otlp_endpoint,
        metrics_port=metrics_port,
    )
    if exit_with_stdin and metrics_port is None and settings.metrics_port is not None:
        # Workers that one program starts on one machine read the same settings: a port is there for one of them.
        settings = replace(settings, metrics_port=0)

    def announce(address: str, metrics_address: str) -> None:
        # Whoever starts workers from a program reads this line to learn the port.
        print(f"Worker node started on port {address.rpartition(':')[2]}", flush=True)
        if metrics_address:
            say(f"metrics at http://{metrics_address}/metrics")

    serving = serve_worker(settings, announce=announce)
    try:
        aio.run(aio.until_stdin_closes(serving) if exit_with_stdin else serving)
    except KeyboardInterrupt:
        say("worker stopped")


def register(
    ip: Annotated[
        str, typer.Option("--ip", metavar="ADDRESS", help="Where the worker is reached: IP address or host name.")
    ],
    username: Annotated[str, typer.Option("--username", metavar="NAME", help="What to call the worker.")],
    port: Annotated[int, typer.Option("--port", metavar="PORT", help="The worker's port.")] = DEFAULT_PORT,
    registry: options.RegistryFile = None,
    config: options.ConfigFile = None,
    debug: options.Debug = False,
) -> None:
    """Add a worker to the registry (workers.json).

    A worker that does not answer yet is registered all the same, with a warning. An address that is there
    already is not added twice: only its name changes.

    [cyan]shardwright register --ip 192.168.1.101 --username worker1[/cyan]
    """
    settings = options.master_config(config, registry=registry)
    entry = WorkerEntry(username=username, ip=ip, port=port)
    change = Registry(settings.registry).add(entry)
    what = {
        Change.ADDED: f"Registered {entry.username} at {entry.address} in {settings.registry}",
        Change.RENAMED: f"{entry.address} was registered already; it is called {entry.username} now",
        Change.UNCHANGED: f"{entry.username} at {entry.address} was registered already",
    }
    print(what[change], flush=True)
    probe = aio.run(probe_all((entry,), grpc_transport(settings)))[0]
    if probe.problem:
        warn(f"it is registered, but there is {probe.problem}")


def workers(
    registry: options.RegistryFile = None,
    as_json: options.AsJson = False,
    config: options.ConfigFile = None,
    debug: options.Debug = False,
) -> None:
    """List the registered workers with their live state."""
    settings = options.master_config(config, registry=registry)
    entries = Registry(settings.registry).load()
    if not entries and not as_json:
        say(f"{settings.registry} lists no worker; add one with: shardwright register --ip ADDRESS --username NAME")
        return
    probes = aio.run(probe_all(entries, grpc_transport(settings))) if entries else []
    if as_json:
        print(json.dumps([probe.as_json() for probe in probes], indent=2))
        return
    console = stdout_console()
    console.print(_table(probes))
    for remark in _remarks(probes):
        console.print(remark, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a worker answered, or why it did not."""

    entry: WorkerEntry
    round_trip_s: float | None = None
    description: WorkerDescription | None = None
    report: HeartbeatReport | None = None
    problem: str = ""

    def as_json(self) -> dict[str, object]:
        """For `workers --json`: numbers in bytes, seconds and percent; null where nothing answered."""
        about, report = self.description, self.report
        return {
            **self.entry.as_json(),
            "alive": not self.problem,
            "problem": self.problem or None,
            "round_trip_s": self.round_trip_s,
            "device": about and about.device,
            "device_name": about and about.device_name,
            "memory_total_bytes": about and about.memory_total_bytes,
            "memory_available_bytes": about and about.memory_available_bytes,
            "num_ranks": about and about.num_ranks,
            "read_bandwidth": about and about.read_bandwidth,
            "version": about and about.package_version,
            "epoch": report and report.epoch,
            "queue_depth": report and report.queue_depth,
            "steps_done": report and report.steps_done,
            "cpu_utilization": report and report.cpu_utilization,
            "gpu_utilization": report and report.gpu_utilization,
        }


def grpc_transport(config: MasterConfig) -> Transport:
    """The transport that real workers speak; imported late because grpc takes a while to load."""
    from shardwright.transport.grpc import GrpcTransport

    return GrpcTransport(max_frame_bytes=config.max_frame_bytes)


async def serve_worker(config: WorkerConfig, *, announce: Callable[[str, str], None]) -> None:
    """Serve until cancelled; imported late because torch takes seconds to load, and reads how to wait when it does."""
    for name, value in short_waiting().items():
        os.environ.setdefault(name, value)
    from shardwright.runtime.worker_process import run_worker

    await run_worker(config, announce=announce, say=say)


async def probe_all(entries: tuple[WorkerEntry, ...], transport: Transport) -> list[Probe]:
    """Ask all workers at once who they are and how they do; gives one probe an entry, in the same order."""
    return list(await asyncio.gather(*(_probe(entry, transport) for entry in entries)))


async def _probe(entry: WorkerEntry, transport: Transport) -> Probe:
    client = transport.connect(entry.address)
    try:
        description = await client.describe(timeout_s=PROBE_TIMEOUT_S)
        started = time.monotonic()
        report = await client.heartbeat(timeout_s=PROBE_TIMEOUT_S)
        return Probe(entry=entry, description=description, report=report, round_trip_s=time.monotonic() - started)
    except ShardwrightError as exc:
        return Probe(entry=entry, problem=one_sentence(exc))
    finally:
        await client.close()


def _table(probes: list[Probe]) -> Table:
    table = Table()
    for name in ("worker", "address", "state", "device", "memory free", "use", "round trip"):
        table.add_column(name, overflow="fold")
    for probe in probes:
        about, report = probe.description, probe.report
        if about is None or report is None:
            table.add_row(probe.entry.username, probe.entry.address, "[red]no answer[/red]", *["-"] * 4)
            continue
        use = f"CPU {report.cpu_utilization:.0f} %"
        if report.gpu_utilization is not None:
            use = f"GPU {report.gpu_utilization:.0f} %"
        table.add_row(
            probe.entry.username,
            probe.entry.address,
            "[green]idle[/green]" if report.epoch == 0 else f"[yellow]in use, {report.queue_depth} waiting[/yellow]",
            f"{figures.with_ranks(about.device, about.num_ranks)} ({about.device_name})",
            f"{about.memory_available_bytes / GIB:.1f} of {about.memory_total_bytes / GIB:.1f} GiB",
            use,
            f"{(probe.round_trip_s or 0.0) * 1000:.1f} ms",
        )
    return table


def _remarks(probes: list[Probe]) -> list[str]:
    """What needs more words than a cell has: why a worker does not answer, and versions that differ from ours."""
    remarks = []
    for probe in probes:
        if probe.problem:
            remarks.append(f"{probe.entry.username}: {probe.problem}")
        elif probe.description is not None and probe.description.package_version != __version__:
            theirs = probe.description.package_version
            remarks.append(f"{probe.entry.username} runs shardwright {theirs}, this is {__version__}")
    return remarks
