"""Makes a request's spans out of what was observed of it. Knows times and counts; nothing of OpenTelemetry or clocks.

A sequence's span holds `queue`, `prefill` and `decode`; below prefill and decode lie the steps that the sequence took
part in, and below each of these one span for each stage that it went through. Steps of a prompt stand for themselves,
decode steps in runs. Times are seconds since 1970 on the master's clock. Workers' times come with an error of about
half a round trip, so a span's ends are moved into its parent's where they lie outside; durations in attributes are
what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shardwright.observation import RequestStep, RequestTrace, StagePassage, StepPassage
from shardwright.types import Epoch, FinishReason, LayerRange

RUN_STEPS = 16
RUN_S = 0.25
"""A run of decode steps ends with this many steps, or once it has lasted so long."""

MAX_RUNS = 64
"""Runs that a sequence keeps of its prompt, and of its decode steps; with more, neighbours are joined by two."""

AttributeValue = str | int | float | bool | tuple[str, ...]

Layers = Callable[[Epoch, int], LayerRange | None]
"""The layers of a stage, by epoch and the stage's index; None where they are not known (any more)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanNode:
    """A span with those below it, in the order of their starts. They lie within its own times."""

    name: str
    start: float
    end: float
    attributes: Mapping[str, AttributeValue]
    children: tuple[SpanNode, ...] = ()


@dataclass(slots=True)
class _StageRun:
    """One stage's part of a run of steps. Durations and bytes are summed up."""

    worker_id: str
    start: float
    end: float
    num_steps: int = 0
    wire_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    serialise_s: float = 0.0
    send_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0

    def add(self, passage: StagePassage) -> None:
        self.start = min(self.start, passage.arrived_at)
        self.end = max(self.end, passage.sent_at)
        self.num_steps += 1
        self.wire_s += passage.wire_s or 0.0
        self.queue_s += max(passage.started_at - passage.arrived_at, 0.0)
        self.compute_s += max(passage.finished_at - passage.started_at - passage.serialise_s, 0.0)
        self.serialise_s += passage.serialise_s
        self.send_s += max(passage.sent_at - passage.finished_at, 0.0)
        self.bytes_in += passage.bytes_in
        self.bytes_out += passage.bytes_out

    def absorb(self, later: _StageRun) -> None:
        self.start = min(self.start, later.start)
        self.end = max(self.end, later.end)
        self.num_steps += later.num_steps
        self.wire_s += later.wire_s
        self.queue_s += later.queue_s
        self.compute_s += later.compute_s
        self.serialise_s += later.serialise_s
        self.send_s += later.send_s
        self.bytes_in += later.bytes_in
        self.bytes_out += later.bytes_out

    def attributes(self) -> dict[str, AttributeValue]:
        return {
            "shardwright.worker": self.worker_id,
            "shardwright.steps": self.num_steps,
            "shardwright.wire_s": self.wire_s,
            "shardwright.queue_s": self.queue_s,
            "shardwright.compute_s": self.compute_s,
            "shardwright.serialise_s": self.serialise_s,
            "shardwright.send_s": self.send_s,
            "shardwright.bytes_in": self.bytes_in,
            "shardwright.bytes_out": self.bytes_out,
        }


@dataclass(slots=True)
class _Run:
    """Steps in a row that one sequence took part in, in one epoch."""

    is_prompt: bool
    epoch: Epoch
    first: int  # the number of the first step
    last: int
    start: float
    end: float
    num_steps: int = 0
    num_tokens: int = 0  # of the sequence itself
    batch_tokens: int = 0  # of everybody in these steps
    batch_sequences: int = 0  # in all steps together
    in_pipeline_s: float = 0.0
    return_s: float = 0.0  # from the last stage to the master
    stages: dict[int, _StageRun] = field(default_factory=dict)  # by index

    def add(self, step: StepPassage, part: RequestStep) -> None:
        self.last = step.number
        self.num_steps += 1
        self.num_tokens += part.num_tokens
        self.batch_tokens += step.num_tokens
        self.batch_sequences += step.num_sequences
        seen = [step.sent_at, *(stage.sent_at for stage in step.stages)]
        end = step.returned_at if step.returned_at is not None else max(seen)
        self.end = max(self.end, end)
        self.in_pipeline_s += max(end - step.sent_at, 0.0)
        if step.returned_at is not None and step.stages:
            self.return_s += max(step.returned_at - step.stages[-1].sent_at, 0.0)
        for stage in step.stages:
            run = self.stages.get(stage.stage_index)
            if run is None:
                run = _StageRun(worker_id=stage.worker_id, start=stage.arrived_at, end=stage.sent_at)
                self.stages[stage.stage_index] = run
            run.add(stage)

    def absorb(self, later: _Run) -> None:
        self.last = later.last
        self.end = max(self.end, later.end)
        self.num_steps += later.num_steps
        self.num_tokens += later.num_tokens
        self.batch_tokens += later.batch_tokens
        self.batch_sequences += later.batch_sequences
        self.in_pipeline_s += later.in_pipeline_s
        self.return_s += later.return_s
        for index, stage in later.stages.items():
            if index in self.stages:
                self.stages[index].absorb(stage)
            else:
                self.stages[index] = stage

    def attributes(self) -> dict[str, AttributeValue]:
        return {
            "shardwright.epoch": self.epoch,
            "shardwright.steps": self.num_steps,
            "shardwright.first_step": self.first,
            "shardwright.last_step": self.last,
            "shardwright.tokens": self.num_tokens,
            "shardwright.batch.tokens": self.batch_tokens,
            "shardwright.batch.sequences": self.batch_sequences / self.num_steps,
            "shardwright.in_pipeline_s": self.in_pipeline_s,
            "shardwright.return_s": self.return_s,
        }


