"""Clients that go, stall or only sit there; and the server's own end."""

import asyncio
import json
import time

import httpx
import openai
import pytest
from fake_text_engine import MODEL, FakeTextEngine

from shardwright.api.server import listen, serve
from shardwright.config import ServeConfig
from shardwright.errors import AddressInUseError, ConfigError

HI = [{"role": "user", "content": "hi"}]


def request(path="/v1/chat/completions", **body):
    content = json.dumps({"model": MODEL} | body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  the engine under test tells nobody
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [{"messages": HI}, {"messages": HI, "n": 3}])
async def test_a_client_that_goes_before_the_first_token_aborts_its_sequences(start, stream, body):
    server = await start(FakeTextEngine(hold=asyncio.Event()))
    _, writer = await server.raw()
    writer.write(request(**body, stream=stream))
    await until(lambda: server.engine.num_running == 1)
    writer.close()
    async with asyncio.timeout(1):
        await server.engine.aborted.wait()
    assert server.engine.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_aborts_all_its_prompts(start, stream):
    server = await start(FakeTextEngine(hold=asyncio.Event()))
    _, writer = await server.raw()
    writer.write(request("/v1/completions", prompt=["a", "b", "c"], stream=stream))
    await until(lambda: server.engine.num_running == 3)
    writer.transport.abort()
    await until(lambda: server.engine.num_aborted == 3)
    assert server.engine.num_running == 0


async def test_a_client_that_goes_in_the_middle_of_a_stream_aborts_its_sequence(start):
    server = await start(FakeTextEngine(hold=asyncio.Event(), hold_after=5))
    reader, writer = await server.raw()
    writer.write(request(messages=HI, stream=True))
    await reader.readuntil(b'"content":"Y"')
    writer.close()
    async with asyncio.timeout(1):
        await server.engine.aborted.wait()


async def test_a_client_that_goes_while_it_waits_in_the_engines_door_is_forgotten(start):
    """The engine may take its time to start; what it starts after the client is gone is closed."""
    entered = asyncio.Event()

    class Slow(FakeTextEngine):
        async def generate(self, given):
            entered.set()
            await asyncio.sleep(60)
            return await super().generate(given)

    server = await start(Slow())
    _, writer = await server.raw()
    writer.write(request(messages=HI))
    async with asyncio.timeout(5):
        await entered.wait()
    writer.close()
    await until(lambda: server.app.state.service.drain._running == 0)


async def test_a_client_that_goes_while_it_sends_leaves_nothing(start):
    server = await start()
    _, writer = await server.raw()
    writer.write(request(messages=HI)[:-5])
    await asyncio.sleep(0.05)
    writer.close()
    await until(lambda: b'outcome="disconnected"' in server.app.state.service.metrics.render())
    assert server.engine.requests == []


async def test_a_client_that_reads_nothing_is_cut_off(start):
    server = await start(FakeTextEngine(reply=lambda *_: "x" * 4000, chunk=200), write_timeout_s=0.2)
    reader, writer = await server.raw()
    writer.write(request("/v1/completions", prompt="a", max_tokens=4000, stream=True, logprobs=20, n=16))
    reader._transport.pause_reading()
    await until(lambda: server.engine.num_running == 1)
    await until(lambda: server.engine.num_running == 0)
    assert server.engine.num_aborted == 1
    writer.transport.abort()


async def test_a_thousand_idle_connections_keep_nobody_else_waiting(start):
    server = await start()
    idle = [await server.raw() for _ in range(1000)]
    half = idle[:200]
    for _, writer in half:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    async with httpx.AsyncClient() as client:
        for _ in range(3):
            began = time.perf_counter()
            answer = await client.post(
                f"{server.url}/v1/chat/completions", json={"model": MODEL, "messages": HI}, timeout=5
            )
            assert answer.status_code == 200
            assert time.perf_counter() - began < 2
    for _, writer in idle:
        writer.close()


async def test_over_the_bound_the_connection_that_waited_longest_makes_room(start):
    server = await start(FakeTextEngine(hold=asyncio.Event()), max_connections=5)
    busy_reader, busy = await server.raw()
    busy.write(request(messages=HI))
    await until(lambda: server.engine.num_running == 1)
    idle = [await server.raw() for _ in range(6)]
    async with asyncio.timeout(5):
        assert await idle[0][0].read() == b""  # closed
        assert await idle[1][0].read() == b""
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{server.url}/health")).status_code == 200
    server.engine.hold.set()
    async with asyncio.timeout(5):
        assert b" 200 " in await busy_reader.readline()
    for _, writer in [*idle, (busy_reader, busy)]:
        writer.close()


