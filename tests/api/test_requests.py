"""What is refused, with the field's name; and that nothing malformed brings the server down."""

import asyncio
import json

import httpx
import pytest
from fake_text_engine import MODEL, FakeTextEngine

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
async def http():
    async with httpx.AsyncClient(timeout=10) as client:
        yield client


async def error_of(http, server, path, body, status=400):
    answer = await http.post(f"{server.url}/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


CHAT_FAULTS = [
    ({"unknown_field": 1}, "unknown_field"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
    ({"messages": [{"role": "user", "content": "x", "name": "anna"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "assistant"}]}, "messages[0]"),
    ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "unrenderable"}]}, "messages"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 1.5}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 3]}, "stop[1]"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"seed": 2**63}, "seed"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop_token_ids": [2**30]}, "stop_token_ids"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": 10_000}, "timeout"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "start: nonsense"}}, "structured_outputs"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": "b" * 40_000}}}}, None),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    ({"tools": []}, "tools"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools[0]"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"echo": True}, "echo"),
    ({"store": True}, "store"),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {"voice": "x", "format": "mp3"}}, "audio"),
    ({"functions": []}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"prediction": {}}, "prediction"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"verbosity": "high"}, "verbosity"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"user": 3}, "user"),
]


@pytest.mark.parametrize(("change", "param"), CHAT_FAULTS, ids=[json.dumps(c)[:60] for c, _ in CHAT_FAULTS])
async def test_a_wrong_field_of_a_chat_is_refused_by_name(start, http, change, param):
    server = await start()
    error = await error_of(http, server, "chat/completions", CHAT | change)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].startswith(param)
    assert server.engine.requests == []


@pytest.mark.parametrize("template", ["{{ tools }}<tool_call>", "{{ tools }}<|tool_call>"])
async def test_tools_that_make_too_large_a_grammar_are_refused(start, http, template):
    server = await start(FakeTextEngine(chat_template=template))
    parameters = {"type": "object", "properties": {f"property_{i}": {"type": "string"} for i in range(40)}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(40)]
    error = await error_of(http, server, "chat/completions", CHAT | {"tools": tools, "tool_choice": "required"})
    assert "characters; at most" in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, -2]}, "prompt[1]"),
        ({"prompt": [2**30]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"echo": "yes"}, "echo"),
    ],
)
async def test_a_wrong_field_of_a_completion_is_refused_by_name(start, http, change, param):
    server = await start()
    error = await error_of(http, server, "completions", TEXT | change)
    assert error["param"].startswith(param)
    assert server.engine.requests == []


@pytest.mark.parametrize(
    "neutral",
    [
        {"store": False, "service_tier": "auto", "modalities": ["text"], "verbosity": "medium", "metadata": {}},
        {"audio": None, "functions": None, "prediction": None, "temperature": None, "stop": None, "tools": None},
        {"user": "anna", "safety_identifier": "x", "prompt_cache_key": "y", "response_format": {"type": "text"}},
        {"tool_choice": "none", "logprobs": False, "n": 1, "stream": False, "top_k": -1},
    ],
)
async def test_fields_that_ask_for_nothing_are_taken(start, http, neutral):
    server = await start()
    answer = await http.post(f"{server.url}/v1/chat/completions", json=CHAT | neutral)
    assert answer.status_code == 200, answer.text


async def test_a_model_without_a_tokenizer_takes_token_ids_alone(start, http):
    server = await start(FakeTextEngine(has_tokenizer=False))
    assert (await error_of(http, server, "completions", TEXT))["param"] == "prompt"
    assert (await error_of(http, server, "completions", TEXT | {"prompt": [1], "echo": True}))["param"] == "echo"
    assert (await error_of(http, server, "chat/completions", CHAT))["param"] == "messages"
    answer = await http.post(f"{server.url}/v1/completions", json=TEXT | {"prompt": [65]})
    assert answer.status_code == 200


