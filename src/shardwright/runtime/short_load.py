"""Runs a short load on a session, the same each time, and says what it gave: a long prompt, one sequence, several."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Protocol

from shardwright.core.prediction import Workload
from shardwright.engine import FinishEvent, RequestEvent, TokenEvent
from shardwright.errors import ClusterError
from shardwright.runtime.session import Session
from shardwright.types import GREEDY, FinishReason, StopConditions, TokenId

_MOST_STRETCH: Final = 4


class Listener(Protocol):
    """Hears what the doctor does now."""

    def doing(self, what: str) -> None:
        """One line for people."""
        ...


class TokenIds:
    """Token ids without a pattern, the same ones each time: no prompt is like another, none needs a clock or a file."""

    def __init__(self, vocab_size: int, *, first: int) -> None:
        """`first` sets two of these apart."""
        self._vocab_size = vocab_size
        self._count = itertools.count(first)

    def take(self, count: int) -> tuple[TokenId, ...]:
        """The next ones (Knuth's multiplicative hash of their number: The Art of Computer Programming, 6.4)."""
        numbers = itertools.islice(self._count, count)
        return tuple(((number * 2654435761) % 2**32 * self._vocab_size) >> 32 for number in numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Achieved:
    """What the running pipeline gave."""

    one_tokens_per_s: float  # decode of one sequence
    many_tokens_per_s: float  # decode of the workload's sequences, while all of them decoded
    time_to_first_token_s: float  # of the long prompt
    prompt_tokens: int

    @property
    def prompt_tokens_per_s(self) -> float:
        """Of the long prompt."""
        return self.prompt_tokens / self.time_to_first_token_s


async def run_load(
    session: Session, workload: Workload, listener: Listener, *, rounds: int = 2, first_id: int = 1 << 24
) -> Achieved:
    """A long prompt, one sequence, and all sequences, with seeded tokens; medians over the rounds.

    A round of each goes before them, so that the scheduler knows the stages' times. `first_id` sets the prompts of one
    load apart from another's. Raises `ClusterError` when the pipeline fails under it.
    """
    load = _LoadRun(session, workload, first_id)
    results: list[tuple[float, float, float]] = []
    for number in range(rounds + 1):
        which = "warming up" if number == 0 else f"round {number} of {rounds}"
        listener.doing(f"running the load, {which}: a prompt of {workload.prompt_tokens} tokens")
        first_s = await load.prompt()
        listener.doing(f"running the load, {which}: one sequence")
        one = await load.decode(1)
        many = one
        if workload.num_sequences > 1:
            listener.doing(f"running the load, {which}: {workload.num_sequences} sequences")
            many = await load.decode(workload.num_sequences)
        results.append((one, many, first_s))
    one, many, first_s = (statistics.median(values) for values in zip(*results[1:], strict=True))
    return Achieved(
        one_tokens_per_s=one,
        many_tokens_per_s=many,
        time_to_first_token_s=first_s,
        prompt_tokens=workload.prompt_tokens,
    )


class _LoadRun:
    def __init__(self, session: Session, workload: Workload, first_id: int) -> None:
        self._session = session
        self._workload = workload
        self._ids = TokenIds(session.vocab_size, first=first_id)

    async def prompt(self) -> float:
        """Seconds from a prompt's submission to its first token."""
        begin = time.perf_counter()
        (times,) = await asyncio.gather(self._times(self._workload.prompt_tokens, 1))
        return times[0] - begin

    async def decode(self, num_sequences: int) -> float:
        """Tokens a second of all sequences together, between the last one's first token and the first one's last.

        Prompts are computed beside answers, a few tokens a step: many sequences need longer answers to meet. Raises
        `ClusterError` where even answers that are `_MOST_STRETCH` times as long don't.
        """
        new_tokens = self._workload.new_tokens
        length = max(self._workload.context - new_tokens // 2, 1)
        for stretch in range(1, _MOST_STRETCH + 1):
            count = stretch * new_tokens
            all_times = await asyncio.gather(*(self._times(length, count) for _ in range(num_sequences)))
            start, end = max(times[0] for times in all_times), min(times[-1] for times in all_times)
            counted = sum(start < at <= end for times in all_times for at in times)
            if counted >= num_sequences * min(new_tokens // 4, 8):
                return counted / (end - start)
        raise ClusterError(
            f"{num_sequences} answers of {count} tokens did not run at the same time; "
            "take fewer sequences (--sequences) or more new tokens (--new-tokens)"
        )

    async def _times(self, num_tokens: int, new_tokens: int) -> list[float]:
        """When each token of an answer came."""
        stop = StopConditions(max_new_tokens=new_tokens)
        _, events = await self._session.submit(self._ids.take(num_tokens), GREEDY, stop)
        return await _token_times(events)


async def _token_times(events: AsyncIterator[RequestEvent]) -> list[float]:
    times = []
    async for event in events:
        if isinstance(event, TokenEvent):
            times.append(time.perf_counter())
        elif isinstance(event, FinishEvent) and event.reason is not FinishReason.LENGTH:
            raise ClusterError(f"the load failed: {event.message or event.reason.value}")
    return times