async def test_a_connection_serves_one_request_after_another(start):
    server = await start()
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=1)) as client:
        for _ in range(5):
            answer = await client.post(f"{server.url}/v1/chat/completions", json={"model": MODEL, "messages": HI})
            assert answer.status_code == 200
            bad = await client.post(f"{server.url}/v1/chat/completions", json={})
            assert bad.status_code == 400


# --- the end -----------------------------------------------------------------------------------------


async def test_the_end_waits_for_running_answers_and_refuses_new_ones(start, client_of):
    server = await start(FakeTextEngine(hold=asyncio.Event()), shutdown_timeout_s=5)
    client = await client_of(server)
    running = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=HI))
    await until(lambda: server.engine.num_running == 1)
    server.stop.set()
    await until(lambda: server.app.state.service.drain.has_begun)
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=MODEL, messages=HI)
    assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{server.url}/ready")).status_code == 503
    server.engine.hold.set()
    assert (await running).choices[0].message.content == "You said: hi"
    async with asyncio.timeout(3):
        await server.task


async def test_the_end_cuts_off_what_takes_too_long_with_an_error(start, client_of):
    server = await start(FakeTextEngine(hold=asyncio.Event(), hold_after=3), shutdown_timeout_s=0.1)
    client = await client_of(server)
    whole = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=HI))
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    await until(lambda: server.engine.num_running == 2)
    began = time.perf_counter()
    server.stop.set()
    with pytest.raises(openai.InternalServerError) as caught:
        await whole
    assert caught.value.code == "shutting_down"
    with pytest.raises(openai.APIError) as caught:
        [chunk async for chunk in stream]
    assert caught.value.code == "shutting_down"
    await server.task
    assert time.perf_counter() - began < 3
    assert server.engine.num_running == 0


async def test_a_cancelled_server_ends_at_once_and_aborts_everything(start):
    server = await start(FakeTextEngine(hold=asyncio.Event()), shutdown_timeout_s=60)
    _, writer = await server.raw()
    writer.write(request(messages=HI))
    await until(lambda: server.engine.num_running == 1)
    server.task.cancel()
    began = time.perf_counter()
    await asyncio.wait({server.task})
    assert time.perf_counter() - began < 3
    assert server.engine.num_running == 0
    writer.close()


async def test_signals_stay_with_the_program(start):
    import signal

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    await start()
    assert {each: signal.getsignal(each) for each in before} == before


async def test_nothing_is_printed(start, client_of, capfd):
    server = await start()
    client = await client_of(server)
    await client.chat.completions.create(model=MODEL, messages=HI)
    server.stop.set()
    await server.task
    assert capfd.readouterr() == ("", "")


def test_a_port_that_is_taken_is_told():
    with listen(ServeConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(AddressInUseError, match=f"127.0.0.1:{port} can't be listened on"):
            listen(ServeConfig(port=port))


def test_a_host_that_does_not_exist_is_told():
    with pytest.raises(ConfigError, match="host is 'no such host'"):
        listen(ServeConfig(host="no such host"))


async def test_it_listens_by_itself_where_the_config_says():
    from shardwright.api.app import create_app

    config = ServeConfig(port=0)
    app = create_app(FakeTextEngine(), config)
    stop, urls = asyncio.Event(), []

    def on_listening(url):
        urls.append(url)
        stop.set()

    async with asyncio.timeout(5):
        await serve(app, config, stop=stop, on_listening=on_listening)
    assert urls[0].startswith("http://127.0.0.1:")


async def test_a_server_without_requests_ticks_once_a_second_and_ends_without_waiting_for_that(start, monkeypatch):
    import uvicorn

    ticks, tick = [], uvicorn.Server.on_tick

    async def noting(self, counter):
        ticks.append(time.perf_counter())
        return await tick(self, counter)

    monkeypatch.setattr(uvicorn.Server, "on_tick", noting)
    server = await start()
    async with httpx.AsyncClient(base_url=server.url) as client:
        first = (await client.get("/health")).headers["date"]
        await asyncio.sleep(1.2)
        assert len(ticks) == 2
        assert (await client.get("/health")).headers["date"] != first
    began = time.perf_counter()
    server.stop.set()
    await server.task
    assert time.perf_counter() - began < 0.5
