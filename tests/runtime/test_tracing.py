"""Traces of a real master and real workers over the memory transport, as the SDK's own exporter sees them."""

import asyncio
import contextlib
import logging
import subprocess
import sys
import time

import httpx
import pytest
from fake_pipeline import FakePipeline, fake_master
from live_sessions import Silence
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tiny_models import prompt_of, save_whole

from shardwright.api.app import create_app
from shardwright.config import MasterConfig, ServeConfig, WorkerConfig
from shardwright.errors import ConfigError, QueueFullError
from shardwright.runtime import otel_export, tracing
from shardwright.runtime.measure import Speed
from shardwright.runtime.otel_export import Spans
from shardwright.runtime.registry import WorkerEntry
from shardwright.runtime.session import open_session
from shardwright.runtime.tracing import MasterTracing
from shardwright.runtime.worker_process import open_worker
from shardwright.transport.memory import MemoryTransport
from shardwright.types import GREEDY, StopConditions

COLLECTOR = "http://127.0.0.1:4317"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SECRET = (11, 12, 13)


class Exported:
    """Every span that was sent, with who is below whom."""

    def __init__(self):
        self.exporters = []

    def make(self, endpoint):
        assert endpoint == COLLECTOR
        self.exporters.append(InMemorySpanExporter())
        return self.exporters[-1]

    @property
    def spans(self):
        return sorted((s for e in self.exporters for s in e.get_finished_spans()), key=lambda s: s.start_time)

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def one(self, name):
        (span,) = self.named(name)
        return span

    def below(self, span):
        return [each for each in self.spans if each.parent and each.parent.span_id == span.context.span_id]

    def all_below(self, span):
        for child in self.below(span):
            yield child
            yield from self.all_below(child)


@pytest.fixture
def exported(monkeypatch):
    found = Exported()
    monkeypatch.setattr(otel_export, "OTLPSpanExporter", found.make)
    return found


def seconds(span):
    return (span.end_time - span.start_time) / 1e9


def names(span):
    """The span as a `traceparent`."""
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"


def check_within(exported, span):
    """All that lies below a span lies within its times, and in its trace."""
    for child in exported.below(span):
        assert span.start_time <= child.start_time <= child.end_time <= span.end_time, (span.name, child.name)
        assert child.context.trace_id == span.context.trace_id
        check_within(exported, child)


# --- a whole cluster ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("traced_model")
    save_whole("llama", path)
    return path


@pytest.fixture
def open_traced(folder, tmp_path, monkeypatch):
    """A session on two workers of this process, all of them with traces on."""
    monkeypatch.setattr(
        "shardwright.runtime.probe.measure_speed", lambda *_, **__: Speed(read_bandwidth=1e10, matrix_rate=1e11)
    )
    monkeypatch.setattr("shardwright.runtime.probe.usable_cores", lambda: 1)

    @contextlib.asynccontextmanager
    async def open_(**settings):
        transport = MemoryTransport()
        worker = WorkerConfig(host="here", device="cpu", cache_dir=tmp_path, otlp_endpoint=COLLECTOR)
        master = MasterConfig(
            model=str(folder),
            cache_dir=tmp_path,
            otlp_endpoint=COLLECTOR,
            **({"dtype": "float32", "block_size": 4, "kv_tokens": 1024, "heartbeat_interval_s": 0.1} | settings),
        )
        async with contextlib.AsyncExitStack() as stack:
            entries = []
            for index in range(2):
                await stack.enter_async_context(open_worker(worker, transport, f"worker{index}:{index + 1}"))
                entries.append(WorkerEntry(username=f"worker{index}", ip=f"worker{index}", port=index + 1))
            yield await stack.enter_async_context(
                open_session(master, entries, listener=Silence(), transport=transport, write_metrics=False)
            )

    return open_


@contextlib.asynccontextmanager
async def http_to(session):
    """A client of the API over this session."""
    app = session.tracing.http(create_app(session.serve_as("tiny"), ServeConfig()), model="tiny")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://master") as client:
        yield client


async def reported(session):
    """All that workers have to tell of the steps so far is told."""
    steps = session.engine.observatory.steps
    async with asyncio.timeout(10.0):
        while any(step.returned_at and len(step.stages) < 2 for step in steps()):  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.02)


