"""What is read from an OpenAI-compatible server, however it is cut and whatever is wrong with it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.cli.console import harmless
from shardwright.cli.openai_http import (
    MAX_EVENT_BYTES,
    Chunk,
    EventStream,
    Usage,
    check_url,
    client_settings,
    error_message,
    read_chunk,
    refusal,
)
from shardwright.errors import ConfigError, HttpServerError


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_events_come_out_the_same_wherever_the_chunks_are_cut(texts, newline, sizes):
    wire = "".join(f"data: {text}{newline}: a comment{newline}id: 3{newline}{newline}" for text in texts).encode()
    wire += b":"  # what follows the last line's CR
    stream, events, at, turn = EventStream(), [], 0, 0
    while at < len(wire):
        size = sizes[turn % len(sizes)]
        events += stream.feed(wire[at : at + size])
        at, turn = at + size, turn + 1
    assert events == texts


def test_data_lines_of_one_event_are_joined_and_an_event_without_data_is_none():
    assert EventStream().feed(b"\xef\xbb\xbfdata: a\ndata:b\n\nevent: ping\n\ndata\n\n") == ["a\nb", ""]


@pytest.mark.parametrize("piece", [b"x" * 65536, b"data: " + b"x" * 65536 + b"\n"])
def test_an_endless_event_is_refused(piece):
    stream = EventStream()
    for _ in range(MAX_EVENT_BYTES // 65536 - 1):
        assert stream.feed(piece) == []
    with pytest.raises(HttpServerError, match="an event of more than"):
        stream.feed(piece * 2)


def test_chunks_of_chat_and_text_completions_are_read():
    assert read_chunk('{"choices":[{"delta":{"content":"a"},"finish_reason":null}]}') == Chunk(text="a", is_piece=True)
    assert read_chunk('{"choices":[{"text":"b","finish_reason":"stop"}]}') == Chunk(
        text="b", finish_reason="stop", is_piece=True
    )
    assert read_chunk('{"choices":[{"delta":{"reasoning_content":"hm"}}]}') == Chunk(reasoning="hm", is_piece=True)
    counted = '{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"prompt_tokens_details":null}}'
    assert read_chunk(counted) == Chunk(usage=Usage(num_prompt=3, num_output=2))


def test_only_events_with_a_token_are_pieces():
    """A chat's first event names the role; a text completion's token may have no text of its own."""
    assert not read_chunk('{"choices":[{"delta":{"role":"assistant","content":""}}]}').is_piece
    assert not read_chunk('{"choices":[{"delta":{},"finish_reason":"stop"}]}').is_piece
    assert read_chunk('{"choices":[{"text":"","finish_reason":null}]}').is_piece
    assert not read_chunk('{"choices":[{"text":"","finish_reason":"stop"}]}').is_piece


@pytest.mark.parametrize(
    "data",
    ["", "nonsense", "[]", "3", '{"choices":3}', '{"choices":[{"delta":{"content":[1]}}]}', '{"choices":["x"]}',
     '{"choices":[{"text":"a","finish_reason":3}]}', '{"usage":{"prompt_tokens":"many","completion_tokens":1}}'],
)  # fmt: skip
def test_what_is_no_chunk_is_told(data):
    with pytest.raises(HttpServerError, match="the server sent an event that is no"):
        read_chunk(data)


def test_an_error_in_the_stream_is_told_in_the_servers_words():
    with pytest.raises(HttpServerError, match="broke off: worker1 is gone"):
        read_chunk('{"error":{"message":"worker1 is gone","type":"server_error"}}')


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"error": {"message": "no such\nmodel"}}, "no such model"),
        ({"error": "plain"}, "plain"),
        ({"detail": [{"msg": "x"}]}, "[{'msg': 'x'}]"),
        ({"object": "error", "message": "old"}, "old"),
        ([], "no reason given"),
        ({}, "no reason given"),
    ],
)
def test_errors_of_many_servers_become_sentences(content, sentence):
    assert error_message(content) == sentence


def test_a_refusal_says_what_can_be_done():
    body = json.dumps({"error": {"message": "busy"}}).encode()
    assert str(refusal(429, {"retry-after": "7"}, body, url="u")) == "the server refused (429): busy; try again in 7 s"
    assert "--api-key or SHARDWRIGHT_API_KEY" in str(refusal(401, {}, body, url="u"))
    assert str(refusal(500, {}, b"<html>oops</html>", url="u")) == "the server refused (500): <html>oops</html>"
    assert refusal(503, {}, b"", url="u").kind == "HTTP 503"


@pytest.mark.parametrize(
    ("given_url", "used"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("https://example.org/api/v3", "https://example.org/api/v3"),
        ("http://[::1]:80", "http://[::1]/v1"),
    ],
)
def test_addresses_are_completed(given_url, used):
    assert check_url(given_url) == used


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "", "http://x:99999/", "http://x/v1?a=b"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="--url is"):
        check_url(url)


def test_a_proxy_is_never_asked_for_this_machines_own_servers():
    def trusts(url):
        return client_settings(url, api_key=None, timeout_s=1.0)["trust_env"]

    assert not trusts("http://127.0.0.1:8000/v1")
    assert not trusts("http://[::1]:8000/v1")
    assert not trusts("http://localhost/v1")
    assert trusts("http://192.168.1.10/v1")


def test_a_key_that_can_not_be_sent_is_refused():
    with pytest.raises(ConfigError, match="the API key has characters"):
        client_settings("http://127.0.0.1/v1", api_key="a\nb", timeout_s=1.0)


@given(st.text())
def test_harmless_text_has_no_control_characters_but_tab_and_newline(text):
    shown = harmless(text)
    assert all(c in "\t\n" or not (ord(c) < 32 or 127 <= ord(c) < 160) for c in shown)
    shown.encode("utf-8")


def test_harmless_text_keeps_everything_else():
    text = "a\tb\n\N{SNOWMAN} \N{GRINNING FACE} é"
    assert harmless(text) == text
    assert harmless("a\r\nb") == "a\nb"
