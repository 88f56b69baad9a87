"""Lets a benchmark that is told to end, end what it started."""

from __future__ import annotations

import signal
import sys
from types import TracebackType


def end_in_order() -> None:
    """Let SIGTERM do what Ctrl-C does, and both without a traceback.

    Also where a shell started the program in the background, for which Ctrl-C would do nothing.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.excepthook = _tell


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