async def test_a_request_over_http_is_one_trace_from_its_arrival_to_each_stage(open_traced, exported):
    asked = {"model": "tiny", "prompt": prompt_of(20, 1), "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    async with open_traced(token_budget=8) as session, http_to(session) as client:
        answer = await client.post(
            "/v1/completions", json=asked, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        assert session.engine.observatory.requests()[0].trace_id == TRACE
        await reported(session)
    server = exported.one("POST /v1/completions")
    assert names(server) == answer.headers["traceresponse"]
    assert f"{server.context.trace_id:032x}" == TRACE
    assert f"{server.parent.span_id:016x}" == PARENT
    assert server.kind is SpanKind.SERVER
    assert dict(server.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
    }
    (sequence,) = exported.below(server)
    assert sequence.name == "text_completion tiny"
    assert sequence.attributes["gen_ai.usage.input_tokens"] == 20
    assert sequence.attributes["gen_ai.usage.output_tokens"] == 40
    assert sequence.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert sequence.attributes["shardwright.traced_steps"] == sequence.attributes["shardwright.steps"]
    queue, prefill, decode = exported.below(sequence)
    assert [queue.name, prefill.name, decode.name] == ["queue", "prefill", "decode"]
    assert [s.name for s in exported.below(prefill)] == ["prompt step"] * 3, "20 tokens, 8 a step"
    assert [s.attributes["shardwright.tokens"] for s in exported.below(prefill)] == [8, 8, 4]
    runs = exported.below(decode)
    assert {s.name for s in runs} == {"decode steps"}
    assert sum(s.attributes["shardwright.steps"] for s in runs) == 39
    for step in (*exported.below(prefill), *runs):
        stages = exported.below(step)
        assert [(s.name, s.attributes["shardwright.worker"]) for s in stages] == [
            ("stage 0", "worker0"),
            ("stage 1", "worker1"),
        ]
        assert stages[0].attributes["shardwright.bytes_out"] == stages[1].attributes["shardwright.bytes_in"] > 0
    check_within(exported, server)
    assert all(span.status.status_code is StatusCode.UNSET for span in exported.spans)


async def test_the_parts_of_a_request_add_up_to_it(open_traced, exported, folder):
    async with open_traced() as session:
        stop = StopConditions(max_new_tokens=30)
        _, events = await session.submit(tuple(prompt_of(9, 2)), GREEDY, stop)
        async for _ in events:
            pass
        await reported(session)
    parent = exported.one(f"text_completion {folder.name}")
    parts = exported.below(parent)
    assert sum(seconds(part) for part in parts) == pytest.approx(seconds(parent), rel=0.01, abs=1e-3)
    steps = [step for part in parts for step in exported.below(part)]
    in_pipeline = sum(step.attributes["shardwright.in_pipeline_s"] for step in steps)
    assert 0.5 * seconds(parent) < in_pipeline <= seconds(parent) * 1.001
    names = ("wire_s", "queue_s", "compute_s", "serialise_s", "send_s")
    accounted = sum(step.attributes["shardwright.return_s"] for step in steps)
    accounted += sum(
        stage.attributes[f"shardwright.{name}"] for step in steps for stage in exported.below(step) for name in names
    )
    assert accounted == pytest.approx(in_pipeline, rel=0.1)


async def test_loading_a_pipeline_is_one_trace_that_the_workers_join(open_traced, exported, folder):
    async with open_traced():
        pass
    whole = exported.one(f"load {folder.name}")
    stages = sorted(exported.below(whole), key=lambda span: span.name)
    assert [span.name for span in stages] == ["load stage 0", "load stage 1"]
    assert [span.attributes["shardwright.layers"] for span in stages] == ["0-2", "3-4"]
    for span in stages:
        (taken,) = exported.below(span)
        assert taken.name == "take in stage"
        assert taken.resource.attributes["service.name"] == "shardwright-worker"
        assert taken.attributes["shardwright.weight_bytes"] > 0
        assert "build" in {part.name for part in exported.below(taken)}
    assert whole.resource.attributes["service.name"] == "shardwright-master"
    check_within(exported, whole)


async def test_no_token_and_no_text_is_in_any_span(open_traced, exported):
    async with open_traced() as session, http_to(session) as client:
        asked = {"model": "tiny", "prompt": [*SECRET], "max_tokens": 3, "user": "who asks"}
        await client.post("/v1/completions", json=asked, timeout=60)
    for span in exported.spans:
        told = f"{span.name} {span.status.description} {dict(span.attributes)}"
        assert "who asks" not in told
        assert not span.events
        assert not any(isinstance(value, tuple) and value != ("length",) for value in span.attributes.values())


# --- requests that do not end well -------------------------------------------------------------------


@contextlib.asynccontextmanager
async def traced_fake(pipeline, **settings):
    """A master over a pipeline that computes nothing, traced."""
    made = MasterTracing(Spans.to_collector(COLLECTOR, service="test"), model="fake")
    try:
        async with fake_master(pipeline, **settings) as engine:
            made.watch(engine.observatory, lambda: engine.snapshot().stages)
            yield engine, made
    finally:
        await made.close()


def up_to(count):
    return StopConditions(max_new_tokens=count)


async def until(condition):
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110  what is waited for sets no event
            await asyncio.sleep(0.001)


async def test_an_aborted_request_is_an_error_and_one_that_has_all_it_wanted_is_none(exported):
    pipeline = FakePipeline()
    async with traced_fake(pipeline) as (engine, _):
        for has_all in (False, True):
            seq_id, reader = await engine.submit((5,), GREEDY, up_to(200))
            await anext(reader)
            engine.cancel(seq_id, has_all=has_all)
            async for _ in reader:
                pass
    aborted, stopped = exported.named("text_completion fake")
    assert (aborted.status.status_code, aborted.attributes["error.type"]) == (StatusCode.ERROR, "abort")
    assert aborted.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert stopped.status.status_code is StatusCode.UNSET
    assert stopped.attributes["gen_ai.response.finish_reasons"] == ("stop",)


async def test_requests_that_lost_their_pipeline_are_errors_with_what_is_known_of_them(exported):
    pipeline = FakePipeline()
    async with traced_fake(pipeline) as (engine, _):
        pipeline.open_.clear()
        _, reader = await engine.submit((5,), GREEDY, up_to(9))
        pipeline.break_link()
        assert [event.reason.value async for event in reader] == ["error"]
    sequence = exported.one("text_completion fake")
    assert (sequence.status.status_code, sequence.attributes["error.type"]) == (StatusCode.ERROR, "error")
    assert [span.name for span in exported.below(sequence)] == ["queue", "prefill"]
    check_within(exported, sequence)


async def test_a_request_that_the_queue_has_no_room_for_is_an_error(exported):
    pipeline = FakePipeline()
    async with traced_fake(pipeline, max_waiting=1, max_running=1) as (engine, _):
        pipeline.open_.clear()
        readers = [(await engine.submit((5,), GREEDY, up_to(9)))[1] for _ in range(2)]
        with pytest.raises(QueueFullError):
            await engine.submit((5,), GREEDY, up_to(9))
        assert {trace.seq_id for trace in engine.observatory.requests()} == {1, 2}
        del readers
    refused = [s for s in exported.spans if s.attributes.get("error.type") == "rejected"]
    assert [(s.name, s.status.description) for s in refused] == [("text_completion fake", "the queue was full")]


async def test_a_request_that_is_open_when_the_master_ends_has_its_span(exported):
    pipeline = FakePipeline()
    async with traced_fake(pipeline) as (engine, _):
        pipeline.open_.clear()
        _, reader = await engine.submit((5,), GREEDY, up_to(9))
        await until(lambda: pipeline.steps)
    assert exported.one("text_completion fake").attributes["error.type"] == "abort"
    await reader.aclose()


# --- the HTTP server's span --------------------------------------------------------------------------


def app_that(answers):
    """An application that sends these messages, or raises."""

    async def app(scope, receive, send):
        for message in answers:
            if isinstance(message, BaseException):
                raise message
            await send(message)

    return app


def start(status, *headers):
    return {"type": "http.response.start", "status": status, "headers": [*headers]}


END = {"type": "http.response.body", "body": b"", "more_body": False}


async def served(answers, *, path="/v1/chat/completions", method="POST", headers=()):
    """What a client would get of this application, traced."""
    made = MasterTracing(Spans.to_collector(COLLECTOR, service="test"), model="fake")
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": method, "path": path, "headers": [*headers], "scheme": "http"}
    try:
        await made.http(app_that(answers), model="tiny")(scope, receive, send)
    finally:
        await made.close()
    return sent


@pytest.mark.parametrize("status", [200, 400, 429, 500, 503])
async def test_a_servers_failure_is_an_error_and_a_clients_mistake_is_none(exported, status):
    sent = await served([start(status), END])
    span = exported.one("POST /v1/chat/completions")
    assert span.attributes["http.response.status_code"] == status
    assert span.status.status_code is (StatusCode.ERROR if status >= 500 else StatusCode.UNSET)
    assert span.attributes.get("error.type") == (str(status) if status >= 500 else None)
    assert sent[0]["headers"] == [(b"traceresponse", names(span).encode())]


async def test_a_client_that_went_away_leaves_an_error(exported):
    await served([start(200), {**END, "more_body": True}])
    assert exported.one("POST /v1/chat/completions").attributes["error.type"] == "client_gone"


async def test_an_exception_of_the_application_is_an_error_and_goes_on(exported):
    with pytest.raises(ZeroDivisionError):
        await served([ZeroDivisionError("secret words")])
    span = exported.one("POST /v1/chat/completions")
    assert (span.attributes["error.type"], span.status.status_code) == ("ZeroDivisionError", StatusCode.ERROR)
    assert not span.events
    assert "secret" not in (span.status.description or "")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/metrics"), ("GET", "/api/state"), ("POST", "/v1/nothing"), ("GET", "/v1/models")]
)
async def test_what_asks_for_no_answer_has_no_trace(exported, method, path):
    sent = await served([start(200), END], method=method, path=path)
    assert exported.spans == []
    assert sent == [start(200), END]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"traceparent", b"nonsense")],
        [(b"traceparent", b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01")],
        [(b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())] * 2,
        [(b"traceparent", b"\xff" * 600)],
    ],
)
async def test_a_header_that_is_no_traceparent_is_as_good_as_none(exported, headers):
    await served([start(200), END], headers=headers)
    assert exported.one("POST /v1/chat/completions").parent is None