class SequenceRuns:
    """Folds the steps of one sequence into runs, as they become known; holds no more than a bounded number of runs."""

    def __init__(self) -> None:
        self._prompt: list[_Run] = []
        self._decode: list[_Run] = []
        self._prompt_scale = 0  # a run of the prompt takes no second step until there are too many
        self._decode_scale = 1

    @property
    def num_steps(self) -> int:
        """Steps folded in so far."""
        return sum(run.num_steps for run in (*self._prompt, *self._decode))

    def add(self, step: StepPassage, part: RequestStep) -> None:
        """One more step, in the order of their numbers."""
        runs = self._prompt if part.is_prompt else self._decode
        if not (runs and self._goes_on(runs[-1], step)):
            runs.append(
                _Run(
                    is_prompt=part.is_prompt,
                    epoch=step.epoch,
                    first=step.number,
                    last=step.number,
                    start=step.sent_at,
                    end=step.sent_at,
                )
            )
        runs[-1].add(step, part)
        if len(runs) > MAX_RUNS:
            self._halve(runs)

    def _goes_on(self, run: _Run, step: StepPassage) -> bool:
        scale = self._prompt_scale if run.is_prompt else self._decode_scale
        if run.epoch != step.epoch:
            return False
        if run.is_prompt:
            return run.num_steps < scale
        others = self._prompt[-1].last if self._prompt else 0
        is_interrupted = others > run.last  # computed again after a preemption
        return not is_interrupted and run.num_steps < RUN_STEPS * scale and step.sent_at - run.start < RUN_S * scale

    def _halve(self, runs: list[_Run]) -> None:
        kept: list[_Run] = []
        for index, run in enumerate(runs):
            if index % 2 and kept[-1].epoch == run.epoch:
                kept[-1].absorb(run)
            else:
                kept.append(run)
        runs[:] = kept
        if runs is self._prompt:
            self._prompt_scale = max(self._prompt_scale, 1) * 2
        else:
            self._decode_scale *= 2

    def spans(self, trace: RequestTrace, *, start: float, end: float, layers: Layers) -> tuple[SpanNode, ...]:
        """What lies below the sequence's own span, which goes from `start` to `end`."""
        begun = end if trace.started_at is None else _within(trace.started_at, start, end)
        nodes = [SpanNode(name="queue", start=start, end=begun, attributes={})]
        if trace.started_at is None:
            return tuple(nodes)
        first_token = end if trace.first_token_at is None else _within(trace.first_token_at, begun, end)
        runs = sorted((*self._prompt, *self._decode), key=lambda run: run.first)
        before = [run for run in runs if run.is_prompt and run.start <= first_token]
        after = [run for run in runs if not (run.is_prompt and run.start <= first_token)]
        prefill: dict[str, AttributeValue] = {
            "shardwright.tokens": sum(run.num_tokens for run in before),
            "shardwright.cached_tokens": trace.num_cached_tokens,
        }
        below = tuple(_run_span(run, begun, first_token, layers) for run in before)
        nodes.append(SpanNode(name="prefill", start=begun, end=first_token, attributes=prefill, children=below))
        if after or first_token < end:
            decode: dict[str, AttributeValue] = {"shardwright.tokens": sum(run.num_tokens for run in after)}
            below = tuple(_run_span(run, first_token, end, layers) for run in after)
            nodes.append(SpanNode(name="decode", start=first_token, end=end, attributes=decode, children=below))
        return tuple(nodes)


def _run_span(run: _Run, low: float, high: float, layers: Layers) -> SpanNode:
    start = _within(run.start, low, high)
    end = _within(run.end, start, high)
    children = []
    for index, stage in sorted(run.stages.items()):
        at = _within(stage.start, start, end)
        attributes: dict[str, AttributeValue] = {"shardwright.stage": index}
        if (held := layers(run.epoch, index)) is not None:
            attributes["shardwright.layers"] = str(held)
        attributes |= stage.attributes()
        children.append(
            SpanNode(name=f"stage {index}", start=at, end=_within(stage.end, at, end), attributes=attributes)
        )
    name = "prompt step" if run.is_prompt else "decode steps"
    return SpanNode(name=name, start=start, end=end, attributes=run.attributes(), children=tuple(children))


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def sequence_attributes(trace: RequestTrace, *, num_traced_steps: int) -> dict[str, AttributeValue]:
    """What a sequence's span tells beside its times; by OpenTelemetry's names for generative AI where it has any."""
    attributes: dict[str, AttributeValue] = {
        "shardwright.sequence": trace.seq_id,
        "gen_ai.usage.input_tokens": trace.num_prompt_tokens,
        "gen_ai.usage.output_tokens": trace.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": trace.num_cached_tokens,
        "shardwright.preemptions": trace.num_preemptions,
        "shardwright.steps": trace.num_steps,
        "shardwright.traced_steps": num_traced_steps,
    }
    if trace.reason is not None:
        attributes["gen_ai.response.finish_reasons"] = (trace.reason.value,)
    if trace.first_token_at is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = max(trace.first_token_at - trace.submitted_at, 0.0)
    return attributes


def failure(reason: FinishReason | None) -> str:
    """What went wrong with a sequence that ended so, in one word; empty when nothing did.

    A client that gave up counts: the answer that was asked for did not come.
    """
    if reason in {FinishReason.STOP, FinishReason.LENGTH}:
        return ""
    return "unknown" if reason is None else reason.value
