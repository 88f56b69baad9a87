"""A worker that hangs in a step, though its process lives and answers, is ended by itself; the others go on."""

import json
import sys

import pytest
from real_processes import port_of, write_registry
from tiny_models import greedy_answer, prompt_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="other systems tell nothing of threads"),
]

PROMPT = prompt_of(9, seed=1)
NUM_TOKENS = 1500
HANGING_WORKER = """
import os, pathlib, threading
from shardwright.cli import app
from shardwright.model.stage import Stage

forward = Stage.forward

def forward_until_told(self, step, tensors):
    output = forward(self, step, tensors)
    if pathlib.Path(os.environ["TEST_HANG"]).exists():
        threading.Event().wait()
    return output

Stage.forward = forward_until_told
app.main()
"""


@pytest.mark.timeout(240)
def test_a_worker_that_hangs_in_a_step_says_so_and_the_answer_is_made_without_it(processes, tiny, tmp_path):
    """Heartbeats, which another thread sends, go on all the time."""
    hang = tmp_path / "hang"
    options = ("--host", "127.0.0.1", "--port", 0, "--threads", 1, "--cache-dir", tmp_path / "cache")
    hanging = processes.run("worker", *options, program=("-c", HANGING_WORKER), TEST_HANG=str(hang))
    sound, _ = processes.worker("--cache-dir", tmp_path / "cache")
    registry = write_registry(tmp_path / "workers.json", [port_of(hanging), port_of(sound)])
    master = processes.run(
        *("generate", "--registry", registry, "--model", tiny.folder, "--cache-dir", tmp_path / "cache"),
        *("--prompt-ids", ",".join(map(str, PROMPT)), "--max-new-tokens", NUM_TOKENS, "--ignore-eos", "--json"),
    )
    master.wait_for("^ready: 2 stages")
    hang.touch()
    assert hanging.wait(timeout_s=60) == 3
    said = "error: this worker hangs in a step: its compute thread has stood still for 10 s; it can't go on, and ends"
    assert said in hanging.err
    assert master.wait(timeout_s=120) == 0, master.err
    answer = json.loads(master.out)
    assert answer["token_ids"] == greedy_answer(tiny.model, PROMPT, NUM_TOKENS)
    assert "worker1" in master.err
