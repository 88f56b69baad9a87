"""Requests that join and leave a running session at told moments, and what each of them got."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardwright.engine import FinishEvent, TokenEvent
from shardwright.runtime.session import Session
from shardwright.types import SamplingParams, StopConditions, TokenId

GREEDY = SamplingParams()


class Silence:
    """A session's listener that does not care."""

    def downloading(self, what, done_bytes, total_bytes):
        """Nothing."""

    def hashing(self, done_bytes, total_bytes):
        """Nothing."""

    def loading(self, worker, done_bytes, total_bytes, phase):
        """Nothing."""

    def ready(self, stages):
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request. It joins when all requests together have got `after` tokens."""

    prompt: Sequence[TokenId]
    max_new_tokens: int
    after: int = 0
    sampling: SamplingParams = GREEDY
    stop_token_ids: frozenset[TokenId] = frozenset()
    abort_at: int | None = None  # give up after this many tokens


@dataclass
class Reply:
    """What came back for one request."""

    tokens: list[TokenId] = field(default_factory=list)
    finish: FinishEvent | None = None


class _TokenCount:
    """Tokens that all requests together have got, to wait for."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: list[tuple[int, asyncio.Event]] = []

    def add_one(self) -> None:
        self._count += 1
        for count, reached in self._waiting:
            if self._count >= count:
                reached.set()

    async def reach(self, count: int) -> None:
        if self._count < count:
            reached = asyncio.Event()
            self._waiting.append((count, reached))
            await reached.wait()


async def ask_all(session: Session, asks: Sequence[Ask]) -> list[Reply]:
    """Submit every request at its moment and follow them all to their ends."""
    count = _TokenCount()
    async with asyncio.timeout(120.0):
        return await asyncio.gather(*(_ask(session, ask, count) for ask in asks))


async def _ask(session: Session, ask: Ask, count: _TokenCount) -> Reply:
    await count.reach(ask.after)
    stop = StopConditions(max_new_tokens=ask.max_new_tokens, stop_token_ids=ask.stop_token_ids)
    seq_id, events = await session.submit(tuple(ask.prompt), ask.sampling, stop)
    reply = Reply()
    async for event in events:
        if isinstance(event, TokenEvent):
            assert event.index == len(reply.tokens), "tokens come in order, none twice"
            reply.tokens.append(event.token_id)
            count.add_one()
            if len(reply.tokens) == ask.abort_at:
                await session.engine.abort(seq_id)
        else:
            reply.finish = event
    return reply
