"""API keys: their file, the check, their limits; and that no key or hash gets out."""

import asyncio
import logging

import httpx
import openai
import pytest
from fake_text_engine import MODEL, FakeTextEngine

from shardwright.api.errors import ApiError
from shardwright.api.keys import Client, KeyEntry, Keyring, new_key, read_key_file
from shardwright.errors import ConfigError

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def keyed(tmp_path):
    """Writes a key file with one key for each name; gives its path and the keys."""

    def write(**limits):
        path, keys = tmp_path / "keys.toml", {}
        text = ""
        for name, given in limits.items():
            keys[name], entry = new_key(name, **given)
            text += entry.to_toml()
        path.write_text(text)
        return path, keys

    return write


def test_a_new_key_stands_in_the_file_as_its_hash_alone(keyed):
    path, keys = keyed(anna={"max_concurrent": 2}, bert={"tokens_per_minute": 500})
    anna, bert = read_key_file(path)
    assert (anna.name, anna.max_concurrent, anna.tokens_per_minute) == ("anna", 2, 0)
    assert (bert.name, bert.max_concurrent, bert.tokens_per_minute) == ("bert", 0, 500)
    assert keys["anna"] not in path.read_text()
    assert keys["anna"].startswith("sw-")
    assert len(set(keys.values())) == 2
    ring = Keyring((anna, bert))
    assert ring.check(f"Bearer {keys['bert']}").name == "bert"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer wrong", "Bearer ä"])
def test_another_key_or_none_is_refused(keyed, header):
    path, _ = keyed(anna={})
    with pytest.raises(ApiError) as caught:
        Keyring(read_key_file(path)).check(header)
    assert (caught.value.status_code, caught.value.kind) == (401, "authentication_error")


GOOD = 'name = "a"\nsha256 = "' + "0" * 64 + '"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no key"),
        ("[[key]", "not valid TOML"),
        ("key = 3", "must be a list of tables"),
        ("[[keys]]", "has no setting 'keys'"),
        (f"[[key]]\n{GOOD}limit = 3", "key 1: has no setting 'limit'"),
        ('[[key]]\nname = "a b"', "name is 'a b'"),
        ('[[key]]\nname = "a"\nsha256 = "XYZ"', r"key 1 \(a\): sha256 must be 64"),
        (f"[[key]]\n{GOOD}max_concurrent = -1", "max_concurrent is -1"),
        (f"[[key]]\n{GOOD}tokens_per_minute = true", "tokens_per_minute is True"),
        (f"[[key]]\n{GOOD}[[key]]\n{GOOD}", "name 'a' stands there twice"),
    ],
)
def test_a_wrong_key_file_is_told_with_the_place(tmp_path, text, says):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"keys\.toml.*{says}"):
        read_key_file(path)


def test_a_key_file_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read_key_file(tmp_path / "none")


def test_a_new_key_needs_a_name_and_limits_that_the_file_can_hold():
    with pytest.raises(ConfigError, match="name is 'a b'"):
        new_key("a b")
    with pytest.raises(ConfigError, match="max_concurrent is -1"):
        new_key("a", max_concurrent=-1)


# --- limits ------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_tokens_are_a_bucket_that_fills_in_a_minute():
    clock = Clock()
    client = Client(KeyEntry(name="a", sha256="", tokens_per_minute=60), clock)
    client.take_prompt(50, "prompt")
    client.take_output(40)  # a debt of 30
    with pytest.raises(ApiError) as caught:
        client.take_prompt(10, "prompt")
    assert (caught.value.status_code, caught.value.headers["Retry-After"]) == (429, "40")
    clock.now += 40
    client.take_prompt(10, "prompt")
    clock.now += 1000
    client.take_prompt(60, "prompt")  # never more than a minute's worth
    with pytest.raises(ApiError):
        client.take_prompt(1, "prompt")
    client.give_back(60)
    client.take_prompt(60, "prompt")


def test_a_prompt_that_is_larger_than_the_bucket_is_told_so_at_once():
    client = Client(KeyEntry(name="a", sha256="", tokens_per_minute=60), Clock())
    with pytest.raises(ApiError) as caught:
        client.take_prompt(61, "messages")
    assert (caught.value.status_code, caught.value.param) == (400, "messages")


async def test_a_key_runs_only_so_many_requests_at_once(start, client_of, keyed):
    path, keys = keyed(anna={"max_concurrent": 1}, bert={})
    server = await start(FakeTextEngine(hold=asyncio.Event()), api_key_file=path)
    anna, bert = await client_of(server, keys["anna"]), await client_of(server, keys["bert"])
    first = asyncio.create_task(anna.chat.completions.create(model=MODEL, messages=HI))
    async with asyncio.timeout(5):
        while not server.engine.num_running:  # noqa: ASYNC110  the engine under test tells nobody
            await asyncio.sleep(0.005)
    with pytest.raises(openai.RateLimitError) as caught:
        await anna.chat.completions.create(model=MODEL, messages=HI)
    assert caught.value.code == "concurrency_limit_exceeded"
    second = asyncio.create_task(bert.chat.completions.create(model=MODEL, messages=HI))
    server.engine.hold.set()
    await first
    await second
    await anna.chat.completions.create(model=MODEL, messages=HI)


async def test_a_key_uses_only_so_many_tokens_a_minute(start, client_of, keyed):
    path, keys = keyed(anna={"tokens_per_minute": 60})
    server = await start(FakeTextEngine(reply=lambda *_: "x" * 200), api_key_file=path)
    client = await client_of(server, keys["anna"])
    await client.chat.completions.create(model=MODEL, messages=HI)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model=MODEL, messages=HI)
    assert caught.value.code == "tokens_per_minute_exceeded"
    assert 100 < int(caught.value.response.headers["retry-after"]) < 240


async def test_a_prompt_that_the_engine_refused_costs_nothing(start, client_of, keyed):
    path, keys = keyed(anna={"tokens_per_minute": 60})
    server = await start(FakeTextEngine(queue_is_full=True), api_key_file=path)
    client = await client_of(server, keys["anna"])
    for _ in range(5):
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model=MODEL, messages=HI)
        assert caught.value.code == "queue_full"


async def test_the_api_and_the_metrics_need_a_key_and_the_probes_do_not(start, keyed):
    path, keys = keyed(anna={})
    server = await start(api_key_file=path)
    good = {"authorization": f"Bearer {keys['anna']}"}
    async with httpx.AsyncClient(base_url=server.url) as http:
        for method, url in (
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", f"/v1/models/{MODEL}"),
            ("GET", "/metrics"),
        ):
            answer = await http.request(method, url)
            assert answer.status_code == 401, url
            assert answer.headers["www-authenticate"] == "Bearer"
            assert (await http.request(method, url, headers=good)).status_code != 401
        for url in ("/health", "/ready", "/openapi.json"):
            assert (await http.get(url)).status_code == 200
    server = await start(api_key_file=path, open_metrics=True)
    async with httpx.AsyncClient(base_url=server.url) as http:
        assert (await http.get("/metrics")).status_code == 200


async def test_logs_name_the_key_and_never_show_it(start, client_of, keyed, caplog):
    path, keys = keyed(anna={})
    caplog.set_level(logging.DEBUG, logger="shardwright")
    server = await start(api_key_file=path)
    client = await client_of(server, keys["anna"])
    await client.chat.completions.create(model=MODEL, messages=HI, user="customer 7")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("shardwright")]
    assert any("key=anna" in line and "'customer 7'" in line and "outcome=ok" in line for line in lines)
    assert not any(keys["anna"] in line for line in lines)
