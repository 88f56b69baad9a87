"""What the tests of failures share: a tiny model, real workers, and a master in this process or in its own."""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from real_processes import Processes, Running, processes_in, write_registry
from tiny_models import Whole, save_whole

from shardwright.cli.app import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Whole:
    """A model of five layers with a long context, so that a generation can last."""
    return save_whole("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=32768, rope_parameters=None)


@pytest.fixture
def processes(tmp_path):
    """Starts processes in the test's folder."""
    with processes_in(tmp_path) as started:
        yield started


@dataclass(frozen=True)
class Cluster:
    processes: Processes
    workers: list[Running]
    ports: list[int]
    registry: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two registered workers that live as long as the module: what one test does to them must not hurt the next."""
    folder = tmp_path_factory.mktemp("cluster")
    with processes_in(folder) as started:
        pairs = started.workers(2, "--cache-dir", folder / "worker-cache")
        ports = [port for _, port in pairs]
        yield Cluster(started, [worker for worker, _ in pairs], ports, write_registry(folder / "workers.json", ports))


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def master(tmp_path, monkeypatch, capsys):
    """Runs a command in this process and gives exit code and output; nothing that it started may be left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv):
        before = set(psutil.Process().children(recursive=True))
        code = main([*(str(arg) for arg in argv), "--cache-dir", str(tmp_path / "cache")])
        captured = capsys.readouterr()
        left = set(psutil.Process().children(recursive=True)) - before
        assert not left, f"left running: {left}"
        return Outcome(code, captured.out, captured.err)

    return run


def error_of(outcome) -> str:
    """The error that a user reads: exactly one line, and no traceback."""
    assert "Traceback" not in outcome.err, outcome.err
    errors = re.findall(r"^error: (.*)$", outcome.err, re.MULTILINE)
    assert len(errors) == 1, outcome.err
    return errors[0]


@pytest.fixture(name="error_of")
def error_of_fixture():
    return error_of
