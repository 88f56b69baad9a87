"""Processes that die or are told to go: what the others say and do, and that none is left behind."""

import asyncio
import json
import os
import re
import signal
import time

import pytest
from real_processes import eventually, write_registry
from tiny_models import greedy_answer, prompt_of

from shardwright.transport.grpc import GrpcTransport

PROMPT = prompt_of(9, seed=1)
IDS = ",".join(map(str, PROMPT))
LONG = ("--prompt-ids", IDS, "--max-new-tokens", 30000, "--ignore-eos", "--json")
ENDS_WITHIN_S = 8.0  # a second on a quiet machine


def described(port):
    """What the worker at this port says of itself."""

    async def ask():
        client = GrpcTransport(max_frame_bytes=1 << 20).connect(f"127.0.0.1:{port}")
        try:
            return await client.describe(timeout_s=20.0)
        finally:
            await client.close()

    return asyncio.run(ask())


def wait_until_it_ends(run):
    """The exit code and the seconds until it came."""
    began = time.monotonic()
    return run.wait(timeout_s=60.0), time.monotonic() - began


@pytest.fixture
def long_run(processes, tiny, tmp_path):
    """A master that generates for minutes, on workers of its own or of a registry."""

    def start(*where):
        return processes.run("generate", "--model", tiny.folder, "--cache-dir", tmp_path / "cache", *LONG, *where)

    return start


@pytest.fixture
def try_master(master, cluster, tiny, error_of):
    """Exit code and error of a master that can't have the registered workers."""

    def attempt():
        outcome = master("generate", "--registry", cluster.registry, "--model", tiny.folder, "--prompt-ids", IDS)
        return outcome.code, error_of(outcome)

    return attempt


@pytest.fixture
def check_serves(master, cluster, tiny):
    """The registered workers answer as the whole model does."""

    def check():
        good = master(
            *("generate", "--registry", cluster.registry, "--model", tiny.folder, "--json", "--prompt-ids", IDS),
            *("--max-new-tokens", 5, "--ignore-eos"),
        )
        assert good.code == 0, good.err
        assert json.loads(good.out)["token_ids"] == greedy_answer(tiny.model, PROMPT, 5)

    return check


@pytest.mark.slow
def test_a_local_worker_killed_in_a_generation_is_named_and_the_others_end(long_run, error_of):
    """The master's own workers: the second is killed while the answer is under way."""
    run = long_run("--local-workers", 2, "--no-recover")
    run.wait_for("^ready: 2 stages")
    time.sleep(0.3)
    victim = max(run.descendants(), key=lambda process: process.pid)
    victim.kill()
    code, seconds = wait_until_it_ends(run)
    assert code == 3
    assert "local-" in error_of(run)
    assert seconds < ENDS_WITHIN_S
    assert run.descendants() == []


@pytest.mark.slow
def test_a_generation_goes_on_when_a_local_worker_is_killed(processes, tiny, tmp_path):
    """The answer is the whole model's to its last token, although half of the pipeline was lost on the way."""
    run = processes.run(
        "generate", "--model", tiny.folder, "--cache-dir", tmp_path / "cache", "--local-workers", 2, "--threads", 1,
        "--prompt-ids", IDS, "--max-new-tokens", 1500, "--ignore-eos", "--json",
    )  # fmt: skip
    run.wait_for("^ready: 2 stages")
    time.sleep(0.3)
    max(run.descendants(), key=lambda process: process.pid).send_signal(signal.SIGKILL)
    expected = greedy_answer(tiny.model, PROMPT, 1500)
    assert run.wait() == 0, run.err
    assert len(re.findall(r"worker local-\d was lost: .*; the model is placed again", run.err)) == 1
    assert json.loads(run.out)["token_ids"] == expected
    assert run.descendants() == []


