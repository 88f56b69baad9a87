"""A real Prometheus scrapes a running server and its workers, which it finds by itself, and has their figures."""

from __future__ import annotations

import json
from dataclasses import dataclass

import httpx
import pytest
from prometheus_server import PrometheusServer, prometheus_in, prometheus_program, scrape_of
from real_processes import Running, eventually, port_of, processes_in, write_registry

from shardwright.cli.app import main

from .conftest import Server

pytestmark = pytest.mark.slow

PHASES = {"wire", "queue", "serialise", "compute", "send", "wait"}
WORKERS = {"worker1", "worker2"}


@dataclass
class Monitored:
    """A server on two registered workers, and a Prometheus that scrapes all three."""

    server: Server
    workers: list[Running]
    prometheus: PrometheusServer
    hidden_size: int
    num_requests: int = 4  # that were answered
    num_tokens: int = 4 * 8  # that these answers had


@pytest.fixture(scope="module")
def monitored(tmp_path_factory, tiny):
    """One for a module's tests, with a few answers given. Prometheus scrapes each second."""
    prometheus_program()  # before anything is started
    folder = tmp_path_factory.mktemp("monitored")
    with processes_in(folder) as started:
        workers = [
            started.run("worker", "--host", "127.0.0.1", "--port", 0, "--threads", 1, "--metrics-port", 0,
                        "--cache-dir", folder / "worker-cache")
            for _ in range(2)
        ]  # fmt: skip
        registry = write_registry(folder / "workers.json", [port_of(worker) for worker in workers])
        server = Server(
            started, tiny.folder, "--served-model-name", "tiny", "--registry", registry, "--no-recover", local_workers=0
        )
        with prometheus_in(folder, scrape=scrape_of(server.url)) as prometheus:
            running = Monitored(server, workers, prometheus, tiny.model.config.hidden_size)
            for number in range(running.num_requests):
                body = {"model": "tiny", "prompt": "x" * 40 * number + "y", "max_tokens": 8, "ignore_eos": True}
                httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
            yield running


def is_about(names):
    """Whether there is a row for each of these workers."""
    return lambda rows: {row["metric"].get("worker") for row in rows} == names


def test_everything_is_found_and_up(monitored):
    monitored.prometheus.wait_for("sum(up) == 3")
    jobs = {
        (each["labels"]["job"], each["labels"].get("worker", "")) for each in monitored.prometheus.targets().values()
    }
    assert jobs == {("shardwright", ""), ("shardwright-workers", "worker1"), ("shardwright-workers", "worker2")}
    hosts = {each["labels"].get("host") for each in monitored.prometheus.targets().values()} - {None}
    assert len(hosts) == 1  # both workers run on this machine


def test_requests_and_latencies_have_figures(monitored):
    prometheus = monitored.prometheus
    prometheus.wait_for("shardwright_ready == 1")
    prometheus.wait_for(f"shardwright_output_tokens_total >= {monitored.num_tokens}")
    prometheus.wait_for(
        f'shardwright_http_requests_total{{endpoint="completions",outcome="ok"}} >= {monitored.num_requests}'
    )
    for family in ("time_to_first_token", "inter_token_latency"):
        [row] = prometheus.wait_for(f"histogram_quantile(0.5, sum by (le) (shardwright_{family}_seconds_bucket)) > 0")
        assert 0 < float(row["value"][1]) < 10
    assert prometheus.values("shardwright_kv_blocks_used <= shardwright_kv_blocks")
    prometheus.wait_for("increase(shardwright_output_tokens_total[30s])")


def test_each_worker_has_its_figures_at_the_master(monitored):
    prometheus = monitored.prometheus
    holds = (
        "stage_busy_seconds_total > 0",
        "stage_steps_total > 0",
        "stage_weight_bytes > 0",
        "stage_kv_bytes > 0",
        "stage_layers > 0",
        "stage_epoch > 0",
        "stage_queue_depth >= 0",
        "master_round_trip_seconds > 0",
        "memory_used_bytes > 0",
        "memory_total_bytes > 0",
        "process_memory_bytes > 0",
        "worker_info == 1",
        "cpu_utilization_ratio <= 1",
        "worker_up == 1",
        "stage_busy_ratio <= 1",
    )
    for name in holds:
        prometheus.wait_for(f"shardwright_{name}", is_about(WORKERS))
    assert sum(prometheus.values("shardwright_stage_layers", "worker").values()) == 5
    prometheus.wait_for("sum by (worker) (shardwright_weights_loaded_bytes_total)", is_about(WORKERS))
    prometheus.wait_for("sum(increase(shardwright_stage_busy_seconds_total[30s])) > 0")


def test_the_time_of_steps_is_told_by_phase_and_stage(monitored):
    found = monitored.prometheus.wait_for(
        "shardwright_stage_phase_seconds_count > 0", lambda rows: len(rows) == len(PHASES) * len(WORKERS)
    )
    assert {(row["metric"]["worker"], row["metric"]["phase"]) for row in found} == {
        (worker, phase) for worker in WORKERS for phase in PHASES
    }
    # The compute thread either computes, turns bytes, or waits.
    [row] = monitored.prometheus.query(
        'max(sum by (worker) (shardwright_stage_phase_seconds_sum{phase=~"compute|serialise"}) '
        "/ on (worker) shardwright_stage_busy_seconds_total)"
    )
    assert 0.5 < float(row["value"][1]) < 1.5


