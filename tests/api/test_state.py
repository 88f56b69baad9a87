"""Probes, metrics, and the OpenAPI document."""

import asyncio

import httpx
import pytest
from fake_text_engine import MODEL, FakeTextEngine
from prometheus_client.parser import text_string_to_metric_families

from shardwright.types import HeartbeatReport, LayerRange, WorkerSnapshot

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def http():
    async with httpx.AsyncClient(timeout=10) as client:
        yield client


async def samples(http, server):
    text = (await http.get(f"{server.url}/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.values())] = sample.value
    return found


async def test_alive_is_not_ready(start, http):
    server = await start()
    assert (await http.get(f"{server.url}/health")).json() == {"status": "alive"}
    assert (await http.get(f"{server.url}/ready")).json() == {"status": "ready"}
    server.engine.ready = False
    assert (await http.get(f"{server.url}/health")).status_code == 200
    answer = await http.get(f"{server.url}/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "not ready"})


def worker(name, layers, report):
    return WorkerSnapshot(worker_id=name, status="ready", layers=layers, last_heard_s=1.0, report=report)


def report(busy_s, uptime_s):
    return HeartbeatReport(
        timestamp=1.0,
        epoch=3,
        queue_depth=2,
        steps_done=5,
        busy_s=busy_s,
        uptime_s=uptime_s,
        device="cpu",
        device_name="x",
        gpu_utilization=None,
        gpu_memory_used_bytes=None,
        gpu_memory_total_bytes=None,
        cpu_utilization=1.0,
        memory_used_bytes=1,
        memory_total_bytes=2,
        process_memory_bytes=1,
    )


async def test_metrics_tell_the_engines_state_when_they_are_asked(start, http):
    workers = (
        worker("w1", LayerRange(0, 4), report(30.0, 40.0)),
        worker("w2", LayerRange(4, 8), report(0.0, 0.0)),
        worker("spare", None, report(0.0, 0.0)),
    )
    server = await start(FakeTextEngine(snapshot_changes={"workers": workers}))
    found = await samples(http, server)
    expected = {
        ("shardwright_ready",): 1,
        ("shardwright_sequences_waiting",): 2,
        ("shardwright_sequences_waiting_limit",): 8,
        ("shardwright_sequences_running",): 0,
        ("shardwright_sequences_finished_total", "stop"): 9,
        ("shardwright_sequences_finished_total", "error"): 0,
        ("shardwright_prompt_tokens_total",): 1000,
        ("shardwright_cached_prompt_tokens_total",): 250,
        ("shardwright_output_tokens_total",): 77,
        ("shardwright_preemptions_total",): 4,
        ("shardwright_prefix_cache_hit_ratio",): 0.25,
        ("shardwright_kv_blocks",): 100,
        ("shardwright_kv_blocks_used",): 40,
        ("shardwright_kv_blocks_cached",): 5,
        ("shardwright_steps_in_flight",): 1,
        ("shardwright_stage_busy_ratio", "w1"): 0.75,
        ("shardwright_stage_busy_ratio", "w2"): 0,
        ("shardwright_stage_busy_seconds_total", "w1"): 30,
        ("shardwright_stage_queue_depth", "w1"): 2,
        ("shardwright_workers", "ready"): 3,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert ("shardwright_stage_busy_ratio", "spare") not in found
    server.engine.ready = False
    server.engine.snapshot_changes = {"total_prompt_tokens": 0, "total_cached_tokens": 0}
    found = await samples(http, server)
    assert found["shardwright_ready",] == 0
    assert found["shardwright_prefix_cache_hit_ratio",] == 0


async def test_metrics_count_requests_by_how_they_ended_and_time_their_tokens(start, http):
    server = await start()
    url = f"{server.url}/v1/chat/completions"
    for stream in (False, True):
        assert (await http.post(url, json=CHAT | {"stream": stream})).status_code == 200
    await http.post(url, json=CHAT | {"n": 0})
    await http.post(url, json=CHAT | {"model": "other"})
    server.engine.queue_is_full = True
    await http.post(url, json=CHAT)
    found = await samples(http, server)
    requests = {name[1:]: value for name, value in found.items() if name[0] == "shardwright_http_requests_total"}
    assert requests == {
        ("chat_completions", "ok"): 2,
        ("chat_completions", "invalid_value"): 1,
        ("chat_completions", "model_not_found"): 1,
        ("chat_completions", "queue_full"): 1,
    }
    assert found["shardwright_time_to_first_token_seconds_count",] == 2
    assert found["shardwright_inter_token_latency_seconds_count",] == 2 * (len("You said: hi") - 1)
    assert found["shardwright_request_duration_seconds_count", "chat_completions"] == 5


async def test_two_servers_in_one_process_have_metrics_of_their_own(start, http):
    first, second = await start(), await start()
    await http.post(f"{first.url}/v1/chat/completions", json=CHAT)
    assert (await samples(http, second)).get(("shardwright_http_requests_total", "chat_completions", "ok")) is None


async def test_the_document_names_every_answer(start, http):
    server = await start()
    document = (await http.get(f"{server.url}/openapi.json")).json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) == {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    names = set(document["components"]["schemas"])
    assert {"ChatRequest", "CompletionRequest", "ChatChunk", "ErrorAnswer", "ChatAnswer"} <= names
    assert "HTTPValidationError" not in names

    def references(value):
        if isinstance(value, dict):
            yield from (each for key, each in value.items() if key == "$ref")
            for each in value.values():
                yield from references(each)
        elif isinstance(value, list):
            for each in value:
                yield from references(each)

    assert {each.rsplit("/", 1)[1] for each in references(document)} <= names


async def test_a_scrape_in_the_middle_of_a_stream_shows_it_running(start, http):
    server = await start(FakeTextEngine(hold=asyncio.Event(), hold_after=2))
    async with http.stream("POST", f"{server.url}/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        async with httpx.AsyncClient() as other:
            assert (await samples(other, server))["shardwright_sequences_running",] == 1
        server.engine.hold.set()
        assert [line async for line in lines][-2:] == ["data: [DONE]", ""]
