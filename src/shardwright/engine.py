"""The engine as its users see it: submit, abort, snapshot, close. All that the API may know of the master."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from shardwright.types import ClusterSnapshot, FinishReason, SamplingParams, SeqId, StopConditions, TokenId


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One more token of a request, in order, never twice. `index` counts the new tokens from 0."""

    seq_id: SeqId
    index: int
    token_id: TokenId
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishEvent:
    """The end of a request; exactly one, and nothing after it. `message` says what went wrong on an error."""

    seq_id: SeqId
    reason: FinishReason
    message: str = ""
    num_cached_tokens: int = 0


RequestEvent: TypeAlias = TokenEvent | FinishEvent


class Engine(Protocol):
    """A running model that takes prompts as token ids."""

    async def submit(
        self, prompt: tuple[TokenId, ...], sampling: SamplingParams, stop: StopConditions
    ) -> tuple[SeqId, AsyncIterator[RequestEvent]]:
        """Queue a prompt; the iterator gives its tokens as they come and ends after a `FinishEvent`."""
        ...

    async def abort(self, seq_id: SeqId) -> None:
        """Stop a request; its iterator ends with `FinishReason.ABORT`. Unknown or finished ids are ignored."""
        ...

    def snapshot(self) -> ClusterSnapshot:
        """The cluster's state at this moment."""
        ...

    async def close(self) -> None:
        """Release the workers and end every open request. Safe to call twice."""
        ...
