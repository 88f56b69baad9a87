"""The whole cluster, many times over: nothing is lost, doubled or wrong, whatever happens."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import run
from simulated_cluster import Simulation, play

RUN = Path(__file__).parent / "run.py"

DIGEST = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from simulated_cluster import Simulation
digest = hashlib.sha256()
for seed in range(12):
    simulation = Simulation(seed)
    simulation.run()
    digest.update(repr(simulation.trace).encode())
print(digest.hexdigest())
"""


def test_two_hundred_seeds_end_well_and_alike():
    """Each seed is played twice with every invariant checked; together they meet all that the core can do."""
    counts: Counter[str] = Counter()
    for seed in range(200):
        counts.update(play(seed).counts)
    ends = ("stop", "length", "abort", "error", "deadline", "rejected")
    for what in ("preemptions", "cached tokens", "killed", "paused", "probes", "prompt scores", *ends):
        assert counts[what] > 20, (what, counts)
    assert counts["pipelines"] > 220, "hardly any story goes on after a failure"
    assert counts["steps"] > 5000


def test_the_same_seed_gives_the_same_effects_in_another_process():
    """No set and no hash of a string decides anything: other hash seeds, same effects."""
    digest = hashlib.sha256()
    for seed in range(12):
        simulation = Simulation(seed)
        simulation.run()
        digest.update(repr(simulation.trace).encode())
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", DIGEST, str(RUN.parent)]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        assert answer.stdout.strip() == digest.hexdigest()


def test_run_tells_how_many_seeds_it_played():
    answer = subprocess.run(
        [sys.executable, str(RUN), "--seeds", "3"], capture_output=True, text=True, check=False, timeout=60
    )
    assert answer.returncode == 0
    assert "3/3 seeds" in answer.stdout


def test_run_names_the_seed_that_failed(monkeypatch, capsys):
    def fail_at_two(seed: int) -> Simulation:
        assert seed != 2, "seed 2, 0.5 s: a block is free twice"
        return play(seed)

    monkeypatch.setattr(run, "play", fail_at_two)
    monkeypatch.setattr(sys, "argv", ["run.py", "--seeds", "9"])
    assert run.main() == 1
    told = capsys.readouterr().err
    assert "seed 2, 0.5 s: a block is free twice" in told
    assert "--first 2 --seeds 1" in told
