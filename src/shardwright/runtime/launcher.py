"""Starts worker processes on this machine and takes them down again, whatever happens.

A local worker listens on a free loopback port and ends when its standard input closes, so that it can't outlive
the process that started it, not even one that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Self

from shardwright.errors import ClusterError, ConfigError, UserError
from shardwright.runtime.registry import WorkerEntry
from shardwright.runtime.threads import worker_environment

START_TIMEOUT_S = 120.0
RANKS_START_TIMEOUT_S = 600.0
"""With several ranks, whose kernel may have to be compiled first, on a machine that has other things to do."""
STOP_TIMEOUT_S = 5.0
LOOPBACK = "127.0.0.1"

MAX_RESTARTS = 5
"""So often in a row is a worker started again that died; one that lived for `STABLE_S` begins a new row."""

FIRST_RESTART_S = 0.5
"""Before the first start of a row; doubled each time."""

STABLE_S = 60.0

log = logging.getLogger(__name__)

_ANNOUNCEMENT = re.compile(r"Worker node started on port (\d+)")


class LocalWorkers:
    """A number of worker processes on this machine, as an async context manager."""

    def __init__(
        self,
        count: int,
        *,
        options: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        keep: bool = False,
    ) -> None:
        """`options` are added to each worker's command line; `environ` to its environment.

        With `keep`, a worker that dies after it listened is started again on its port, a few times in a row.
        """
        self._count = count
        self._options = tuple(options)
        self._environ = dict(environ or {})
        self._processes: list[asyncio.subprocess.Process] = []
        self._logs: list[IO[bytes]] = []
        self._keep = keep
        self._keepers: list[asyncio.Task[None]] = []
        self.entries: list[WorkerEntry] = []

    async def __aenter__(self) -> Self:
        """Start all workers and wait until each listens. Raises `ClusterError` as `listening` does."""
        try:
            await self.start()
            await self.listening()
        except BaseException:
            await self.stop()
            raise
        return self

    async def start(self) -> None:
        """Start the processes without waiting for them; `stop` must follow, whatever happens."""
        for index in range(self._count):
            await self._start(index, port=0)

    async def listening(self) -> Sequence[WorkerEntry]:
        """Wait until each worker listens; gives their addresses.

        Raises `ClusterError` with a worker's last words if one dies before that.
        """
        timeout_s = RANKS_START_TIMEOUT_S if "--tensor-parallel" in self._options else START_TIMEOUT_S
        try:
            async with asyncio.timeout(timeout_s):
                ports = await asyncio.gather(*(self._port(i) for i in range(self._count)))
        except TimeoutError:
            raise ClusterError(f"a local worker did not listen within {timeout_s:.0f} s") from None
        self.entries = [WorkerEntry(username=f"local-{i}", ip=LOOPBACK, port=port) for i, port in enumerate(ports)]
        if self._keep and not self._keepers:
            self._keepers = [
                asyncio.create_task(self._keep_alive(index, port), name=f"keep local worker {index}")
                for index, port in enumerate(ports)
            ]
        return self.entries

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order of `entries`."""
        return [process.pid for process in self._processes]

    async def stop(self) -> None:
        """End every worker: by closing its input and SIGTERM, then by SIGKILL. Safe to call twice."""
        keepers, self._keepers = self._keepers, []
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        processes, self._processes = self._processes, []
        await asyncio.shield(asyncio.gather(*(_stop(process) for process in processes)))
        for log in self._logs:
            log.close()
        self._logs.clear()

    async def _keep_alive(self, index: int, port: int) -> None:
        """Start a worker again whenever it dies; give it up when it dies again and again."""
        loop = asyncio.get_running_loop()
        num_deaths = 0
        while True:
            began = loop.time()
            code = await self._processes[index].wait()
            num_deaths = 1 if loop.time() - began > STABLE_S else num_deaths + 1
            if num_deaths > MAX_RESTARTS:
                log.error("local worker %d ended with exit code %d again; it is not started any more", index, code)
                return
            delay_s = FIRST_RESTART_S * 2 ** (num_deaths - 1)
            log.warning("local worker %d ended with exit code %d; starting it again in %g s", index, code, delay_s)
            await asyncio.sleep(delay_s)
            await self._start(index, port=port)

    async def _start(self, index: int, *, port: int) -> None:
        output = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the worker
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "shardwright", "worker",
                "--host", LOOPBACK, "--port", str(port), "--exit-with-stdin", *self._options,
                stdin=asyncio.subprocess.PIPE,
                # Of a worker that is started again nobody reads the port: a pipe would fill up.
                stdout=asyncio.subprocess.DEVNULL if port else asyncio.subprocess.PIPE,
                stderr=output,
                env={**worker_environment(), **os.environ, **self._environ},
                start_new_session=True,  # Ctrl-C reaches the master alone, which then ends its workers in order
            )  # fmt: skip
        except BaseException:
            output.close()
            raise
        if index == len(self._processes):
            self._processes.append(process)
            self._logs.append(output)
            return
        self._processes[index] = process
        self._logs[index].close()
        self._logs[index] = output

    async def _port(self, index: int) -> int:
        process = self._processes[index]
        assert process.stdout is not None
        while line := await process.stdout.readline():
            if match := _ANNOUNCEMENT.search(line.decode(errors="replace")):
                return int(match[1])
        code = await process.wait()
        log = self._logs[index]
        log.seek(0)
        words = log.read().decode(errors="replace").strip().splitlines()[-5:]
        if code == UserError.exit_code and words:  # its own sentence says what to change
            raise ConfigError(words[-1].removeprefix("error: "))
        raise ClusterError(f"local worker {index} ended with exit code {code} before it listened: {' | '.join(words)}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, BrokenPipeError, ConnectionResetError):
            process.terminate()
            if process.stdin is not None:
                process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
