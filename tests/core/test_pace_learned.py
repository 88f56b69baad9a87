"""What a master's pace comes to when it begins without any measurement."""

from dataclasses import replace
from itertools import pairwise
from statistics import median, quantiles

import pytest
from timed_line import TrueStage
from timed_master import HEARTBEAT_S, TimedMaster

from shardwright.core.step_budget import GapWatch
from shardwright.types import StepInput

# as measured for Gemma-2B's shape, a core for each of two stages
STAGE = TrueStage(base_s=0.09, sequence_s=0.004, token_s=0.004)


def prefill_s(**options: object) -> tuple[float, list[float]]:
    """Seconds for 16 prompts of 512 tokens, and each stage's part of them that it was busy."""
    run = TimedMaster(line=[STAGE, STAGE], **options)
    for seq_id in range(1, 17):
        run.ask(seq_id, 512, new=1)
    run.run_until(lambda: run.num_tokens == 16)
    return run.now, [busy_s / run.now for busy_s in run.busy()]


@pytest.mark.parametrize("same_host", [False, True])
def test_prompts_keep_both_stages_busy_from_the_first_on(same_host):
    """On two machines, and on one whose stages have a core each."""
    alone_s, _ = prefill_s(same_host=same_host, changes={"max_steps_in_flight": 1})
    seconds, busy = prefill_s(same_host=same_host)
    assert alone_s >= 1.7 * seconds
    assert min(busy) >= 0.85


def decode_rate(line, *, num_sequences: int = 16, **options: object) -> tuple[float, TimedMaster]:
    """Tokens a second after half a minute, and the run."""
    run = TimedMaster(line=line, **options)
    for seq_id in range(1, num_sequences + 1):
        run.ask(seq_id, 20, new=3000)
    run.run(30)
    before = run.num_tokens
    run.run(30)
    return (run.num_tokens - before) / 30, run


def test_a_slow_link_is_filled():
    """20 ms one way cost less than a tenth of 16 sequences' throughput."""
    near, _ = decode_rate([STAGE, STAGE])
    far, _ = decode_rate([STAGE, replace(STAGE, delay_s=0.02)])
    assert far >= 0.9 * near


def test_the_choice_settles():
    """It tries other numbers of steps in the first seconds and stays with what it found."""
    for options in ({}, {"same_host": True}, {"same_host": True, "slowdown": float}):
        _, run = decode_rate([STAGE, STAGE], **options)
        late = {steps for when, steps in run.choices if when > 30}
        assert len(late) == 1, f"{options}: {late}"


def gaps(run: TimedMaster, decodes: int, *, since: float) -> list[float]:
    return [
        after - before
        for seq_id in range(1, decodes + 1)
        for before, after in pairwise(run.times[seq_id])
        if before >= since
    ]


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
@pytest.mark.parametrize("decodes", [1, 4, 8, 16])
def test_a_burst_of_long_prompts_leaves_gaps_below_three_times_those_without(decodes, delay_s):
    """And it does so while the prompts get half of the speed that they would have alone in one step at a time."""
    run = TimedMaster(line=[STAGE, replace(STAGE, delay_s=delay_s)])
    for seq_id in range(1, decodes + 1):
        run.ask(seq_id, 20, new=3000)
    run.run(20)
    quiet = median(gaps(run, decodes, since=10.0))
    for seq_id in range(101, 109):
        run.ask(seq_id, 2000, new=1)
    run.run_until(lambda: all(seq_id in run.times for seq_id in range(101, 109)))
    assert max(gaps(run, decodes, since=20.0)) < 3 * quiet
    assert run.now - 20 < 2 * 16000 * 2 * STAGE.token_s


def slow_machine(now: float, _: StepInput) -> float:
    """Something else runs beside it for five seconds of the burst."""
    return 1.6 if 22 < now < 27 else 1.0


def large_gap(*, num_stages: int) -> float:
    """Which one gap of a hundred is larger, beside a burst of prompts of which each is longer than a chunk."""
    run = TimedMaster(line=[STAGE] * num_stages, hindrance=slow_machine)
    for seq_id in range(1, 5):
        run.ask(seq_id, 20, new=3000)
    run.run(20)
    quiet = median(gaps(run, 4, since=10.0))
    for seq_id in range(101, 105):
        run.ask(seq_id, 2000, new=1)
    run.run_until(lambda: all(seq_id in run.times for seq_id in range(101, 105)))
    return quantiles(gaps(run, 4, since=20.0), n=100)[98] / quiet


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_machine_that_becomes_slower_gets_smaller_chunks_before_its_report_tells(num_stages, monkeypatch):
    """Reports come once a second, as means by shape. Gaps are seen at once."""
    watched = large_gap(num_stages=num_stages)
    monkeypatch.setattr(GapWatch, "took", lambda *_, **__: None)
    assert watched < 0.85 * large_gap(num_stages=num_stages)
    assert watched < 3


def test_a_burst_before_anything_was_measured_is_met_with_care():
    """Half a second after the first token of all: no heartbeat has told a step's time yet."""
    run = TimedMaster(line=[STAGE])
    run.ask(1, 20, new=3000)
    run.run_until(lambda: len(run.times.get(1, ())) == 2)
    assert run.now < HEARTBEAT_S
    for seq_id in range(101, 109):
        run.ask(seq_id, 2000, new=1)
    run.run(5)
    assert max(gaps(run, 1, since=0.0)) < 3 * STAGE.step_s(1, 0)
