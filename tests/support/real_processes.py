"""Starts real masters and workers for tests, reads what they say, and ends every one of them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
from shared_kernels import share_kernels

ROOT = Path(__file__).resolve().parents[2]
MARK = "TEST_RUN_MARK"  # in the environment of everything that a test starts, and of what that starts
START_TIMEOUT_S = 90.0  # the machine may be busy with other tests


class Running:
    """One process with its standard output and error read line by line as they come."""

    def __init__(self, argv: Sequence[str], *, cwd: Path, environ: dict[str, str]) -> None:
        self.mark = environ[MARK]
        self.process = subprocess.Popen(
            [*argv],
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._lines: dict[str, list[str]] = {"out": [], "err": []}
        self._news: queue.Queue[None] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (("out", self.process.stdout), ("err", self.process.stderr))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, name, stream):
        with stream:
            for line in stream:
                self._lines[name].append(line.decode(errors="replace"))
                self._news.put(None)
        self._news.put(None)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return "".join(self._lines["out"])

    @property
    def err(self) -> str:
        return "".join(self._lines["err"])

    def wait_for(self, pattern: str, *, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """Wait until a line on either stream matches."""
        deadline = time.monotonic() + timeout_s
        while True:
            over = all(not thread.is_alive() for thread in self._threads)
            if match := re.search(pattern, self.out + self.err, re.MULTILINE):
                return match
            assert not over, f"ended with {self.process.wait()} before it said {pattern!r}:\n{self.out}{self.err}"
            assert time.monotonic() < deadline, f"did not say {pattern!r} in {timeout_s} s:\n{self.out}{self.err}"
            with contextlib.suppress(queue.Empty):
                self._news.get(timeout=0.2)

    def wait(self, *, timeout_s: float = START_TIMEOUT_S) -> int:
        """The exit code, once the process is over and all it wrote was read."""
        code = self.process.wait(timeout_s)
        for thread in self._threads:
            thread.join(timeout_s)
        return code

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def descendants(self) -> list[psutil.Process]:
        """What this process started and what that started, also after it is gone."""
        return [process for process in marked(self.mark) if process.pid != self.pid]


def marked(mark: str) -> list[psutil.Process]:
    """Every living process whose environment carries the mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return found


class Processes:
    """Starts processes in one folder and ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._all: list[Running] = []

    def run(self, *argv: object, program: Sequence[str] = ("-m", "shardwright"), **environ: str) -> Running:
        """Start `shardwright ...` (or another program of this Python) in the folder."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHARDWRIGHT_")}
        if "PATH" not in environ:  # else it may find a compiler of the test's own
            share_kernels(argv)
        settings = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1", MARK: secrets.token_hex(8)}
        running = Running(
            [sys.executable, *program, *(str(arg) for arg in argv)],
            cwd=self.folder,
            environ={**inherited, **settings, **environ},
        )
        self._all.append(running)
        return running

    def worker(self, *options: object, port: int = 0) -> tuple[Running, int]:
        """A worker on loopback, started but perhaps not listening yet; `port_of` waits for that."""
        running = self.run("worker", "--host", "127.0.0.1", "--port", port, "--threads", 1, *options)
        return running, port

    def workers(self, count: int, *options: object) -> list[tuple[Running, int]]:
        """Workers that listen, each with its port."""
        started = [self.worker(*options)[0] for _ in range(count)]
        return [(running, port_of(running)) for running in started]

    def close(self) -> None:
        """End everything that was started here, by process id."""
        for running in self._all:
            for process in [*running.descendants(), *([running.process] if running.process.poll() is None else [])]:
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    process.kill()
            running.wait()


def port_of(worker: Running) -> int:
    """The port that a worker said it listens on."""
    return int(worker.wait_for(r"^Worker node started on port (\d+)$")[1])


def write_registry(path: Path, ports: Sequence[int]) -> Path:
    """A workers.json with worker1, worker2 and so on."""
    entries = [{"username": f"worker{n}", "ip": "127.0.0.1", "port": port} for n, port in enumerate(ports, start=1)]
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def eventually(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> bool:
    """Whether the condition becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def processes_in(folder: Path) -> Iterator[Processes]:
    """Processes of a test or of a module; all are gone when the block ends."""
    started = Processes(folder)
    try:
        yield started
    finally:
        started.close()
