"""How long a worker is away: small and large pings, timed. Knows clients; nothing of steps or stages."""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING, Final

from shardwright.types import LinkMeasures

if TYPE_CHECKING:
    from shardwright.transport.base import WorkerClient

SMALL_PING: Final = bytes(8)
PING_TIMEOUT_S: Final = 30.0
PING_INTERVAL_S: Final = 1.0
"""An open step link is timed so often."""

_ROUND_TRIPS: Final = 15
_TRANSFERS: Final = 5
_TRANSFER_LIMIT_S: Final = 2.0
_NOISE_BYTES: Final = 1 << 16


async def round_trip(client: WorkerClient, *, timeout_s: float = PING_TIMEOUT_S) -> float:
    """Seconds there and back of a few bytes. Raises what the client raises."""
    begin = time.perf_counter()
    await client.ping(SMALL_PING, reply_bytes=len(SMALL_PING), timeout_s=timeout_s)
    return time.perf_counter() - begin


async def measure_link(client: WorkerClient, sizes: tuple[int, ...]) -> LinkMeasures:
    """Time the way to a worker: medians of small messages, and of transfers of each size that are acknowledged.

    Each size gets one transfer that does not count, so that the connection is open and its window wide. Takes a few
    seconds on a slow link: further transfers of a size are left out after two. Raises what the client raises.
    """
    await round_trip(client)
    trips = [await round_trip(client) for _ in range(_ROUND_TRIPS)]
    noise = os.urandom(_NOISE_BYTES)  # links that compress have nothing to gain from it
    transfers = []
    for size in sizes:
        data = (noise * (size // _NOISE_BYTES + 1))[:size]
        transfers.append((size, await _transfer_time(client, data)))
    return LinkMeasures(round_trip_s=statistics.median(trips), transfers=tuple(transfers))


async def _transfer_time(client: WorkerClient, data: bytes) -> float:
    await client.ping(data, reply_bytes=0, timeout_s=PING_TIMEOUT_S)
    times: list[float] = []
    while not times or (len(times) < _TRANSFERS and sum(times) < _TRANSFER_LIMIT_S):
        begin = time.perf_counter()
        await client.ping(data, reply_bytes=0, timeout_s=PING_TIMEOUT_S)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
