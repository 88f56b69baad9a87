"""Probes, metrics, and the OpenAPI document."""

import asyncio

import httpx
import pytest
from fake_text_engine import MODEL, FakeTextEngine
from prometheus_client.parser import text_string_to_metric_families

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


async def test_a_scrape_in_the_middle_of_a_stream_is_answered(start, http):
    server = await start(FakeTextEngine(hold=asyncio.Event(), hold_after=2))
    async with http.stream("POST", f"{server.url}/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        async with httpx.AsyncClient() as other:
            found = await samples(other, server)
        assert found["shardwright_time_to_first_token_seconds_count",] == 1
        assert ("shardwright_request_duration_seconds_count", "chat_completions") not in found
        server.engine.hold.set()
        assert [line async for line in lines][-2:] == ["data: [DONE]", ""]
