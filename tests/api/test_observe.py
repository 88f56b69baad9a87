"""What the server tells of its cluster: state, steps, requests, the past, and what scrapers read."""

import asyncio
import dataclasses
import enum
import json
import math

import httpx
import jsonschema_rs
import pytest
from fake_observatory import NOW, FakeObservatory, example_report, example_request, example_step, example_worker
from fake_text_engine import FakeTextEngine

from shardwright.api.encoding import encode, encode_list
from shardwright.api.keys import new_key
from shardwright.types import FinishReason, LayerRange, StepTrace

OPEN_PATHS = ("/metrics", "/metrics.json", "/prometheus/targets")
KEYED_PATHS = ("/api/state", "/api/steps", "/api/requests", "/api/requests/1", "/api/history", "/api/events")


@pytest.fixture
async def http():
    async with httpx.AsyncClient(timeout=10) as client:
        yield client


@pytest.fixture
def seen():
    return FakeObservatory()


@pytest.fixture
async def server(start, seen):
    return await start(FakeTextEngine(observatory=seen))


def plain(value):
    """What `dataclasses.asdict` gives, as JSON has it."""

    def made(value):
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, dict):
            return {name: made(each) for name, each in value.items()}
        return [made(each) for each in value] if isinstance(value, list | tuple) else value

    return made(dataclasses.asdict(value))


async def get(http, server, path, **query):
    answer = await http.get(server.url + path, params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


async def test_the_state_is_the_view_by_its_field_names(http, server, seen):
    assert await get(http, server, "/api/state") == plain(seen.cluster)


async def test_the_state_leaves_out_traces_of_steps(http, server, seen):
    trace = StepTrace(
        epoch=3, step=1, num_sequences=1, num_tokens=1, arrived_s=0.0, started_s=0.0, finished_s=0.0, sent_s=0.0,
        serialise_s=0.0, bytes_in=0, bytes_out=0,
    )  # fmt: skip
    seen.change_worker("desk", report=example_report(traces=(trace,)))
    state = await get(http, server, "/api/state")
    assert [worker["report"]["traces"] for worker in state["workers"]] == [[], []]


async def test_the_model_has_the_name_that_it_is_served_under(http, server, seen):
    """Not where it lies on the master's disk."""
    seen.change_view(model_name="/home/anna/models/secret")
    for path in ("/api/state", "/metrics"):
        text = (await http.get(server.url + path)).text
        assert "/home/anna" not in text
        assert "fake/characters-1" in text


async def test_steps_are_those_after_a_number(http, server, seen):
    assert await get(http, server, "/api/steps") == {"steps": [plain(step) for step in seen.passages]}
    assert [step["number"] for step in (await get(http, server, "/api/steps", since=5))["steps"]] == [6, 7]


async def test_a_step_under_way_comes_with_what_is_known(http, server, seen):
    seen.put_step(example_step(8, sent_at=NOW, returned_at=None, stages=()))
    assert (await get(http, server, "/api/steps", since=7))["steps"][0]["returned_at"] is None


async def test_requests_come_without_their_steps_and_one_with_them(http, server):
    listed = (await get(http, server, "/api/requests"))["requests"]
    assert [(each["seq_id"], each["steps"], each["num_steps"]) for each in listed] == [(2, [], 7), (1, [], 7)]
    assert await get(http, server, "/api/requests/1") == plain(example_request(1))


async def test_a_request_that_is_not_known_is_not_found(http, server):
    answer = await http.get(f"{server.url}/api/requests/99")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "request_not_found"


async def test_the_history_can_begin_after_a_time(http, server, seen):
    assert await get(http, server, "/api/history") == {"history": [plain(point) for point in seen.points]}
    since = seen.points[-3].at
    assert [each["at"] for each in (await get(http, server, "/api/history", since=since))["history"]] == [
        point.at for point in seen.points[-2:]
    ]


async def test_rows_for_grafana_are_a_list_that_can_be_cut_to_what_is_new(http, server, seen):
    seen.rows = [
        {"timestamp": NOW + second, "time": f"t{second}", "worker": worker, "gpu_utilization": math.nan}
        for second in (0, 5)
        for worker in ("rack-1", "desk")
    ]
    rows = await get(http, server, "/metrics.json")
    assert rows == [row | {"gpu_utilization": None} for row in seen.rows]
    assert await get(http, server, "/metrics.json", since=NOW) == rows[2:]
    assert await get(http, server, "/metrics.json", latest="true") == rows[2:]
    seen.rows = seen.rows[:3]  # the second worker told nothing lately
    latest = await get(http, server, "/metrics.json", latest="true")
    assert [(row["worker"], row["time"]) for row in latest] == [("rack-1", "t5"), ("desk", "t0")]


async def test_prometheus_finds_workers_that_have_a_port_for_it(http, server, seen):
    assert await get(http, server, "/prometheus/targets") == [
        {"targets": ["rack-1.test:9464"], "labels": {"worker": "rack-1", "host": "host-of-rack-1"}},
        {"targets": ["desk.test:9464"], "labels": {"worker": "desk", "host": "host-of-desk"}},
    ]
    seen.change_view(workers=(*seen.cluster.workers, example_worker("late", None, metrics_target="late.test:1")))
    seen.change_worker("desk", metrics_target="")
    assert [each["labels"]["worker"] for each in await get(http, server, "/prometheus/targets")] == ["rack-1", "late"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/api/steps?since=-1", "since"),
        ("/api/steps?since=x", "since"),
        ("/api/steps?since=1&since=2", "since"),
        ("/api/steps?until=1", "until"),
        ("/api/state?since=1", "since"),
        ("/api/events?since=1", "since"),
        ("/api/requests/last", "seq_id"),
        ("/api/history?since=nan", "since"),
        ("/metrics.json?since=inf", "since"),
        ("/metrics.json?latest=perhaps", "latest"),
        ("/metrics.json?worker=desk", "worker"),
    ],
)
async def test_a_parameter_that_can_not_be_used_is_refused_by_its_name(http, server, path, name):
    answer = await http.get(server.url + path)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert name in answer.json()["error"]["message"]


