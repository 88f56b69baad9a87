"""What a transport gives: a client that speaks to one worker, and a server that a worker listens with.

`WorkerService` is what a worker's shell implements; `WorkerClient` is its mirror on the other side of the
network. A transport only moves messages: it knows nothing of tensors, stages or scheduling. `grpc` and `memory`
implement these protocols and pass the same contract tests.

Streams. A client's stream starts when it is iterated for the first time; closing its iterator (`aclose`) ends the
call. Sending waits until there is room, so that neither side buffers without bound. A service's `incoming` ends when
the client has sent all that it had; if the client goes away before that, or the listener closes, whoever reads
`incoming` gets `LinkLostError`, and an iterator of answers that waits for anything else is closed: it is cancelled
where it waits. A `ProtocolError` that `incoming` raises belongs to the client: let it end the call.

Errors. A client raises `WorkerUnreachableError` when nobody answers, `LinkLostError` when an open call breaks,
`ProtocolError` (or a subclass) when the worker refused what was sent, and `asyncio.CancelledError` as usual.
A service raises `ShardwrightError`s; the transport carries kind and message to the client's side.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from shardwright.types import Epoch, HeartbeatReport, LinkMeasures, MachineMeasures, WorkerDescription
from shardwright.wire.messages import LayerResult, LoadMessage, LoadReply, StepMessage, StepReply, StepResult


class WorkerService(Protocol):
    """A worker as seen from the network."""

    async def describe(self) -> WorkerDescription:
        """Who this worker is and what it measured."""
        ...

    def initialize_worker(self, incoming: AsyncIterator[LoadMessage]) -> AsyncIterator[LoadReply]:
        """Take a stage. Ends after `LoadDone` or `LoadRefused`."""
        ...

    def process_layers(self, incoming: AsyncIterator[StepMessage]) -> AsyncIterator[StepReply]:
        """The step link: one call per (sender, epoch), open as long as the pipeline is."""
        ...

    async def process_layer(self, message: StepMessage) -> LayerResult:
        """Compute one step by hand and answer with its result; nothing is forwarded."""
        ...

    def tokens(self, epoch: Epoch) -> AsyncIterator[StepResult]:
        """The results of the last stage, in step order, until the epoch ends."""
        ...

    async def heartbeat(self, traces_since: int | None = None) -> HeartbeatReport:
        """The worker's state now; answers while the stage computes.

        With traces of the steps from number `traces_since` on, and the timings since they were told last; None: with
        neither, and the timings stay for who asks for them.
        """
        ...

    async def release(self, epoch: Epoch) -> None:
        """Drop the stage of this epoch, if it is still held."""
        ...

    async def ping(self, data: bytes, reply_bytes: int) -> bytes:
        """So many bytes, at once: whoever asks times the way of `data` and of these."""
        ...

    async def measure_machine(self, dtype: str) -> MachineMeasures:
        """Measure the machine, its matrix rate at float32, bfloat16 or float16.

        In turn with the pipeline's steps, which wait for it: a second or two.
        """
        ...

    async def measure_link(self, address: str, sizes: tuple[int, ...]) -> LinkMeasures:
        """Measure the way from this worker to the one at `address`, with transfers of these sizes in bytes.

        Steps on the same way share it meanwhile. Raises what a client of that worker raises.
        """
        ...


class WorkerClient(Protocol):
    """One worker, spoken to. Calls have time limits of their own; streams live until closed or broken."""

    trace_parent: str
    """The span that streams opened from now on belong to; empty at first, and without traces. See `trace_context`."""

    @property
    def address(self) -> str:
        """host:port, as connected to."""
        ...

    async def describe(self, *, timeout_s: float) -> WorkerDescription:
        """Ask who the worker is."""
        ...

    def initialize_worker(self, outgoing: AsyncIterator[LoadMessage]) -> AsyncIterator[LoadReply]:
        """Give the worker a stage; ends after `LoadDone` or `LoadRefused`."""
        ...

    def process_layers(self, outgoing: AsyncIterator[StepMessage]) -> AsyncIterator[StepReply]:
        """Open a step link; ends when `outgoing` ends."""
        ...

    async def process_layer(self, message: StepMessage, *, timeout_s: float) -> LayerResult:
        """Have one step computed by hand."""
        ...

    def tokens(self, epoch: Epoch) -> AsyncIterator[StepResult]:
        """Follow the last stage's results."""
        ...

    async def heartbeat(self, *, timeout_s: float, traces_since: int | None = None) -> HeartbeatReport:
        """Ask for the worker's state; with traces from number `traces_since` on, and the timings since they were told.

        None: without both, and nothing is taken away from who asks for them. At most `MAX_TRACES` come at once; the
        report's `next_trace` is what to ask for next.
        """
        ...

    async def release(self, epoch: Epoch, *, timeout_s: float) -> None:
        """Have the stage of this epoch dropped."""
        ...

    async def ping(self, data: bytes, *, reply_bytes: int, timeout_s: float) -> bytes:
        """Send `data` and get so many bytes back. Raises `ProtocolError` for more than `MAX_PING_BYTES` either way."""
        ...

    async def measure_machine(self, dtype: str, *, timeout_s: float) -> MachineMeasures:
        """Have the worker's machine measured, in turn with its steps; the matrix rate at this dtype."""
        ...

    async def measure_link(self, address: str, sizes: tuple[int, ...], *, timeout_s: float) -> LinkMeasures:
        """Have the way from this worker to the one at `address` measured, with transfers of these sizes in bytes."""
        ...

    async def close(self) -> None:
        """Close the connection; open streams end with `LinkLostError`."""
        ...


class Listener(Protocol):
    """A listening worker."""

    @property
    def address(self) -> str:
        """host:port really bound (port 0 asks for a free one)."""
        ...

    async def close(self, *, grace_s: float) -> None:
        """Stop listening; open calls get `grace_s` seconds to end."""
        ...


class Transport(Protocol):
    """A way to reach workers and to be one."""

    def connect(self, address: str) -> WorkerClient:
        """A client for host:port. Does not wait; the first call finds out whether anybody is there."""
        ...

    async def serve(self, address: str, service: WorkerService) -> Listener:
        """Listen on host:port. Raises `AddressInUseError` when another process has the port."""
        ...
