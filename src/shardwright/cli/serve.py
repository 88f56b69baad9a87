"""The command `serve`: a model behind the OpenAI-compatible HTTP API, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from shardwright.cli import aio, options
from shardwright.cli.console import INTERRUPTED, say, warn
from shardwright.cli.start import session_for
from shardwright.config import MasterConfig, ServeConfig
from shardwright.errors import ClusterError, ConfigError
from shardwright.runtime.lasting_imports import import_for_good

if TYPE_CHECKING:
    from shardwright.engine import ServedModel
    from shardwright.runtime.master import MasterEngine

FAILURE_CHECK_S = 0.5

log = logging.getLogger(__name__)


def add_commands(app: typer.Typer) -> None:
    """Put this module's command under the application."""
    app.command("serve")(serve)


@options.expand
def serve(
    *,
    flags: options.ModelFlags,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What clients call the model. Default: its own name; of a path the last part."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(metavar="HOST", help="Address to listen on (default: 127.0.0.1).")] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port to listen on; 0: a free one (default: 8000).")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keys that may use the API; see shardwright api-key.", dir_okay=False),
    ] = None,
    open_metrics: Annotated[
        bool | None,
        typer.Option(
            "--open-metrics", help="/metrics, /metrics.json and /prometheus/targets need no key.", show_default=False
        ),
    ] = None,
    cors: Annotated[
        str | None,
        typer.Option(
            "--cors", metavar="ORIGINS", help="Web origins whose pages may call the API, with commas; *: all."
        ),
    ] = None,
    tool_style: Annotated[
        str | None,
        typer.Option(metavar="STYLE", help="How the model writes tool calls (default: auto, by its chat template)."),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most requests that wait; over it 429 (default: 512; 0: any number)."),
    ] = None,
    max_running: Annotated[
        int | None, typer.Option(metavar="N", help="Most sequences that are computed together (default: 64).")
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Most time for an answer (default: 600).")
    ] = None,
    shutdown_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long running answers may go on after Ctrl-C (default: 10)."),
    ] = None,
    otlp_endpoint: options.OtlpEndpoint = None,
    token_budget: options.TokenBudget = None,
    steps_in_flight: options.StepsInFlight = None,
    recover: options.Recover = None,
    heartbeat_timeout: options.HeartbeatTimeout = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log a line for each request.")] = False,
    debug: options.Debug = False,
) -> None:
    """Serve a model over the OpenAI-compatible HTTP API until Ctrl-C.

    Ctrl-C or SIGTERM takes no new requests, lets running answers go on for --shutdown-timeout, and ends; a second
    one ends at once. When a worker is lost, the model is placed again over those that are left, and answers under way
    go on. Where too few are left, the server stays up: requests get 503 with the reason, and so does /ready, until a
    worker is back. A browser sees the cluster at work at the server's address, a terminal with shardwright top.

    [cyan]shardwright serve --model smollm2-135m --local-workers 2[/cyan]

    [cyan]shardwright serve --model google/gemma-2b --host 0.0.0.0 --api-key-file keys.toml[/cyan]

    Exit codes: 0 stopped while all was well, 3 the cluster had failed, 130 or 143 stopped before it was ready.
    """
    settings = flags.master_config(
        max_waiting=max_waiting,
        max_running=max_running,
        token_budget=token_budget,
        steps_in_flight=steps_in_flight,
        recover=recover,
        heartbeat_timeout_s=heartbeat_timeout,
        otlp_endpoint=otlp_endpoint,
    )
    api = options.serve_config(
        flags.config,
        host=host,
        port=port,
        api_key_file=api_key_file,
        open_metrics=open_metrics,
        cors_origins=cors,
        tool_style=tool_style,
        request_timeout_s=request_timeout,
        shutdown_timeout_s=shutdown_timeout,
    )
    worker_options = flags.worker_options()
    if settings.otlp_endpoint:
        worker_options += ["--otlp-endpoint", settings.otlp_endpoint]
    if served_model_name is not None and not served_model_name.strip():
        raise ConfigError("--served-model-name is empty; give the name that clients use, or leave it out")
    if log_requests:
        logging.getLogger("shardwright.api").setLevel(logging.INFO)
    # What would end it is found before the model is loaded, which may take minutes.
    from shardwright.api.keys import read_key_file
    from shardwright.api.server import listen
    from shardwright.runtime.tracing import check_installed

    check_installed(settings.otlp_endpoint)
    if api.api_key_file is not None:
        read_key_file(api.api_key_file)
    with contextlib.closing(listen(api)) as listener:
        if api.api_key_file is None and not is_loopback(listener):
            warn(f"everybody who reaches {api.host}:{api.port} may use the model; --api-key-file FILE asks for keys")
        code = aio.run(
            run_server(
                settings,
                api,
                listener,
                name=served_model_name,
                local_workers=flags.local_workers,
                options=worker_options,
            )
        )
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    raise typer.Exit(code)


