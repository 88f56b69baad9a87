"""What can be seen of a running model: workers, steps on their way, requests in pieces, the last hour.

Frozen values for metrics, dashboards and the command line, and the protocol of who gives them. Times of day are seconds
since 1970 as the master's clock tells them; workers' times are translated to it. Durations are seconds, sizes bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shardwright.types import (
    PHASE_BUCKETS_S,
    ClusterSnapshot,
    Epoch,
    FinishReason,
    HeartbeatReport,
    PhaseTimes,
    RankLoad,
    SeqId,
    StepId,
    WorkerId,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePassage:
    """A step at one stage. A stage whose worker has not reported the step yet is absent from the step."""

    worker_id: WorkerId
    stage_index: int
    arrived_at: float
    started_at: float
    finished_at: float
    sent_at: float
    serialise_s: float  # of the time between started and finished
    wire_s: float | None  # from the sender (the master, or the previous stage) to here; None before it has reported
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPassage:
    """A step's trip through the pipeline."""

    number: int  # counts the steps that this master sent, over all epochs, from 1
    epoch: Epoch
    step: StepId
    num_sequences: int
    num_tokens: int
    sent_at: float
    returned_at: float | None  # None while it is under way, and for one that never came back
    stages: tuple[StagePassage, ...]  # in the pipeline's order
    num_stages: int = 0  # of its pipeline: so many `stages` there are once all is told; 0: not known any more


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStep:
    """A sequence's part of a step."""

    number: int  # the step's
    num_tokens: int  # of this sequence, computed in the step
    is_prompt: bool  # whether these are tokens of its prompt (or computed again after a preemption)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """A sequence from its arrival to its end, as far as it has come."""

    seq_id: SeqId
    submitted_at: float
    started_at: float | None  # its first step was sent
    first_token_at: float | None
    finished_at: float | None
    reason: FinishReason | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    steps: tuple[RequestStep, ...]  # the first and the last of them, where there are very many
    num_steps: int
    trace_id: str = ""  # of the distributed trace that it belongs to, as 32 hex digits; empty without tracing


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts by bucket since the master began: one more than `bounds`, not summed up."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    def quantile(self, part: float) -> float | None:
        """The value below which `part` (0 to 1) of all lie, linear inside its bucket; None of nothing.

        What lies above the last bound counts as lying on it.
        """
        wanted = part * sum(self.counts)
        if not any(self.counts):
            return None
        below = 0
        for index, count in enumerate(self.counts):
            if count and below + count >= wanted:
                low = self.bounds[index - 1] if index else 0.0
                high = self.bounds[min(index, len(self.bounds) - 1)]
                return low + (high - low) * max(wanted - below, 0.0) / count
            below += count
        return self.bounds[-1]

    def since(self, before: Histogram) -> Histogram:
        """What was counted after `before` was taken."""
        assert self.bounds == before.bounds, "two states of one histogram"
        counts = tuple(now - then for now, then in zip(self.counts, before.counts, strict=True))
        return Histogram(bounds=self.bounds, counts=counts, total=self.total - before.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker as people want to see it: what it is, what it holds, how it does."""

    worker_id: WorkerId
    address: str  # host:port
    host_id: str
    device: str
    device_name: str
    status: str  # joining, loading, ready, lost
    reason: str  # why it was lost
    stage_index: int | None
    first_layer: int | None
    end_layer: int | None  # exclusive
    memory_limit_bytes: int  # what it offered for weights and KV
    weight_bytes: int
    kv_bytes: int
    busy_ratio: float | None  # 0 to 1, over the last seconds; None before two reports
    report: HeartbeatReport | None  # the newest one
    report_age_s: float | None
    master_round_trip_s: float | None  # of the fastest of the last heartbeats
    wire: Histogram | None  # of the way from the sender to it, in `PHASE_BUCKETS_S`; None before the first step
    metrics_target: str  # host:port for Prometheus; empty without
    num_ranks: int = 1  # devices that compute each layer together
    ranks: tuple[RankLoad, ...] = ()  # these devices, rank 0 first, as of `report`; empty with one device


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkView:
    """A way that steps take: from `sender` (empty: the master) to `receiver` (empty: the master)."""

    sender: WorkerId
    receiver: WorkerId
    round_trip_s: float | None
    bytes_per_s: float | None  # of tensors, over the last seconds; None where none are carried
    wire_s: float | None  # mean of the last steps, from the sender to the receiver


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryPoint:
    """What happened in the seconds before `at`."""

    at: float
    interval_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float  # computed, not those from the prefix cache
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    inter_token_p50_s: float | None
    inter_token_p95_s: float | None
    kv_used_ratio: float
    prefix_hit_ratio: float | None  # of the prompt tokens that came in this time; None without any
    num_running: int
    num_waiting: int
    num_workers_lost: int
    is_ready: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """The whole at one moment."""

    at: float
    started_at: float  # of the master
    model_name: str
    num_layers: int
    snapshot: ClusterSnapshot
    is_ready: bool
    failure: str  # why no request can be answered; empty while there is a pipeline
    workers: tuple[WorkerView, ...]  # in the pipeline's order, then the others
    links: tuple[LinkView, ...]  # master to first stage, stage to stage, last stage to master
    time_to_first_token: Histogram
    inter_token_latency: Histogram
    num_errors: tuple[tuple[str, int], ...]  # by kind, of the master and all workers


class Observatory(Protocol):
    """Tells what is going on. Cheap to ask once or twice a second; all answers are copies."""

    def view(self) -> ClusterView:
        """Everything but steps, requests and the past."""
        ...

    def steps(self, since: int = 0) -> tuple[StepPassage, ...]:
        """The last steps whose number is above `since`, oldest first; a step under way comes with what is known.

        Workers report with their heartbeat: a step's stages are known about a second after it came back.
        """
        ...

    def steps_changed(self, since: int = 0, *, limit: int | None = None) -> tuple[int, tuple[StepPassage, ...]]:
        """A cursor, and the steps that are new or more complete since the cursor `since`, oldest first.

        Where there are more than `limit` (None: no limit) only the newest of them are given.

        For who follows the steps: begin with 0, which gives all that are kept, and hand the last answer's cursor in
        again. A step comes several times: when it was sent, when it came back, when a stage was reported; replace what
        is known of its number. Cursors count changes, not steps.
        """
        ...

    def requests(self) -> tuple[RequestTrace, ...]:
        """Those that run or wait, and the last ones that ended, newest first; their `steps` are left empty."""
        ...

    def request(self, seq_id: SeqId) -> RequestTrace | None:
        """One of them, with its steps; None when it is not known (any more)."""
        ...

    def history(self) -> tuple[HistoryPoint, ...]:
        """The last hour, oldest first, one point for each `metrics_interval_s`."""
        ...

    def metrics_rows(self, *, since: float = 0.0) -> list[dict[str, object]]:
        """The last hour as flat rows, one for each worker and point of time, oldest first; see docs/monitoring.md.

        Rows of one point share their `timestamp`; only those with one above `since` are given.
        """
        ...


def phase_histogram(times: PhaseTimes) -> Histogram:
    """A phase's times as a histogram."""
    return Histogram(bounds=PHASE_BUCKETS_S, counts=times.counts, total=times.total_s)
