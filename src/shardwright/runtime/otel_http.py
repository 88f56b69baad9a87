"""The server's span of each request for an answer, as an ASGI middleware around the application.

A W3C `traceparent` header makes the span its child; the answer's `traceresponse` header tells the span's own ids. What
the application does for the request sees the span in OpenTelemetry's context. Bodies are not looked at.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.trace import Span, SpanKind

from shardwright.runtime.otel_export import Spans, fail, nanoseconds, remote_context, trace_parent_of, wall_clock
from shardwright.runtime.otel_requests import ASKED_FOR

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPERATIONS: Final = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


class HttpTracing:
    """Traces what asks for an answer; everything else passes, so that nobody's polling fills the collector."""

    def __init__(self, app: App, spans: Spans, *, model: str, clock: Callable[[], float] = wall_clock) -> None:
        self._app = app
        self._tracer = spans.tracer
        self._model = model
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = str(scope.get("path", ""))
        operation = _OPERATIONS.get(path)
        if scope["type"] != "http" or scope["method"] != "POST" or operation is None:
            await self._app(scope, receive, send)
            return
        span = self._tracer.start_span(
            f"POST {path}",
            context=remote_context(_header(scope, b"traceparent"), _header(scope, b"tracestate")),
            kind=SpanKind.SERVER,
            start_time=nanoseconds(self._clock()),
            attributes={
                "http.request.method": "POST",
                "http.route": path,
                "url.path": path,
                "url.scheme": str(scope.get("scheme", "http")),
                "network.protocol.version": str(scope.get("http_version", "1.1")),
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": self._model,
            },
        )
        context = otel_context.set_value(ASKED_FOR, (operation, self._model), otel.set_span_in_context(span))
        token = otel_context.attach(context)
        try:
            await self._answer(span, scope, receive, send)
        finally:
            otel_context.detach(token)
            span.end(nanoseconds(self._clock()))

    async def _answer(self, span: Span, scope: Scope, receive: Receive, send: Send) -> None:
        is_whole = False
        told = trace_parent_of(span).encode()

        async def watched(message: Message) -> None:
            nonlocal is_whole
            if message["type"] == "http.response.start":
                status = int(message["status"])
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    fail(span, str(status), "")
                if told:
                    message = {**message, "headers": [*message.get("headers", ()), (b"traceresponse", told)]}
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                is_whole = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except BaseException as exc:
            fail(span, type(exc).__name__, "")
            raise
        if not is_whole:
            fail(span, "client_gone", "the client went away before its answer was there")


def _header(scope: Scope, name: bytes) -> str:
    """A header's value; empty without it, and for one that is there twice where that makes no sense."""
    values = [value for each, value in scope.get("headers", ()) if each.lower() == name]
    if name == b"traceparent" and len(values) != 1:
        return ""
    return b",".join(values).decode("latin-1")
