"""The command `bench serve`: a fixed, seeded workload against a running server, and how it bore it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shardwright.cli import aio, options
from shardwright.cli.console import harmless, stderr_console, stdout_console
from shardwright.errors import ClusterError, ConfigError, HttpServerError

if TYPE_CHECKING:
    import httpx

    from shardwright.cli.bench_report import Report, Sample
    from shardwright.cli.bench_workload import PlannedRequest, Workload
    from shardwright.cli.openai_http import Chunk

DEFAULT_CONCURRENCY = 8

bench = typer.Typer(help="Measure a running server.", no_args_is_help=True, rich_markup_mode="rich")


class Mode(StrEnum):
    """Which of the API's two ways is measured."""

    CHAT = "chat"
    COMPLETIONS = "completions"


def add_commands(app: typer.Typer) -> None:
    """Put this module's command under the application."""
    bench.command("serve")(serve)
    app.add_typer(bench, name="bench")


@bench.callback()
def _group() -> None:
    """Measure a running server."""


def serve(
    url: options.Url = options.DEFAULT_URL,
    model: options.ServedModel = None,
    api_key: options.ApiKey = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="chat: prompts of words, with about as many tokens. completions: prompts of token ids, exact lengths."
        ),
    ] = Mode.CHAT,
    requests: Annotated[int, typer.Option(metavar="N", min=1, max=1_000_000, help="How many requests.")] = 64,
    concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="C", min=1, max=10_000, help=f"Requests under way at once. Default: {DEFAULT_CONCURRENCY}."
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            min=0.0,
            help="Instead of --concurrency: requests a second, as a Poisson process, whatever comes back.",
        ),
    ] = None,
    input_tokens: Annotated[
        str,
        typer.Option(
            metavar="MEAN[,SPREAD]", help="Length of a prompt's own part; evenly from mean - spread to mean + spread."
        ),
    ] = "128",
    output_tokens: Annotated[
        str, typer.Option(metavar="MEAN[,SPREAD]", help="Length of an answer (max_tokens).")
    ] = "64",
    shared_prefix: Annotated[
        int, typer.Option(metavar="TOKENS", min=0, help="Tokens that prompts have in common, before their own part.")
    ] = 0,
    prefixes: Annotated[
        int, typer.Option(metavar="K", min=1, help="How many different shared prefixes there are.")
    ] = 1,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="The same seed gives the same requests.")] = 0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Ask for answers of full length (a field that not every server knows).",
        ),
    ] = True,
    id_range: Annotated[
        str, typer.Option(metavar="LOW,HIGH", help="With --mode completions: token ids from LOW to below HIGH.")
    ] = "100,1000",
    warmup: Annotated[
        int, typer.Option(metavar="N", min=0, help="Requests before the measured ones, one after the other.")
    ] = 1,
    timeout: options.RequestTimeout = 600.0,
    as_json: options.AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the distributions (needs matplotlib).", dir_okay=False)
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Measure any OpenAI-compatible server that streams: latencies with percentiles, throughput, errors.

    The requests follow from the settings and the seed alone, so two runs ask the same. Sampling is greedy.

    [cyan]shardwright bench serve --concurrency 8 --requests 64[/cyan]

    [cyan]shardwright bench serve --rate 2 --input-tokens 512,256 --output-tokens 128,64 --shared-prefix 1000[/cyan]

    [cyan]shardwright bench serve --mode completions --json > run.json[/cyan]

    Exit code 3 when no request succeeded.
    """
    from shardwright.cli.bench_plot import check_plot
    from shardwright.cli.bench_plot import plot as draw
    from shardwright.cli.bench_report import print_report, summarize
    from shardwright.cli.bench_workload import Spread, Workload

    if rate is not None and concurrency is not None:
        raise ConfigError(
            "--rate and --concurrency were given; the one sends by the clock, the other when a place is free"
        )
    if rate is not None and rate <= 0:
        raise ConfigError(f"--rate is {rate}; it must be above 0 requests a second")
    workload = Workload(
        num_requests=requests,
        input_tokens=Spread.parse(input_tokens, name="--input-tokens"),
        output_tokens=Spread.parse(output_tokens, name="--output-tokens"),
        seed=seed,
        rate=rate,
        shared_prefix=shared_prefix,
        num_prefixes=prefixes,
        token_range=_id_range(id_range) if mode is Mode.COMPLETIONS else None,
    )
    if plot is not None:
        check_plot(plot)
    places = None if rate is not None else concurrency or DEFAULT_CONCURRENCY
    target = Target(url=url, model=model, api_key=api_key, mode=mode, ignore_eos=ignore_eos, timeout_s=timeout)
    name, samples = aio.run(measure(target, workload, places=places, num_warm_up=warmup))
    report = summarize(samples)
    if as_json:
        settings = {"url": url, "model": name, "mode": mode.value, "concurrency": places, "ignore_eos": ignore_eos}
        print(json.dumps({**settings, "workload": asdict(workload), **report.as_json()}, indent=2))
    else:
        how = f"{rate:g} requests/s" if rate is not None else f"{places} at once"
        stdout_console().print(harmless(f"{name} at {url}: {requests} requests, {how}, seed {seed}"), markup=False)
        print_report(stdout_console(), report, has_rate=rate is not None)
    if plot is not None and report.num_ok:
        draw(plot, samples, title=harmless(f"{name}, {requests} requests"))
    _check_some_succeeded(report)


def _check_some_succeeded(report: Report) -> None:
    if not report.num_ok:
        kind, error = next(iter(report.errors.items()))
        raise ClusterError(f"no request succeeded; {kind}: {harmless(error.example)}")


def _id_range(text: str) -> tuple[int, int]:
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError:
        low = high = 0
    if not 0 <= low < high:
        raise ConfigError(f"--id-range is {text!r}; give the first token id and the one after the last: 100,1000")
    return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server, and how it is asked."""

    url: str
    model: str | None
    api_key: str | None
    mode: Mode
    ignore_eos: bool
    timeout_s: float


