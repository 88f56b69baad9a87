"""Every query of every dashboard and alert, asked of a real Prometheus that scrapes a running cluster of two workers.

Jobs and rules are those of the exported files; the intervals alone are shorter, so that a test need not wait long.
"""

from __future__ import annotations

import json
import time

import httpx
import pynvml
import pytest
import yaml
from prometheus_server import prometheus_in
from promql_names import with_values
from real_processes import eventually, processes_in

from shardwright.cli.app import main
from shardwright.grafana.alerts import alerts

pytestmark = pytest.mark.slow

# Correctly without an answer here, by panel (or alert), each with its reason.
NO_GPU = "no NVIDIA GPU"
NO_ERRORS = "nothing failed"
NOBODY_WAITS = "no request waits"
NO_RANKS = "no worker has ranks"
EMPTY = {
    "overview: Errors by kind A": NO_ERRORS,
    "overview: GPU A": NO_GPU,
    "overview: Memory in use A": NO_GPU,
    "overview: Workers side by side D": NO_GPU,
    "overview: Workers side by side E": NO_GPU,
    "worker: Errors by kind A": NO_ERRORS,
    "worker: GPU A": NO_GPU,
    "worker: GPU memory A": NO_GPU,
    "worker: GPU memory B": NO_GPU,
    "worker: GPU temperature and power A": NO_GPU,
    "worker: GPU temperature and power B": NO_GPU,
    "worker: GPU of each rank A": NO_RANKS,
    "worker: Memory of each rank A": NO_RANKS,
    "worker: Memory of each rank B": NO_RANKS,
    "worker: Memory of each rank C": NO_RANKS,
    "capacity: GPU A": NO_GPU,
    "capacity: GPU memory in use A": NO_GPU,
    "alert ShardwrightStageSaturated": NOBODY_WAITS,
    "alert ShardwrightBlocksExhausted": NOBODY_WAITS,
}


def has_gpu():
    """Whether this machine has a GPU that NVIDIA's driver tells of: workers on its CPU tell of it too."""
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount() > 0
    except pynvml.NVMLError:
        return False


RULES = {rule.name: rule for rule in alerts(2.0)}


class Watched:
    """A cluster, the Prometheus that watches it, and the exported dashboards."""

    def __init__(self, server, prometheus, exported):
        self.server = server
        self.master = server.url.removeprefix("http://")
        self.prometheus = prometheus
        self.dashboards = {path.stem: json.loads(path.read_text()) for path in (exported / "dashboards").iterdir()}

    @property
    def queries(self):
        """What panels ask, by dashboard, panel and the query's letter, as Grafana would send it."""
        return {
            f"{name}: {panel['title']} {target['refId']}": with_values(
                target["expr"], cluster=self.master, __rate_interval="15s"
            )
            for name, board in self.dashboards.items()
            for panel in board["panels"]
            for target in panel.get("targets", ())
            if "expr" in target
        }

    def shown(self, name, *labels):
        """The numbers that a panel shows now, by these labels."""
        return self.prometheus.values(self.queries[name], *labels)

    def work(self):
        """Some seconds of answers to prompts that share a beginning, watched from before the first one."""
        self.prometheus.wait_for("shardwright_ready == 1 and up == 1")
        end = time.monotonic() + 5
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello " * 30}], "max_tokens": 24}
        with httpx.Client(base_url=self.server.url, timeout=60) as client:
            while time.monotonic() < end:
                client.post("/v1/chat/completions", json=body).raise_for_status()


