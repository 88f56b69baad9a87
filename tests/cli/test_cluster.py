"""`worker`, `register` and `workers` from the shell's side."""

import asyncio
import json
import socket
import time

import pytest

from shardwright import __version__
from shardwright.cli import cluster
from shardwright.cli.nodes import master_node, worker_node
from shardwright.config import WorkerConfig
from shardwright.errors import AddressInUseError, WorkerUnreachableError
from shardwright.runtime.registry import WorkerEntry
from shardwright.types import PROTOCOL_VERSION, WorkerDescription

from .conftest import report

ALIVE = WorkerDescription(
    protocol_version=PROTOCOL_VERSION, package_version=__version__, torch_version="t", transformers_version="t",
    host_id="h", pid=1, device="cpu", device_name="Some CPU", memory_total_bytes=8 * 2**30,
    memory_available_bytes=6 * 2**30, read_bandwidth=1e10, matrix_rate=1e11, num_threads=2,
)  # fmt: skip


class FakeClient:
    def __init__(self, network, address):
        self.network, self.address = network, address

    async def describe(self, *, timeout_s):
        await asyncio.sleep(self.network.delay_s)
        if self.address not in self.network.alive:
            raise WorkerUnreachableError(f"no answer at {self.address}")
        return ALIVE

    async def heartbeat(self, *, timeout_s):
        return report(1.0, 2.0, epoch=self.network.alive[self.address])

    async def close(self):
        self.network.closed += 1


class FakeNetwork:
    """A transport on which some addresses answer; `alive` maps them to the epoch that they hold."""

    def __init__(self):
        self.alive, self.closed, self.delay_s = {}, 0, 0.0

    def connect(self, address):
        return FakeClient(self, address)


@pytest.fixture
def network(monkeypatch):
    network = FakeNetwork()
    monkeypatch.setattr(cluster, "grpc_transport", lambda _config: network)
    return network


REGISTER = ("register", "--ip", "192.168.1.101", "--username", "worker1")


def test_a_worker_is_registered(run_cli, network, tmp_path):
    network.alive = {"192.168.1.101:50051": 0}
    outcome = run_cli(*REGISTER)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == "Registered worker1 at 192.168.1.101:50051 in workers.json\n"
    assert json.loads((tmp_path / "workers.json").read_text()) == [
        {"username": "worker1", "ip": "192.168.1.101", "port": 50051}
    ]


def test_an_unreachable_worker_is_registered_with_a_warning(run_cli, network, tmp_path):
    outcome = run_cli(*REGISTER)
    assert outcome.code == 0
    assert outcome.err == "warning: it is registered, but there is no answer at 192.168.1.101:50051\n"
    assert len(json.loads((tmp_path / "workers.json").read_text())) == 1
    assert network.closed == 1


def test_a_second_registration_adds_nothing_and_says_so(run_cli, network, tmp_path):
    run_cli(*REGISTER)
    assert "was registered already" in run_cli(*REGISTER).out
    assert "is called other now" in run_cli(*REGISTER[:-1], "other").out
    assert [e["username"] for e in json.loads((tmp_path / "workers.json").read_text())] == ["other"]


def test_a_registry_that_is_not_json_is_named_and_left_alone(run_cli, network, tmp_path):
    (tmp_path / "workers.json").write_text("{oops")
    outcome = run_cli(*REGISTER)
    assert (outcome.code, outcome.out) == (2, "")
    assert "error: workers.json: line 1, column 2: not JSON" in outcome.err
    assert (tmp_path / "workers.json").read_text() == "{oops"


@pytest.mark.parametrize(("flag", "value"), [("--ip", "300.1.1.1"), ("--username", ""), ("--port", "70000")])
def test_a_bad_value_is_refused_and_nothing_is_written(run_cli, network, tmp_path, flag, value):
    outcome = run_cli(*REGISTER, flag, value)
    assert outcome.code == 2
    assert f"error: {flag.removeprefix('--')} is" in outcome.err
    assert not (tmp_path / "workers.json").exists()