async def measure(
    target: Target,
    workload: Workload,
    *,
    places: int | None,
    num_warm_up: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[str, list[Sample]]:
    """Send all requests and follow their answers; gives the model's name and a sample for each request.

    `places` are the requests under way at once; None: each is sent at its time. Raises `HttpServerError` when not
    even the warm-up succeeds: nothing that follows could.
    """
    import httpx

    from shardwright.cli.bench_workload import plan_requests, warm_up_requests
    from shardwright.cli.openai_http import check_url, client_settings

    url = check_url(target.url)
    settings = client_settings(url, api_key=target.api_key, timeout_s=target.timeout_s)
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(**settings, limits=unlimited) as client:
        model = target.model or await _first_model(client, url, target.timeout_s)
        bench_client = _Client(client, url, model, target, clock)
        for request in warm_up_requests(workload, num_warm_up):
            sample = await bench_client.send(request, due_s=clock())
            if sample.error_kind:
                hint = "; try --no-ignore-eos" if "ignore_eos" in sample.error else ""
                raise HttpServerError(f"the first request failed: {sample.error}{hint}", kind=sample.error_kind)
        requests = plan_requests(workload)
        with _bar(len(requests)) as advance:
            if places is None:
                return model, await _by_the_clock(bench_client, requests, advance, clock)
            return model, await _by_places(bench_client, requests, places, advance, clock)


async def _by_the_clock(
    client: _Client, requests: Sequence[PlannedRequest], advance: Callable[[], None], clock: Callable[[], float]
) -> list[Sample]:
    start = clock()

    async def send(request: PlannedRequest) -> Sample:
        due_s = start + request.at_s
        await asyncio.sleep(max(0.0, due_s - clock()))
        sample = await client.send(request, due_s=due_s)
        advance()
        return sample

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(request)) for request in requests]
    return [task.result() for task in tasks]


