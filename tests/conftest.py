"""What all tests share: those that need a GPU are left out, and said to be, where there is none."""

import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they
    # start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests on machines without an NVIDIA device; torch is not imported to find out."""
    if any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg")):  # Linux's, and Windows' inside WSL
        return
    skip = pytest.mark.skip(reason="this machine has no GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
