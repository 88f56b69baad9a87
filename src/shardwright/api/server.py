"""Serves the application on a socket: uvicorn, with bounds on connections, and an end that takes bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from shardwright.api.service import Service
from shardwright.config import ServeConfig
from shardwright.errors import AddressInUseError, ConfigError

log = logging.getLogger(__name__)

_RESERVED_FILES = 128  # that the process needs for itself: weights, links to workers, logs
_MAX_HEAD_BYTES = 32 * 1024


def listen(config: ServeConfig) -> socket.socket:
    """A socket that listens where the config says; port 0 takes a free one.

    Raises `AddressInUseError` when another process has the port, `ConfigError` for a host that is none of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as exc:
        raise ConfigError(f"host is {config.host!r}; it can't be resolved: {exc}") from exc
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
        listener.setblocking(False)
    except OSError as exc:
        listener.close()
        where = f"{config.host}:{config.port}"
        if isinstance(exc, PermissionError):
            raise ConfigError(f"{where} can't be listened on: {exc.strerror}; choose a port above 1023") from exc
        raise AddressInUseError(f"{where} can't be listened on: {exc.strerror}; choose another --port") from exc
    return listener


async def serve(
    app: FastAPI,
    config: ServeConfig,
    *,
    stop: asyncio.Event,
    listener: socket.socket | None = None,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serve until `stop` is set, then end within about `shutdown_timeout_s`.

    It prints nothing and leaves signals alone: the caller's handler for Ctrl-C sets `stop`. `on_listening` is called
    once with the server's URL when it takes connections. On `stop` the port is closed to new requests (503) while the
    running ones go on; those that are not done in time end with an error, in a stream with an error event. If the
    calling task is cancelled, everything ends at once. `listener` is closed in any case. Raises what `listen` does.
    """
    service: Service = app.state.service
    with contextlib.closing(listener or listen(config)) as sock:
        server = _Server(_uvicorn_config(app, config))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        listening = asyncio.create_task(server.listening.wait())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((serving, listening), return_when=asyncio.FIRST_COMPLETED)
            if on_listening is not None and listening.done():
                on_listening(_url(sock))
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            await service.drain.finish(config.shutdown_timeout_s)
        finally:
            service.drain.cut()
            listening.cancel()
            stopping.cancel()
            server.end()
            await serving


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _uvicorn_config(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    max_connections = config.max_connections
    if num_files != resource.RLIM_INFINITY and max_connections > num_files - _RESERVED_FILES:
        max_connections = max(num_files - _RESERVED_FILES, 1)
        log.warning("only %d connections are taken at once: the process may open %d files", max_connections, num_files)
    return uvicorn.Config(
        app,
        http=_protocol(config, max_connections),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(config.keep_alive_s)),
        timeout_graceful_shutdown=2,  # answers are over by then: `Drain` has seen to it
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
    )


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs the program, and says when it takes connections."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._ending = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    def end(self) -> None:
        """Take no more connections, close those that there are, and return from `serve`."""
        self.should_exit = True
        self._ending.set()

    async def main_loop(self) -> None:
        """Tick once a second, as the `Date` of answers needs, not ten times: an idle server should cost little."""
        while not await self.on_tick(0):  # at 0 it writes the date
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._ending.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _protocol(config: ServeConfig, max_connections: int) -> type[asyncio.Protocol]:
    """Uvicorn's protocol with what it lacks: time limits for heads and for readers, and a bound on connections."""

    class GuardedProtocol(H11Protocol):
        """One connection."""

        _head_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(cast("asyncio.Transport", transport))
            self._expect_head()
            if len(self.connections) > max_connections:
                self._make_room()

        def _make_room(self) -> None:
            """Close the connection that has waited longest without a request; this one if there is none."""
            waiting = [each for each in self.connections if isinstance(each, GuardedProtocol) and each.is_waiting]
            oldest = min(waiting, key=lambda each: each.waiting_since, default=self)
            oldest.transport.close()
            # Its place is free now, not when the loop gets round to telling it: more may come before that.
            self.connections.discard(oldest)

        @property
        def is_waiting(self) -> bool:
            """Whether no request runs on it."""
            cycle = cast("RequestResponseCycle | None", self.cycle)
            return cycle is None or cycle.response_complete

        def _expect_head(self) -> None:
            self.waiting_since = time.monotonic()  # uvloop's own clock stands still between its turns
            self._cancel_head_timer()
            self._head_timer = self.loop.call_later(config.head_timeout_s, self._close_waiting)

        def _cancel_head_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _close_waiting(self) -> None:
            if self.is_waiting and not self.transport.is_closing():
                self.transport.close()

        def data_received(self, data: bytes) -> None:
            was_waiting = self.is_waiting
            if was_waiting and self._head_timer is None:  # the first bytes of another request on a kept connection
                self._expect_head()
            super().data_received(data)
            if not self.is_waiting:
                self._cancel_head_timer()

        def on_response_complete(self) -> None:
            self.waiting_since = time.monotonic()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(config.write_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._cancel_write_timer()
            super().resume_writing()

        def _cancel_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_head_timer()
            self._cancel_write_timer()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._cancel_head_timer()
            super().send_400_response(msg)

    return GuardedProtocol
