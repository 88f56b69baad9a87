"""An observatory whose every answer can be set: a pipeline of two workers that has been busy, unless told otherwise.

`FakeObservatory` implements `observation.Observatory`. Its parts may be replaced at any time (`cluster`, `passages`,
`traces`, `points`, `rows`), or changed a little by the `change_...` methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from shardwright.observation import (
    ClusterView,
    Histogram,
    HistoryPoint,
    LinkView,
    RequestStep,
    RequestTrace,
    StagePassage,
    StepPassage,
    WorkerView,
)
from shardwright.types import (
    PHASE_BUCKETS_S,
    ClusterSnapshot,
    FinishReason,
    HeartbeatReport,
    LayerRange,
    LinkReport,
    PhaseTimes,
    RankLoad,
    StageAssignment,
    StepPhase,
    WorkerSnapshot,
)

NOW = 1_767_225_600.0  # 2026-01-01T00:00:00Z
MIB = 1024 * 1024


def spread(total: int, *, peak: int = 5) -> tuple[int, ...]:
    """Counts of `total` observations for the buckets of phases, most of them around one bucket."""
    counts = [0] * (len(PHASE_BUCKETS_S) + 1)
    counts[peak - 1], counts[peak], counts[peak + 1] = total // 4, total - total // 4 - total // 8, total // 8
    return tuple(counts)


def example_report(**changes: Any) -> HeartbeatReport:
    """A worker without a GPU that holds a stage and sends to `desk`."""
    report = HeartbeatReport(
        timestamp=NOW - 0.5,
        epoch=3,
        queue_depth=1,
        steps_done=400,
        busy_s=30.0,
        uptime_s=60.0,
        device="cpu",
        device_name="AMD EPYC",
        gpu_utilization=None,
        gpu_memory_used_bytes=None,
        gpu_memory_total_bytes=None,
        cpu_utilization=97.0,
        memory_used_bytes=16_000 * MIB,
        memory_total_bytes=64_000 * MIB,
        process_memory_bytes=1_500 * MIB,
        clock_received_s=1000.0,
        clock_sent_s=1000.001,
        weight_bytes=800 * MIB,
        kv_bytes=200 * MIB,
        next_trace=400,
        phases=tuple(
            PhaseTimes(phase=phase, counts=spread(400, peak=4 + index), total_s=0.5 * (index + 1))
            for index, phase in enumerate(StepPhase)
        ),
        link=LinkReport(peer="desk", bytes_sent=4_000_000, steps_sent=400, round_trip_s=0.0004),
        errors=(("LinkLostError", 1),),
        loaded_bytes=(("cache", 300 * MIB), ("network", 500 * MIB)),
        offloaded_bytes=600 * MIB,
        offload_read_bytes=240_000 * MIB,
        offload_wait_s=12.5,
    )
    return replace(report, **changes)


def example_worker(worker_id: str, index: int | None, **changes: Any) -> WorkerView:
    """A worker that holds stage `index` of two, 4 layers each (None: none); `desk` is the last one and has two GPUs."""
    report = example_report()
    if worker_id == "desk":
        report = example_report(
            device="cuda:0",
            device_name="NVIDIA L4",
            gpu_utilization=64.0,
            gpu_memory_used_bytes=18_000 * MIB,
            gpu_memory_total_bytes=24_000 * MIB,
            gpu_temperature_c=61.0,
            gpu_power_w=70.5,
            ranks=(
                RankLoad(
                    rank=1,
                    device="cuda:1",
                    device_name="NVIDIA L4",
                    process_memory_bytes=1_400 * MIB,
                    gpu_utilization=60.0,
                    gpu_memory_used_bytes=17_000 * MIB,
                    gpu_memory_total_bytes=24_000 * MIB,
                ),
            ),
            queue_depth=0,
            link=None,
            errors=(),
            loaded_bytes=(("disk", 1_600 * MIB),),
        )
    view = WorkerView(
        worker_id=worker_id,
        address=f"{worker_id}.test:50051",
        host_id=f"host-of-{worker_id}",
        device=report.device,
        device_name=report.device_name,
        status="joining" if index is None else "ready",
        reason="",
        stage_index=index,
        first_layer=None if index is None else 4 * index,
        end_layer=None if index is None else 4 * index + 4,
        memory_limit_bytes=2_000 * MIB,
        weight_bytes=0 if index is None else report.weight_bytes,
        kv_bytes=0 if index is None else report.kv_bytes,
        busy_ratio=None if index is None else 0.5,
        report=report,
        report_age_s=0.4,
        master_round_trip_s=0.0006,
        wire=None if index is None else Histogram(bounds=PHASE_BUCKETS_S, counts=spread(400, peak=3), total=0.16),
        metrics_target=f"{worker_id}.test:9464",
        num_ranks=1 + len(report.ranks),
        ranks=report.all_ranks,
    )
    return replace(view, **changes)


def example_view(workers: Sequence[WorkerView] | None = None, **changes: Any) -> ClusterView:
    """The whole cluster; its snapshot has the stages and workers of `workers`."""
    if workers is None:
        workers = (example_worker("rack-1", 0), example_worker("desk", 1))
    placed = sorted((w for w in workers if w.stage_index is not None), key=lambda w: w.stage_index)
    names = [worker.worker_id for worker in placed]
    stages = tuple(
        StageAssignment(
            epoch=3,
            worker_id=worker.worker_id,
            stage_index=index,
            num_stages=len(placed),
            layers=LayerRange(worker.first_layer, worker.end_layer),
            num_blocks=100,
            block_size=16,
            next_worker_id=names[index + 1] if index + 1 < len(names) else None,
        )
        for index, worker in enumerate(placed)
    )
    snapshot = ClusterSnapshot(
        epoch=3,
        ready=bool(placed),
        stages=stages,
        workers=tuple(
            WorkerSnapshot(
                worker_id=worker.worker_id,
                status=worker.status,
                layers=None if worker.first_layer is None else LayerRange(worker.first_layer, worker.end_layer),
                last_heard_s=1.0,
                report=worker.report,
                reason=worker.reason,
            )
            for worker in workers
        ),
        num_blocks=100,
        num_free_blocks=60,
        num_waiting=2,
        num_running=3,
        num_steps_in_flight=1,
        max_steps_in_flight=2,
        total_prompt_tokens=1000,
        total_cached_tokens=250,
        total_output_tokens=770,
        total_preemptions=4,
        max_waiting=8,
        num_cached_blocks=5,
        finished=((FinishReason.STOP, 9), (FinishReason.ABORT, 1)),
    )
    chain = ["", *names, ""] if names else []
    view = ClusterView(
        at=NOW,
        started_at=NOW - 3600.0,
        model_name="fake/characters-1",
        num_layers=8,
        snapshot=snapshot,
        is_ready=bool(placed),
        failure="" if placed else "worker rack-1 was lost: the link broke",
        workers=tuple(workers),
        links=tuple(
            LinkView(
                sender=sender,
                receiver=receiver,
                round_trip_s=0.0004,
                bytes_per_s=64_000.0 if sender and receiver else None,
                wire_s=0.0003,
            )
            for sender, receiver in pairwise(chain)
        ),
        time_to_first_token=Histogram(bounds=(0.1, 0.5, 1.0), counts=(2, 6, 1, 1), total=4.2),
        inter_token_latency=Histogram(bounds=(0.01, 0.05, 0.1), counts=(500, 240, 15, 5), total=9.1),
        num_errors=(("LinkLostError", 1),),
    )
    return replace(view, **changes)


def example_step(number: int, *, sent_at: float, **changes: Any) -> StepPassage:
    """A step of three sequences that took 50 ms over two stages, with wire and queue between them."""

    def stage(index: int, worker_id: str, arrived: float, finished: float, wire_s: float) -> StagePassage:
        return StagePassage(
            worker_id=worker_id,
            stage_index=index,
            arrived_at=sent_at + arrived,
            started_at=sent_at + arrived + 0.001,
            finished_at=sent_at + finished,
            sent_at=sent_at + finished + 0.001,
            serialise_s=0.001,
            wire_s=wire_s,
            bytes_in=0 if index == 0 else 8192,
            bytes_out=8192 if index == 0 else 0,
        )

    passage = StepPassage(
        number=number,
        epoch=3,
        step=number,
        num_sequences=3,
        num_tokens=3,
        sent_at=sent_at,
        returned_at=sent_at + 0.05,
        stages=(stage(0, "rack-1", 0.002, 0.022, 0.002), stage(1, "desk", 0.025, 0.047, 0.002)),
        num_stages=2,
    )
    return replace(passage, **changes)


def example_request(seq_id: int, **changes: Any) -> RequestTrace:
    """A request that is over: its prompt took steps 1 and 2, its 6 tokens steps 2 to 7."""
    began = NOW - 10.0 + seq_id
    trace = RequestTrace(
        seq_id=seq_id,
        submitted_at=began,
        started_at=began + 0.01,
        first_token_at=began + 0.12,
        finished_at=began + 0.4,
        reason=FinishReason.LENGTH,
        num_prompt_tokens=40,
        num_cached_tokens=16,
        num_output_tokens=6,
        num_preemptions=0,
        steps=(
            RequestStep(number=1, num_tokens=16, is_prompt=True),
            RequestStep(number=2, num_tokens=8, is_prompt=True),
            *(RequestStep(number=number, num_tokens=1, is_prompt=False) for number in range(3, 8)),
        ),
        num_steps=7,
    )
    return replace(trace, **changes)


def example_history(count: int = 12, *, interval_s: float = 5.0) -> tuple[HistoryPoint, ...]:
    """Points that end now; the first one saw no request."""
    return tuple(
        HistoryPoint(
            at=NOW - interval_s * (count - 1 - index),
            interval_s=interval_s,
            output_tokens_per_s=10.0 * index,
            prompt_tokens_per_s=25.0 * index,
            ttft_p50_s=0.1 if index else None,
            ttft_p95_s=0.3 if index else None,
            inter_token_p50_s=0.02 if index else None,
            inter_token_p95_s=0.05 if index else None,
            kv_used_ratio=min(1.0, 0.05 * index),
            prefix_hit_ratio=0.25 if index else None,
            num_running=min(index, 3),
            num_waiting=max(0, index - 3),
            num_workers_lost=0,
            is_ready=True,
        )
        for index in range(count)
    )


class FakeObservatory:
    """Gives what it was told to give."""

    def __init__(
        self,
        *,
        cluster: ClusterView | None = None,
        passages: Sequence[StepPassage] | None = None,
        traces: Sequence[RequestTrace] | None = None,
        points: Sequence[HistoryPoint] | None = None,
        rows: Sequence[dict[str, object]] | None = None,
    ) -> None:
        self.cluster = cluster if cluster is not None else example_view()
        self.traces = list(traces if traces is not None else (example_request(2), example_request(1)))
        self.points = list(points if points is not None else example_history())
        self.rows = list(rows if rows is not None else self._rows())
        self._passages: dict[int, tuple[int, StepPassage]] = {}  # with the change that brought them so far
        self._num_changes = 0
        steps = passages if passages is not None else [example_step(n, sent_at=NOW - 1 + n / 20) for n in range(1, 8)]
        for passage in steps:
            self.put_step(passage)

    # --- to set ------------------------------------------------------------------------------------

    def change_view(self, **changes: Any) -> None:
        """Replace fields of the view."""
        self.cluster = replace(self.cluster, **changes)

    def change_worker(self, worker_id: str, **changes: Any) -> None:
        """Replace fields of one worker's view."""
        workers = tuple(replace(w, **changes) if w.worker_id == worker_id else w for w in self.cluster.workers)
        self.change_view(workers=workers)

    def put_step(self, passage: StepPassage) -> None:
        """A new step, or more of one."""
        self._num_changes += 1
        self._passages[passage.number] = (self._num_changes, passage)

    @property
    def passages(self) -> list[StepPassage]:
        """All steps, by number."""
        return [self._passages[number][1] for number in sorted(self._passages)]

    # --- the protocol ------------------------------------------------------------------------------

    def view(self) -> ClusterView:
        return self.cluster

    def steps(self, since: int = 0) -> tuple[StepPassage, ...]:
        return tuple(passage for passage in self.passages if passage.number > since)

    def steps_changed(self, since: int = 0, *, limit: int | None = None) -> tuple[int, tuple[StepPassage, ...]]:
        changed = [self._passages[n][1] for n in sorted(self._passages) if self._passages[n][0] > since]
        return self._num_changes, tuple(changed if limit is None else changed[max(len(changed) - limit, 0) :])

    def requests(self) -> tuple[RequestTrace, ...]:
        return tuple(replace(trace, steps=()) for trace in self.traces)

    def request(self, seq_id: int) -> RequestTrace | None:
        return next((trace for trace in self.traces if trace.seq_id == seq_id), None)

    def history(self) -> tuple[HistoryPoint, ...]:
        return tuple(self.points)

    def metrics_rows(self, *, since: float = 0.0) -> list[dict[str, object]]:
        return [dict(row) for row in self.rows if row["timestamp"] > since]

    def _rows(self) -> list[dict[str, object]]:
        return [
            {
                "time": "2026-01-01T00:00:00.000+00:00",
                "timestamp": NOW,
                "worker": worker.worker_id,
                "device": worker.device,
                "device_name": worker.device_name,
                "status": worker.status,
                "busy_ratio": worker.busy_ratio,
            }
            for worker in self.cluster.workers
        ]
