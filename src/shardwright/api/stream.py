"""Runs one request's generation while its client listens, and writes its answer as a whole or piece by piece.

The client may go at any time: the connection is watched from the moment that the body is there, not only when
something is sent, and what was generated for it is given up at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shardwright.api.errors import SERVER, ApiError, of_end, of_engine, shutting_down
from shardwright.api.keys import Client
from shardwright.api.limits import ClientGoneError
from shardwright.api.metrics import Meter
from shardwright.api.service import Service
from shardwright.engine import ChoiceEnd, GenerationEvent, GenerationRequest, TextDelta
from shardwright.errors import ShardwrightError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_MERGED_EVENTS = 64  # of all prompts of a request, that wait to be sent
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies shall pass each piece on at once
]


class EventWriter:
    """Sends server-sent events; the first piece begins the answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def write(self, data: bytes) -> None:
        """Send whole events."""
        if not self.has_begun:
            self.has_begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """End the answer."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


Work = Callable[[EventWriter], Awaitable[Response | None]]
"""Makes the answer: gives it whole, or writes it as events and gives None."""


class GenerationAnswer(Response):
    """The answer to one request, made while it is sent."""

    def __init__(self, service: Service, client: Client, meter: Meter, work: Work, label: str) -> None:
        super().__init__()
        self._service = service
        self._client = client
        self._meter = meter
        self._work = work
        self._label = label

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the work and send what it makes, or the error that it ends with."""
        writer = EventWriter(send)
        outcome = "disconnected"
        try:
            response = await self._run(receive, writer)
            outcome = "ok"
            if response is None:
                await writer.end()
            else:
                await response(scope, receive, send)
        except ClientGoneError:
            pass
        except ApiError as exc:
            outcome = exc.code or str(exc.status_code)
            await self._fail(exc, writer, scope, receive, send)
        except ShardwrightError as exc:
            error = of_engine(exc)
            outcome = error.code or str(error.status_code)
            await self._fail(error, writer, scope, receive, send)
        except Exception:
            outcome = "internal_error"
            log.exception("%s failed", self._label)
            await self._fail(_internal_error(), writer, scope, receive, send)
        finally:
            seconds = self._meter.done(outcome)
            log.info("%s key=%s outcome=%s seconds=%.3f", self._label, self._client.name, outcome, seconds)

    async def _run(self, receive: Receive, writer: EventWriter) -> Response | None:
        drain = self._service.drain
        with self._client.slot():
            drain.enter()
            try:
                return await while_connected(receive, drain.over, self._work(writer))
            finally:
                drain.leave()

    @staticmethod
    async def _fail(error: ApiError, writer: EventWriter, scope: Scope, receive: Receive, send: Send) -> None:
        if writer.has_begun:
            await writer.write(b"data: " + json.dumps(error.content()).encode() + b"\n\n")
            await writer.end()
        else:
            await error.response()(scope, receive, send)


def _internal_error() -> ApiError:
    return ApiError(500, "the server made a mistake; its log says more", kind=SERVER, code="internal_error")


async def while_connected(receive: Receive, over: asyncio.Event, work: Awaitable[Response | None]) -> Response | None:
    """The result of `work`, which is cancelled when the client goes or the server ends.

    Raises `ClientGoneError`, or `ApiError` 503 when `over` is set first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_until_gone(receive))
    ended = asyncio.create_task(over.wait())
    try:
        await asyncio.wait((task, gone, ended), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGoneError
        raise shutting_down()
    finally:
        for each in (task, gone, ended):
            each.cancel()
        # Only when the work has let go of the engine is the request over.
        await asyncio.gather(task, gone, ended, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# --- the engine's events -----------------------------------------------------------------------------


async def generate(
    service: Service, client: Client, meter: Meter, requests: Sequence[GenerationRequest], prompt_field: str
) -> AsyncGenerator[tuple[int, GenerationEvent]]:
    """The events of all prompts, each with its prompt's number; those of different prompts come as they happen.

    All prompts are started before the first event is given, or none is. Raises `ApiError` for what the engine refuses,
    and for a choice that ends in anything but a stop or its length. Closing it aborts what still runs.
    """
    num_prompt = sum(len(request.prompt) for request in requests)
    client.take_prompt(num_prompt, prompt_field)
    has_begun = False
    async with contextlib.AsyncExitStack() as stack:
        streams = []
        try:
            for request in requests:
                stream = await service.engine.generate(request)
                streams.append(stream)
                stack.push_async_callback(_close, stream)
            merged = _only(streams[0]) if len(streams) == 1 else _merge(streams)
            stack.push_async_callback(merged.aclose)
            async for number, event in merged:
                has_begun = True
                if isinstance(event, TextDelta):
                    if count := len(event.tokens):
                        meter.tokens(number * requests[0].num_choices + event.choice, count)
                        client.take_output(count)
                elif isinstance(event, ChoiceEnd) and (error := of_end(event)) is not None:
                    raise error
                yield number, event
        except ShardwrightError as exc:
            if not has_begun:
                client.give_back(num_prompt)
            raise of_engine(exc, prompt_field) from exc


async def _close(stream: AsyncIterator[GenerationEvent]) -> None:
    close: Callable[[], Coroutine[Any, Any, None]] | None = getattr(stream, "aclose", None)
    if close is not None:
        await close()


async def _only(stream: AsyncIterator[GenerationEvent]) -> AsyncGenerator[tuple[int, GenerationEvent]]:
    async for event in stream:
        yield 0, event


async def _merge(streams: Sequence[AsyncIterator[GenerationEvent]]) -> AsyncGenerator[tuple[int, GenerationEvent]]:
    queue: asyncio.Queue[tuple[int, GenerationEvent | Exception | None]] = asyncio.Queue(_MERGED_EVENTS)

    async def pump(number: int, stream: AsyncIterator[GenerationEvent]) -> None:
        try:
            async for event in stream:
                await queue.put((number, event))
            await queue.put((number, None))
        except Exception as exc:  # noqa: BLE001  the top of a task: whoever takes from the queue raises it
            await queue.put((number, exc))

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            number, event = await queue.get()
            if event is None:
                num_open -= 1
            elif isinstance(event, Exception):
                raise event
            else:
                yield number, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- usage -------------------------------------------------------------------------------------------


class UsageCounter:
    """Adds up the tokens of a request. A prompt counts once, however many choices go on from it."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self._num_prompt = sum(len(request.prompt) for request in requests)
        self._num_output = 0
        self._cached: dict[int, int] = {}  # by prompt: the least of its choices, which is what the first one saved

    def add(self, number: int, end: ChoiceEnd) -> None:
        """A choice of the prompt with this number is over."""
        self._num_output += end.num_output_tokens
        self._cached[number] = min(self._cached.get(number, end.num_cached_tokens), end.num_cached_tokens)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": self._num_prompt + self._num_output,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


def json_bytes(value: object) -> bytes:
    """Compact JSON; text is quoted as it is."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event_bytes(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(value) + b"\n\n"
