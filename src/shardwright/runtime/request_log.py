"""What became of each request: when it came, ran, answered and ended, which steps carried it, how long its tokens took.

Written once for each step and each token, so everything here is a few dictionary look-ups; what people see is made when
somebody asks. Only counts and times are kept, nothing of what was asked or answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, TypeAlias

from shardwright.observation import Histogram, RequestStep, RequestTrace
from shardwright.runtime.tally import Tally
from shardwright.types import FinishReason, SeqId, SequenceSlice

FINISHED_KEPT: Final = 500
FIRST_STEPS_KEPT: Final = 64
LAST_STEPS_KEPT: Final = 192

TTFT_BUCKETS_S: Final = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
"""Upper bounds of the times to the first token; steps of a half at most, so that quantiles are worth showing."""

GAP_BUCKETS_S: Final = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08,
    0.1, 0.125, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0,
)  # fmt: skip
"""The same of the times between two tokens of a sequence."""

_Part: TypeAlias = tuple[int, int, bool]  # the step's number, tokens of the sequence in it, whether of its prompt


class _Trace:
    """One request as it goes on; times are on the master's own clock."""

    __slots__ = (
        "finished_at",
        "first_steps",
        "first_token_at",
        "last_steps",
        "last_token_at",
        "num_cached_tokens",
        "num_output_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_steps",
        "reason",
        "seq_id",
        "shown",
        "started_at",
        "submitted_at",
        "trace_id",
    )

    def __init__(self, seq_id: SeqId, num_prompt_tokens: int, now: float) -> None:
        self.seq_id = seq_id
        self.num_prompt_tokens = num_prompt_tokens
        self.submitted_at = now
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.finished_at: float | None = None
        self.reason: FinishReason | None = None
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.num_preemptions = 0
        self.num_steps = 0
        self.trace_id = ""
        self.first_steps: list[_Part] = []
        self.last_steps: deque[_Part] | None = None
        self.shown: tuple[float, RequestTrace] | None = None  # of one that is over, with the wall clock's offset


class RequestLog:
    """Requests that are open, and the last ones that ended."""

    def __init__(self) -> None:
        self._open: dict[SeqId, _Trace] = {}
        self._finished: dict[SeqId, _Trace] = {}  # in the order in which they ended
        self._first_tokens = Tally(TTFT_BUCKETS_S)
        self._gaps = Tally(GAP_BUCKETS_S)

    # --- written as things happen ------------------------------------------------------------------

    def submitted(self, seq_id: SeqId, num_prompt_tokens: int, now: float) -> None:
        """A request came."""
        self._open[seq_id] = _Trace(seq_id, num_prompt_tokens, now)

    def traced(self, seq_id: SeqId, trace_id: str) -> None:
        """It belongs to a distributed trace."""
        self._open[seq_id].trace_id = trace_id

    def rejected(self, seq_id: SeqId) -> None:
        """It was not taken: there is nothing to tell of it."""
        self._open.pop(seq_id, None)

    def step_sent(self, number: int, slices: Iterable[SequenceSlice], now: float) -> int:
        """A step was sent that carries these; gives how many tokens of prompts (or computed again) are in it."""
        num_prompt = 0
        traces = self._open
        for piece in slices:
            trace = traces.get(piece.seq_id)
            if trace is None:
                continue  # the master's own probe
            count = len(piece.token_ids)
            # A lone token that gives the next one is a decode, unless it is the rest of a prompt.
            is_prompt = count > 1 or piece.sampling is None or piece.start_position < trace.num_prompt_tokens
            if is_prompt:
                num_prompt += count
            if trace.num_steps < FIRST_STEPS_KEPT:
                if trace.started_at is None:
                    trace.started_at = now
                    trace.num_cached_tokens = piece.start_position
                trace.first_steps.append((number, count, is_prompt))
            else:
                if trace.last_steps is None:
                    trace.last_steps = deque(maxlen=LAST_STEPS_KEPT)
                trace.last_steps.append((number, count, is_prompt))
            trace.num_steps += 1
        return num_prompt

    def token(self, seq_id: SeqId, now: float) -> None:
        """A request got a token."""
        trace = self._open.get(seq_id)
        if trace is None:
            return
        if trace.num_output_tokens:
            self._gaps.add(now - trace.last_token_at)
        else:
            trace.first_token_at = now
            self._first_tokens.add(now - trace.submitted_at)
        trace.last_token_at = now
        trace.num_output_tokens += 1

    def finished(self, seq_id: SeqId, reason: FinishReason, now: float, *, num_preemptions: int = 0) -> None:
        """A request ended; one that is not open is no news."""
        trace = self._open.pop(seq_id, None)
        if trace is None:
            return
        trace.finished_at = now
        trace.reason = reason
        trace.num_preemptions = max(trace.num_preemptions, num_preemptions)
        self._finished[seq_id] = trace
        if len(self._finished) > FINISHED_KEPT:
            del self._finished[next(iter(self._finished))]

    # --- read by people ----------------------------------------------------------------------------

    @property
    def time_to_first_token(self) -> Histogram:
        """From a request's arrival to its first token."""
        return self._first_tokens.histogram()

    @property
    def inter_token_latency(self) -> Histogram:
        """Between two tokens of one sequence."""
        return self._gaps.histogram()

    def open_ids(self) -> tuple[SeqId, ...]:
        """The requests that run or wait."""
        return tuple(self._open)

    def preempted(self, seq_id: SeqId, count: int) -> None:
        """An open request gave its KV blocks up so many times until now."""
        trace = self._open.get(seq_id)
        if trace is not None:
            trace.num_preemptions = count

    def requests(self, wall_offset: float) -> tuple[RequestTrace, ...]:
        """All that are known, newest first, without their steps; `wall_offset` makes the clock's times of day."""
        traces = sorted((*self._open.values(), *self._finished.values()), key=lambda t: t.seq_id, reverse=True)
        return tuple(_summary(trace, wall_offset) for trace in traces)

    def request(self, seq_id: SeqId, wall_offset: float) -> RequestTrace | None:
        """One of them, with its steps."""
        trace = self._open.get(seq_id) or self._finished.get(seq_id)
        if trace is None:
            return None
        steps = tuple(
            RequestStep(number=number, num_tokens=count, is_prompt=is_prompt)
            for number, count, is_prompt in (*trace.first_steps, *(trace.last_steps or ()))
        )
        return _shown(trace, wall_offset, steps=steps)


def _summary(trace: _Trace, wall_offset: float) -> RequestTrace:
    """A request without its steps; made once for one that is over."""
    if trace.shown is not None and trace.shown[0] == wall_offset:
        return trace.shown[1]
    summary = _shown(trace, wall_offset, steps=())
    if trace.finished_at is not None:
        trace.shown = wall_offset, summary
    return summary


def _shown(trace: _Trace, wall_offset: float, *, steps: tuple[RequestStep, ...]) -> RequestTrace:
    def wall(at: float | None) -> float | None:
        return None if at is None else at + wall_offset

    return RequestTrace(
        seq_id=trace.seq_id,
        submitted_at=trace.submitted_at + wall_offset,
        started_at=wall(trace.started_at),
        first_token_at=wall(trace.first_token_at),
        finished_at=wall(trace.finished_at),
        reason=trace.reason,
        num_prompt_tokens=trace.num_prompt_tokens,
        num_cached_tokens=trace.num_cached_tokens,
        num_output_tokens=trace.num_output_tokens,
        num_preemptions=trace.num_preemptions,
        steps=steps,
        num_steps=trace.num_steps,
        trace_id=trace.trace_id,
    )
