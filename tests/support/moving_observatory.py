"""An observatory of a pipeline that works: steps, requests and history come as time goes by, all of it computed.

Three workers hold thirty layers. Two groups of sequences take turns, so that two steps are under way at once; prompts
come in chunks. What is told of a step comes a second late, as from real workers.
"""

from __future__ import annotations

import random  # noqa: TID251  seeded
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

from fake_observatory import MIB, FakeObservatory, example_view, example_worker

from shardwright.observation import HistoryPoint, LinkView, RequestStep, RequestTrace, StagePassage, StepPassage
from shardwright.types import FinishReason

WORKERS = ("rack-1", "desk", "closet")
PACE = (1.0, 1.3, 0.8)  # how long the stages take, relative to each other
TOLD_LATE_S = 1.0
CHUNK = 96


def _now() -> float:
    return time.time_ns() / 1e9


@dataclass
class _Sequence:
    trace: RequestTrace
    prompt_left: int
    output_left: int
    steps: list[RequestStep] = field(default_factory=list)


class MovingObservatory(FakeObservatory):
    """Ask it at any time: it has then worked until now. `clock` is seconds since 1970."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = _now,
        past_s: float = 20.0,
        seed: int = 1,
        told_late_s: float = TOLD_LATE_S,
    ) -> None:
        workers = [
            example_worker(name, 0, stage_index=n, first_layer=10 * n, end_layer=10 * n + 10)
            for n, name in enumerate(WORKERS)
        ]
        began = clock() - past_s
        super().__init__(
            cluster=example_view(workers, num_layers=30, num_errors=(), started_at=began - 3000, at=began),
            passages=(), traces=(), points=(), rows=(),
        )  # fmt: skip
        self.told_late_s = told_late_s
        self._clock = clock
        self._random = random.Random(seed)
        self._free = [began] * len(WORKERS)  # when each stage has done all that it got
        self._group_at = [began, began + 0.01]  # when each group's next step may be sent
        self._groups: list[list[_Sequence]] = [[], []]
        self._waiting: list[StepPassage] = []  # steps whose stages are not told yet
        self._number = 0
        self._seq_id = 0
        self._advancing = threading.RLock()  # the server's thread asks, and the test's
        self._epoch = 3
        self._stopped_at: float | None = None
        self.points = [self._point(began - 5 * n) for n in range(200, 0, -1)]

    # --- to set ------------------------------------------------------------------------------------

    def lose(self, worker_id: str, reason: str) -> None:
        """A worker dies, and with it the pipeline."""
        self._advance()
        self._stopped_at = self._clock()
        self.change_worker(
            worker_id, status="lost", reason=reason, stage_index=None, first_layer=None, end_layer=None, busy_ratio=None
        )
        snapshot = replace(self.cluster.snapshot, ready=False, stages=(), num_blocks=0, num_free_blocks=0)
        self.change_view(
            is_ready=False, failure=f"worker {worker_id} is lost: {reason}", snapshot=snapshot, links=(),
            num_errors=(("LinkLostError", 1),),
        )  # fmt: skip

    # --- the protocol ------------------------------------------------------------------------------

    def view(self):
        self._advance()
        return super().view()

    def steps(self, since=0):
        self._advance()
        return super().steps(since)

    def steps_changed(self, since=0, *, limit=None):
        self._advance()
        return super().steps_changed(since, limit=limit)

    def requests(self):
        self._advance()
        return super().requests()

    def request(self, seq_id):
        self._advance()
        return super().request(seq_id)

    # --- the work ----------------------------------------------------------------------------------

    def _advance(self) -> None:
        with self._advancing:
            self._advance_alone()

    def _advance_alone(self) -> None:
        now = self._clock()
        while self._stopped_at is None and min(self._group_at) <= now:
            group = self._group_at.index(min(self._group_at))
            self._step(group, self._group_at[group])
        while self._waiting and self._waiting[0].returned_at + self.told_late_s <= now:
            self.put_step(self._waiting.pop(0))
        if not self.points or self.points[-1].at + 5 <= now:
            self.points.append(self._point(now))
        running = [sequence for group in self._groups for sequence in group]
        snapshot = replace(self.cluster.snapshot, num_running=len(running), num_waiting=0)
        if self._stopped_at is None:
            snapshot = replace(snapshot, num_free_blocks=100 - 12 * len(running))
        self.change_view(at=now, snapshot=snapshot)
        for number, worker in enumerate(self.cluster.workers):
            if worker.status == "lost":
                continue
            report = replace(
                worker.report, timestamp=now, steps_done=self._number, uptime_s=now - self.cluster.started_at
            )
            busy = None if worker.stage_index is None else (0.42, 0.61, 0.35)[number]
            self.change_worker(worker.worker_id, report=report, busy_ratio=busy)
        if self._stopped_at is None:
            chain = pairwise(["", *WORKERS, ""])
            self.change_view(
                links=tuple(
                    LinkView(
                        sender=sender,
                        receiver=receiver,
                        round_trip_s=0.0004,
                        bytes_per_s=1.4 * MIB if sender and receiver else None,
                        wire_s=0.0003,
                    )
                    for sender, receiver in chain
                )
            )

    def _step(self, group: int, sent_at: float) -> None:
        sequences = self._groups[group]
        if len(sequences) < 2 and self._random.random() < 0.05:
            self._seq_id += 1
            prompt = self._random.choice((40, 180, 250))
            trace = RequestTrace(
                seq_id=self._seq_id,
                submitted_at=sent_at - self._random.uniform(0.001, 0.03),
                started_at=sent_at,
                first_token_at=None,
                finished_at=None,
                reason=None,
                num_prompt_tokens=prompt,
                num_cached_tokens=16,
                num_output_tokens=0,
                num_preemptions=0,
                steps=(),
                num_steps=0,
            )
            sequences.append(_Sequence(trace, prompt - 16, self._random.randint(30, 90)))
        if not sequences:
            self._group_at[group] = sent_at + 0.05
            return
        self._number += 1
        tokens = [min(sequence.prompt_left, CHUNK) or 1 for sequence in sequences]
        passage = self._through(self._number, sent_at, len(tokens), sum(tokens))
        self.put_step(replace(passage, returned_at=passage.returned_at, stages=()))
        self._waiting.append(passage)
        self._group_at[group] = passage.returned_at + 0.0006
        for sequence, count in zip(list(sequences), tokens, strict=True):
            self._take(sequence, count, passage)
            if not sequence.output_left:
                sequences.remove(sequence)

    def _take(self, sequence: _Sequence, count: int, passage: StepPassage) -> None:
        is_prompt = sequence.prompt_left > 0
        sequence.steps.append(RequestStep(number=passage.number, num_tokens=count, is_prompt=is_prompt))
        sequence.prompt_left -= count * is_prompt
        changes: dict[str, object] = {"steps": tuple(sequence.steps), "num_steps": len(sequence.steps)}
        if not sequence.prompt_left:
            sequence.output_left -= 1
            changes["num_output_tokens"] = sequence.trace.num_output_tokens + 1
            if sequence.trace.first_token_at is None:
                changes["first_token_at"] = passage.returned_at
            if not sequence.output_left:
                changes |= {"finished_at": passage.returned_at, "reason": FinishReason.STOP}
        sequence.trace = replace(sequence.trace, **changes)
        others = [trace for trace in self.traces if trace.seq_id != sequence.trace.seq_id]
        self.traces = sorted([*others, sequence.trace], key=lambda trace: -trace.seq_id)[:40]

    def _through(self, number: int, sent_at: float, num_sequences: int, num_tokens: int) -> StepPassage:
        at, stages = sent_at, []
        for index, name in enumerate(WORKERS):
            wire = self._random.uniform(0.0003, 0.0012)
            arrived = at + wire
            started = max(arrived + 0.00005, self._free[index])
            spent = PACE[index] * (0.006 + 0.00035 * num_tokens) * self._random.uniform(0.9, 1.15)
            self._free[index] = finished = started + spent
            at = finished + 0.0002
            stages.append(
                StagePassage(
                    worker_id=name,
                    stage_index=index,
                    arrived_at=arrived,
                    started_at=started,
                    finished_at=finished,
                    sent_at=at,
                    serialise_s=0.04 * spent,
                    wire_s=wire,
                    bytes_in=0 if index == 0 else num_tokens * 1152,
                    bytes_out=0 if index == len(WORKERS) - 1 else num_tokens * 1152,
                )
            )
        return StepPassage(
            number=number, epoch=self._epoch, step=number, num_sequences=num_sequences, num_tokens=num_tokens,
            sent_at=sent_at, returned_at=at + 0.0004, stages=tuple(stages), num_stages=len(WORKERS),
        )  # fmt: skip

    def _point(self, at: float) -> HistoryPoint:
        pick = self._random.uniform
        return HistoryPoint(
            at=at, interval_s=5.0, output_tokens_per_s=pick(40, 70), prompt_tokens_per_s=pick(80, 160),
            ttft_p50_s=pick(0.1, 0.15), ttft_p95_s=pick(0.2, 0.4), inter_token_p50_s=pick(0.03, 0.04),
            inter_token_p95_s=pick(0.06, 0.09), kv_used_ratio=pick(0.3, 0.5), prefix_hit_ratio=pick(0.1, 0.3),
            num_running=3, num_waiting=0, num_workers_lost=0, is_ready=True,
        )  # fmt: skip
