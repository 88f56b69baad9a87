"""A conversation with an OpenAI-compatible server: what was said so far, and one streamed answer after the other."""

from __future__ import annotations

import collections
import contextlib
import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from shardwright.cli.openai_http import (
    DONE,
    MAX_ERROR_BYTES,
    Chunk,
    EventStream,
    Usage,
    check_url,
    client_settings,
    encode_body,
    link_error,
    read_chunk,
    read_models,
    refusal,
)
from shardwright.errors import ConfigError, HttpServerError

RESERVED = ("model", "messages", "stream", "stream_options", "n")


class ChatServer:
    """The server, as a context manager. Its methods block; all raise `HttpServerError`."""

    def __init__(self, url: str, *, api_key: str | None, timeout_s: float) -> None:
        """`timeout_s` is how long the server may send nothing. Raises `ConfigError` for a bad URL or key."""
        self.url = check_url(url)
        self._timeout_s = timeout_s
        self._client = httpx.Client(**client_settings(self.url, api_key=api_key, timeout_s=timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def first_model(self) -> str:
        """The name of the model that the server names first."""
        try:
            response = self._client.get(f"{self.url}/models")
        except httpx.HTTPError as exc:
            raise link_error(exc, url=self.url, timeout_s=self._timeout_s) from exc
        return read_models(response, url=self.url)

    def stream(self, body: dict[str, Any]) -> Generator[Chunk]:
        """Ask for a chat completion and give its chunks. Closing the generator tells the server to stop."""
        try:
            content = encode_body(body)
            with self._client.stream("POST", f"{self.url}/chat/completions", content=content) as response:
                yield from self._chunks(response)
        except httpx.HTTPError as exc:
            raise link_error(exc, url=self.url, timeout_s=self._timeout_s) from exc

    def _chunks(self, response: httpx.Response) -> Generator[Chunk]:
        if response.status_code != httpx.codes.OK:
            said = b""
            for part in response.iter_bytes():
                said += part
                if len(said) > MAX_ERROR_BYTES:
                    break
            raise refusal(response.status_code, response.headers, said[:MAX_ERROR_BYTES], url=self.url)
        kind = response.headers.get("content-type", "nothing")
        if not kind.startswith("text/event-stream"):
            raise HttpServerError(f"{self.url}: the server answered with {kind} instead of a stream of events")
        events = EventStream()
        finished = False
        parts = response.iter_bytes()
        for part in parts:
            for data in events.feed(part):
                if data == DONE:
                    with contextlib.suppress(httpx.HTTPError):  # what ends the body: the connection is used again
                        collections.deque(parts, maxlen=0)
                    return
                chunk = read_chunk(data)
                finished = finished or chunk.finish_reason is not None
                yield chunk
        if not finished:
            raise HttpServerError("the server broke off before the answer's end", kind="broken off")


@dataclass(slots=True, kw_only=True)
class Reply:
    """One answer, whole or as far as it came. Times are seconds on the clock that it was asked with."""

    text: str = ""
    num_pieces: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    asked_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    interrupted: bool = False

    def describe(self) -> str:
        """Tokens, time to the first, and tokens a second after it, in a line; as far as they are known."""
        if self.first_s is None:
            return "stopped before the first token" if self.interrupted else "the answer is empty"
        # Without the server's count the pieces that it sent are what there is to count.
        count, noun = (self.usage.num_output, "token") if self.usage else (self.num_pieces, "piece")
        parts = [f"{count} {noun}{'' if count == 1 else 's'}", f"first after {self.first_s - self.asked_s:.2f} s"]
        if count > 1 and self.last_s > self.first_s:
            parts.append(f"{(count - 1) / (self.last_s - self.first_s):.1f} {noun}s/s")
        if self.usage is not None and self.usage.num_cached:
            parts.append(f"{self.usage.num_cached} of {self.usage.num_prompt} prompt tokens from the cache")
        if self.interrupted:
            parts.append("stopped")
        elif self.finish_reason == "length":
            parts.append("cut at the token limit")
        elif self.finish_reason not in ("stop", None):
            parts.append(f"ended with {self.finish_reason}")
        return ", ".join(parts)


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What was said, and how answers are asked for."""

    model: str
    system: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)  # user and assistant in turn
    last_question: str = ""
    counts_tokens: bool = True  # whether the server takes `stream_options`

    def body(self, question: str) -> dict[str, Any]:
        """The request for an answer to this question, after all that was said."""
        messages = [*self.turns, {"role": "user", "content": question}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        counting = {"stream_options": {"include_usage": True}} if self.counts_tokens else {}
        return {"model": self.model, "messages": messages, "stream": True, **counting, **self.params}

    def ask(
        self,
        server: ChatServer,
        question: str,
        show: Callable[[Chunk], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> Reply:
        """Ask, show each chunk, and remember question and answer.

        Ctrl-C ends the answer: what came until then is remembered as the answer. Of a request that fails nothing
        is remembered but its question, for `retry`. Raises `HttpServerError`.
        """
        self.last_question = question
        reply = Reply(asked_s=clock())
        try:
            self._follow(server, question, reply, show, clock)
        except KeyboardInterrupt:
            reply.interrupted = True
        if reply.text or not reply.interrupted:
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply.text}]
        return reply

    def _follow(
        self, server: ChatServer, question: str, reply: Reply, show: Callable[[Chunk], None], clock: Callable[[], float]
    ) -> None:
        try:
            with contextlib.closing(server.stream(self.body(question))) as chunks:
                for chunk in chunks:
                    _note(chunk, reply, clock())
                    show(chunk)
        except HttpServerError as exc:
            # Some servers know streaming but not its options; what they lack is only the count of tokens.
            if not self.counts_tokens or reply.num_pieces or "stream_options" not in str(exc):
                raise
            self.counts_tokens = False
            self._follow(server, question, reply, show, clock)

    def retry(self) -> str:
        """Take back the last answer, if the last question got one; gives the question to be asked again."""
        if self.turns and self.turns[-2]["content"] == self.last_question:
            del self.turns[-2:]
        return self.last_question

    def clear(self) -> None:
        """Forget what was said; the system message and the parameters stay."""
        self.turns.clear()
        self.last_question = ""

    def set_param(self, assignment: str) -> None:
        """Take `name=value` (JSON, or plain text), or `name=` to leave it to the server. Raises `ConfigError`."""
        name, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals or not name.isidentifier():
            raise ConfigError(f"{assignment!r} sets nothing; write name=value, such as temperature=0.7")
        if name in RESERVED:
            raise ConfigError(f"{name} can't be set here: the chat itself decides it")
        if not value:
            self.params.pop(name, None)
            return
        try:
            self.params[name] = json.loads(value)
        except ValueError:
            self.params[name] = value

    def save(self, path: Path, *, overwrite: bool) -> None:
        """Write everything to a file as JSON. Raises `ConfigError` when that fails or the file is there already."""
        content = {"model": self.model, "system": self.system, "params": self.params, "messages": self.turns}
        try:
            with path.open("w" if overwrite else "x", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2) + "\n")
        except FileExistsError:
            raise ConfigError(f"{path} is there already; choose another name") from None
        except OSError as exc:
            raise ConfigError(f"{path}: can't be written: {exc.strerror}") from exc

    def load(self, path: Path) -> None:
        """Go on with what `save` wrote; the model stays. Raises `ConfigError` and changes nothing when it can't."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in content["messages"]]
            system, params = str(content["system"]), dict(content["params"])
        except OSError as exc:
            raise ConfigError(f"{path}: can't be read: {exc.strerror}") from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise ConfigError(f"{path}: not a conversation that /save wrote") from exc
        roles = [turn["role"] for turn in turns]
        if roles != ["user", "assistant"] * (len(turns) // 2) or any(name in RESERVED for name in params):
            raise ConfigError(f"{path}: not a conversation that /save wrote")
        self.turns, self.system, self.params = turns, system, params
        self.last_question = turns[-2]["content"] if turns else ""


def _note(chunk: Chunk, reply: Reply, now_s: float) -> None:
    if chunk.is_piece:
        reply.first_s = now_s if reply.first_s is None else reply.first_s
        reply.last_s = now_s
        reply.num_pieces += 1
    reply.text += chunk.text
    reply.finish_reason = chunk.finish_reason or reply.finish_reason
    reply.usage = chunk.usage or reply.usage
