"""The stream of events: what comes when, what a listener costs, and how it ends."""

import asyncio
import json
import time
from dataclasses import replace

import httpx
import pytest
from fake_observatory import NOW, FakeObservatory, example_request, example_step
from fake_text_engine import FakeTextEngine

from shardwright.api import events as events_module
from shardwright.api.errors import ApiError
from shardwright.api.events import Broadcast


class Clock:
    def __init__(self):
        self.now = 100.25

    def __call__(self):
        return self.now


class Counting(FakeObservatory):
    """Counts how often it is looked at."""

    num_views = 0

    def view(self):
        self.num_views += 1
        return super().view()


@pytest.fixture
def seen():
    return Counting()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def broadcast(seen, clock):
    return Broadcast(FakeTextEngine(observatory=seen), max_listeners=2, clock=clock, tick_s=1.0)


def read(data):
    """(event, data) of each event."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        fields = dict(line.partition(": ")[::2] for line in block.split("\n"))
        found.append((fields["event"], json.loads(fields["data"])))
    return found


def names(data):
    return [name for name, _ in read(data)]


def test_a_listener_gets_everything_first(broadcast, seen):
    data, _ = broadcast.begin()
    found = dict(read(data))
    assert list(found) == ["state", "history", "requests", "steps"]
    assert found["state"]["at"] == NOW
    assert len(found["history"]["history"]) == len(seen.points)
    assert [each["seq_id"] for each in found["requests"]["requests"]] == [2, 1]
    assert [each["number"] for each in found["steps"]["steps"]] == [1, 2, 3, 4, 5, 6, 7]


def test_then_each_second_what_is_new(broadcast, seen, clock):
    _, second = broadcast.begin()
    clock.now += 0.5
    assert broadcast.after(second) == (b"", second)
    clock.now += 0.5
    data, second = broadcast.after(second)
    assert names(data) == ["state"]
    seen.put_step(example_step(8, sent_at=NOW, returned_at=None, stages=()))
    seen.points.append(replace(seen.points[-1], at=NOW + 5))
    seen.traces.insert(0, example_request(3, finished_at=None, reason=None))
    clock.now += 1
    data, second = broadcast.after(second)
    found = dict(read(data))
    assert [each["number"] for each in found["steps"]["steps"]] == [8]
    assert [each["at"] for each in found["history"]["history"]] == [NOW + 5]
    assert [each["seq_id"] for each in found["requests"]["requests"]] == [3, 2, 1]
    seen.put_step(example_step(8, sent_at=NOW))
    clock.now += 1
    data, second = broadcast.after(second)
    found = dict(read(data))
    assert list(found) == ["state", "steps"]
    assert [(each["number"], len(each["stages"])) for each in found["steps"]["steps"]] == [(8, 2)]


def test_of_a_long_past_only_the_newest_steps_are_told(broadcast, seen, clock, monkeypatch):
    monkeypatch.setattr(events_module, "_STEPS", 3)
    data, second = broadcast.begin()
    assert [each["number"] for each in dict(read(data))["steps"]["steps"]] == [5, 6, 7]
    for number in range(8, 18):
        seen.put_step(example_step(number, sent_at=NOW))
    clock.now += 1
    data, second = broadcast.after(second)
    assert [each["number"] for each in dict(read(data))["steps"]["steps"]] == [15, 16, 17]
    clock.now += 1
    assert names(broadcast.after(second)[0]) == ["state"]


def test_of_requests_that_are_over_only_the_newest_are_told(broadcast, seen):
    over = [example_request(number) for number in range(300, 0, -1)]
    waits = example_request(0, finished_at=None, reason=None)
    seen.traces = [*over, waits]
    data, _ = broadcast.begin()
    told = [each["seq_id"] for each in dict(read(data))["requests"]["requests"]]
    assert told == [*range(300, 200, -1), 0]


def test_all_listeners_get_the_same_second_which_is_made_once(broadcast, seen, clock):
    starts = [broadcast.begin()[1] for _ in range(2)]
    before = seen.num_views
    clock.now += 1
    first, second = (broadcast.after(start)[0] for start in starts)
    assert first == second != b""
    assert seen.num_views == before + 1


def test_who_comes_late_gets_no_point_of_the_history_twice(broadcast, seen, clock):
    broadcast.begin()
    seen.points.append(replace(seen.points[-1], at=NOW + 5))
    clock.now += 30
    data, second = broadcast.begin()
    assert [each["at"] for each in dict(read(data))["history"]["history"]][-2:] == [NOW, NOW + 5]
    seen.points.append(replace(seen.points[-1], at=NOW + 10))
    data, same = broadcast.begin()
    assert [each["at"] for each in dict(read(data))["history"]["history"]][-2:] == [NOW, NOW + 5]
    clock.now += 1
    assert [each["at"] for each in dict(read(broadcast.after(same)[0]))["history"]["history"]] == [NOW + 10]
    assert broadcast.after(second) == broadcast.after(same)


def test_a_listener_that_was_slow_for_a_moment_gets_what_it_missed(broadcast, seen, clock):
    _, second = broadcast.begin()
    other = second
    for number in range(8, 8 + events_module._KEPT):
        seen.put_step(example_step(number, sent_at=NOW))
        clock.now += 1
        _, other = broadcast.after(other)
    steps = [data["steps"] for name, data in read(broadcast.after(second)[0]) if name == "steps"]
    assert [each["number"] for some in steps for each in some] == list(range(8, 8 + events_module._KEPT))
    clock.now += 1
    broadcast.after(other)
    assert broadcast.after(second) is None


def test_nothing_is_made_while_nobody_asks(broadcast, seen, clock):
    _, second = broadcast.begin()
    before = seen.num_views
    clock.now += 10
    assert names(broadcast.after(second)[0]) == ["state"]
    assert seen.num_views == before + 1


def test_places_are_bounded_and_given_back(broadcast):
    with broadcast.place():
        with broadcast.place(), pytest.raises(ApiError, match="2 clients listen already") as caught, broadcast.place():
            pass
        assert (caught.value.status_code, caught.value.code) == (503, "too_many_listeners")
        with broadcast.place():
            assert broadcast.num_listeners == 2
    assert broadcast.num_listeners == 0


# --- over HTTP -------------------------------------------------------------------------------------


@pytest.fixture
async def http():
    async with httpx.AsyncClient(timeout=10) as client:
        yield client


@pytest.fixture(autouse=True)
def short_seconds(monkeypatch):
    """A second of the stream takes 20 ms here."""
    init = Broadcast.__init__
    monkeypatch.setattr(Broadcast, "__init__", lambda self, *args, **more: init(self, *args, **{"tick_s": 0.02} | more))


async def test_events_come_as_they_happen(start, http, seen):
    server = await start(FakeTextEngine(observatory=seen))
    async with http.stream("GET", f"{server.url}/api/events") as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = answer.aiter_lines()
        async with asyncio.timeout(5):
            assert await anext(lines) == ": shardwright"
            async for line in lines:
                if line == "event: steps":
                    break
            seen.put_step(example_step(8, sent_at=NOW))
            async for line in lines:
                if line == "event: steps":
                    break
            data = json.loads((await anext(lines)).removeprefix("data: "))
            assert [each["number"] for each in data["steps"]] == [8]


async def test_more_listeners_than_there_is_room_for_are_refused_until_one_goes(start, http, seen):
    server = await start(FakeTextEngine(observatory=seen), max_event_listeners=1)
    url = f"{server.url}/api/events"
    async with http.stream("GET", url) as first:
        await anext(first.aiter_lines())
        refused = await http.get(url)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_listeners"
        assert int(refused.headers["retry-after"]) > 0
        assert "shardwright_event_listeners 1.0" in (await http.get(f"{server.url}/metrics")).text
    async with asyncio.timeout(5):
        while True:
            async with http.stream("GET", url) as answer:
                if answer.status_code == 200:
                    break


async def test_a_listener_that_reads_nothing_is_cut_off(start, seen):
    seen.traces = [example_request(number, finished_at=None) for number in range(1, 2000)]
    server = await start(FakeTextEngine(observatory=seen), write_timeout_s=0.3)
    reader, writer = await server.raw()
    writer.write(b"GET /api/events HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.sleep(0.05)
    reader._transport.pause_reading()

    def listens():
        return b"shardwright_event_listeners 1.0" in server.app.state.service.metrics.render()

    async with asyncio.timeout(10):
        while not listens():  # noqa: ASYNC110  the server tells nobody
            await asyncio.sleep(0.01)
        while listens():
            seen.traces.append(example_request(len(seen.traces) + 1, finished_at=None))
            await asyncio.sleep(0.01)


async def test_the_end_of_the_server_waits_for_no_listener(start, http, seen):
    server = await start(FakeTextEngine(observatory=seen), shutdown_timeout_s=30)
    async with http.stream("GET", f"{server.url}/api/events") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        began = time.perf_counter()
        server.stop.set()
        async with asyncio.timeout(5):
            async for _ in lines:  # a clean end, not a broken connection
                pass
        await server.task
        assert time.perf_counter() - began < 2


async def test_listeners_leave_nothing_behind(start, http, seen):
    server = await start(FakeTextEngine(observatory=seen))
    before = len(asyncio.all_tasks())
    for _ in range(5):
        async with http.stream("GET", f"{server.url}/api/events") as answer:
            await anext(answer.aiter_lines())
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110  tasks tell nobody
            await asyncio.sleep(0.01)
    assert b"shardwright_event_listeners 0.0" in server.app.state.service.metrics.render()
