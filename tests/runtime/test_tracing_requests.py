"""When a sequence's spans are made: once its workers have reported, or had time enough; and what is kept till then."""

import asyncio
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shardwright.observation import RequestStep, RequestTrace, StagePassage, StepPassage
from shardwright.runtime import otel_requests
from shardwright.runtime.otel_export import Spans
from shardwright.runtime.otel_requests import MAX_PASSAGES, PATIENCE_S, RequestTracing
from shardwright.types import FinishReason, LayerRange, StageAssignment

T0 = 1_700_000_000.0
STAGES = tuple(
    StageAssignment(
        epoch=2,
        worker_id=f"w{index}",
        stage_index=index,
        num_stages=2,
        layers=LayerRange(index * 3, index * 3 + 3),
        num_blocks=8,
        block_size=4,
        next_worker_id=None,
    )
    for index in range(2)
)


class Observed:
    """An observatory that knows what the test tells it, and of each request the first 64 and the last 192 steps."""

    def __init__(self):
        self.now = T0
        self.traces = {}
        self.parts = {}
        self.steps = {}
        self.changed = {}
        self.cursor = 0

    def submit(self, seq_id):
        self.parts[seq_id] = []
        self.traces[seq_id] = RequestTrace(
            seq_id=seq_id,
            submitted_at=self.now,
            started_at=self.now,
            first_token_at=None,
            finished_at=None,
            reason=None,
            num_prompt_tokens=3,
            num_cached_tokens=0,
            num_output_tokens=0,
            num_preemptions=0,
            steps=(),
            num_steps=0,
        )

    def step(self, *seq_ids, has_returned=True):
        """A step of these sequences, of which no worker has told yet."""
        number = len(self.steps) + 1
        for seq_id in seq_ids:
            self.parts[seq_id].append(RequestStep(number=number, num_tokens=1, is_prompt=not self.parts[seq_id]))
            trace = self.traces[seq_id]
            self.traces[seq_id] = replace(trace, first_token_at=trace.first_token_at or self.now + 0.01)
        self._put(
            StepPassage(
                number=number,
                epoch=2,
                step=number,
                num_sequences=len(seq_ids),
                num_tokens=len(seq_ids),
                sent_at=self.now,
                returned_at=self.now + 0.01 if has_returned else None,
                stages=(),
            )
        )
        self.now += 0.02
        return number

    def report(self, number, *, stages=2):
        """Workers tell of a step."""
        step = self.steps[number]
        passages = tuple(
            StagePassage(
                worker_id=f"w{index}",
                stage_index=index,
                arrived_at=step.sent_at + 0.001,
                started_at=step.sent_at + 0.002,
                finished_at=step.sent_at + 0.003,
                sent_at=step.sent_at + 0.004,
                serialise_s=0.0,
                wire_s=None,
                bytes_in=0,
                bytes_out=0,
            )
            for index in range(stages)
        )
        self._put(replace(step, stages=passages))

    def _put(self, step):
        self.steps[step.number] = step
        self.cursor += 1
        self.changed[step.number] = self.cursor

    def steps_changed(self, since=0):
        return self.cursor, tuple(self.steps[n] for n, at in sorted(self.changed.items()) if at > since)

    def request(self, seq_id):
        trace = self.traces.get(seq_id)
        if trace is None:
            return None
        parts = self.parts[seq_id]
        kept = (*parts[:64], *parts[64:][-192:])
        return replace(trace, steps=kept, num_steps=len(parts))

    def finish(self, seq_id, reason=FinishReason.LENGTH):
        self.traces[seq_id] = replace(self.traces[seq_id], finished_at=self.now, reason=reason)


class Traced:
    """Sequences traced out of such an observatory."""

    def __init__(self):
        self.observed = Observed()
        self.exporter = InMemorySpanExporter()
        self.spans = Spans(self.exporter, service="test", collector="here")
        self.tracing = RequestTracing(self.spans, model="m")
        self.tracing.watch(self.observed, lambda: STAGES, lambda: self.observed.now)

    def begin(self, seq_id=1):
        self.observed.submit(seq_id)
        return self.tracing.begin(seq_id, self.observed.now)

    def end(self, seq_id=1):
        self.observed.finish(seq_id)
        self.tracing.end(seq_id, self.observed.now)

    def made(self):
        self.spans.flush()
        return sorted(self.exporter.get_finished_spans(), key=lambda span: (span.start_time, -span.end_time))

    def sequences(self):
        return [span for span in self.made() if span.name == "text_completion m"]


@pytest.fixture
async def traced():
    made = Traced()
    yield made
    await made.spans.close()


async def test_a_sequences_spans_wait_for_what_its_workers_have_to_tell(traced):
    traced.begin()
    number = traced.observed.step(1)
    traced.end()
    await traced.tracing.collect()
    assert traced.made() == []
    traced.observed.report(number, stages=1)
    await traced.tracing.collect()
    assert traced.made() == [], "one of two stages"
    traced.observed.report(number)
    await traced.tracing.collect()
    names = [span.name for span in traced.made()]
    assert sorted(names) == ["decode", "prefill", "prompt step", "queue", "stage 0", "stage 1", "text_completion m"]


