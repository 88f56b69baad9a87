"""What every kernel needs that is compiled where it is used: the CPU's identity, a locked folder, a compiler to end.

Knows processes and files; nothing of what is compiled, and nothing of torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

LOCK = "lock"
"""The file in a folder of kernels that whoever writes there holds. It is never removed: others may wait for it."""

_builds: list[subprocess.Popen[bytes]] = []  # that run now


class BuildTimeoutError(Exception):
    """A compiler took too long and was ended; never leaves this room."""


def cpu_identity() -> bytes:
    """What tells apart CPUs for which a compiler makes different code; folders may be shared by machines."""
    wanted = (b"model name", b"flags", b"Features", b"CPU part", b"CPU implementer")
    try:
        first, _, _ = Path("/proc/cpuinfo").read_bytes().partition(b"\n\n")
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return b"\n".join(line for line in first.splitlines() if line.startswith(wanted))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time, and one thread of it, write in this folder, which exists.

    The system drops the lock of a process that dies.
    """
    with (folder / LOCK).open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def locked_if_free(folder: Path) -> Iterator[bool]:
    """The same without waiting: whether nobody else holds the lock."""
    with (folder / LOCK).open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run_build(command: Sequence[str], *, timeout_s: float | None = None) -> tuple[int, str]:
    """Run a compiler to its end; gives its exit code and what it wrote to standard error.

    `stop_building` ends it from another thread. Its standard input closes when this process is gone, however that
    came about. Raises `OSError` where it can't be started and `BuildTimeoutError` after `timeout_s`.
    """
    reads, writes = os.pipe()
    try:
        process = subprocess.Popen(  # noqa: S603  the callers look it up, or it is our own
            command,
            stdin=reads,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,  # a compiler has children of its own, which end with it only if told together
        )
        _builds.append(process)
        try:
            _, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as exc:
            _end(process)
            process.communicate()
            raise BuildTimeoutError(f"{command[0]} took longer than {timeout_s:g} s") from exc
        finally:
            _builds.remove(process)
    finally:
        os.close(reads)
        os.close(writes)
    return process.returncode, errors.decode(errors="replace")


def stop_building() -> None:
    """End the compilers that this process started, whichever thread waits for them: the process is about to end."""
    for process in _builds.copy():
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
