"""Tells all who listen what goes on, as server-sent events, once a second.

A second's events are made once, by whoever needs them first, and are the same for everybody: a listener costs a timer
and a copy into its socket, and while nobody listens nothing is made. A client that does not read is cut off when it
misses what is kept, or by the server's limit for slow readers, whichever comes first.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Iterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shardwright.api.encoding import as_served, encode
from shardwright.api.errors import SERVER, ApiError, shutting_down
from shardwright.api.limits import ClientGoneError
from shardwright.api.stream import EventWriter, while_connected
from shardwright.engine import TextEngine
from shardwright.observation import RequestTrace

TICK_S = 1.0
_KEPT = 15  # seconds of events, for listeners that are slow for a moment
_STEPS = 1000  # that are told of at once: the first look at a long past must not hold up anybody's token
_ENDED = 100  # requests that are over, of which each second tells; /api/requests has all that are known


class Broadcast:
    """Makes the events. `clock` is monotonic, in seconds."""

    def __init__(
        self,
        engine: TextEngine,
        *,
        max_listeners: int,
        clock: Callable[[], float] = time.monotonic,
        tick_s: float = TICK_S,
    ) -> None:
        self._engine = engine
        self._max_listeners = max_listeners
        self._clock = clock
        self._tick_s = tick_s
        self.num_listeners = 0
        self._kept: collections.deque[tuple[int, bytes]] = collections.deque()
        self._made = -1  # the newest second whose events were made
        self._lost = -1  # the newest one whose events are not kept any more
        self._steps_cursor = 0
        self._history_at = float("-inf")
        self._requests = b""

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the listeners' places. Raises `ApiError` 503 when all are taken."""
        if self.num_listeners >= self._max_listeners:
            raise ApiError(
                503,
                f"{self._max_listeners} clients listen already, the most that this server takes; close one of them, or "
                "raise max_event_listeners",
                kind=SERVER,
                code="too_many_listeners",
                retry_after_s=5,
            )
        self.num_listeners += 1
        try:
            yield
        finally:
            self.num_listeners -= 1

    def begin(self) -> tuple[bytes, int]:
        """All that there is to see now, as events, and the second from which `after` goes on."""
        self._make_due()
        observatory = self._engine.observatory
        history = tuple(point for point in observatory.history() if point.at <= self._history_at)
        whole = (
            _event("state", as_served(self._engine)),
            _event("history", {"history": history}),
            _event("requests", {"requests": _recent(observatory.requests())}),
            _event("steps", {"steps": observatory.steps_changed(limit=_STEPS)[1]}),
        )
        return b"".join(whole), self._made

    async def wait(self, second: int) -> None:
        """Wait until the second after this one has begun."""
        await asyncio.sleep(max((second + 1) * self._tick_s - self._clock(), 0.0))

    def after(self, second: int) -> tuple[bytes, int] | None:
        """The events after this second and the second that they go up to; None when not all are kept any more."""
        self._make_due()
        if second < self._lost:
            return None
        return b"".join(data for made, data in self._kept if made > second), self._made

    def _make_due(self) -> None:
        due = int(self._clock() / self._tick_s)
        if due <= self._made:
            return
        while len(self._kept) >= _KEPT:
            self._lost, _ = self._kept.popleft()
        self._kept.append((due, self._make()))
        self._made = due

    def _make(self) -> bytes:
        observatory = self._engine.observatory
        events = [_event("state", as_served(self._engine))]
        self._steps_cursor, steps = observatory.steps_changed(self._steps_cursor, limit=_STEPS)
        if steps:
            events.append(_event("steps", {"steps": steps}))
        requests = _event("requests", {"requests": _recent(observatory.requests())})
        if requests != self._requests:
            self._requests = requests
            events.append(requests)
        if points := [point for point in observatory.history() if point.at > self._history_at]:
            self._history_at = points[-1].at
            events.append(_event("history", {"history": points}))
        return b"".join(events)


def _recent(requests: tuple[RequestTrace, ...]) -> list[RequestTrace]:
    """Those that are not over, and the newest that are."""
    recent, num_ended = [], 0
    for request in requests:
        num_ended += request.finished_at is not None
        if request.finished_at is None or num_ended <= _ENDED:
            recent.append(request)
    return recent


def _event(name: str, value: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode(value) + b"\n\n"


class EventsAnswer(Response):
    """The stream of events to one listener, until it goes, falls behind or the server ends.

    It counts as no running request: when the server is told to stop it ends at once.
    """

    def __init__(self, broadcast: Broadcast, ending: asyncio.Event) -> None:
        super().__init__()
        self._broadcast = broadcast
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events as they come."""
        writer = EventWriter(send)
        try:
            with self._broadcast.place():
                if self._ending.is_set():
                    raise shutting_down()
                await while_connected(receive, self._ending, self._tell(writer))
        except ClientGoneError:
            return
        except ApiError as exc:
            if not writer.has_begun:
                await exc.response()(scope, receive, send)
                return
        await writer.end()

    async def _tell(self, writer: EventWriter) -> None:
        # Clients that reconnect by themselves wait so long before they do.
        await writer.write(b": shardwright\nretry: 2000\n\n")
        data, second = self._broadcast.begin()
        await writer.write(data)
        while True:
            await self._broadcast.wait(second)
            news = self._broadcast.after(second)
            if news is None:
                return
            data, second = news
            await writer.write(data)