async def test_a_caller_that_samples_nothing_has_nothing_kept(exported):
    sent = await served([start(200), END], headers=[(b"traceparent", f"00-{TRACE}-{PARENT}-00".encode())])
    assert exported.spans == []
    assert sent[0]["headers"][0][1].startswith(f"00-{TRACE}-".encode())
    assert sent[0]["headers"][0][1].endswith(b"-00")


# --- the collector, and none -------------------------------------------------------------------------


class Unreachable(SpanExporter):
    """An exporter whose collector does not answer; `shutdown` ends its waiting."""

    def __init__(self, waits_s=0.0):
        self.waits_s = waits_s
        self.is_over = False
        self.calls = 0

    def export(self, spans):
        self.calls += 1
        until = time.monotonic() + self.waits_s
        while not self.is_over and time.monotonic() < until:
            time.sleep(0.01)
        return SpanExportResult.FAILURE

    def shutdown(self):
        self.is_over = True


async def test_a_collector_that_is_gone_is_told_once_and_what_was_lost_is_counted(caplog):
    spans = Spans(Unreachable(), service="test", collector=COLLECTOR)
    with caplog.at_level(logging.WARNING, logger="shardwright"):
        for _ in range(3):
            spans.tracer.start_span("x").end()
            spans.flush()
        await spans.close()
    assert spans.num_lost == 3
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith(f"traces can't be sent to {COLLECTOR}")
    assert caplog.messages[1] == f"3 spans of traces were not sent to {COLLECTOR}"


