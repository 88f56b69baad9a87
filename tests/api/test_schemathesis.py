"""Requests made from the OpenAPI document: no answer is a server error, and each is as the document says."""

import pytest
import schemathesis
from api_server import server_in_thread
from fake_text_engine import FakeTextEngine
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance


@pytest.fixture(scope="module")
def api_schema():
    """The document of a server that runs in a thread of its own."""
    with server_in_thread(FakeTextEngine(reply=lambda *_: "ok")) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/metrics", "GET"),
    ("/metrics.json", "GET"),
    ("/prometheus/targets", "GET"),
    ("/api/state", "GET"),
    ("/api/steps", "GET"),
    ("/api/requests", "GET"),
    ("/api/requests/{seq_id}", "GET"),
    ("/api/history", "GET"),
]
ENDLESS = {("/api/events", "GET")}  # an answer that never ends; test_events.py has it


def test_all_operations_are_tried(api_schema):
    found = {(each.ok().path, each.ok().method.upper()) for each in api_schema.get_all_operations()}
    assert found == {*OPERATIONS, *ENDLESS}


@pytest.mark.parametrize("mode", GenerationMode, ids=str)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_as_the_document_says_and_none_is_a_server_error(api_schema, path, method, mode):
    operation = api_schema[path][method]
    kinds = {each["schema"].get("type") for each in operation.definition.raw.get("parameters", ())}
    if mode is GenerationMode.NEGATIVE and method == "GET" and not kinds - {"string"}:
        pytest.skip("there is nothing to get wrong")

    @settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        # Not all that makes a request valid can be said in a schema: fields that need each other, grammars, tokens.
        case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=20)

    run()
