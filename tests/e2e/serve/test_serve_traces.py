"""Traces of a real server and its two worker processes, as an OTLP collector on a socket gets them."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from real_processes import eventually

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAID = "Why is the sky blue?"


class Collector(TraceServiceServicer):
    """Takes spans; each with the name of the service that made it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.requests = []

    def Export(self, request, context):  # noqa: N802  gRPC's name
        with self.lock:
            self.requests.append(request)
        return ExportTraceServiceResponse()

    @property
    def spans(self):
        with self.lock:
            found = []
            for request in self.requests:
                for resource in request.resource_spans:
                    service = {each.key: each.value.string_value for each in resource.resource.attributes}
                    found += [(service["service.name"], span) for scope in resource.scope_spans for span in scope.spans]
        return found

    def named(self, name):
        return [span for _, span in self.spans if span.name == name]

    def below(self, span):
        return [each for _, each in self.spans if each.parent_span_id == span.span_id]


@pytest.fixture
def collector():
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    made = Collector()
    add_TraceServiceServicer_to_server(made, server)
    made.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield made
    server.stop(0).wait()


@pytest.mark.slow
def test_a_collector_gets_one_trace_of_a_request_and_one_of_the_loading_from_master_and_workers(serve, collector):
    server = serve("--served-model-name", "tiny", "--otlp-endpoint", collector.url)
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "tiny", "messages": [{"role": "user", "content": SAID}], "max_tokens": 40, "ignore_eos": True},
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")
    told = answer.json()["choices"][0]["message"]["content"]
    assert eventually(lambda: collector.named("chat tiny") and len(collector.named("take in stage")) == 2)

    (http,) = collector.named("POST /v1/chat/completions")
    assert (http.trace_id.hex(), http.parent_span_id.hex()) == (TRACE, PARENT)
    (sequence,) = collector.below(http)
    parts = sorted(collector.below(sequence), key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in parts] == ["queue", "prefill", "decode"]
    runs = collector.below(parts[2])
    assert sum(number(span, "shardwright.steps") for span in runs) == 39
    for span in runs:
        assert sorted(stage.name for stage in collector.below(span)) == ["stage 0", "stage 1"]
    for parent in (http, sequence, *parts, *runs):
        for child in collector.below(parent):
            assert parent.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
            assert child.end_time_unix_nano <= parent.end_time_unix_nano
            assert child.trace_id == parent.trace_id

    (loading,) = [span for span in collector.named(f"load {server_model(collector)}") if not span.parent_span_id]
    for stage in collector.below(loading):
        (taken,) = collector.below(stage)
        assert ("shardwright-worker", taken) in collector.spans
    everything = b"".join(request.SerializeToString() for request in collector.requests)
    assert SAID.encode() not in everything
    assert len(told) < 3 or told.encode() not in everything
    assert not server.run.err.count("opentelemetry")


def number(span, name):
    (value,) = [each.value for each in span.attributes if each.key == name]
    return value.int_value


def server_model(collector):
    (name,) = {span.name.removeprefix("load ") for _, span in collector.spans if not span.parent_span_id}
    return name


@pytest.mark.slow
def test_a_server_whose_collector_is_gone_answers_says_so_once_and_ends_in_time(serve):

    server = serve("--served-model-name", "tiny", "--otlp-endpoint", "http://127.0.0.1:9")
    for _ in range(3):
        answer = httpx.post(
            f"{server.url}/v1/completions", json={"model": "tiny", "prompt": SAID, "max_tokens": 5}, timeout=60
        )
        assert answer.status_code == 200
    began = time.monotonic()
    server.run.send(signal.SIGINT)
    assert server.run.wait(timeout_s=60.0) == 0
    assert time.monotonic() - began < 15.0
    assert server.run.err.count("traces can't be sent") <= 3, "by the master and by each of its workers"
    assert "were not sent to http://127.0.0.1:9" in server.run.err
