"""What `chat` and `bench serve` know of an OpenAI-compatible server: addresses, server-sent events, chunks, errors.

Everything that comes from the server is checked here and nothing of it is trusted; the requests themselves are sent
by the commands, each in its own way.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from shardwright.cli.options import DEFAULT_URL
from shardwright.errors import ConfigError, HttpServerError

CONNECT_TIMEOUT_S = 10.0
MAX_EVENT_BYTES = 8 * 1024 * 1024  # an event that is longer is no answer of a language model
MAX_ERROR_BYTES = 64 * 1024
DONE = "[DONE]"


class EventStream:
    """Cuts a stream of server-sent events into the data of its events, wherever the borders of its chunks lie.

    Follows the format of the HTML standard (section 9.2.6) as far as these servers use it: data lines are joined,
    comments and other fields are passed over, an event that the stream's end cuts off is dropped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._num_bytes = 0
        self._is_first_line = True

    def feed(self, chunk: bytes) -> list[str]:
        """Take more bytes; gives the data of each event that is complete now. Raises `HttpServerError`: too long."""
        # A line may end in CR, LF or both. A last CR waits for what follows, which may be its LF.
        buffer = self._rest + chunk
        held = b"\r" if buffer.endswith(b"\r") else b""
        lines = buffer[: len(buffer) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + held
        events = []
        for line in lines:
            self._num_bytes += len(line)
            if (event := self._take(line)) is not None:
                events.append(event)
        if self._num_bytes + len(self._rest) > MAX_EVENT_BYTES:
            raise HttpServerError(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")
        return events

    def _take(self, raw: bytes) -> str | None:
        line = raw.decode("utf-8", errors="replace")
        if self._is_first_line:
            line = line.removeprefix("\N{BYTE ORDER MARK}")
            self._is_first_line = False
        if line:
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            return None
        data, self._data, self._num_bytes = self._data, [], 0
        return "\n".join(data) if data else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request cost, by the server's count, in tokens."""

    num_prompt: int
    num_output: int
    num_cached: int = 0  # of the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One event of a streamed answer."""

    text: str = ""
    reasoning: str = ""  # what some servers send of a model's thinking, beside the answer
    finish_reason: str | None = None
    usage: Usage | None = None
    is_piece: bool = False  # whether a token of the answer lies in it; its text may be empty or begin a character


def read_chunk(data: str) -> Chunk:
    """Read an event of a streamed chat or text completion.

    Raises `HttpServerError` for an error that the server sends in the stream, and for what is no such event.
    """
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise HttpServerError(f"the server sent an event that is no JSON object: {_shortened(data)}", kind="bad event")
    if content.get("error"):
        raise HttpServerError(f"the server broke off: {error_message(content)}", kind="error in the stream")
    try:
        choice = (content.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        text = delta.get("content") or choice.get("text") or ""
        reasoning = delta.get("reasoning_content") or ""
        finish_reason = choice.get("finish_reason")
        # A chat's first event may only name the role, and the last of either kind only the reason.
        is_piece = bool(text or reasoning or ("text" in choice and finish_reason is None))
        usage = _usage(content.get("usage"))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        text = None
    if not (isinstance(text, str) and isinstance(reasoning, str) and isinstance(finish_reason, str | None)):
        raise HttpServerError(f"the server sent an event that is no completion: {_shortened(data)}", kind="bad event")
    return Chunk(text=text, reasoning=reasoning, finish_reason=finish_reason, usage=usage, is_piece=is_piece)


def _usage(content: Any) -> Usage | None:
    if content is None:
        return None
    details = content.get("prompt_tokens_details") or {}
    return Usage(
        num_prompt=int(content["prompt_tokens"]),
        num_output=int(content["completion_tokens"]),
        num_cached=int(details.get("cached_tokens") or 0),
    )


def error_message(content: object) -> str:
    """The sentence in an error object, OpenAI's or one of those that others send instead."""
    if isinstance(content, Mapping):
        error = content.get("error", content)
        if isinstance(error, Mapping):
            for name in ("message", "detail"):
                if error.get(name):
                    return _shortened(str(error[name]))
        if error:
            return _shortened(str(error))
    return "no reason given"


def refusal(status: int, headers: Mapping[str, str], body: bytes, *, url: str) -> HttpServerError:
    """The error for an answer that is none: what the server said, and what can be done about it."""
    try:
        said = error_message(json.loads(body))
    except ValueError:
        said = _shortened(body.decode("utf-8", errors="replace")) or "no reason given"
    hints = {
        401: "; give the key with --api-key or SHARDWRIGHT_API_KEY",
        403: "; give another key with --api-key or SHARDWRIGHT_API_KEY",
        404: f"; is {url} the API's address (it often ends in /v1), and the model's name right?",
        429: f"; try again in {headers['retry-after']} s" if headers.get("retry-after", "").isdecimal() else "",
    }
    return HttpServerError(f"the server refused ({status}): {said}{hints.get(status, '')}", kind=f"HTTP {status}")


def link_error(error: httpx.HTTPError, *, url: str, timeout_s: float) -> HttpServerError:
    """The sentence for what went wrong between here and the server."""
    match error:
        case httpx.ConnectTimeout():
            return HttpServerError(f"{url}: no connection within {CONNECT_TIMEOUT_S:.0f} s", kind="no connection")
        case httpx.ConnectError():
            return HttpServerError(
                f"{url}: no connection ({error}); is a server running there? (shardwright serve)", kind="no connection"
            )
        case httpx.TimeoutException():
            return HttpServerError(f"{url}: the server sent nothing for {timeout_s:.0f} s", kind="timeout")
        case _:
            reason = " ".join(str(error).split()) or type(error).__name__
            return HttpServerError(f"{url}: the connection broke: {reason}", kind="connection broke")


def check_url(url: str) -> str:
    """The API's address without a slash at its end; `/v1` is added where there is no path. Raises `ConfigError`."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise ConfigError(f"--url is {url!r}: {exc}") from exc
    is_address = parsed.scheme in ("http", "https") and parsed.host and (parsed.port or 1) in range(1, 65536)
    if not is_address or parsed.query or parsed.fragment:
        raise ConfigError(f"--url is {url!r}; give the API's address, such as {DEFAULT_URL}")
    path = parsed.path.rstrip("/") or "/v1"
    return str(parsed.copy_with(path=path))


def client_settings(url: str, *, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """How an httpx client of either kind is made for this server. Raises `ConfigError` for a key that can't be sent."""
    headers = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
    if api_key:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key has characters that can't stand in an HTTP header")
        headers["Authorization"] = f"Bearer {api_key}"
    return {
        "headers": headers,
        "timeout": httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
        # A proxy that the environment names can't reach this machine's loopback.
        "trust_env": not _is_loopback(httpx.URL(url).host),
    }


def encode_body(body: Mapping[str, Any]) -> bytes:
    """A request's JSON. Halves of characters, which a model or a file may hold, can't be sent and become `?`."""
    return json.dumps(body, ensure_ascii=False).encode("utf-8", errors="replace")


def read_models(response: httpx.Response, *, url: str) -> str:
    """The first model of a server's list. Raises `HttpServerError` when the answer is no list, or it is empty."""
    if response.status_code != httpx.codes.OK:
        raise refusal(response.status_code, response.headers, response.content, url=url)
    try:
        listed = response.json()
    except ValueError:
        raise HttpServerError(f"{url}/models is no JSON; is this an OpenAI-compatible server?") from None
    try:
        return str(listed["data"][0]["id"])
    except (IndexError, KeyError, TypeError):
        raise HttpServerError(f"{url} does not say which models it has; name one with --model") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shortened(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