async def test_with_keys_everything_asks_for_one_and_scrapers_may_be_let_in(http, start, tmp_path):
    key, entry = new_key("anna", max_concurrent=0, tokens_per_minute=0)
    file = tmp_path / "keys.toml"
    file.write_text(entry.to_toml())
    closed = await start(api_key_file=file)
    opened = await start(api_key_file=file, open_metrics=True)
    for path in KEYED_PATHS:
        for server in (closed, opened):
            assert (await http.get(server.url + path)).status_code == 401, path
    for path in OPEN_PATHS:
        assert (await http.get(closed.url + path)).status_code == 401, path
        assert (await http.get(opened.url + path)).status_code == 200, path
    headers = {"Authorization": f"Bearer {key}"}
    for path in (*KEYED_PATHS[:-1], *OPEN_PATHS):
        assert (await http.get(closed.url + path, headers=headers)).status_code == 200, path
    document = (await http.get(f"{closed.url}/openapi.json")).json()["paths"]
    keyed = {
        path.replace("{seq_id}", "1") for path, methods in document.items() if "security" in methods.get("get", {})
    }
    assert keyed == {*KEYED_PATHS, *OPEN_PATHS, "/v1/models", "/v1/models/{model}"}


async def test_the_document_describes_what_is_told(http, server):
    """Also where a float is null because it is not finite."""
    server.engine.observatory.change_worker("desk", report=example_report(cpu_utilization=math.nan))
    document = (await http.get(f"{server.url}/openapi.json")).json()
    paths = ["/api/state", "/api/steps", "/api/requests", "/api/requests/{seq_id}", "/api/history", "/metrics.json",
             "/prometheus/targets"]  # fmt: skip
    for path in paths:
        answer = await get(http, server, path.replace("{seq_id}", "1"))
        schema = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema_rs.Draft202012Validator(schema | {"components": document["components"]}).validate(answer)
    assert set(document["components"]["schemas"]["ClusterView"]["required"]) == {
        field.name for field in dataclasses.fields(server.engine.observatory.cluster)
    }


@pytest.mark.parametrize("count", [0, 1, 256, 257, 1000])
async def test_long_lists_are_encoded_in_pieces_and_others_get_their_turns(count):
    values = [{"number": number, "at": math.nan} for number in range(count)]
    turns = 0

    async def others():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    waiting = asyncio.create_task(others())
    assert await encode_list(values) == encode(values)
    waiting.cancel()
    assert turns >= count // 256 - 1


def test_json_has_enums_by_value_ranges_by_their_ends_and_null_for_what_is_not_finite():
    value = {"reason": FinishReason.STOP, "layers": LayerRange(0, 4), "floats": (math.nan, math.inf, -math.inf, 0.5)}
    assert encode(value) == b'{"reason":"stop","layers":{"start":0,"end":4},"floats":[null,null,null,0.5]}'
    assert json.loads(encode("line\nbreak")) == "line\nbreak"
    assert b"\n" not in encode("line\nbreak")