@pytest.fixture(scope="module")
def server(tmp_path_factory, serve_in):
    """One that does not recover, so that what the last test breaks stays broken."""
    with processes_in(tmp_path_factory.mktemp("served")) as started:
        running = serve_in(started, "--served-model-name", "tiny", "--no-recover")
        assert running.url
        yield running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, server):
    """A server that has answered while Prometheus watched it with the exported jobs and rules."""
    folder = tmp_path_factory.mktemp("watched")
    exported = folder / "exported"
    assert main(["grafana", "export", str(exported), "--master", server.url.removeprefix("http://")]) == 0
    jobs = yaml.safe_load((exported / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    jobs[1]["http_sd_configs"][0]["refresh_interval"] = "1s"
    with prometheus_in(folder, scrape=jobs, rules=[exported / "prometheus" / "alerts.yaml"]) as prometheus:
        watched = Watched(server, prometheus, exported)
        watched.work()
        yield watched


def test_every_query_of_every_panel_and_alert_has_an_answer_or_none_for_a_reason(cluster):
    queries = cluster.queries | {f"alert {rule.name}": rule.expr for rule in RULES.values()}
    assert len(queries) > 80
    answers = {name: cluster.prometheus.query(expr) for name, expr in queries.items()}
    empty = {name for name, reason in EMPTY.items() if reason != NO_GPU or not has_gpu()}
    assert {name for name, rows in answers.items() if not rows} == empty
    assert not {name: rows for name, rows in answers.items() if any(row["value"][1] == "NaN" for row in rows)}


def test_dashboards_tell_what_the_cluster_does(cluster):
    assert cluster.shown("overview: Pipeline A") == {(): 1}
    assert cluster.shown("overview: Workers lost A") == {(): 0}
    workers = {worker for (worker,) in cluster.shown("overview: Workers side by side A", "worker")}
    assert len(workers) == 2
    assert sum(cluster.shown("overview: Workers side by side B", "worker").values()) == 5  # the tiny model's layers
    assert cluster.shown("overview: Generated A")[()] > 1
    busy = cluster.shown("overview: Busy stages A", "worker")
    assert {worker for (worker,) in busy} == workers
    assert all(0 < part <= 1 for part in busy.values())
    assert all(0 < part < 1 for part in cluster.shown("capacity: RAM in use A", "worker").values())
    phases = cluster.shown("latency: Phases by stage A", "worker", "phase")
    for worker in workers:
        assert {phase for of, phase in phases if of == worker} >= {"wire", "queue", "serialise", "compute", "send"}
        assert phases[worker, "compute"] > 0


def test_variables_find_the_cluster_and_its_workers(cluster):
    """Grafana's `label_values` lists the values that a label of a selector's series has."""
    assert cluster.prometheus.values("shardwright_ready", "instance").keys() == {(cluster.master,)}
    selector = f'shardwright_worker_up{{instance="{cluster.master}"}}'
    assert len(cluster.prometheus.values(selector, "worker")) == 2


def test_prometheus_takes_the_rules_and_nothing_fires(cluster):
    rules = cluster.prometheus.rules
    assert eventually(lambda: all(rule["health"] == "ok" for rule in rules())), rules()
    assert {rule["name"]: rule["state"] for rule in rules()} == dict.fromkeys(RULES, "inactive")


def test_the_master_is_scraped_under_its_name(cluster):
    target = cluster.prometheus.targets()["shardwright", cluster.master]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_rows_of_metrics_json_have_what_the_infinity_dashboard_shows(cluster):
    panels = cluster.dashboards["metrics-json"]["panels"]
    queries = [panel["targets"][0] for panel in panels if panel["type"] != "row"]
    for query in queries:
        params = {each["key"]: each["value"] for each in query["url_options"]["params"]}
        if "since" in params:
            params["since"] = params["since"].replace("${__from:date:seconds}", "1")
        url = f"{cluster.server.url}{query['url']}"
        rows = httpx.get(url, params=params, timeout=30).raise_for_status().json()
        assert len({row["worker"] for row in rows}) == 2
        for column in query["columns"]:
            kinds = (int, float, type(None)) if column["type"] == "number" else str
            assert all(isinstance(row[column["selector"]], kinds) for row in rows), column


def test_a_lost_worker_is_seen_by_dashboards_and_rules(cluster):
    """Stands last in this file: it ends a worker."""
    cluster.server.run.descendants()[0].kill()
    prometheus = cluster.prometheus
    [lost] = prometheus.wait_for(RULES["ShardwrightWorkerLost"].promql)
    prometheus.wait_for(RULES["ShardwrightNotReady"].promql)
    prometheus.wait_for(cluster.queries["overview: Workers lost A"], lambda rows: rows[0]["value"][1] == "1")
    assert cluster.shown("overview: Pipeline A") == {(): 0}
    assert cluster.shown("overview: Workers side by side A", "worker")[lost["metric"]["worker"],] == 0
    assert eventually(
        lambda: {r["name"]: r["state"] for r in prometheus.rules()}["ShardwrightWorkerLost"] != "inactive"
    )
    assert not prometheus.query(RULES["ShardwrightMasterDown"].promql)
