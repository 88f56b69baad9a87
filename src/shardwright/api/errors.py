"""Errors in OpenAI's form, and which status each of ours has. Knows nothing of routes."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from shardwright.engine import ChoiceEnd
from shardwright.errors import (
    ClusterError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    ShardwrightError,
    UserError,
)
from shardwright.types import FinishReason

INVALID = "invalid_request_error"
AUTHENTICATION = "authentication_error"
RATE_LIMIT = "rate_limit_error"
TIMEOUT = "timeout_error"
SERVER = "server_error"


class ApiError(HTTPException):
    """An answer with OpenAI's error object. `param` names the field that is wrong, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        headers: dict[str, str] = {}
        if retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status in {408, 413}:
            headers["Connection"] = "close"  # the rest of the body was not read
        super().__init__(status, message, headers or None)
        self.kind = kind
        self.param = param
        self.code = code

    def content(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        kind = _LingeringResponse if self.status_code == 413 else JSONResponse
        return kind(self.content(), self.status_code, self.headers)


_LINGER_S = 3.0
_LINGER_BYTES = 64 * 1024 * 1024


class _LingeringResponse(JSONResponse):
    """An answer to a client that is still sending, before the connection is closed.

    Most clients read only when all is sent, and closing on unread bytes makes the system drop the answer too. So what
    comes is thrown away for a while first.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI calls it so
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        num_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while num_bytes < _LINGER_BYTES:
                    message = await receive()
                    if not message.get("more_body", False):
                        break
                    num_bytes += len(message["body"])
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A field has a value that can't be used: 400."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    """The server takes no more requests: 503."""
    return ApiError(503, "the server is shutting down", kind=SERVER, code="shutting_down", retry_after_s=5)


def deadline_exceeded(message: str) -> ApiError:
    """The request's time was up: 504."""
    return ApiError(504, message or "the request's time was up", kind=TIMEOUT, code="deadline_exceeded")


def of_engine(error: ShardwrightError, param: str | None = None) -> ApiError:
    """What the engine refuses or fails with, as an answer. `param` names the field that the request's content is in."""
    message = str(error)
    if isinstance(error, PromptTooLongError):
        return invalid(message, param, "context_length_exceeded")
    if isinstance(error, InvalidRequestError):
        return invalid(message, param)
    if isinstance(error, QueueFullError):
        return ApiError(429, message, kind=RATE_LIMIT, code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, ClusterError):
        return ApiError(503, message, kind=SERVER, code="cluster_error", retry_after_s=5)
    if isinstance(error, UserError):
        return invalid(message, param)
    return ApiError(500, message, kind=SERVER, code="internal_error")


def of_end(end: ChoiceEnd) -> ApiError | None:
    """The error that a choice ended with; None for one that ended well."""
    match end.reason:
        case FinishReason.STOP | FinishReason.LENGTH:
            return None
        case FinishReason.DEADLINE:
            return deadline_exceeded(end.message)
        case FinishReason.REJECTED:
            return ApiError(
                429, end.message or "too many requests wait", kind=RATE_LIMIT, code="queue_full", retry_after_s=1
            )
        case FinishReason.ABORT:
            return ApiError(503, end.message or "the request was aborted", kind=SERVER, code="aborted", retry_after_s=1)
        case FinishReason.ERROR:
            return ApiError(
                503, end.message or "the cluster failed", kind=SERVER, code="cluster_error", retry_after_s=5
            )


# --- validation ------------------------------------------------------------------------------------


class FieldError(ValueError):
    """A schema's own complaint about one field, raised while the object that has it is checked."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def of_validation(errors: Sequence[Mapping[str, Any]], body: object) -> ApiError:
    """One error for all that a schema found; it names the field that the deepest one is about.

    `errors` are pydantic's. Their places hold the names of union members too, which no client knows: a part that
    is not there in `body` is left out, unless it is what is missing or unknown.
    """
    places = [(_place(error, body), error) for error in errors]
    # An unknown field is the surest sign of what is wrong. Among alternatives the one counts that fits furthest, and
    # of these one whose type is right.
    unknown = [each for each in places if each[1]["type"] == "extra_forbidden"]
    place, _ = max(unknown or places, key=lambda each: (len(each[0]), not each[1]["type"].endswith("_type")))
    messages = dict.fromkeys(_message(error) for where, error in places if where == place)
    name = _name(place)
    if not name:
        return invalid(f"the body is wrong: {' or '.join(messages)}")
    kind = next(error["type"] for where, error in places if where == place)
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(kind)
    return invalid(f"{name}: {' or '.join(messages)}", name, code or "invalid_value")


def _place(error: Mapping[str, Any], body: object) -> tuple[str | int, ...]:
    found: list[str | int] = []
    value = body
    parts: Iterable[str | int] = error["loc"]
    for part in parts:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        elif not (part == error["loc"][-1] and error["type"] == "missing"):
            continue
        found.append(part)
    context = error.get("ctx", {})
    if isinstance(field := getattr(context.get("error"), "field", None), str):
        found.append(field)
    elif error["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        found.append(str(context["discriminator"]).strip("'"))
    return tuple(found)


def _name(place: Iterable[str | int]) -> str:
    name = ""
    for part in place:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            name += f".{part}" if name else part
    return name[:200]


def _message(error: Mapping[str, Any]) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "is not known here; leave it out"
        case "missing":
            return "is missing"
        case "none_required":
            return "is not supported here; leave it out"
        case "union_tag_not_found":
            return "is missing"
        case "union_tag_invalid":
            return f"is {str(error['ctx']['tag'])[:100]!r}; it must be one of {error['ctx']['expected_tags']}"
        case "value_error" | "assertion_error":
            return str(error["ctx"]["error"])
        case _:
            text = str(error["msg"])
            return (text[:1].lower() + text[1:]).replace("input should", "should")[:500]
