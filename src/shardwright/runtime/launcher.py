"""Starts worker processes on this machine and takes them down again, whatever happens.

A local worker listens on a free loopback port and ends when its standard input closes, so that it can't outlive
the process that started it, not even one that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
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

_ANNOUNCEMENT = re.compile(r"Worker node started on port (\d+)")


class LocalWorkers:
    """A number of worker processes on this machine, as an async context manager."""

    def __init__(self, count: int, *, options: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> None:
        """`options` are added to each worker's command line; `environ` to its environment."""
        self._count = count
        self._options = tuple(options)
        self._environ = dict(environ or {})
        self._processes: list[asyncio.subprocess.Process] = []
        self._logs: list[IO[bytes]] = []
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
        for _ in range(self._count):
            await self._start()

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
        processes, self._processes = self._processes, []
        await asyncio.shield(asyncio.gather(*(_stop(process) for process in processes)))
        for log in self._logs:
            log.close()
        self._logs.clear()

    async def _start(self) -> None:
        log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the worker
        self._logs.append(log)
        self._processes.append(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "shardwright", "worker",
                "--host", LOOPBACK, "--port", "0", "--exit-with-stdin", *self._options,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**worker_environment(), **os.environ, **self._environ},
                start_new_session=True,  # Ctrl-C reaches the master alone, which then ends its workers in order
            )
        )  # fmt: skip

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