def test_workers_shows_who_answers_and_who_does_not(run_cli, network):
    network.alive = {"10.0.0.1:50051": 0, "10.0.0.2:50051": 7}
    for n in (1, 2, 3):
        run_cli("register", "--ip", f"10.0.0.{n}", "--username", f"w{n}")
    outcome = run_cli("workers")
    rows = [line for line in outcome.out.splitlines() if "10.0.0." in line]
    assert outcome.code == 0
    assert ["idle" in rows[0], "in use" in rows[1], "no answer" in rows[2]] == [True] * 3
    assert "6.0 of 8.0 GiB" in rows[0]
    assert outcome.out.splitlines()[-1] == "w3: no answer at 10.0.0.3:50051"


def test_a_worker_of_another_version_is_pointed_out(run_cli, network, monkeypatch):
    network.alive = {"10.0.0.1:50051": 0}
    run_cli("register", "--ip", "10.0.0.1", "--username", "w1")
    assert "runs shardwright" not in run_cli("workers").out
    monkeypatch.setattr(cluster, "__version__", "9.9.9")
    assert f"w1 runs shardwright {__version__}, this is 9.9.9" in run_cli("workers").out


def test_workers_as_json_is_a_list_with_one_object_a_worker(run_cli, network):
    network.alive = {"10.0.0.1:50051": 0}
    for n in (1, 2):
        run_cli("register", "--ip", f"10.0.0.{n}", "--username", f"w{n}")
    first, second = json.loads(run_cli("workers", "--json").out)
    assert (first["username"], first["alive"], first["problem"], first["epoch"]) == ("w1", True, None, 0)
    assert (second["alive"], second["problem"]) == (False, "no answer at 10.0.0.2:50051")
    assert second["device"] is None


def test_an_empty_registry_says_how_to_fill_it(run_cli):
    outcome = run_cli("workers")
    assert (outcome.code, outcome.out) == (0, "")
    assert "add one with: shardwright register" in outcome.err
    assert json.loads(run_cli("workers", "--json").out) == []


async def test_workers_are_asked_all_at_once(network):
    network.delay_s = 0.2
    entries = tuple(WorkerEntry(username=f"w{n}", ip=f"10.0.0.{n + 1}", port=1) for n in range(20))
    started = time.monotonic()
    probes = await cluster.probe_all(entries, network)
    assert time.monotonic() - started < 2.0
    assert [probe.entry for probe in probes] == list(entries)


def serve(monkeypatch, run):
    monkeypatch.setattr(cluster, "serve_worker", run)


def test_a_worker_announces_its_port_and_gets_its_settings(run_cli, monkeypatch, tmp_path):
    seen = []

    async def run_worker(config, *, announce):
        seen.append(config)
        announce("0.0.0.0:50077", "")

    serve(monkeypatch, run_worker)
    outcome = run_cli(
        "worker", "--host", "127.0.0.1", "--port", "0", "--device", "cpu", "--threads", "2", "--memory-gib", "1.5",
        "--cache-dir", tmp_path,
    )  # fmt: skip
    assert (outcome.code, outcome.out, outcome.err) == (0, "Worker node started on port 50077\n", "")
    assert seen == [
        WorkerConfig(
            host="127.0.0.1", port=0, device="cpu", threads=2, memory_bytes=3 * 2**29, cache_dir=tmp_path
        )
    ]  # fmt: skip


def test_a_worker_says_where_its_metrics_are(run_cli, monkeypatch):
    seen = []

    async def run_worker(config, *, announce):
        seen.append(config.metrics_port)
        announce("0.0.0.0:50077", "0.0.0.0:9100")

    serve(monkeypatch, run_worker)
    outcomes = [
        run_cli("worker", "--metrics-port", "9100"),
        run_cli("--metrics-port", "9100", entry=worker_node),
    ]
    for outcome in outcomes:
        assert (outcome.code, outcome.out) == (0, "Worker node started on port 50077\n")
        assert outcome.err == "metrics at http://0.0.0.0:9100/metrics\n"
    assert seen == [9100, 9100]