async def _by_places(
    client: _Client,
    requests: Sequence[PlannedRequest],
    places: int,
    advance: Callable[[], None],
    clock: Callable[[], float],
) -> list[Sample]:
    left = iter(requests)

    async def fill_place() -> list[Sample]:
        samples = []
        for request in left:  # shared by all places: each takes the next
            samples.append(await client.send(request, due_s=clock()))
            advance()
        return samples

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(fill_place()) for _ in range(min(places, len(requests)))]
    return [sample for task in tasks for sample in task.result()]


class _Client:
    """Sends single requests and takes the time of all that comes back."""

    def __init__(
        self, client: httpx.AsyncClient, url: str, model: str, target: Target, clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._url = url
        self._model = model
        self._target = target
        self._clock = clock

    async def send(self, request: PlannedRequest, *, due_s: float) -> Sample:
        """One request to its end; what goes wrong stands in the sample."""
        from shardwright.cli.bench_report import Sample

        sample = Sample(due_s=due_s, asked_tokens=request.max_tokens, sent_s=self._clock())
        try:
            async with contextlib.aclosing(self._chunks(request)) as chunks:
                async for chunk in chunks:
                    if chunk.is_piece:
                        sample.piece_s.append(self._clock())
                    sample.usage = chunk.usage or sample.usage
        except HttpServerError as exc:
            sample.error_kind, sample.error = exc.kind, str(exc)
        if not sample.error_kind and not sample.piece_s:
            sample.error_kind, sample.error = "empty answer", "the answer has no tokens"
        sample.end_s = self._clock()
        return sample

    async def _chunks(self, request: PlannedRequest) -> AsyncGenerator[Chunk]:
        import httpx

        from shardwright.cli.openai_http import DONE, EventStream, encode_body, link_error, read_chunk

        path = "chat/completions" if self._target.mode is Mode.CHAT else "completions"
        content = encode_body(self._body(request))
        try:
            async with self._client.stream("POST", f"{self._url}/{path}", content=content) as response:
                await _check(response, self._url)
                events = EventStream()
                finished = False
                parts = response.aiter_bytes()
                async for part in parts:
                    for data in events.feed(part):
                        if data == DONE:
                            await _read_up(parts)
                            return
                        chunk = read_chunk(data)
                        finished = finished or chunk.finish_reason is not None
                        yield chunk
                if not finished:
                    raise HttpServerError("the server broke off before the answer's end", kind="broken off")
        except httpx.HTTPError as exc:
            raise link_error(exc, url=self._url, timeout_s=self._target.timeout_s) from exc

    def _body(self, request: PlannedRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._target.mode is Mode.CHAT:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        return body | {"ignore_eos": True} if self._target.ignore_eos else body


async def _read_up(parts: AsyncIterator[bytes]) -> None:
    """Read what ends the body after the stream's own end, so that the connection can be used again."""
    import httpx

    with contextlib.suppress(httpx.HTTPError):
        async for _ in parts:
            pass


async def _check(response: httpx.Response, url: str) -> None:
    """Raises `HttpServerError` for an answer that is no stream of events."""
    from shardwright.cli.openai_http import MAX_ERROR_BYTES, refusal

    kind = response.headers.get("content-type", "nothing")
    if response.status_code == 200 and kind.startswith("text/event-stream"):
        return
    said = b""
    async for part in response.aiter_bytes():
        said += part
        if len(said) > MAX_ERROR_BYTES:
            break
    if response.status_code != 200:
        raise refusal(response.status_code, response.headers, said[:MAX_ERROR_BYTES], url=url)
    raise HttpServerError(f"{url}: the server answered with {kind} instead of a stream of events", kind="no stream")


async def _first_model(client: httpx.AsyncClient, url: str, timeout_s: float) -> str:
    import httpx

    from shardwright.cli.openai_http import link_error, read_models

    try:
        response = await client.get(f"{url}/models")
    except httpx.HTTPError as exc:
        raise link_error(exc, url=url, timeout_s=timeout_s) from exc
    return read_models(response, url=url)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """Shows in a terminal how many requests are over."""
    console = stderr_console()
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda: progress.advance(task)
