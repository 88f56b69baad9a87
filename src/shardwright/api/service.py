"""What every route needs: the engine, the settings, keys, metrics, and the state of shutting down."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from shardwright.api.errors import ApiError, of_engine, of_validation, shutting_down
from shardwright.api.keys import Client, Keyring
from shardwright.api.limits import LARGE_BODY_BYTES, parse_json, read_body
from shardwright.api.metrics import Metrics
from shardwright.api.schemas import GenerationFields
from shardwright.api.tools import ToolStyle
from shardwright.config import ServeConfig
from shardwright.engine import TextEngine
from shardwright.errors import ShardwrightError

_CUT_S = 3.0  # for requests that were cut off to let go of the engine

Fields = TypeVar("Fields", bound=GenerationFields)
Result = TypeVar("Result")


class Drain:
    """The server's end: no new requests from `begin` on, and the running ones are cut off at `finish`."""

    def __init__(self) -> None:
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.begun = asyncio.Event()  # from here on new requests are refused
        self.over = asyncio.Event()  # from here on running ones are cut off

    @property
    def has_begun(self) -> bool:
        """Whether new requests are refused."""
        return self.begun.is_set()

    def enter(self) -> None:
        """A request begins to run. Raises `ApiError` 503 when the server is shutting down."""
        if self.has_begun:
            raise shutting_down()
        self._running += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request that entered is over."""
        self._running -= 1
        if not self._running:
            self._idle.set()

    async def finish(self, timeout_s: float) -> None:
        """Refuse new requests, give the running ones this long to end by themselves, then end them."""
        self.begun.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            self.cut()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CUT_S):
                    await self._idle.wait()

    def cut(self) -> None:
        """Refuse new requests and end the running ones."""
        self.begun.set()
        self.over.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """All that routes share."""

    engine: TextEngine
    config: ServeConfig
    keys: Keyring
    metrics: Metrics
    tool_style: ToolStyle | None
    drain: Drain = field(default_factory=Drain)
    # One thread: a tokenizer may not take two texts at once.
    text_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="shardwright-text")
    )

    def client(self, request: Request) -> Client:
        """Whose request it is. Raises `ApiError` 401."""
        return self.keys.check(request.headers.get("authorization"))

    async def read(self, request: Request, kind: type[Fields]) -> Fields:
        """A request's checked body. Raises `ApiError`, and `ClientGoneError` when it never comes whole."""
        body = await read_body(request, max_bytes=self.config.max_body_bytes, timeout_s=self.config.body_timeout_s)
        if len(body) > LARGE_BODY_BYTES:
            return await asyncio.to_thread(self._check, body, kind)
        return self._check(body, kind)

    def _check(self, body: bytes, kind: type[Fields]) -> Fields:
        value = parse_json(body)
        try:
            fields = kind.model_validate(value)
        except ValidationError as exc:
            raise of_validation(exc.errors(include_url=False, include_input=False), value) from None
        served = self.engine.model.name
        if fields.model != served:
            raise ApiError(
                404,
                f"the model {fields.model!r} is not served here; {served!r} is",
                param="model",
                code="model_not_found",
            )
        return fields

    async def text(self, param: str, function: Callable[[], Result]) -> Result:
        """Call the codec or check a grammar, off the event loop: either may take as long as many tokens.

        Raises `ApiError` 400 naming `param` for what the engine can't take.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self.text_thread, function)
        except ShardwrightError as exc:
            raise of_engine(exc, param) from exc


def new_id(prefix: str) -> str:
    """An id for an answer or a call: nobody can guess it."""
    return prefix + secrets.token_hex(12)


def now() -> int:
    """Seconds since 1970, for `created`."""
    return int(datetime.now(tz=UTC).timestamp())
