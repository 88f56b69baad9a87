"""What the two generating routes have in common: the order in which a request is taken in."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from shardwright.api.errors import ApiError
from shardwright.api.keys import Client
from shardwright.api.limits import ClientGoneError
from shardwright.api.metrics import Meter
from shardwright.api.schemas import GenerationFields
from shardwright.api.service import Service
from shardwright.api.stream import EventWriter, GenerationAnswer

log = logging.getLogger(__name__)

Fields = TypeVar("Fields", bound=GenerationFields)
Handler = Callable[[Service, Client, Meter, Fields, EventWriter], Awaitable[Response | None]]


async def take_in(
    service: Service, request: Request, endpoint: str, kind: type[Fields], handler: Handler[Fields]
) -> Response:
    """Check the key, read the body, check it; the answer that comes back runs `handler` while it is sent."""
    meter = service.metrics.begin(endpoint)
    try:
        client = service.client(request)
        fields = await service.read(request, kind)
    except ApiError as exc:
        meter.done(exc.code or str(exc.status_code))
        return exc.response()
    except ClientGoneError:
        meter.done("disconnected")
        return Response(status_code=400)  # nobody is there to read it

    def work(writer: EventWriter) -> Awaitable[Response | None]:
        return handler(service, client, meter, fields, writer)

    return GenerationAnswer(service, client, meter, work, f"{endpoint} user={_shown(fields)}")


def _shown(fields: GenerationFields) -> str:
    """Who the client says that it asks for, in one word of a log line."""
    given = (fields.user, fields.safety_identifier, fields.prompt_cache_key)
    return ",".join(repr(each) for each in given if each is not None) or "-"