async def test_a_worker_that_never_tells_holds_a_sequence_back_for_some_seconds_only(traced):
    traced.begin()
    traced.observed.step(1)
    traced.observed.step(1, has_returned=False)
    traced.end()
    await traced.tracing.collect()
    traced.observed.now += PATIENCE_S - 0.1
    await traced.tracing.collect()
    assert traced.made() == []
    traced.observed.now += 0.2
    await traced.tracing.collect()
    (sequence,) = traced.sequences()
    assert sequence.attributes["shardwright.traced_steps"] == 2
    assert not any(span.name.startswith("stage") for span in traced.made())


async def test_a_long_answer_is_whole_though_only_its_first_and_last_steps_are_remembered(traced):
    traced.begin()
    for _ in range(10):
        for _ in range(100):
            traced.observed.report(traced.observed.step(1))
        await traced.tracing.collect()
    traced.end()
    await traced.tracing.collect()
    (sequence,) = traced.sequences()
    assert sequence.attributes["shardwright.steps"] == 1000
    assert sequence.attributes["shardwright.traced_steps"] == 1000


async def test_sequences_that_shared_steps_each_have_them_and_tell_how_many_there_were(traced):
    ids = {traced.begin(seq_id) for seq_id in (1, 2, 3)}
    assert len(ids) == 3, "a trace each, where nobody asked for all"
    traced.observed.report(traced.observed.step(1, 2, 3))
    for seq_id in (1, 2, 3):
        traced.end(seq_id)
    await traced.tracing.collect()
    steps = [span for span in traced.made() if span.name == "prompt step"]
    assert [span.attributes["shardwright.first_step"] for span in steps] == [1, 1, 1]
    assert {span.attributes["shardwright.batch.sequences"] for span in steps} == {3}
    assert {f"{span.context.trace_id:032x}" for span in steps} == ids


async def test_a_request_that_is_forgotten_already_has_its_span_all_the_same(traced):
    traced.begin()
    traced.end()
    traced.observed.traces.clear()
    await traced.tracing.collect()
    assert [span.name for span in traced.made()] == ["text_completion m"]


async def test_what_is_kept_of_steps_is_bounded_and_nothing_is_while_nobody_asks(traced, monkeypatch):
    monkeypatch.setattr(otel_requests, "MAX_PASSAGES", 50)
    traced.begin()
    for _ in range(80):
        traced.observed.step(1)
    await traced.tracing.collect()
    assert sorted(traced.tracing._passages) == list(range(31, 81))
    traced.end()
    await traced.tracing.collect(is_last=True)
    assert not traced.tracing._passages
    assert traced.sequences()[0].attributes["shardwright.traced_steps"] == 50
    assert MAX_PASSAGES > 50


async def test_making_many_spans_lets_others_run_in_between(traced):
    traced.begin()
    for _ in range(90):
        traced.observed.report(traced.observed.step(1))
        traced.observed.now += 1.0
    traced.end()
    turns = 0

    async def other():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(other())
    await traced.tracing.collect()
    task.cancel()
    assert len(traced.made()) > 100
    assert turns >= len(traced.made()) // 16 - 1


async def test_being_stopped_while_spans_are_made_leaves_none_half_made(traced):
    traced.begin()
    for _ in range(90):
        traced.observed.report(traced.observed.step(1))
        traced.observed.now += 1.0
    traced.end()
    task = asyncio.create_task(traced.tracing.collect())
    while not traced.made():  # noqa: ASYNC110  nobody tells
        await asyncio.sleep(0)
    assert not traced.sequences(), "it is being made"
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert len(traced.sequences()) == 1
    assert sum(span.name == "stage 1" for span in traced.made()) == sum("step" in s.name for s in traced.made())


async def test_a_bug_in_what_is_collected_costs_the_open_traces_and_no_later_ones(traced, monkeypatch, caplog):
    monkeypatch.setattr(otel_requests, "COLLECT_INTERVAL_S", 0.005)
    traced.begin()
    steps_changed = traced.observed.steps_changed
    traced.observed.steps_changed = lambda _: 1 // 0
    task = asyncio.create_task(traced.tracing.run())
    async with asyncio.timeout(5.0):
        while traced.tracing._open:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.005)
    traced.observed.steps_changed = steps_changed
    traced.begin(2)
    traced.observed.report(traced.observed.step(2))
    traced.end(2)
    async with asyncio.timeout(5.0):
        while not traced.sequences():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait([task])
    assert [record.message for record in caplog.records] == ["the traces of 1 requests were given up"]
    assert traced.sequences()[0].attributes["shardwright.sequence"] == 2
