"""A rank that stands still in a step takes its worker down within two seconds; one that is only slow does not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from shardwright.config import default_cache_dir
from shardwright.model.deepspeed_kernel import build_kernel
from shardwright.runtime.stillness import thread_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="other systems tell nothing of threads"),
]

FAULTS = '''
import contextlib, ctypes, os, pathlib, subprocess, sys, threading, time

BURN = "import time\\nend = time.monotonic() + 5.0\\nwhile time.monotonic() < end: pass"

def strike(folder, rank):
    """What the file of this rank asks for, if there is one, once."""
    path = pathlib.Path(folder, f"fault-{rank}")
    if not path.exists():
        return
    kind = path.read_text()
    path.unlink()
    if kind == "deadlock beside a busy thread":

        def work():
            while True:
                pass

        threading.Thread(target=work, daemon=True).start()
        kind = "deadlock"
    if kind == "deadlock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    elif kind == "deadlock without beats":
        ctypes.PyDLL(None).sleep(600)  # keeps the interpreter's lock
    elif kind == "device":
        import torch
        torch.cuda._sleep(1 << 62)  # cycles
    elif kind == "slow":
        end = time.process_time() + 3.0
        while time.process_time() < end:
            pass
    elif kind == "starved":  # of its core, which others take, until they end
        cores = os.sched_getaffinity(0)
        core = {min(cores)}
        for _ in range(3):
            os.sched_setaffinity(subprocess.Popen([sys.executable, "-c", BURN]).pid, core)
        os.sched_setaffinity(0, core)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass
        os.sched_setaffinity(0, cores)  # it is starved for as long as they run, not beside whatever else does
        with contextlib.suppress(PermissionError):  # few users may leave the idle class
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
'''
RANK = """#!{python}
import faulthandler, sys
faulthandler.dump_traceback_later(90)  # who waits for what, where a test's patience is about to end
sys.path.insert(0, {folder!r})
sys.argv = sys.argv[2:]  # instead of `python -m module`
from faults import strike
from shardwright.runtime import rank_process

build = rank_process.Rank._build

def build_with_faults(self, message):
    answer = build(self, message)
    for stage in self._stages.values():
        mlp = stage._model.get_submodule("model.layers.2.mlp")
        mlp.register_forward_pre_hook(lambda *_: strike({folder!r}, self._rank))
    return answer

rank_process.Rank._build = build_with_faults
rank_process.main()
"""
PROGRAM = """
import faulthandler, os, pathlib, sys, threading, time
faulthandler.dump_traceback_later(90)
folder, device, all_reduce, fault, rank = sys.argv[1:]
sys.path.insert(0, folder)
sys.executable = folder + "/rank"
import split_models as lab
from faults import strike
from ranked_models import RankedModel
from tiny_models import save_whole
from shardwright.config import default_cache_dir
from shardwright.runtime.ranks import Ranks

struck = 0.0

def lost(what):
    print(f"{time.monotonic() - struck:.2f} s after: {what}", flush=True)
    ranks.kill()
    os._exit(3)

devices = ["cpu"] * 2 if device == "cpu" else ["cuda:0", "cuda:1"]
ranks = Ranks(devices=devices, threads=1, on_lost=lost, say=print)
ranks.join(kernels=default_cache_dir() / "kernels" / "deepspeed", all_reduce=all_reduce)
whole = save_whole("llama", pathlib.Path(folder, "model"))
split = RankedModel(ranks, whole.folder, 1)
mlp = split.stages[0]._stage._model.get_submodule("model.layers.2.mlp")
mlp.register_forward_pre_hook(lambda *_: strike(folder, 0))
expected = lab.whole_answers(whole.model, lab.RAGGED)
assert lab.serve(split, lab.RAGGED) == expected
pathlib.Path(folder, f"fault-{rank}").write_text(fault)
struck = time.monotonic()
assert lab.serve(split, lab.RAGGED) == expected
print("answered", flush=True)
split.close()
ranks.close()
"""


def tell_threads(pid):
    """Print how the threads of a process and of its children are, for whoever reads why they did not end."""
    with contextlib.suppress(psutil.Error):  # one has ended meanwhile; the others are ended all the same
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            for thread in process.threads():
                print(process.pid, thread, thread_state(process.pid, thread.id))  # noqa: T201


@pytest.fixture
def strike(tmp_path):
    """Runs a worker's ranks, one of which a fault befalls in a step; gives the exit code and what was printed."""
    (tmp_path / "model").mkdir()
    (tmp_path / "faults.py").write_text(FAULTS)
    wrapper = tmp_path / "rank"
    wrapper.write_text(RANK.format(python=sys.executable, folder=str(tmp_path)))
    wrapper.chmod(0o700)
    support = str(Path(__file__).parents[2] / "support")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([support, os.environ.get("PYTHONPATH", "")])}

    def run(fault, *, rank=1, all_reduce="gloo", device="cpu"):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), device, all_reduce, fault, str(rank)],
            env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True,
        ) as program:  # fmt: skip
            try:
                out, _ = program.communicate(timeout=100)
            finally:
                if program.poll() is None:
                    tell_threads(program.pid)
                    os.killpg(program.pid, signal.SIGKILL)
        return program.returncode, out.strip().splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def shm():
    """DeepSpeed's shared-memory all-reduce is there. Compiling it takes a minute of two cores, so it is kept."""
    build_kernel(default_cache_dir() / "kernels" / "deepspeed")
    return "shm"


@pytest.fixture(params=["gloo", "shm"])
def all_reduce(request):
    return request.getfixturevalue(request.param) if request.param == "shm" else request.param


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "rank", "who"),
    [
        ("deadlock", 1, "rank 1 (process "),
        ("deadlock", 0, "rank 0 (process "),
        ("deadlock beside a busy thread", 1, "rank 1 (process "),
        ("deadlock beside a busy thread", 0, "rank 0 (process "),
        ("deadlock without beats", 1, ""),
    ],
)
def test_a_rank_that_stands_still_in_a_step_is_lost_though_it_lives(strike, fault, rank, who, all_reduce):
    """Between two sums, while the other rank waits in the next one: asleep, or, in DeepSpeed's kernel, at work."""
    code, line = strike(fault, rank=rank, all_reduce=all_reduce)
    seconds, _, what = line.partition(" s after: ")
    assert code == 3
    assert what.startswith(who)
    assert "still in a step for 1.2 s" in what
    assert "can't compute" in what
    assert 1.0 < float(seconds) < 8.0  # 2 on a quiet machine


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("fault", "rank"), [("slow", 0), ("slow", 1), ("starved", 1)])
def test_a_rank_that_is_slow_is_waited_for(strike, fault, rank, all_reduce):
    """For seconds in one layer of a step, in which the other rank stands still: it computes, or would if it could."""
    code, line = strike(fault, rank=rank, all_reduce=all_reduce)
    assert (code, line) == (0, "answered")


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("fault", "rank"), [("device", 1), ("device", 0), ("deadlock", 1)])
def test_a_rank_that_hangs_on_its_gpu_is_lost_though_it_lives(strike, fault, rank):
    """The other GPU waits in a sum, and both threads have gone on, but for a deadlock."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    code, line = strike(fault, rank=rank, device="cuda", all_reduce="auto")
    seconds, _, what = line.partition(" s after: ")
    assert code == 3
    assert what.startswith("no GPU of this worker has finished a layer of a step for 1.2 s")
    assert 1.0 < float(seconds) < 8.0  # 2 on a quiet machine
