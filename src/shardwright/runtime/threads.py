"""How compute threads wait. Several stages on one machine share its cores: a thread that spins takes one away."""

from __future__ import annotations


def short_waiting() -> dict[str, str]:
    """Environment that makes OpenMP threads spin for a moment between parallel regions, then sleep.

    Long enough for the gap between two operations of a layer, short enough to be over when another stage's turn comes.
    It must be set before torch is imported, since the OpenMP library reads it once when it is loaded. Measured in
    `docs/decisions/0004-threads-and-waiting.md`.
    """
    return {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"}