def test_workers_that_a_program_starts_do_not_compete_for_one_metrics_port(run_cli, monkeypatch):
    """They all read the port from the same environment; a port on their own command line is meant for them."""
    seen = []

    async def run_worker(config, *, announce):
        seen.append(config.metrics_port)

    serve(monkeypatch, run_worker)
    monkeypatch.setattr(cluster.aio, "until_stdin_closes", lambda serving: serving)
    run_cli("worker", "--exit-with-stdin")
    monkeypatch.setenv("SHARDWRIGHT_METRICS_PORT", "9100")
    run_cli("worker", "--exit-with-stdin")
    run_cli("worker", "--exit-with-stdin", "--metrics-port", "9200")
    run_cli("worker")
    assert seen == [None, 0, 9200, 9100]


def test_a_port_in_use_is_one_sentence(run_cli, monkeypatch):
    async def run_worker(config, *, announce):
        raise AddressInUseError(f"port {config.port} is in use; choose another with --port")

    serve(monkeypatch, run_worker)
    outcome = run_cli("worker")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err == "error: port 50051 is in use; choose another with --port\n"


def test_ctrl_c_is_how_a_worker_is_stopped_and_no_error(run_cli, monkeypatch):
    async def run_worker(config, *, announce):
        raise KeyboardInterrupt

    serve(monkeypatch, run_worker)
    outcome = run_cli("worker")
    assert (outcome.code, outcome.err) == (0, "worker stopped\n")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--port", "70000"), "port is 70000; it must be between 0 and 65535"),
        (("--threads", "-1"), "threads is -1"),
        (("--metrics-port", "65536"), "metrics_port is 65536; it must be between 0 and 65535"),
        (("--metrics-port", "50051"), "metrics_port is 50051, and so is port; choose two different ones"),
    ],
)
def test_a_bad_worker_setting_is_refused(run_cli, argv, says):
    outcome = run_cli("worker", *argv)
    assert outcome.code == 2
    assert f"error: {says}" in outcome.err


def test_master_node_registers_as_the_issue_says(run_cli, network, tmp_path):
    outcome = run_cli("--register", "--ip", "192.168.1.101", "--username", "worker1", entry=master_node)
    assert outcome.code == 0
    assert json.loads((tmp_path / "workers.json").read_text())[0]["username"] == "worker1"


def test_master_node_generates_with_the_asked_for_options(run_cli, fake_start):
    outcome = run_cli(
        "--generate", "--prompt", "hi", "--max-length", "9", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "3",
        "--seed", "1", entry=master_node,
    )  # fmt: skip
    assert (outcome.code, outcome.out) == (0, "HI\n")
    assert fake_start.config.model == "google/gemma-2b"
    assert fake_start.session.stops[0].max_new_tokens == 7
    assert fake_start.session.submitted[0][1].top_k == 3


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "choose one of --register and --generate"),
        (("--register", "--generate"), "choose one of --register and --generate"),
        (("--register", "--ip", "10.0.0.1"), "--username is missing"),
        (("--register", "--username", "w"), "--ip is missing"),
    ],
)
def test_master_node_says_what_is_missing(run_cli, argv, says):
    outcome = run_cli(*argv, entry=master_node)
    assert outcome.code == 2
    assert says in outcome.err


@pytest.mark.timeout(60)
def test_registering_a_silent_address_does_not_hang(run_cli):
    """A port where somebody listens but never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        outcome = run_cli("register", "--ip", "127.0.0.1", "--port", silent.getsockname()[1], "--username", "w")
    assert outcome.code == 0
    assert "warning: it is registered, but there is no answer" in outcome.err
