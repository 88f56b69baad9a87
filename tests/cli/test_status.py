"""`status` for people and for scripts: what it prints and the code that it ends with."""

import json
from dataclasses import replace

import httpx
import pytest
from api_server import server_in_thread
from fake_observatory import FakeObservatory, example_view
from fake_text_engine import FakeTextEngine


@pytest.fixture
def seen():
    return FakeObservatory()


@pytest.fixture
def server(seen):
    with server_in_thread(FakeTextEngine(observatory=seen)) as running:
        yield running


def test_a_ready_server_is_summed_up(run_cli, server):
    outcome = run_cli("status", "--url", server.url)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].startswith("fake/characters-1  ready  epoch 3")
    assert [line.split()[0] for line in lines[1:6]] == ["worker", "rack-1", "desk", "rank", "rank"]
    assert "tokens/s 110.0" in outcome.out
    assert lines[-1] == "errors so far: LinkLostError 1"


def test_json_is_the_state_as_the_server_tells_it(run_cli, server):
    outcome = run_cli("status", "--json", "--url", server.url)
    assert (outcome.code, outcome.err) == (0, "")
    state = json.loads(outcome.out)
    assert state == httpx.get(f"{server.url}/api/state").json()
    assert [worker["num_ranks"] for worker in state["workers"]] == [1, 2]
    assert [[load["device"] for load in worker["ranks"]] for worker in state["workers"]] == [[], ["cuda:0", "cuda:1"]]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_recovery_is_told_and_is_why_the_server_is_not_ready(run_cli, server, seen, options):
    cause = "worker desk was lost: no heartbeat for 1.0 s"
    seen.change_view(is_ready=False, snapshot=replace(seen.cluster.snapshot, recovering_from=cause))
    outcome = run_cli("status", "--url", server.url, *options)
    assert outcome.code == 3
    assert outcome.err == f"error: {server.url} is not ready: recovering: {cause}\n"
    if options:
        assert json.loads(outcome.out)["snapshot"]["recovering_from"] == cause
    else:
        assert f"recovering: {cause}; 5 requests wait" in outcome.out.splitlines()


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_server_that_is_not_ready_has_its_reason_and_an_exit_code(run_cli, server, seen, options):
    seen.cluster = example_view(())
    outcome = run_cli("status", "--url", server.url, *options)
    assert outcome.code == 3
    assert outcome.err == f"error: {server.url} is not ready: worker rack-1 was lost: the link broke\n"
    assert outcome.out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_ready": False}, "no token went through the pipeline lately"),
        ({"is_ready": False, "failure": "worker desk is gone"}, "worker desk is gone"),
    ],
)
def test_the_reason_is_the_one_that_there_is(run_cli, server, seen, changes, reason):
    seen.change_view(**changes)
    assert run_cli("status", "--url", server.url).err.endswith(f"is not ready: {reason}\n")


def test_a_server_that_is_about_to_have_a_pipeline_says_so(run_cli, server, seen):
    seen.cluster = example_view((), failure="")
    assert "there is no pipeline yet" in run_cli("status", "--url", server.url).err
