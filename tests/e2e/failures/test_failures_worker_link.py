"""What a bad link between two workers does to requests, when the master's own links are good."""

import asyncio
import contextlib
import time
from itertools import pairwise

import pytest
from live_sessions import Silence
from relay import AroundRelays, Relay
from tiny_models import greedy_answer

from shardwright.config import MasterConfig
from shardwright.engine import FinishEvent, TokenEvent
from shardwright.runtime.registry import WorkerEntry
from shardwright.runtime.session import open_session
from shardwright.transport.grpc import GrpcTransport
from shardwright.transport.grpc_options import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S
from shardwright.types import FinishReason, SamplingParams, StopConditions

PROMPT = (5, 17, 3, 99)


@contextlib.asynccontextmanager
async def relayed_session(cluster, tiny, tmp_path, *, delay_s=0.0, recover=True):
    """A session whose workers reach each other through relays, and the relays."""
    config = MasterConfig(
        model=str(tiny.folder), cache_dir=tmp_path / "cache", dtype="float32", kv_tokens=4096, recover=recover
    )
    async with contextlib.AsyncExitStack() as stack:
        relays, entries, workers = [], [], {}
        for number, port in enumerate(cluster.ports):
            relay = await stack.enter_async_context(Relay(f"127.0.0.1:{port}", delay_s=delay_s))
            host, _, relay_port = relay.address.rpartition(":")
            entries.append(WorkerEntry(username=f"worker{number}", ip=host, port=int(relay_port)))
            workers[relay.address] = f"127.0.0.1:{port}"
            relays.append(relay)
        transport = AroundRelays(GrpcTransport(), workers)
        opening = open_session(config, entries, listener=Silence(), transport=transport, write_metrics=False)
        yield await stack.enter_async_context(opening), relays


async def follow(session, num_tokens, *, on_token=lambda _: None):
    """One request to its end: its tokens, when they came, and how it ended."""
    stop = StopConditions(max_new_tokens=num_tokens)
    _, events = await session.submit(PROMPT, SamplingParams(), stop)
    tokens, times, finish = [], [], None
    async with asyncio.timeout(60):
        async for event in events:
            if isinstance(event, TokenEvent):
                tokens.append(event.token_id)
                times.append(time.perf_counter())
                on_token(len(tokens))
            elif isinstance(event, FinishEvent):
                finish = event
    return tokens, times, finish


def at_the_fifth(relays, change):
    """What does this to each relay when the fifth token has come."""

    def on_token(num_tokens):
        if num_tokens == 5:
            for relay in relays:
                change(relay)

    return on_token


async def test_a_delay_on_the_workers_link_delays_each_token_once_and_changes_none(cluster, tiny, tmp_path):
    async with relayed_session(cluster, tiny, tmp_path) as (session, relays):
        expected, _, _ = await follow(session, 6)
        assert sorted(relay.num_connections for relay in relays) == [0, 1], "only the workers' link is relayed"
    async with relayed_session(cluster, tiny, tmp_path, delay_s=0.2) as (session, _):
        tokens, times, _ = await follow(session, 6)
    assert tokens == expected
    gaps = [after - before for before, after in pairwise(times)]
    assert min(gaps) >= 0.2
    assert min(gaps) < 0.4  # the master's links, there and back, have no delay


async def test_a_cut_between_the_workers_ends_requests_with_an_error_that_names_the_worker(cluster, tiny, tmp_path):
    async with relayed_session(cluster, tiny, tmp_path, recover=False) as (session, relays):
        tokens, _, finish = await follow(session, 3000, on_token=at_the_fifth(relays, Relay.cut))
        assert 5 <= len(tokens) < 3000
        assert finish.reason is FinishReason.ERROR
        assert "worker worker" in finish.message
        assert "127.0.0.1" in finish.message


async def test_a_cut_between_the_workers_that_stays_leaves_the_answer_to_one_of_them(cluster, tiny, tmp_path):
    expected = greedy_answer(tiny.model, PROMPT, 500)
    async with relayed_session(cluster, tiny, tmp_path) as (session, relays):
        assert len(session.stages) == 2
        tokens, _, finish = await follow(session, 500, on_token=at_the_fifth(relays, Relay.cut))
        assert tokens == expected
        assert finish.reason is FinishReason.LENGTH
        assert len(session.stages) == 1


@pytest.mark.slow
@pytest.mark.parametrize("recover", [True, False])
async def test_a_silent_link_between_the_workers_is_noticed_and_recovered_from(cluster, tiny, tmp_path, recover):
    expected = greedy_answer(tiny.model, PROMPT, 1000)
    async with relayed_session(cluster, tiny, tmp_path, recover=recover) as (session, relays):
        began = time.perf_counter()
        tokens, _, finish = await follow(session, 1000, on_token=at_the_fifth(relays, Relay.silence))
        assert time.perf_counter() - began < KEEPALIVE_S + KEEPALIVE_TIMEOUT_S + (30 if recover else 10)
        assert tokens == expected[: len(tokens)]
        if recover:
            assert finish.reason is FinishReason.LENGTH
            assert len(tokens) == 1000
        else:
            assert finish.reason is FinishReason.ERROR
            assert "ping timeout" in finish.message
