"""The application: its routes, what they may answer, and the OpenAPI document that says so."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

import shardwright
from shardwright.api import schemas
from shardwright.api.chat import chat
from shardwright.api.completions import complete
from shardwright.api.errors import SERVER, ApiError
from shardwright.api.keys import Keyring, read_key_file
from shardwright.api.metrics import CONTENT_TYPE, Metrics
from shardwright.api.routes import take_in
from shardwright.api.schemas import ChatRequest, CompletionRequest, ErrorAnswer, ModelList, ModelObject, Status
from shardwright.api.service import Service
from shardwright.api.tools import choose_style
from shardwright.config import ServeConfig
from shardwright.engine import TextEngine

_REASONS = {
    400: "The request is wrong; `param` names the field.",
    401: "No API key, or one that is not known.",
    404: "No such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not JSON by its type.",
    429: "The queue is full, or the API key's limits are reached; `Retry-After` says when to try again.",
    500: "The server made a mistake.",
    503: "The cluster has failed, or the server is shutting down.",
    504: "The request's time was up before the answer had begun.",
}


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": _REASONS[status]} for status in statuses}


_GENERATING = _responses(400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


def create_app(engine: TextEngine, config: ServeConfig) -> FastAPI:
    """The application that serves `engine`. Its state holds the `Service`, for `server.serve`.

    Raises `ConfigError` for a key file that can't be used.
    """
    keys = Keyring(read_key_file(config.api_key_file) if config.api_key_file else ())
    service = Service(
        engine=engine,
        config=config,
        keys=keys,
        metrics=Metrics(engine),
        tool_style=choose_style(config.tool_style, engine.model.chat_template),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        service.text_thread.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Shardwright",
        summary="OpenAI-compatible API of a model that is split over several machines",
        version=shardwright.__version__,
        # The pages of FastAPI fetch their scripts from elsewhere; the document itself is served.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers={HTTPException: _on_http_error, Exception: _on_mistake},
    )
    app.state.service = service
    if origins := [origin.strip() for origin in config.cors_origins.split(",") if origin.strip()]:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    _add_generation(app, service)
    _add_models(app, service)
    _add_state(app, service)
    app.openapi = lambda: _document(app, service)  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=schemas.ChatAnswer,
        responses=_GENERATING,
        openapi_extra=_body(ChatRequest),
        operation_id="create_chat_completion",
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await take_in(service, request, "chat_completions", ChatRequest, chat)

    @app.post(
        "/v1/completions",
        response_model=schemas.CompletionAnswer,
        responses=_GENERATING,
        openapi_extra=_body(CompletionRequest),
        operation_id="create_completion",
    )
    async def completions(request: Request) -> Response:
        """Go on from a text."""
        return await take_in(service, request, "completions", CompletionRequest, complete)


def _add_models(app: FastAPI, service: Service) -> None:
    def served() -> dict[str, Any]:
        model = service.engine.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "shardwright",
            "max_model_len": model.context_length,
        }

    @app.get("/v1/models", response_model=ModelList, responses=_responses(401, 500), operation_id="list_models")
    async def models(request: Request) -> Response:
        """The model that is served."""
        service.client(request)
        return JSONResponse({"object": "list", "data": [served()]})

    @app.get(
        "/v1/models/{model:path}",
        response_model=ModelObject,
        responses=_responses(401, 404, 500),
        operation_id="retrieve_model",
    )
    async def model(request: Request, model: str) -> Response:
        """One model."""
        service.client(request)
        if model != service.engine.model.name:
            raise ApiError(404, f"the model {model[:200]!r} is not served here", param="model", code="model_not_found")
        return JSONResponse(served())


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Status, responses=_responses(500), operation_id="health")
    async def health() -> Response:
        """Whether the server is alive."""
        return JSONResponse({"status": "alive"})

    @app.get(
        "/ready",
        response_model=Status,
        responses={
            503: {"model": Status, "description": "No token went through the pipeline lately."},
            **_responses(500),
        },
        operation_id="ready",
    )
    async def ready() -> Response:
        """Whether a real token went through the real pipeline lately."""
        if service.drain.has_begun:
            return JSONResponse({"status": "shutting down"}, 503)
        if not service.engine.is_ready():
            return JSONResponse({"status": "not ready"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_class=PlainTextResponse, responses=_responses(401, 500), operation_id="metrics")
    async def metrics(request: Request) -> Response:
        """Figures for Prometheus, in its text format."""
        if not service.config.open_metrics:
            service.client(request)
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for these"
    if isinstance(error, ApiError):
        return error.response()
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code)
    answer = ApiError(error.status_code, str(error.detail), code=code)
    return JSONResponse(answer.content(), error.status_code, error.headers)


async def _on_mistake(_: Request, __: Exception) -> Response:
    return ApiError(500, "the server made a mistake; its log says more", kind=SERVER, code="internal_error").response()


# --- the OpenAPI document ----------------------------------------------------------------------------

_REFERENCES = "#/components/schemas/{model}"


def _body(kind: type[schemas.GenerationFields]) -> dict[str, Any]:
    schema = {"$ref": _REFERENCES.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _events(chunk: str) -> dict[str, Any]:
    """A stream's events: chunks, perhaps an error, then `[DONE]` if there was none."""
    kinds = [{"$ref": _REFERENCES.format(model=name)} for name in (chunk, "ErrorAnswer")]
    json_data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    data = {"anyOf": [{"const": "[DONE]"}, json_data]}
    return {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
    """FastAPI's document, with what it can't know: bodies that are read here, streams, keys, types of answers."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = FastAPI.openapi(app)
    definitions = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        definitions.pop(name, None)
    inputs: list[tuple[type[Any], Any]] = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
    _, added = models_json_schema(inputs, ref_template=_REFERENCES)
    definitions.update(added["$defs"])
    for kind, _ in inputs:
        definitions[kind.__name__]["properties"]["model"]["enum"] = [service.engine.model.name]
    _, chunk = models_json_schema([(schemas.ChatChunk, "serialization")], ref_template=_REFERENCES)
    definitions.update({name: each for name, each in chunk["$defs"].items() if name not in definitions})
    streams = {"/v1/chat/completions": "ChatChunk", "/v1/completions": "CompletionAnswer"}
    keyed = [path for path in document["paths"] if path.startswith("/v1/")]
    if not service.config.open_metrics:
        keyed.append("/metrics")
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if not service.keys.is_open and path in keyed:
                operation["security"] = [{"apiKey": []}]
            if path in streams:
                operation["responses"]["200"]["content"]["text/event-stream"] = _events(streams[path])
                operation["responses"]["429"]["headers"] = {
                    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
                }
    if not service.keys.is_open:
        document["components"]["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = document
    return document