@pytest.mark.slow
def test_a_worker_killed_while_it_loads_is_named(processes, tiny, tmp_path, error_of):
    """The other worker of the registry lives on."""
    pairs = processes.workers(2, "--cache-dir", tmp_path / "worker-cache")
    registry = write_registry(tmp_path / "workers.json", [port for _, port in pairs])
    (survivor, _), (victim, _) = pairs
    run = processes.run(
        "generate", "--model", tiny.folder, "--registry", registry, "--cache-dir", tmp_path / "cache", *LONG,
        "--no-recover",
    )  # fmt: skip
    run.wait_for("^(model|worker2): ")
    victim.send(signal.SIGKILL)
    code, seconds = wait_until_it_ends(run)
    assert code == 3
    assert "worker2" in error_of(run) or str(pairs[1][1]) in error_of(run)
    assert seconds < 3 * ENDS_WITHIN_S  # a lost connection is tried again first
    assert survivor.process.poll() is None


def test_a_compiler_ends_with_the_worker_that_waits_for_it(processes, tmp_path):
    """It would go on for seconds, on a machine that may be about to do something else."""
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\ntouch {tmp_path / "compiles"}\nsleep 600 & wait\n')
    compiler.chmod(0o700)
    path = f"{compiler.parent}:{os.environ['PATH']}"
    run = processes.run("worker", "--host", "127.0.0.1", "--port", 0, "--cache-dir", tmp_path / "cache", PATH=path)
    assert eventually((tmp_path / "compiles").exists, timeout_s=60)
    assert len(run.descendants()) == 2, "the compiler and its own child"
    run.send(signal.SIGTERM)
    code, seconds = wait_until_it_ends(run)
    assert code == 143
    assert seconds < ENDS_WITHIN_S
    assert eventually(lambda: run.descendants() == [])


@pytest.mark.parametrize("moment", ["^looking at", "^loading the stages", "^ready: 2 stages"])
def test_ctrl_c_ends_a_master_and_its_workers(long_run, moment):
    run = long_run("--local-workers", 2)
    run.wait_for(moment)
    run.send(signal.SIGINT)
    code, seconds = wait_until_it_ends(run)
    assert code == 130
    assert seconds < ENDS_WITHIN_S
    assert run.err.rstrip().endswith("interrupted")
    assert "Traceback" not in run.err
    assert run.out == ""
    assert run.descendants() == []


@pytest.mark.slow
def test_sigterm_ends_a_master_and_its_workers(long_run):
    run = long_run("--local-workers", 2)
    run.wait_for("^ready: 2 stages")
    run.send(signal.SIGTERM)
    code, seconds = wait_until_it_ends(run)
    assert code == 143
    assert seconds < ENDS_WITHIN_S
    assert "Traceback" not in run.err
    assert run.descendants() == []


@pytest.mark.slow
def test_local_workers_end_when_their_master_is_killed(long_run):
    run = long_run("--local-workers", 2)
    run.wait_for("^ready: 2 stages")
    assert len(run.descendants()) == 2
    run.send(signal.SIGKILL)
    assert run.process.wait(30) == -signal.SIGKILL
    assert eventually(lambda: not run.descendants(), timeout_s=ENDS_WITHIN_S)


def test_registered_workers_refuse_a_second_master_and_outlive_a_killed_one(
    long_run, cluster, try_master, check_serves
):
    """One master at a time; a killed one leaves them free for the next."""
    first = long_run("--registry", cluster.registry)
    first.wait_for("^ready: 2 stages")
    code, error = try_master()
    assert code == 3
    assert "is serving another master" in error
    assert first.process.poll() is None
    first.send(signal.SIGKILL)
    first.process.wait(30)
    assert eventually(lambda: not any(described(port).in_use for port in cluster.ports))
    check_serves()
    assert [worker.process.poll() for worker in cluster.workers] == [None, None]


def test_a_worker_ends_on_ctrl_c(processes):
    [(worker, _)] = processes.workers(1)
    worker.send(signal.SIGINT)
    code, seconds = wait_until_it_ends(worker)
    assert code == 0
    assert seconds < ENDS_WITHIN_S
    assert worker.err == "worker stopped\n"
