"""Streams completions over HTTP and takes the times at which their pieces come, with as little CPU as it can.

The client shares its cores with what it measures, so it reads sockets and notes times; what the events say is read
when all answers are over. For a workload with rates and percentiles there is `shardwright bench serve`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from shardwright.cli.openai_http import DONE, EventStream, Usage, read_chunk

TIMEOUT_S = 1800.0  # for one answer: a benchmark that hangs should say so


@dataclass(slots=True, kw_only=True)
class Answer:
    """One streamed answer. Times are of `time.perf_counter`."""

    began: float  # just before the request was sent
    pieces: list[float] = field(default_factory=list)  # when each event with text, or with tokens' scores, came
    usage: Usage

    @property
    def first_token_s(self) -> float:
        """From the sending to the first piece."""
        return self.pieces[0] - self.began


async def complete(
    url: str, prompts: Sequence[Sequence[int]], *, new_tokens: int, each_token: bool = False
) -> list[Answer]:
    """Ask `/v1/completions` for all prompts of token ids at once, each on a connection of its own, greedily.

    With `each_token` every token comes as an event, even where its text is not complete yet. Raises `RuntimeError` when
    an answer is refused, breaks off, or has another number of tokens.
    """
    raw = await asyncio.gather(*(_stream(url, prompt, new_tokens, each_token=each_token) for prompt in prompts))
    answers = [_read(began, events) for began, events in raw]
    for answer in answers:
        if answer.usage.num_output != new_tokens:
            raise RuntimeError(f"{url}: asked for {new_tokens} tokens, got {answer.usage.num_output}")
    return answers


async def _stream(
    url: str, prompt: Sequence[int], new_tokens: int, *, each_token: bool
) -> tuple[float, list[tuple[float, bytes]]]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    fields = {
        "prompt": list(prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "model": "bench",
    } | ({"logprobs": 0} if each_token else {})
    body = json.dumps(fields).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            began = time.perf_counter()
            writer.write(head.encode() + body)
            received = await reader.readuntil(b"\r\n\r\n")
            status = received.split(b" ", 2)[1]
            if status != b"200" or b"transfer-encoding: chunked" not in received.lower():
                raise RuntimeError(f"{url} answered {status.decode()}: {(await reader.read(4096)).decode()}")
            chunks = []
            while size := int(await reader.readline(), 16):
                data = await reader.readexactly(size + 2)
                chunks.append((time.perf_counter(), data[:size]))
            return began, chunks
        finally:
            writer.close()


def _read(began: float, chunks: Sequence[tuple[float, bytes]]) -> Answer:
    """What the chunks of an answer said, and when."""
    stream = EventStream()
    pieces: list[float] = []
    usage, is_done = None, False
    for at, data in chunks:
        for event in stream.feed(data):
            if event == DONE:
                is_done = True
                continue
            chunk = read_chunk(event)
            usage = chunk.usage or usage
            if chunk.is_piece:
                pieces.append(at)
    if not is_done or usage is None or not pieces:
        raise RuntimeError("an answer broke off, or had no text")
    return Answer(began=began, pieces=pieces, usage=usage)


def tokens_per_s(answers: Sequence[Answer]) -> float:
    """All new tokens over the whole time, prompts included."""
    took = max(answer.pieces[-1] for answer in answers) - min(answer.began for answer in answers)
    return sum(answer.usage.num_output for answer in answers) / took
