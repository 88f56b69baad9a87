"""How compute threads wait. Several stages on one machine share its cores: a thread that spins takes one away."""

from __future__ import annotations


def passive_waiting() -> dict[str, str]:
    """Environment that makes OpenMP threads sleep, not spin, between parallel regions.

    It must be set before torch is imported, since the OpenMP library reads it once when it is loaded. Measured in
    `docs/decisions/`.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
