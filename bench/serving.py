"""Brings up what is measured: workers that share the machine or have a core each, servers, sessions, relays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from shardwright.config import MasterConfig
from shardwright.runtime.launcher import LocalWorkers
from shardwright.runtime.registry import Registry, WorkerEntry
from shardwright.runtime.session import OpenModel, Session, open_session
from shardwright.transport.base import Transport
from shardwright.transport.grpc import GrpcTransport

RELAY = Path(__file__).resolve().parents[1] / "tests" / "support" / "relay.py"
sys.path[:0] = [str(Path(__file__).resolve().parent), str(RELAY.parent)]

from compare import Quiet  # noqa: E402
from relay import AroundRelays  # noqa: E402

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0

_SERVING = re.compile(r"^Serving .* on (http://\S+)")


# --- workers -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def sharing_workers(count: int) -> AsyncIterator[Sequence[WorkerEntry]]:
    """Workers that may all use every core, as `--local-workers` starts them."""
    async with LocalWorkers(count) as workers:
        yield workers.entries


@contextlib.asynccontextmanager
async def pinned_workers(*cores: Sequence[int]) -> AsyncIterator[Sequence[WorkerEntry]]:
    """A worker for each group of cores, with a thread for each of them and no other core.

    Without groups two workers with a core and a thread each, as if they were two machines of one core.
    """
    async with contextlib.AsyncExitStack() as stack:
        entries = []
        for number, group in enumerate(cores or [[core] for core in separate_cores(2)]):
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, group)  # this thread's alone; its children begin with it
            try:
                local = LocalWorkers(1, options=["--threads", str(len(group))])
                stack.push_async_callback(local.stop)
                await local.start()
            finally:
                os.sched_setaffinity(0, before)
            (pid,) = local.pids
            assert psutil.Process(pid).cpu_affinity() == list(group), "a worker must stay on its cores"
            (entry,) = await local.listening()
            name = f"core-{'+'.join(map(str, group))}"
            name = name if name not in {each.username for each in entries} else f"{name}-{number}"
            entries.append(WorkerEntry(username=name, ip=entry.ip, port=entry.port))
        yield entries


def separate_cores(count: int) -> list[int]:
    """So many cores that this process may use, no two of which are one core's hyperthreads. Raises `RuntimeError`."""
    found: dict[str, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text("ascii")
        except OSError:
            siblings = str(core)
        found.setdefault(siblings, core)
    if len(found) < count:
        raise RuntimeError(f"pinned workers need {count} cores; this process may use {len(found)}")
    return list(found.values())[:count]


# --- sessions ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def session_on(
    config: MasterConfig, model: OpenModel, entries: Sequence[WorkerEntry], *, transport: Transport | None = None
) -> AsyncIterator[Session]:
    """The model on these workers, with the master in this process."""
    opening = open_session(
        config, entries, listener=Quiet(), transport=transport or GrpcTransport(), model=model, write_metrics=False
    )
    async with opening as session:
        yield session


# --- servers -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """A running `shardwright serve`."""

    url: str
    pid: int

    def cpu_s(self) -> float:
        """CPU time of its process so far, user and system; its workers' is not in it."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system


@contextlib.asynccontextmanager
async def server_on(config: MasterConfig, entries: Sequence[WorkerEntry] | None) -> AsyncIterator[Server]:
    """`shardwright serve` on these workers, or on two local ones that it starts itself; in a process of its own.

    Raises `RuntimeError` with its last words when it ends before it serves.
    """
    with tempfile.TemporaryDirectory(prefix="shardwright-bench-") as name:
        folder = Path(name)
        command = [
            *(sys.executable, "-m", "shardwright", "serve", "--model", config.model, "--dtype", config.dtype),
            *("--served-model-name", "bench", "--port", "0", "--kv-tokens", str(config.kv_tokens)),
        ]
        if entries is None:
            command += ["--local-workers", "2"]
        else:
            registry = Registry(folder / "workers.json")
            for entry in entries:
                registry.add(entry)
            command += ["--registry", str(registry.path)]
        with (folder / "log").open("w+b") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=folder,  # its metrics.json goes there
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=own_environment(),
            )
            try:
                url = await _served_url(process)
                if url is None:
                    log.seek(0)
                    words = log.read().decode(errors="replace").strip().splitlines()[-5:]
                    raise RuntimeError(f"shardwright serve did not come up: {' | '.join(words)}")
                yield Server(url, process.pid)
            finally:
                await _stop(process)


def own_environment() -> Mapping[str, str]:
    """This process's environment without settings that would change what is measured."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SHARDWRIGHT_")}


async def _served_url(process: asyncio.subprocess.Process) -> str | None:
    assert process.stdout is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            while line := await process.stdout.readline():
                if match := _SERVING.match(line.decode(errors="replace")):
                    return match[1]
    return None


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


# --- relays ------------------------------------------------------------------------------------------


class RelayProcess:
    """`tests/support/relay.py` in a process of its own, so that it waits for no master's event loop."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address

    async def num_bytes(self) -> int:
        """Bytes that went through it, both ways."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"counts\n")
        _, there, back = (await self._process.stdout.readline()).split()
        return int(there) + int(back)


@contextlib.asynccontextmanager
async def relay_to(address: str, *, delay_s: float, mbit_s: float | None = None) -> AsyncIterator[RelayProcess]:
    """A relay to a worker that delays what goes through it and limits its bandwidth, each way."""
    limit = () if mbit_s is None else ("--mbit-s", str(mbit_s))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(RELAY), "--to", address, "--delay-ms", str(delay_s * 1e3), *limit),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = (await process.stdout.readline()).decode()
        yield RelayProcess(process, said.removeprefix("listening on ").strip())
    finally:
        process.stdin.close()
        await _stop(process)


@contextlib.asynccontextmanager
async def delayed_session(
    config: MasterConfig,
    model: OpenModel,
    entries: Sequence[WorkerEntry],
    *,
    delay_s: float,
    mbit_s: float | None = None,
) -> AsyncIterator[tuple[Session, list[RelayProcess]]]:
    """The model on these workers with a delay on the links between them, and on none of the master's.

    The master knows each worker by its relay's address, and passes that on to the worker before it, but goes around
    the relay itself.
    """
    async with contextlib.AsyncExitStack() as stack:
        relays, renamed, around = [], [], {}
        for entry in entries:
            relay = await stack.enter_async_context(relay_to(entry.address, delay_s=delay_s, mbit_s=mbit_s))
            relays.append(relay)
            around[relay.address] = entry.address
            host, _, port = relay.address.rpartition(":")
            renamed.append(WorkerEntry(username=entry.username, ip=host, port=int(port)))
        transport = AroundRelays(GrpcTransport(), around)
        yield await stack.enter_async_context(session_on(config, model, renamed, transport=transport)), relays
