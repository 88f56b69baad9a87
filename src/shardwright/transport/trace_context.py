"""Which distributed trace a call belongs to, as W3C's `traceparent` beside the call's messages.

A client that has a `trace_parent` names it on the calls that belong to a pipeline: InitializeWorker, ProcessLayers and
Tokens. The service finds it while it answers such a call. It is a hint: nothing depends on it, and what is no
`traceparent` is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Final

TRACE_KEY: Final = "traceparent"

_FORMAT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_INCOMING: Final[ContextVar[str]] = ContextVar("trace_parent", default="")


def incoming_trace_parent() -> str:
    """The `traceparent` of the call that is being answered; empty without one."""
    return _INCOMING.get()


def take_trace_parent(metadata: Mapping[str, object]) -> None:
    """Remember what a call brought, for the task that answers it and the tasks that it starts."""
    value = str(metadata.get(TRACE_KEY, ""))
    _INCOMING.set(value if _FORMAT.fullmatch(value) else "")


def trace_metadata(trace_parent: str) -> tuple[tuple[str, str], ...]:
    """What a call brings; nothing for a client without a trace."""
    return ((TRACE_KEY, trace_parent),) if trace_parent else ()
