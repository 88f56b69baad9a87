"""What a request may be, before its content matters: its size, its time to arrive, its JSON. Bounds stand here."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.types import Receive

from shardwright.api.errors import ApiError, invalid

MAX_JSON_DEPTH = 64
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128  # of one message in the history
MAX_NAME_CHARS = 256
MAX_SCHEMA_CHARS = 32 * 1024  # of one tool's parameters or of the answer's schema, as compact JSON
LARGE_BODY_BYTES = 128 * 1024  # from here on parsing would hold up other requests' tokens: it goes to a thread

_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class ClientGoneError(Exception):
    """The client closed the connection; nobody waits for an answer."""


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The request's whole body.

    Raises `ApiError`: 415 for another type than JSON, 413 as soon as more than `max_bytes` were told or came, 408 when
    it takes longer than `timeout_s`; `ClientGoneError` when the connection ends first.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            415,
            f"the body's type is {media_type[:100]!r}; send it with the header `Content-Type: application/json`",
            code="media_type",
        )
    told = request.headers.get("content-length", "")
    if told.isdecimal() and (len(told) > 18 or int(told) > max_bytes):
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(request.receive, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {timeout_s:g} s", code="body_timeout") from None


async def _read(receive: Receive, max_bytes: int) -> bytes:
    pieces = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        pieces += message.get("body", b"")
        if len(pieces) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(pieces)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes} bytes, the most that is taken", code="body_too_large")


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises `ApiError` 400 for what is none: not UTF-8, no JSON, NaN or infinity, nested deeper than `MAX_JSON_DEPTH`,
    half of a surrogate pair, a number or a name given twice that no program could take.
    """
    if not body:
        raise invalid("the body is empty; it must be a JSON object", code="invalid_json")
    if _depth_may_exceed(body):
        raise invalid(f"the JSON is nested deeper than {MAX_JSON_DEPTH} levels", code="invalid_json")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if _LONE_SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as exc:
        raise invalid(f"the body is not UTF-8: byte {exc.start}", code="invalid_json") from None
    except UnicodeEncodeError:
        raise invalid("the JSON has half of a surrogate pair, which is no character", code="invalid_json") from None
    except json.JSONDecodeError as exc:
        raise invalid(f"the body is not JSON: {exc.msg} at character {exc.pos}", code="invalid_json") from None
    except ValueError as exc:
        raise invalid(f"the body is not JSON that can be used: {exc}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    return value


# A string that never ends is taken to the end of the body: trying again inside it would take quadratic time.
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+\\?(?:"|\Z)|[\[\]{}]', re.DOTALL)


def _depth_may_exceed(body: bytes) -> bool:
    """Whether the brackets outside strings nest too deep; the parser itself would use up its stack on them."""
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return False
    depth = 0
    for match in _BRACKETS.finditer(body):
        first = match[0][:1]
        if first in b"[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                return True
        elif first in b"]}":
            depth -= 1
    return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:100]!r} is given twice")
            seen.add(name)
    return value