async def run_server(
    config: MasterConfig,
    api: ServeConfig,
    listener: socket.socket,
    *,
    name: str | None,
    local_workers: int,
    options: Sequence[str],
) -> int:
    """Bring the model up and serve it on this socket until a signal says stop; gives the exit code.

    Raises what a session's start raises, and `ClusterError` at the end when the cluster had failed.
    """
    with _Signals() as signals:
        try:
            async with session_for(config, local_workers=local_workers, options=options) as session:
                import_for_good("shardwright.api.app")
                from shardwright.api.app import create_app
                from shardwright.api.server import serve as serve_app

                engine = session.serve_as(name or public_name(session.model.files.name))
                app = create_app(engine, api)
                if session.tracing is not None:
                    app.add_middleware(session.tracing.http, model=engine.model.name)

                def announce(url: str) -> None:
                    print(ready_line(engine.model, url, needs_key=api.api_key_file is not None))
                    print(f"Dashboard: {reachable(url)}/", flush=True)

                watching = asyncio.create_task(watch(session.engine, recovers=config.recover), name="watch the cluster")
                try:
                    await serve_app(app, api, stop=signals.stop_serving(), listener=listener, on_listening=announce)
                finally:
                    watching.cancel()
                failure = session.engine.failure
        except asyncio.CancelledError:
            if signals.number is None:
                raise
            return 128 + signals.number
    if failure:
        raise ClusterError(f"the cluster failed while it was serving: {failure}")
    say("server stopped")
    return 0


def public_name(model: str) -> str:
    """What clients call a model: a hub id or bundled name as it is, of a path its last part."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def ready_line(model: ServedModel, url: str, *, needs_key: bool) -> str:
    """The line that says where the model is served, with a request to try."""
    body: dict[str, Any] = {"model": model.name}
    if model.has_chat_template:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Why is the sky blue?"}]
    else:
        path, body["prompt"] = "completions", "The sky is" if model.has_tokenizer else [1, 2, 3]
    key = ["-H", "Authorization: Bearer YOUR_KEY"] if needs_key else []
    words = [
        "curl",
        f"{reachable(url)}/v1/{path}",
        *key,
        "-H",
        "Content-Type: application/json",
        "-d",
        json.dumps(body),
    ]
    return f"Serving {model.name} on {url} - try: {shlex.join(words)}"


def reachable(url: str) -> str:
    """The URL to connect to from this machine: an address that means "all of this machine's" is none."""
    return url.replace("://0.0.0.0:", "://127.0.0.1:").replace("://[::]:", "://[::1]:")


async def watch(engine: MasterEngine, *, recovers: bool) -> None:
    """Log when the cluster fails, and when it serves again."""
    told = ""
    what_to_do = (
        "; they are answered again when workers are back" if recovers else "; stop the server and start it again"
    )
    while True:
        if engine.failure != told:
            told = engine.failure
            if told:
                log.error("requests are answered with 503 from now on: %s%s", told, what_to_do)
            else:
                log.warning("requests are answered again")
        await asyncio.sleep(FAILURE_CHECK_S)


class _Signals:
    """Ctrl-C and SIGTERM, as a context manager inside the running loop.

    The first one stops the start, or the serving once that has begun; the second ends the process where it is: its
    local workers end when their standard input closes, registered ones when they miss their master.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._stop: asyncio.Event | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python's own handlers run also while the loop is busy, so that a second Ctrl-C always works. The loop's, which
        # `aio.run` set, would still be called beside them.
        with contextlib.suppress(ValueError):  # not in the main thread: a test's, say
            self._loop.remove_signal_handler(signal.SIGTERM)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_serving(self) -> asyncio.Event:
        """From now on the first signal sets this event instead of cancelling."""
        self._stop = asyncio.Event()
        return self._stop

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        self._loop.call_soon_threadsafe(self._act)

    def _act(self) -> None:
        if self._stop is not None:
            say("stopping when the running answers are over; Ctrl-C again ends at once")
            self._stop.set()
        elif self._task is not None:
            self._task.cancel()


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can connect to it."""
    host = str(listener.getsockname()[0])
    return host == "::1" or host.startswith("127.")
