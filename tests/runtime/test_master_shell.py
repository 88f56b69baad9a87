"""What the master's shell does around the core: who is told what and when, how requests end, and the core's clock."""

import asyncio
import gc

import pytest
from fake_pipeline import FakePipeline, fake_master

from shardwright.engine import FinishEvent, PromptScoresEvent, TokenEvent
from shardwright.errors import ClusterError
from shardwright.types import GREEDY, FinishReason, SamplingParams, StopConditions


def up_to(count):
    return StopConditions(max_new_tokens=count)


async def events_of(reader):
    return [event async for event in reader]


async def until(condition):
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110  a snapshot's figures announce themselves to nobody
            await asyncio.sleep(0.001)


def others():
    return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


@pytest.fixture
def pipeline():
    return FakePipeline()


async def test_a_request_gets_its_tokens_in_order_and_one_end(pipeline):
    async with fake_master(pipeline) as engine:
        seq_id, reader = await engine.submit((5, 6), GREEDY, up_to(3))
        assert await events_of(reader) == [
            *(TokenEvent(seq_id=seq_id, index=i, token_id=7 + i, logprob=-1.0) for i in range(3)),
            FinishEvent(seq_id=seq_id, reason=FinishReason.LENGTH),
        ]
        assert engine.snapshot().num_running == 0


async def test_closing_the_reader_before_its_first_event_aborts_the_request(pipeline):
    async with fake_master(pipeline) as engine:
        pipeline.open_.clear()
        _, reader = await engine.submit((5,), GREEDY, up_to(99))
        assert engine.snapshot().num_running == 1
        await reader.aclose()
        assert engine.snapshot().num_running == 0
        assert [event async for event in reader] == []
        await reader.aclose()


async def test_a_cancelled_reader_aborts_the_request(pipeline):
    async with fake_master(pipeline) as engine:
        pipeline.open_.clear()
        _, reader = await engine.submit((5,), GREEDY, up_to(99))
        task = asyncio.create_task(events_of(reader))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert engine.snapshot().num_running == 0


async def test_a_reader_that_is_dropped_in_the_middle_aborts_the_request(pipeline):
    async with fake_master(pipeline) as engine:
        _, reader = await engine.submit((5,), GREEDY, up_to(200))
        async for event in reader:
            assert event.token_id == 6
            break
        del reader
        gc.collect()
        await until(lambda: engine.snapshot().num_running == 0)
        assert dict(engine.snapshot().finished) == {FinishReason.ABORT: 1}


async def test_a_slow_reader_holds_up_nobody_and_keeps_no_more_than_its_tokens(pipeline):
    async with fake_master(pipeline) as engine:
        _, slow = await engine.submit((5,), GREEDY, up_to(50))
        _, quick = await engine.submit((9,), GREEDY, up_to(60))
        assert len(await events_of(quick)) == 61
        assert engine.snapshot().num_running == 0
        assert len(await events_of(slow)) == 51


async def test_requests_cost_no_task_of_their_own(pipeline):
    async with fake_master(pipeline) as engine:
        before = len(others())
        pipeline.open_.clear()
        readers = [(await engine.submit((i,), GREEDY, up_to(5)))[1] for i in range(1, 20)]
        await asyncio.sleep(0)
        assert len(others()) == before
        pipeline.open_.set()
        assert [len(await events_of(reader)) for reader in readers] == [6] * 19
    assert others() == []


async def test_the_next_step_goes_out_before_anybody_looks_at_the_last_ones_tokens(pipeline):
    """A client that takes long over a token must not hold up the pipeline."""
    seen = []
    async with fake_master(pipeline, max_steps_in_flight=1) as engine:
        engine.start((5,), GREEDY, up_to(4), lambda events: seen.append((len(pipeline.steps), events)))
        await until(lambda: engine.snapshot().num_running == 0)
        await asyncio.sleep(0.01)
    # the probe, then a step for each token: when a token is told of, the step after its own is there already
    assert [steps for steps, _ in seen] == [3, 4, 5, 5]
    assert [len(events) for _, events in seen] == [1, 1, 1, 2], "the last token and the end come together"


async def test_a_sink_that_raises_keeps_nothing_from_the_others(pipeline):
    def broken(events):
        raise ValueError("a bug")

    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    async with fake_master(pipeline) as engine:
        engine.start((5,), GREEDY, up_to(3), broken)
        _, reader = await engine.submit((9,), GREEDY, up_to(3))
        assert len(await events_of(reader)) == 4
    assert {str(error) for error in reported} == {"a bug"}


