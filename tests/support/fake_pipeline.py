"""A master's engine over workers that compute nothing: the answers are told beforehand, and steps can be held back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from shardwright.core.master import MasterState
from shardwright.core.settings import CoreSettings
from shardwright.errors import LinkLostError
from shardwright.runtime.master import MasterEngine
from shardwright.types import (
    HeartbeatReport,
    ModelCosts,
    PromptScores,
    SequenceSlice,
    StepInput,
    TokenOut,
    TokenScore,
    WorkerCapacity,
)
from shardwright.wire.messages import LoadDone, StepAck, StepResult

REPORT = HeartbeatReport(
    timestamp=0.0,
    epoch=1,
    queue_depth=0,
    steps_done=0,
    busy_s=0.0,
    uptime_s=1.0,
    device="cpu",
    device_name="",
    gpu_utilization=None,
    gpu_memory_used_bytes=None,
    gpu_memory_total_bytes=None,
    cpu_utilization=0.0,
    memory_used_bytes=0,
    memory_total_bytes=0,
    process_memory_bytes=0,
)


def count_up(prompt: Sequence[int], index: int) -> int:
    """The answer that goes on counting from the prompt's last token."""
    return prompt[-1] + 1 + index


@dataclass
class FakePipeline:
    """Takes steps from the master and gives `answer(prompt, index)` for each slice that samples."""

    answer: Callable[[Sequence[int], int], int] = count_up
    epoch: int = 1
    steps: list[StepInput] = field(default_factory=list)  # that arrived
    open_: asyncio.Event = field(default_factory=asyncio.Event)  # steps are answered while it is set
    heartbeats: asyncio.Event = field(default_factory=asyncio.Event)  # and heartbeats while this is
    heard_at: list[tuple[str, float]] = field(default_factory=list)  # who was asked for a heartbeat, and when
    _results: asyncio.Queue[StepResult | None] = field(default_factory=asyncio.Queue)
    _prompts: dict[int, list[int]] = field(default_factory=dict)
    _lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.open_.set()
        self.heartbeats.set()

    async def answer_steps(self, outgoing) -> AsyncIterator[StepAck]:
        async for message in outgoing:
            step = message.step
            self.steps.append(step)
            await self.open_.wait()
            self._results.put_nowait(self._compute(step))
            yield StepAck(epoch=step.epoch, step=step.step)

    async def results(self) -> AsyncIterator[StepResult]:
        while (result := await self._results.get()) is not None:
            yield result
        raise LinkLostError("the link broke")

    def break_link(self) -> None:
        """The last stage's stream breaks."""
        self._results.put_nowait(None)

    def _compute(self, step: StepInput) -> StepResult:
        tokens: list[TokenOut] = []
        scores: list[PromptScores] = []
        for piece in step.slices:
            known = self._prompts.setdefault(piece.seq_id, [])
            del known[piece.start_position :]
            known.extend(piece.token_ids)
            if piece.num_prompt_logprobs is not None:
                scores.append(self._score(piece))
            if piece.sampling is not None:
                length = self._lengths.setdefault(piece.seq_id, len(known))
                token = self.answer(known[:length], len(known) - length)
                top = tuple((token + i, -1.0 - i) for i in range(piece.sampling.num_top_logprobs))
                tokens.append(TokenOut(seq_id=piece.seq_id, token_id=token, logprob=-1.0, top=top))
        return StepResult(epoch=step.epoch, step=step.step, tokens=tuple(tokens), prompt_scores=tuple(scores))

    def _score(self, piece: SequenceSlice) -> PromptScores:
        following = [*piece.token_ids[1:]] + ([] if piece.next_token_id is None else [piece.next_token_id])
        return PromptScores(
            seq_id=piece.seq_id,
            first_position=piece.start_position + 1,
            scores=tuple(TokenScore(token_id=token, logprob=-float(token)) for token in following),
        )


class FakeWorker:
    """The client's side of a worker; the first gets the steps, the last gives the tokens."""

    address = "fake:1"

    def __init__(self, pipeline: FakePipeline, name: str) -> None:
        self._pipeline = pipeline
        self._name = name

    def process_layers(self, outgoing):
        return self._pipeline.answer_steps(outgoing)

    def tokens(self, epoch):
        return self._pipeline.results()

    async def heartbeat(self, *, timeout_s, traces_since=None):
        self._pipeline.heard_at.append((self._name, asyncio.get_running_loop().time()))
        await self._pipeline.heartbeats.wait()
        return REPORT

    async def release(self, epoch, *, timeout_s):
        pass


COSTS = ModelCosts(
    name="fake",
    hidden_size=8,
    layer_bytes=(1000,) * 4,
    layer_kv_bytes_per_token=(8,) * 4,
    embedding_bytes=500,
    head_bytes=500,
    tied_embedding=False,
    activation_bytes_per_token=16,
    max_context=256,
)


@contextlib.asynccontextmanager
async def fake_master(
    pipeline: FakePipeline, *, heartbeat_interval_s=0.05, clock=None, **settings
) -> AsyncIterator[MasterEngine]:
    """A deployed engine over two fake workers."""
    values = {"block_size": 4, "token_budget": 64, "max_kv_tokens": 1024, "min_kv_tokens": 4, "workspace_bytes": 0}
    timeout_s = settings.get("heartbeat_timeout_s", 10.0)
    capacities = tuple(
        WorkerCapacity(
            worker_id=name,
            host_id=name,
            device="cpu",
            memory_bytes=10**6,
            read_bandwidth=1e9,
            matrix_rate=1e9,
        )
        for name in ("a", "b")
    )

    async def load(assignment, client):
        return LoadDone(weight_bytes=1, kv_bytes=1, load_s=0.0)

    engine = MasterEngine(
        MasterState(CoreSettings(**(values | settings)), COSTS),
        {capacity.worker_id: FakeWorker(pipeline, capacity.worker_id) for capacity in capacities},
        load,
        heartbeat_interval_s=heartbeat_interval_s,
        heartbeat_timeout_s=timeout_s,
        **({} if clock is None else {"clock": clock}),
    )
    async with engine:
        await engine.deploy(capacities)
        yield engine