async def test_a_collector_that_hangs_holds_up_neither_spans_nor_the_end(monkeypatch):
    monkeypatch.setattr(otel_export, "CLOSE_S", 0.3)
    exporter = Unreachable(waits_s=30.0)
    spans = Spans(exporter, service="test", collector=COLLECTOR)
    began = time.monotonic()
    for _ in range(5000):  # more than the queue takes
        spans.tracer.start_span("x").end()
    assert time.monotonic() - began < 5.0
    await spans.close()
    assert time.monotonic() - began < 10.0
    assert spans.num_lost == 5000


async def test_the_sdks_own_exporter_fails_quietly_where_nobody_listens(caplog, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    spans = Spans.to_collector("http://127.0.0.1:9", service="test")  # discard: nobody has it
    with caplog.at_level(logging.WARNING):
        spans.tracer.start_span("x").end()
        await asyncio.to_thread(spans.flush)
        await spans.close()
    assert spans.num_lost == 1
    first, last = caplog.messages
    assert first.startswith("traces can't be sent to http://127.0.0.1:9: Failed to export traces to 127.0.0.1:9")
    assert last == "1 spans of traces were not sent to http://127.0.0.1:9"


async def test_without_the_extra_asking_for_traces_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "shardwright.runtime.otel_export", None)
    with pytest.raises(ConfigError, match=r"traces were asked for.*pip install 'shardwright\[otel\]'"):
        tracing.check_installed(COLLECTOR)
    with pytest.raises(ConfigError, match=r"pip install"):
        async with tracing.master_tracing(COLLECTOR, model="x"):
            pass
    with pytest.raises(ConfigError, match=r"pip install"):
        async with tracing.traced_service(COLLECTOR, object()):
            pass


async def test_without_a_collector_there_is_nothing_between_a_worker_and_the_network():
    service = object()
    async with tracing.master_tracing("", model="x") as made, tracing.traced_service("", service) as same:
        assert made is None
        assert same is service
    tracing.check_installed("")


def test_nothing_of_opentelemetry_is_imported_while_traces_are_off():
    """FastAPI looks for its interfaces by itself; they do nothing without the SDK."""
    program = (
        "import sys, asyncio\n"
        "import shardwright.runtime.session, shardwright.runtime.worker_process, shardwright.cli.serve\n"
        "from shardwright.runtime import tracing\n"
        "async def off():\n"
        "    async with tracing.master_tracing('', model='x'), tracing.traced_service('', None):\n"
        "        tracing.check_installed('')\n"
        "asyncio.run(off())\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
        "import shardwright.api.app, shardwright.api.server\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.stdout.split(), ran.returncode) == (["[]", "[]"], 0), ran.stderr