async def test_likeliest_tokens_and_prompt_scores_reach_the_client(pipeline):
    async with fake_master(pipeline, token_budget=3) as engine:
        seq_id, reader = await engine.submit(
            (5, 6, 7, 8, 9), SamplingParams(num_top_logprobs=2), up_to(1), num_prompt_logprobs=0
        )
        events = await events_of(reader)
    scores = [score for event in events if isinstance(event, PromptScoresEvent) for score in event.scores]
    assert [(score.token_id, score.logprob) for score in scores] == [(6, -6.0), (7, -7.0), (8, -8.0), (9, -9.0)]
    assert events[-2] == TokenEvent(seq_id=seq_id, index=0, token_id=10, logprob=-1.0, top=((10, -1.0), (11, -2.0)))


async def test_a_broken_pipeline_ends_open_requests_and_refuses_new_ones(pipeline):
    async with fake_master(pipeline) as engine:
        pipeline.open_.clear()
        _, reader = await engine.submit((5,), GREEDY, up_to(3))
        pipeline.break_link()
        (end,) = await events_of(reader)
        assert end.reason is FinishReason.ERROR
        assert "the link broke" in end.message
        assert not engine.is_ready()
        with pytest.raises(ClusterError, match="the link broke"):
            await engine.submit((5,), GREEDY, up_to(3))


async def test_closing_the_master_ends_every_request_and_leaves_no_task(pipeline):
    async with fake_master(pipeline) as engine:
        assert engine.is_ready()
        pipeline.open_.clear()
        _, reader = await engine.submit((5,), GREEDY, up_to(3))
    (end,) = await events_of(reader)
    assert (end.reason, end.message) == (FinishReason.ABORT, "the master is closing")
    assert not engine.is_ready()
    with pytest.raises(ClusterError, match="closed"):
        await engine.submit((5,), GREEDY, up_to(3))
    assert others() == []


async def test_a_fault_of_the_core_ends_every_request_and_is_not_hidden(pipeline, monkeypatch, caplog):
    async with fake_master(pipeline) as engine:
        pipeline.open_.clear()
        _, reader = await engine.submit((5,), GREEDY, up_to(3))

        def broken(event, now):
            raise AssertionError("block 3 is twice there")

        monkeypatch.setattr(engine._state, "handle", broken)
        with pytest.raises(AssertionError):
            await engine.submit((6,), GREEDY, up_to(3))
        (end,) = await events_of(reader)
        assert end.reason is FinishReason.ERROR
        assert "block 3 is twice there" in end.message
        assert not engine.is_ready()
        with pytest.raises(ClusterError, match="block 3 is twice there"):
            await engine.submit((6,), GREEDY, up_to(3))
        monkeypatch.undo()
        pipeline.open_.set()
        await asyncio.sleep(0.05)
    assert "block 3 is twice there" in caplog.text
    assert others() == []


async def test_an_idle_pipeline_is_tried_and_ready_means_that_it_answers(pipeline):
    async with fake_master(pipeline, probe_interval_s=0.05) as engine:
        for _ in range(6):
            await asyncio.sleep(0.04)
            assert engine.is_ready()
        assert len(pipeline.steps) > 3
        pipeline.open_.clear()
        await until(lambda: not engine.is_ready())
        assert engine.snapshot().ready, "the pipeline is up, but nothing comes out of it"
        pipeline.open_.set()
        await until(engine.is_ready)


class Clock:
    """A clock that can leap, as it does for a process that was stopped."""

    def __init__(self):
        self.leaps = 0.0

    def __call__(self):
        return asyncio.get_running_loop().time() + self.leaps


async def test_a_master_that_was_held_up_itself_calls_no_worker_lost(pipeline):
    clock = Clock()
    async with fake_master(pipeline, clock=clock, heartbeat_timeout_s=5.0) as engine:
        pipeline.heartbeats.clear()
        await asyncio.sleep(0.15)
        clock.leaps += 1000.0
        await asyncio.sleep(0.3)
        assert engine.snapshot().ready
        pipeline.heartbeats.set()
        _, reader = await engine.submit((5,), GREEDY, up_to(3))
        assert len(await events_of(reader)) == 4


async def test_a_worker_that_is_silent_is_lost_at_its_time(pipeline):
    async with fake_master(pipeline, heartbeat_timeout_s=0.4) as engine:
        pipeline.heartbeats.clear()
        start = asyncio.get_running_loop().time()
        await until(lambda: not engine.snapshot().ready)
        assert 0.2 < asyncio.get_running_loop().time() - start < 1.0


async def test_workers_are_asked_for_heartbeats_at_different_moments(pipeline):
    """All at first, then half an interval apart: what that costs must not come to one step."""
    async with fake_master(pipeline, heartbeat_interval_s=0.3):
        await until(lambda: len(pipeline.heard_at) >= 6)
    when = {name: [at for who, at in pipeline.heard_at if who == name] for name in ("a", "b")}
    assert abs(when["a"][0] - when["b"][0]) < 0.1
    for one, other in zip(when["a"][1:3], when["b"][1:3], strict=True):
        assert other - one == pytest.approx(0.15, abs=0.1)