def test_the_link_between_the_stages_counts_what_it_carries(monitored):
    prometheus = monitored.prometheus
    prometheus.wait_for('shardwright_link_round_trip_seconds{worker="worker1",peer="worker2"} > 0')
    [row] = prometheus.wait_for("shardwright_link_sent_bytes_total / on (worker, peer) shardwright_link_steps_total")
    # A row of float32 of the model's hidden size for each token, and the longest prompt has 121.
    assert 4 * monitored.hidden_size <= float(row["value"][1]) <= 4 * monitored.hidden_size * 121


def test_workers_tell_the_same_as_the_master_tells_of_them(monitored):
    """Their own metrics carry another prefix, and Prometheus' target labels say which worker it is."""
    prometheus = monitored.prometheus
    for name in ("stage_steps_total", "stage_layers", "stage_weight_bytes", "stage_epoch"):
        prometheus.wait_for(f"shardwright_node_{name} == on (worker) shardwright_{name}", is_about(WORKERS))
    prometheus.wait_for(
        'sum by (worker) (shardwright_node_stage_phase_seconds_count{phase="compute"})', is_about(WORKERS)
    )


def test_an_answers_steps_are_told_stage_by_stage(monitored):
    """Each came to both stages, in order, and every token of the answer is one of them."""
    url = monitored.server.url

    def whole():
        """The request's trace and its steps, once the workers have reported all of them."""
        newest = httpx.get(f"{url}/api/requests").json()["requests"][0]
        trace = httpx.get(f"{url}/api/requests/{newest['seq_id']}").json()
        numbers = [step["number"] for step in trace["steps"]]
        steps = httpx.get(f"{url}/api/steps", params={"since": numbers[0] - 1}).json()["steps"]
        steps = [step for step in steps if step["number"] in numbers]
        return trace, steps if all(len(step["stages"]) == 2 for step in steps) else []

    assert eventually(lambda: bool(whole()[1]))
    trace, steps = whole()
    assert (trace["num_output_tokens"], trace["reason"]) == (8, "length")
    assert sum(step["num_tokens"] for step in trace["steps"] if not step["is_prompt"]) == 7  # the prompt gave the first
    assert len(steps) == trace["num_steps"] == len(trace["steps"])
    for step in steps:
        first, second = step["stages"]
        assert (first["worker_id"], second["worker_id"]) == ("worker1", "worker2")
        assert first["bytes_out"] == second["bytes_in"] > 0
        for stage in step["stages"]:
            assert stage["arrived_at"] <= stage["started_at"] <= stage["finished_at"] <= stage["sent_at"]
        assert first["finished_at"] <= second["started_at"] + 0.005  # clocks of two processes
        assert step["sent_at"] <= step["returned_at"]


def test_the_events_of_a_running_server_tell_of_a_new_answer(monitored):
    url = monitored.server.url
    told = {}
    with httpx.stream("GET", f"{url}/api/events", timeout=20) as answer:
        lines = answer.iter_lines()
        body = {"model": "tiny", "prompt": "tell", "max_tokens": 3, "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        seq_id = max(each["seq_id"] for each in httpx.get(f"{url}/api/requests").json()["requests"])
        for line in lines:
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                told[name] = json.loads(line.removeprefix("data: "))
                requests = told.get("requests", {}).get("requests", ())
                if name == "requests" and any(each["seq_id"] == seq_id and each["finished_at"] for each in requests):
                    break
    assert told["state"]["is_ready"]
    assert told["state"]["model_name"] == "tiny"
    assert [worker["worker_id"] for worker in told["state"]["workers"]] == ["worker1", "worker2"]


def test_top_and_status_show_the_running_server(monitored, capsys):
    for argv in (["top", "--once"], ["status"]):
        assert main([*argv, "--url", monitored.server.url]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("tiny  ready  epoch ")
        assert "5 layers on 2 workers" in shown
        assert all(worker in shown for worker in WORKERS)
    assert main(["status", "--json", "--url", monitored.server.url]) == 0
    assert json.loads(capsys.readouterr().out)["num_layers"] == 5


def test_a_worker_that_dies_is_down_and_lost(monitored, capsys):
    """The last of these tests: the pipeline is gone after it."""
    monitored.workers[1].process.kill()
    prometheus = monitored.prometheus
    prometheus.wait_for('up{job="shardwright-workers",worker="worker2"} == 0')
    prometheus.wait_for('shardwright_worker_up{worker="worker2"} == 0', timeout_s=40)
    prometheus.wait_for("shardwright_ready == 0")
    prometheus.wait_for("sum by (kind) (shardwright_errors_total) > 0")
    assert prometheus.values("shardwright_worker_up", "worker")["worker1",] == 1
    assert httpx.get(f"{monitored.server.url}/health").status_code == 200
    assert main(["status", "--url", monitored.server.url]) == 3
    said = capsys.readouterr()
    assert "worker2 is lost" in said.out
    assert f"{monitored.server.url} is not ready: " in said.err
