"""What all tests share: those that need a GPU are left out, and said to be, where there is none."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from shared_kernels import KERNELS

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they
    # start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Let all processes of this run find one folder of compiled kernels (`real_processes.py`); xdist's inherit it."""
    if not hasattr(config, "workerinput"):
        os.environ[KERNELS] = tempfile.mkdtemp(prefix="shardwright-test-kernels-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it; the tests are over."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(KERNELS), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests on machines without an NVIDIA device; torch is not imported to find out."""
    if any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg")):  # Linux's, and Windows' inside WSL
        return
    skip = pytest.mark.skip(reason="this machine has no GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