DEEP = b"[" * 100_000
BODIES = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b'"text"', 400),
    (b"null", 400),
    (b"\xff\xfe", 400),
    (b'{"model": "\xc3\x28"}', 400),
    (b'{"model": NaN}', 400),
    (b'{"model": "a", "model": "b"}', 400),
    (b'{"messages": "\\ud800"}', 400),
    (b'{"a": ' + b"9" * 5000 + b"}", 400),
    (b'{"a": 1e999}', 400),
    (b'{"a": ' + DEEP, 400),
    (b'{"a":' * 100_000, 400),
    (b'{"a": "' + b'\\"' * 500_000, 400),
    (b'"' * 1_000_000, 400),
    (b"{" + b" " * 5_000_000 + b"}", 413),
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=range(len(BODIES)))
async def test_a_malformed_body_is_refused_and_quickly(start, http, body, status):
    server = await start()
    for path in ("chat/completions", "completions"):
        answer = await http.post(
            f"{server.url}/v1/{path}", content=body, headers={"content-type": "application/json"}, timeout=2
        )
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


async def test_another_type_than_json_is_refused(start, http):
    server = await start()
    answer = await http.post(f"{server.url}/v1/completions", content=b"x", headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "media_type")


async def test_a_body_that_grows_too_large_is_refused_before_it_ends(start):
    """Chunked, without a length: the server answers while the client is still sending."""
    server = await start(max_body_bytes=10_000)
    reader, writer = await server.raw()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(4):
        writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
    async with asyncio.timeout(5):
        assert b" 413 " in await reader.readline()
    writer.close()


async def test_a_length_that_is_too_large_is_refused_before_the_body(start):
    server = await start()
    reader, writer = await server.raw()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 413 " in head
        assert b"connection: close" in head.lower()
    writer.close()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"])
async def test_a_head_that_does_not_come_ends_the_connection(start, sent):
    server = await start(head_timeout_s=0.1)
    reader, writer = await server.raw()
    writer.write(sent)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()


async def test_a_head_that_trickles_ends_too(start):
    """Bytes that keep coming don't keep the connection: the whole head has one limit."""
    server = await start(head_timeout_s=0.3)
    reader, writer = await server.raw()
    async with asyncio.timeout(5):
        closed = asyncio.create_task(reader.read())
        while not closed.done():
            writer.write(b"G")
            await asyncio.wait({closed}, timeout=0.05)
    assert closed.exception() is not None or closed.result() == b""
    writer.close()


async def test_a_body_that_does_not_come_is_answered_with_a_timeout(start):
    server = await start(body_timeout_s=0.1)
    reader, writer = await server.raw()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    async with asyncio.timeout(5):
        assert b" 408 " in await reader.readline()
    writer.close()


async def test_unknown_paths_and_methods_have_openais_error_object(start, http):
    server = await start()
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/v1/models", 405)):
        answer = await http.request(method, server.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "POST" in (await http.get(f"{server.url}/v1/completions")).headers["allow"]


async def test_a_mistake_of_the_server_is_a_plain_error_without_details(start, http, caplog):
    def breaks(prompt, choice):
        raise RuntimeError("secret detail")

    server = await start(FakeTextEngine(reply=breaks))
    answer = await http.post(f"{server.url}/v1/completions", json=TEXT)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret detail" in caplog.text
    assert (await http.get(f"{server.url}/health")).status_code == 200


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_a_mistake_in_one_of_many_prompts_ends_the_request(start, http, prompt, caplog):
    server = await start(FakeTextEngine(reply=lambda *_: 1 // 0))
    answer = await http.post(f"{server.url}/v1/completions", json=TEXT | {"prompt": prompt})
    assert answer.status_code == 500
    assert server.engine.num_running == 0


async def test_origins_are_allowed_only_when_they_are_set(start, http):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    server = await start()
    assert (await http.options(f"{server.url}/v1/completions", headers=ask)).status_code == 405
    server = await start(cors_origins="https://a.example, https://b.example")
    answer = await http.options(f"{server.url}/v1/completions", headers=ask)
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    answer = await http.options(f"{server.url}/v1/completions", headers=ask | {"origin": "https://c.example"})
    assert "access-control-allow-origin" not in answer.headers
