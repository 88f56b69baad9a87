"""Routes that tell what goes on in the cluster: its state, steps, requests and the past; nothing here changes it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from starlette.responses import PlainTextResponse, Response

from shardwright.api.document import answers, events, many, one, responses
from shardwright.api.encoding import as_served, encode, encode_list
from shardwright.api.errors import ApiError, invalid
from shardwright.api.events import Broadcast, EventsAnswer
from shardwright.api.metrics import CONTENT_TYPE
from shardwright.api.service import Service
from shardwright.observation import ClusterView, HistoryPoint, RequestTrace, StepPassage

SinceStep = Annotated[int, Query(ge=0, description="Only steps with a number above this one.")]
SinceTime = Annotated[
    float, Query(ge=0, allow_inf_nan=False, description="Only what is newer than this, in seconds since 1970.")
]


class _EventStream(Response):
    """For the document alone: what kind of answer a route gives."""

    media_type = "text/event-stream"


def add_observation(app: FastAPI, service: Service) -> None:
    """Put the routes into the application."""
    _add_api(app, service)
    _add_events(app, service)
    _add_scraped(app, service)


def _add_api(app: FastAPI, service: Service) -> None:
    observatory = service.engine.observatory

    @app.get(
        "/api/state", responses=responses(400, 401, 500), openapi_extra=answers(one(ClusterView)), operation_id="state"
    )
    async def state(request: Request) -> Response:
        """The cluster at this moment. Reports' `traces` are left empty."""
        _admit(service, request)
        return _json(as_served(service.engine))

    @app.get(
        "/api/steps",
        responses=responses(400, 401, 500),
        openapi_extra=answers(many("steps", StepPassage)),
        operation_id="steps",
    )
    async def steps(request: Request, since: SinceStep = 0) -> Response:
        """The last steps, oldest first; one that is under way comes with what is known of it."""
        _admit(service, request, "since")
        return _answer(b'{"steps":' + await encode_list(observatory.steps(since)) + b"}")

    @app.get(
        "/api/requests",
        responses=responses(400, 401, 500),
        openapi_extra=answers(many("requests", RequestTrace)),
        operation_id="requests",
    )
    async def requests(request: Request) -> Response:
        """Sequences that run or wait and the last ones that ended, newest first; their `steps` are left empty."""
        _admit(service, request)
        return _json({"requests": observatory.requests()})

    @app.get(
        "/api/requests/{seq_id}",
        responses=responses(400, 401, 404, 500),
        openapi_extra=answers(one(RequestTrace)),
        operation_id="request",
    )
    async def one_request(request: Request, seq_id: int) -> Response:
        """One of them with its steps."""
        _admit(service, request)
        found = observatory.request(seq_id)
        if found is None:
            raise ApiError(
                404,
                f"sequence {seq_id} is not known, or not any more; /api/requests lists those that are",
                param="seq_id",
                code="request_not_found",
            )
        return _json(found)

    @app.get(
        "/api/history",
        responses=responses(400, 401, 500),
        openapi_extra=answers(many("history", HistoryPoint)),
        operation_id="history",
    )
    async def history(request: Request, since: SinceTime = 0.0) -> Response:
        """The last hour, oldest first."""
        _admit(service, request, "since")
        return _json({"history": [point for point in observatory.history() if point.at > since]})


def _add_events(app: FastAPI, service: Service) -> None:
    broadcast = Broadcast(service.engine, max_listeners=service.config.max_event_listeners)
    service.metrics.add_gauge(
        "event_listeners", "Clients that listen to /api/events.", lambda: float(broadcast.num_listeners)
    )

    @app.get(
        "/api/events",
        response_class=_EventStream,
        responses=responses(400, 401, 500, 503),
        openapi_extra=events(
            state=one(ClusterView),
            steps=many("steps", StepPassage),
            requests=many("requests", RequestTrace),
            history=many("history", HistoryPoint),
        ),
        operation_id="events",
    )
    async def listen(request: Request) -> Response:
        """All of this as it happens, as server-sent events, once a second."""
        _admit(service, request)
        return EventsAnswer(broadcast, service.drain.begun)


def _add_scraped(app: FastAPI, service: Service) -> None:
    observatory = service.engine.observatory

    @app.get("/metrics", response_class=PlainTextResponse, responses=responses(401, 500), operation_id="metrics")
    async def metrics(request: Request) -> Response:
        """Figures for Prometheus, in its text format."""
        _admit_scraper(service, request)
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    rows_schema = {"type": "array", "items": {"type": "object"}}

    @app.get(
        "/metrics.json",
        responses=responses(400, 401, 500),
        openapi_extra=answers(rows_schema),
        operation_id="metrics_rows",
    )
    async def metrics_rows(
        request: Request,
        *,
        since: SinceTime = 0.0,
        latest: Annotated[bool, Query(description="Only the newest row of each worker.")] = False,
    ) -> Response:
        """The last hour as flat rows, one for each worker and point of time, for Grafana's JSON sources."""
        _admit_scraper(service, request)
        _check_query(request, "since", "latest")
        rows = observatory.metrics_rows(since=since)
        if latest:
            rows = list({row["worker"]: row for row in rows}.values())
        return _answer(await encode_list(rows))

    @app.get(
        "/prometheus/targets",
        responses=responses(401, 500),
        openapi_extra=answers(_TARGETS),
        operation_id="prometheus_targets",
    )
    async def targets(request: Request) -> Response:
        """The workers that answer Prometheus themselves, in the form of its HTTP service discovery."""
        _admit_scraper(service, request)
        return _json(
            [
                {"targets": [worker.metrics_target], "labels": {"worker": worker.worker_id, "host": worker.host_id}}
                for worker in observatory.view().workers
                if worker.metrics_target
            ]
        )


_TARGETS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "targets": {"type": "array", "items": {"type": "string"}},
            "labels": {
                "type": "object",
                "properties": {"worker": {"type": "string"}, "host": {"type": "string"}},
                "required": ["worker", "host"],
            },
        },
        "required": ["targets", "labels"],
    },
}


def _admit(service: Service, request: Request, *names: str) -> None:
    """Check the key, and that the query has no other parameters than these, each once. Raises `ApiError` 400, 401."""
    service.client(request)
    _check_query(request, *names)


def _admit_scraper(service: Service, request: Request) -> None:
    if not service.config.open_metrics:
        service.client(request)


def _check_query(request: Request, *names: str) -> None:
    seen: set[str] = set()
    for name, _ in request.query_params.multi_items():
        if name not in names:
            raise invalid(f"{name[:100]}: is not known here; leave it out", name[:100], "unknown_parameter")
        if name in seen:
            raise invalid(f"{name}: is given twice", name)
        seen.add(name)


def _json(value: object) -> Response:
    return _answer(encode(value))


def _answer(content: bytes) -> Response:
    return Response(content, media_type="application/json", headers={"Cache-Control": "no-store"})
