"""Ranks' processes: one that dies or stands still is noticed, and none outlives rank 0."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from real_processes import eventually

from shardwright.errors import ClusterError, ConfigError
from shardwright.runtime.rank_channel import Channel, Kind
from shardwright.runtime.ranks import Ranks, rank_devices
from shardwright.types import StepInput

PROGRAM = """
import time
from shardwright.runtime.ranks import Ranks
ranks = Ranks(devices=["cpu"] * 3, threads=1, on_lost=print, say=print)
while len(ranks.loads()) < 2:
    time.sleep(0.02)
print(*ranks.pids, flush=True)
time.sleep(600)
"""


@pytest.fixture
def watched():
    """Two ranks beside rank 0 that have not met, and what is told when one is lost."""
    lost = queue.Queue()
    ranks = Ranks(devices=["cpu"] * 3, threads=1, on_lost=lost.put, say=print)
    yield ranks, lost
    ranks.kill()
    for each in ranks._processes:
        each.process.wait()
        each.listener.join()
        each.process.stdin.close()
        each.process.stdout.close()


def beating(ranks):
    """Wait for every rank's first sign of life, and count them as joined from then on."""
    assert eventually(lambda: all(each.figures for each in ranks._processes))
    for each in ranks._processes:
        each.watched.joined()


def test_a_rank_that_is_killed_is_named_with_its_signal(watched):
    ranks, lost = watched
    beating(ranks)
    os.kill(ranks.pids[1], signal.SIGKILL)
    what = lost.get(timeout=10)
    assert what.startswith(f"rank 2 (process {ranks.pids[1]}, cpu) ended with signal SIGKILL")
    assert "can't compute" in what


@pytest.mark.parametrize("killed", [False, True])
def test_a_step_whose_sum_breaks_since_a_rank_is_gone_names_the_rank(watched, monkeypatch, killed):
    """What the transport says of the broken connection is no news to anybody; a fault of rank 0's own is."""
    ranks, lost = watched
    monkeypatch.setattr(ranks, "_group", SimpleNamespace(waits=True))
    monkeypatch.setattr(ranks, "_tell", lambda *_: None)  # they hold no stage
    beating(ranks)
    expected = (ClusterError, "a rank of this worker is gone") if killed else (ConnectionError, "reset by peer")

    def break_a_step():
        with ranks._lead(1, StepInput(epoch=1, step=1, slices=()), {}, None):
            if killed:
                os.kill(ranks.pids[1], signal.SIGKILL)
            raise ConnectionError("reset by peer")

    with pytest.raises(expected[0], match=expected[1]):
        break_a_step()
    what = lost.get(timeout=10)
    assert (
        "ended with signal SIGKILL" if killed else "rank 0 failed in a step: ConnectionError: reset by peer"
    ) in what


def test_a_rank_that_stands_still_is_noticed_once(watched):
    ranks, lost = watched
    beating(ranks)
    os.kill(ranks.pids[0], signal.SIGSTOP)
    began = time.monotonic()
    assert lost.get(timeout=10).startswith(f"rank 1 (process {ranks.pids[0]}, cpu) has not moved for 1.5 s")
    assert time.monotonic() - began > 1.0  # not at the first late beat
    ranks.kill()
    assert lost.empty()


def test_beats_tell_what_a_ranks_process_holds(watched):
    ranks, _ = watched
    beating(ranks)
    loads = ranks.loads()
    assert [(load.rank, load.device, load.gpu_utilization) for load in loads] == [(1, "cpu", None), (2, "cpu", None)]

    def all_are_right():  # they import what they will need, and grow
        held = [psutil.Process(pid).memory_info().rss for pid in ranks.pids]
        return all(0.8 < load.process_memory_bytes / rss < 1.25 for load, rss in zip(ranks.loads(), held, strict=True))

    assert eventually(all_are_right)


def test_no_rank_outlives_a_killed_rank_0(tmp_path):
    """Also one that stands still and can't see its input end."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, cwd=tmp_path, text=True) as program:
        pids = [int(word) for word in program.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(pids[1], signal.SIGSTOP)
        program.kill()
        assert eventually(lambda: not any(alive(pid) for pid in pids))


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_channel_carries_json_and_bytes_whole():
    reads, writes = os.pipe()
    channel = Channel(reads=reads, writes=writes)
    channel.send(Kind.STEP, {"key": 3, "tensors": [["hidden", "float32", [4, 8]]]}, b"\0\x80" * 1000)
    channel.send(Kind.CLOSE, {"key": 3})
    os.close(writes)
    step, close, end = channel.receive(), channel.receive(), channel.receive()
    os.close(reads)
    assert (step.kind, step.fields["tensors"], step.data) == (
        Kind.STEP,
        [["hidden", "float32", [4, 8]]],
        b"\0\x80" * 1000,
    )
    assert (close.kind, close.fields) == (Kind.CLOSE, {"key": 3})
    assert end is None


def test_ranks_take_the_devices_from_the_first_on(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert rank_devices(torch.device("cpu"), 2) == ["cpu", "cpu"]
    assert rank_devices(torch.device("cuda", 1), 3) == ["cuda:1", "cuda:2", "cuda:3"]
    with pytest.raises(ConfigError, match="--tensor-parallel 4 takes cuda:1 to cuda:4, but this machine has 4 GPUs"):
        rank_devices(torch.device("cuda", 1), 4)
    with pytest.raises(ConfigError, match="not on mps"):
        rank_devices(torch.device("mps"), 2)
