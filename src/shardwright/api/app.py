"""The application: its routes, what they may answer, and the OpenAPI document that says so."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

import shardwright
from shardwright.api import schemas
from shardwright.api.chat import chat
from shardwright.api.completions import complete
from shardwright.api.dashboard import add_dashboard
from shardwright.api.document import body, document, responses
from shardwright.api.errors import SERVER, ApiError, of_validation
from shardwright.api.keys import Keyring, read_key_file
from shardwright.api.metrics import Metrics
from shardwright.api.observe import add_observation
from shardwright.api.routes import take_in
from shardwright.api.schemas import ChatRequest, CompletionRequest, ModelList, ModelObject, Status
from shardwright.api.service import Service
from shardwright.api.tools import choose_style
from shardwright.config import ServeConfig
from shardwright.engine import TextEngine

_GENERATING = responses(400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


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
        exception_handlers={
            HTTPException: _on_http_error,
            RequestValidationError: _on_bad_parameter,
            Exception: _on_mistake,
        },
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
    add_observation(app, service)
    add_dashboard(app, service)
    app.openapi = lambda: document(app, service)  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=schemas.ChatAnswer,
        responses=_GENERATING,
        openapi_extra=body(ChatRequest),
        operation_id="create_chat_completion",
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await take_in(service, request, "chat_completions", ChatRequest, chat)

    @app.post(
        "/v1/completions",
        response_model=schemas.CompletionAnswer,
        responses=_GENERATING,
        openapi_extra=body(CompletionRequest),
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

    @app.get("/v1/models", response_model=ModelList, responses=responses(401, 500), operation_id="list_models")
    async def models(request: Request) -> Response:
        """The model that is served."""
        service.client(request)
        return JSONResponse({"object": "list", "data": [served()]})

    @app.get(
        "/v1/models/{model:path}",
        response_model=ModelObject,
        responses=responses(401, 404, 500),
        operation_id="retrieve_model",
    )
    async def model(request: Request, model: str) -> Response:
        """One model."""
        service.client(request)
        if model != service.engine.model.name:
            raise ApiError(404, f"the model {model[:200]!r} is not served here", param="model", code="model_not_found")
        return JSONResponse(served())


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Status, responses=responses(500), operation_id="health")
    async def health() -> Response:
        """Whether the server is alive."""
        return JSONResponse({"status": "alive"})

    @app.get(
        "/ready",
        response_model=Status,
        responses={
            503: {"model": Status, "description": "No token went through the pipeline lately."},
            **responses(500),
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


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for these"
    if isinstance(error, ApiError):
        return error.response()
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code)
    answer = ApiError(error.status_code, str(error.detail), code=code)
    return JSONResponse(answer.content(), error.status_code, error.headers)


async def _on_bad_parameter(request: Request, error: Exception) -> Response:
    """A parameter in the path or the query is wrong: 400, in the same form as for a body's fields."""
    assert isinstance(error, RequestValidationError), "registered for these"
    given = {**request.query_params, **request.path_params}
    # The place of an error begins with where the parameter stands, which its name says well enough.
    return of_validation([{**each, "loc": each["loc"][1:]} for each in error.errors()], given).response()


async def _on_mistake(_: Request, __: Exception) -> Response:
    return ApiError(500, "the server made a mistake; its log says more", kind=SERVER, code="internal_error").response()
