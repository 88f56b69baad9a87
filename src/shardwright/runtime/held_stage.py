"""A worker's stage of one epoch, with what lives as long as it does: its results, and the link to the next stage.

Knows what is sent on and in which order; nothing of what is computed, nor of when the stage comes and goes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardwright.errors import LinkLostError, ShardwrightError
from shardwright.runtime.links import PING_INTERVAL_S, round_trip
from shardwright.runtime.step_recorder import Transit
from shardwright.runtime.telemetry import StepClock
from shardwright.types import LinkReport, PromptScores, StageLoad, StepId, TokenOut
from shardwright.wire.messages import LoadDone, StepAck, StepMessage, StepReply, StepResult

if TYPE_CHECKING:
    from shardwright.model.stage import Stage
    from shardwright.runtime.ranks import RankedStage
    from shardwright.transport.base import WorkerClient

LINK_WINDOW = 32
"""Most steps sent to the next stage without an acknowledgement; the master keeps fewer in flight."""

NUM_ROUND_TRIPS = 5
"""Last pings of a link; the fastest is told."""


@dataclass(slots=True)
class ComputedStep:
    """What a step's computation left behind, waiting to be sent on."""

    message: StepMessage  # for the next stage: the step as it came, with this stage's tensors
    transit: Transit
    tokens: tuple[TokenOut, ...]
    prompt_scores: tuple[PromptScores, ...]


@dataclass(slots=True)
class HeldStage:
    """One epoch's stage with everything that lives as long as it does."""

    load: StageLoad
    done: LoadDone  # what its master was told
    stage: Stage | RankedStage
    clock: StepClock
    loaded_at: float
    trace_parent: str = ""  # of the trace of the pipeline; empty without one
    results: asyncio.Queue[tuple[StepResult, Transit] | None] = field(default_factory=asyncio.Queue)
    next_link: NextLink | None = None

    def link_report(self) -> LinkReport | None:
        """The link to the next stage as it is now; None on the last stage."""
        link, peer = self.next_link, self.load.assignment.next_worker_id
        if peer is None:
            return None
        if link is None:  # no step has gone there yet, or none will any more
            return LinkReport(peer=peer, bytes_sent=0, steps_sent=0, round_trip_s=None)
        return LinkReport(
            peer=peer, bytes_sent=link.bytes_sent, steps_sent=link.steps_sent, round_trip_s=link.round_trip_s
        )


class NextLink:
    """The step link to the next stage: sends what is queued while credits last, passes replies on, and is timed."""

    def __init__(
        self,
        client: WorkerClient,
        *,
        on_sent: Callable[[Transit], None],
        on_reply: Callable[[StepReply], None],
        on_lost: Callable[[ShardwrightError], None],
    ) -> None:
        self.bytes_sent = 0
        self.steps_sent = 0
        self._client = client
        self._on_sent = on_sent
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._queue: asyncio.Queue[ComputedStep | None] = asyncio.Queue()
        self._credits = asyncio.Semaphore(LINK_WINDOW)
        self._acknowledged: StepId = 0
        self._closing = False
        self._trips_s: deque[float] = deque(maxlen=NUM_ROUND_TRIPS)
        self._task = asyncio.create_task(self._run(), name=f"link to {client.address}")
        self._pings = asyncio.create_task(self._ping(), name=f"pings to {client.address}")

    @property
    def round_trip_s(self) -> float | None:
        """Of a small message: the fastest of the last few, which waited for nothing but the link."""
        return min(tuple(self._trips_s), default=None)

    def send(self, computed: ComputedStep) -> None:
        """Queue a step; the master bounds how many there can be."""
        self._queue.put_nowait(computed)

    async def _outgoing(self) -> AsyncIterator[StepMessage]:
        while (computed := await self._queue.get()) is not None:
            await self._credits.acquire()
            self.steps_sent += 1
            self.bytes_sent += computed.transit.bytes_out
            self._on_sent(computed.transit)
            yield computed.message

    async def _run(self) -> None:
        try:
            async for reply in self._client.process_layers(self._outgoing()):
                if isinstance(reply, StepAck):
                    self._take_credits(reply.step)
                self._on_reply(reply)
            lost: ShardwrightError = LinkLostError(f"{self._client.address} closed the step link")
        except ShardwrightError as exc:
            lost = exc
        self._pings.cancel()
        if not self._closing:
            self._on_lost(lost)

    async def _ping(self) -> None:
        """Time a few bytes now and then; they travel beside the steps, and a ping that fails is just not counted."""
        while True:
            await asyncio.sleep(PING_INTERVAL_S)
            with contextlib.suppress(ShardwrightError):
                self._trips_s.append(await round_trip(self._client))

    def _take_credits(self, step: StepId) -> None:
        """Steps are numbered from 1 without a gap: one credit for each since the last acknowledgement."""
        for _ in range(self._acknowledged, step):
            self._credits.release()
        self._acknowledged = max(self._acknowledged, step)

    async def close(self) -> None:
        """End the stream and the connection; what is still queued is void."""
        self._closing = True
        self._task.cancel()
        self._pings.cancel()
        await asyncio.wait((self._task, self._pings))
        await self._client.close()
