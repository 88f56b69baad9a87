"""The OpenAPI document: which answers a route may give, and what FastAPI can't know of bodies, streams and keys."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from shardwright.api import schemas
from shardwright.api.encoding import observed_schemas
from shardwright.api.schemas import ChatRequest, CompletionRequest, ErrorAnswer
from shardwright.api.service import Service

_REASONS: Final = {
    400: "The request is wrong; `param` names the field.",
    401: "No API key, or one that is not known.",
    404: "No such model, or no such sequence.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not JSON by its type.",
    429: "The queue is full, or the API key's limits are reached; `Retry-After` says when to try again.",
    500: "The server made a mistake.",
    503: "The cluster has failed, or the server is shutting down.",
    504: "The request's time was up before the answer had begun.",
}
_REFERENCES: Final = "#/components/schemas/{model}"
_SCRAPED: Final = ("/metrics", "/metrics.json", "/prometheus/targets")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """That a route may answer with an error of these statuses."""
    return {status: {"model": ErrorAnswer, "description": _REASONS[status]} for status in statuses}


def body(kind: type[schemas.GenerationFields]) -> dict[str, Any]:
    """That a route, which reads its body itself, takes this."""
    schema = {"$ref": _REFERENCES.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answers(schema: dict[str, Any]) -> dict[str, Any]:
    """That a route answers with JSON of this schema."""
    return {"responses": {"200": {"content": {"application/json": {"schema": schema}}}}}


def one(kind: type) -> dict[str, Any]:
    """The schema of something that can be observed."""
    return {"$ref": _REFERENCES.format(model=kind.__name__)}


def many(name: str, kind: type) -> dict[str, Any]:
    """The schema of an object that holds a list of them under a name."""
    listed = {"type": "array", "items": one(kind)}
    return {"type": "object", "properties": {name: listed}, "required": [name], "additionalProperties": False}


def events(**kinds: dict[str, Any]) -> dict[str, Any]:
    """That a route answers with server-sent events of these names, whose data is JSON of these schemas."""
    each = [
        {
            "type": "object",
            "properties": {
                "event": {"const": name},
                "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": schema},
            },
            "required": ["event", "data"],
        }
        for name, schema in kinds.items()
    ]
    return {"responses": {"200": {"content": {"text/event-stream": {"itemSchema": {"oneOf": each}}}}}}


def _chunks(chunk: str) -> dict[str, Any]:
    """A generation's events: chunks, perhaps an error, then `[DONE]` if there was none."""
    kinds = [{"$ref": _REFERENCES.format(model=name)} for name in (chunk, "ErrorAnswer")]
    json_data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    data = {"anyOf": [{"const": "[DONE]"}, json_data]}
    return {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}


def document(app: FastAPI, service: Service) -> dict[str, Any]:
    """FastAPI's document, with what it can't know: bodies that are read here, streams, keys, types of answers."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    made = FastAPI.openapi(app)
    definitions = made["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        definitions.pop(name, None)
    inputs: list[tuple[type[Any], Any]] = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
    _, added = models_json_schema(inputs, ref_template=_REFERENCES)
    definitions.update(added["$defs"])
    for kind, _ in inputs:
        definitions[kind.__name__]["properties"]["model"]["enum"] = [service.engine.model.name]
    _, chunk = models_json_schema([(schemas.ChatChunk, "serialization")], ref_template=_REFERENCES)
    for more in (chunk["$defs"], observed_schemas(_REFERENCES)):
        definitions.update({name: each for name, each in more.items() if name not in definitions})
    streams = {"/v1/chat/completions": "ChatChunk", "/v1/completions": "CompletionAnswer"}
    for path, methods in made["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if not service.keys.is_open and _is_keyed(path, open_metrics=service.config.open_metrics):
                operation["security"] = [{"apiKey": []}]
            if path in streams:
                operation["responses"]["200"]["content"]["text/event-stream"] = _chunks(streams[path])
                operation["responses"]["429"]["headers"] = {
                    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
                }
    if not service.keys.is_open:
        made["components"]["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = made
    return made


def _is_keyed(path: str, *, open_metrics: bool) -> bool:
    return path.startswith(("/v1/", "/api/")) or (path in _SCRAPED and not open_metrics)
