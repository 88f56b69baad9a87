"""Gives one worker its stage and streams it the tensors that it lacks, a chunk at a time.

Weights come from the master's disk: its memory holds no more than a few chunks for each worker, whatever the model's
size, for a chunk is read when the transport takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from shardwright.errors import (
    LinkLostError,
    ProtocolError,
    ShardwrightError,
    StageLoadError,
    WorkerLostError,
    WorkerUnreachableError,
)
from shardwright.runtime.raw_source import RawSource
from shardwright.transport.base import WorkerClient
from shardwright.types import StageLoad, WorkerId
from shardwright.wire.messages import (
    LoadBegin,
    LoadDone,
    LoadMessage,
    LoadProgress,
    LoadRefused,
    LoadReply,
    WeightChunk,
    WeightRequest,
    WeightsNeeded,
)

MAX_CHUNK_BYTES = 1024 * 1024
MAX_BACKOFF_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SentProgress:
    """How much of what the worker asked for over this connection is on its way."""

    worker_id: WorkerId
    sent_bytes: int
    total_bytes: int


Progress: TypeAlias = LoadReply | SentProgress


async def send_stage(
    client: WorkerClient,
    load: StageLoad,
    source: RawSource,
    progress: Callable[[Progress], None],
    *,
    retries: int = 5,
    backoff_s: float = 0.2,
    stall_timeout_s: float = 120.0,
    chunk_bytes: int = MAX_CHUNK_BYTES,
) -> LoadDone:
    """Have a worker build its stage; call it for all workers at once. `progress` sees every reply and chunk.

    A broken connection is opened again after `backoff_s`, doubled each time, and so is one on which neither side
    moved for `stall_timeout_s`; `retries` bounds the tries in a row that brought the worker nothing.
    Raises `StageLoadError` when the worker can't build the stage, `WorkerLostError` when it stays away, and
    `ProtocolError` or `CheckpointError` when one of the two sides' bytes are wrong.
    """
    assert 0 < chunk_bytes <= MAX_CHUNK_BYTES
    sending = _Sending(client, load, source, progress, chunk_bytes)
    failures = 0
    while True:
        missing_before = sending.fewest_missing
        try:
            return await sending.attempt(stall_timeout_s)
        except (LinkLostError, WorkerUnreachableError) as exc:
            failures = 1 if sending.fewest_missing < missing_before else failures + 1
            if failures > retries:
                raise WorkerLostError(
                    f"worker {load.assignment.worker_id} at {client.address} was lost while it loaded layers "
                    f"{load.assignment.layers}, and did not come back in {retries} tries: {exc}"
                ) from exc
        await asyncio.sleep(min(backoff_s * 2 ** (failures - 1), MAX_BACKOFF_S))


class _Sending:
    """One worker's load over all its connections."""

    def __init__(
        self,
        client: WorkerClient,
        load: StageLoad,
        source: RawSource,
        progress: Callable[[Progress], None],
        chunk_bytes: int,
    ) -> None:
        self.fewest_missing = sum(spec.num_bytes for spec in load.tensors) + 1
        self._client = client
        self._load = load
        self._worker_id = load.assignment.worker_id
        self._specs = {spec.sha256: spec for spec in load.tensors}
        self._source = source
        self._progress = progress
        self._chunk_bytes = chunk_bytes
        self._failure: ShardwrightError | None = None  # of reading the source, which happens in the transport

    async def attempt(self, stall_timeout_s: float) -> LoadDone:
        """One call, to its end. Raises `LinkLostError` when it breaks or stalls."""
        needed: asyncio.Future[WeightsNeeded] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(stall_timeout_s) as limit:
                replies = self._client.initialize_worker(self._outgoing(needed, limit, stall_timeout_s))
                async with contextlib.AsyncExitStack() as stack:
                    if (aclose := getattr(replies, "aclose", None)) is not None:
                        stack.push_async_callback(aclose)
                    return await self._follow(replies, needed, limit, stall_timeout_s)
        except (LinkLostError, TimeoutError) as exc:
            if self._failure is not None:
                raise self._failure from None
            if isinstance(exc, LinkLostError):
                raise
            raise LinkLostError(f"worker {self._worker_id} did not move for {stall_timeout_s:g} s") from exc
        finally:
            if not needed.done():  # lets the sending side end
                needed.set_result(WeightsNeeded(requests=(), bytes_from_disk=0, bytes_from_cache=0))

    async def _follow(
        self,
        replies: AsyncIterator[LoadReply],
        needed: asyncio.Future[WeightsNeeded],
        limit: asyncio.Timeout,
        stall_timeout_s: float,
    ) -> LoadDone:
        async for reply in replies:
            _set_limit(limit, stall_timeout_s)
            match reply:
                case WeightsNeeded():
                    if needed.done():
                        raise ProtocolError(f"worker {self._worker_id} asked for weights twice in one call")
                    missing = self._check_requests(reply.requests)
                    self.fewest_missing = min(self.fewest_missing, missing)
                    self._progress(reply)
                    needed.set_result(reply)
                case LoadProgress():
                    self._progress(reply)
                case LoadDone():
                    self._progress(reply)
                    return reply
                case LoadRefused():
                    self._progress(reply)
                    raise StageLoadError(
                        f"worker {self._worker_id} can't load layers {self._load.assignment.layers}: {reply.reason}"
                    )
                case _:
                    assert_never(reply)
        raise LinkLostError(f"worker {self._worker_id} ended the call before its stage was ready")

    def _check_requests(self, requests: tuple[WeightRequest, ...]) -> int:
        """The bytes asked for. Raises `ProtocolError` when they are not of this stage, or asked for twice."""
        seen: set[str] = set()
        missing = 0
        for request in requests:
            spec = self._specs.get(request.sha256)
            if spec is None or request.sha256 in seen:
                fault = "twice" if request.sha256 in seen else "which its stage has not"
                raise ProtocolError(f"worker {self._worker_id} asked for tensor {request.sha256[:80]!r} {fault}")
            if not 0 <= request.offset < spec.num_bytes:
                raise ProtocolError(
                    f"worker {self._worker_id} asked for tensor {spec.name} from byte {request.offset} on, "
                    f"but it has {spec.num_bytes}"
                )
            seen.add(request.sha256)
            missing += spec.num_bytes - request.offset
        return missing

    async def _outgoing(
        self, needed: asyncio.Future[WeightsNeeded], limit: asyncio.Timeout, stall_timeout_s: float
    ) -> AsyncIterator[LoadMessage]:
        yield LoadBegin(load=self._load)
        requests = (await asyncio.shield(needed)).requests
        total = sum(self._specs[request.sha256].num_bytes - request.offset for request in requests)
        sent = 0
        for request in requests:
            spec = self._specs[request.sha256]
            for offset in range(request.offset, spec.num_bytes, self._chunk_bytes):
                length = min(self._chunk_bytes, spec.num_bytes - offset)
                try:
                    data = await asyncio.to_thread(self._source.read, spec.name, offset, length)
                except ShardwrightError as exc:
                    self._failure = exc
                    _set_limit(limit, 0.0)  # ends the call now, whatever the transport does with a failed sender
                    return
                sent += length
                self._progress(SentProgress(worker_id=self._worker_id, sent_bytes=sent, total_bytes=total))
                yield WeightChunk(sha256=spec.sha256, offset=offset, data=data)
                _set_limit(limit, stall_timeout_s)


def _set_limit(limit: asyncio.Timeout, timeout_s: float) -> None:
    with contextlib.suppress(RuntimeError):  # the call has just ended; the transport will stop its sender
        limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
