"""A worker of two ranks goes down with either of them, and says why; the pipeline sees a lost worker."""

import signal
import time

import pytest
from real_processes import eventually, write_registry
from tiny_models import greedy_answer, prompt_of

pytestmark = pytest.mark.slow

PROMPT = prompt_of(9, seed=1)
IDS = ",".join(map(str, PROMPT))
RANKS = ("--tensor-parallel", 2, "--all-reduce", "gloo")


def rank_of(worker):
    """The process of a worker's rank 1."""
    (rank,) = [p for p in worker.descendants() if "shardwright.runtime.rank_process" in p.cmdline()]
    return rank


@pytest.mark.parametrize(
    ("number", "why"),
    [(signal.SIGKILL, "ended with signal SIGKILL"), (signal.SIGSTOP, "has not moved for 1.5 s")],
)
def test_a_rank_that_dies_or_hangs_takes_its_worker_and_the_request_down(processes, tiny, tmp_path, number, why):
    """While a long answer is under way; the master names the worker."""
    ((worker, port),) = processes.workers(1, *RANKS, "--cache-dir", tmp_path / "cache")
    registry = write_registry(tmp_path / "workers.json", [port])
    master = processes.run(
        *("generate", "--registry", registry, "--model", tiny.folder, "--cache-dir", tmp_path / "cache"),
        *("--prompt-ids", IDS, "--max-new-tokens", 30000, "--ignore-eos", "--json"),
    )
    master.wait_for("^ready: 1 stage")
    rank = rank_of(worker)
    began = time.monotonic()
    rank.send_signal(number)
    assert worker.wait(timeout_s=30) == 3
    seconds = time.monotonic() - began
    assert f"error: rank 1 (process {rank.pid}, cpu) {why}" in worker.err
    assert "Traceback" not in worker.err
    assert seconds < 8.0  # 2 on a quiet machine
    assert eventually(lambda: worker.descendants() == [])
    assert master.wait(timeout_s=60) != 0
    assert "worker1" in master.err


def test_a_killed_rank_0_leaves_no_rank_behind_and_an_ended_one_neither(processes, tmp_path):
    workers = processes.workers(2, *RANKS, "--cache-dir", tmp_path / "cache")
    for number, (worker, _) in zip((signal.SIGKILL, signal.SIGTERM), workers, strict=True):
        assert len(worker.descendants()) == 1
        worker.send(number)
        worker.wait(timeout_s=30)
        assert eventually(lambda worker=worker: worker.descendants() == [])


def test_generate_on_workers_of_two_ranks_answers_as_the_whole_model(processes, tiny, tmp_path):
    """Four processes: two stages of two ranks, over gRPC."""
    run = processes.run(
        *("generate", "--model", tiny.folder, "--cache-dir", tmp_path / "cache", "--local-workers", 2),
        *("--tensor-parallel", 2, "--prompt-ids", IDS, "--max-new-tokens", 9, "--ignore-eos", "--json"),
        SHARDWRIGHT_ALL_REDUCE="gloo",
    )
    assert run.wait(timeout_s=120) == 0, run.err
    assert f'"token_ids": {greedy_answer(tiny.model, PROMPT, 9)}' in run.out
    assert run.descendants() == []
