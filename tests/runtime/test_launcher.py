"""Local workers that die are started again on their ports, a few times in a row. A shell script stands for a worker."""

import asyncio
import os
import signal
import sys

import psutil
import pytest

from shardwright.runtime import launcher
from shardwright.runtime.launcher import LocalWorkers

SCRIPT = """#!/bin/sh
while [ "$1" != --port ]; do shift; done
[ -e "{folder}/broken" ] && {{ echo "$$ $2" >> "{folder}/starts"; exit 7; }}
echo "$$ $2" >> "{folder}/starts"
[ "$2" = 0 ] && echo "Worker node started on port $((40000 + $(wc -l < "{folder}/starts")))"
exec cat > /dev/null
"""


class Workers(LocalWorkers):
    """Local workers, and what was started for them: in the script's folder, a line for each process and its port."""

    folder = None

    @property
    def starts(self):
        path = self.folder / "starts"
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(map(int, line.split())) for line in lines]

    def break_(self):
        """From now on a process ends as soon as it was started."""
        (self.folder / "broken").touch()

    def mend(self):
        (self.folder / "broken").unlink()


@pytest.fixture
def local_workers(tmp_path, monkeypatch):
    """Makes local workers whose processes are the script."""
    script = tmp_path / "python"
    script.write_text(SCRIPT.format(folder=tmp_path))
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(launcher, "FIRST_RESTART_S", 0.01)
    monkeypatch.setattr(Workers, "folder", tmp_path)
    return Workers


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def until(condition):
    async with asyncio.timeout(20.0):
        while not condition():  # noqa: ASYNC110  processes announce themselves to nobody
            await asyncio.sleep(0.005)


async def test_a_worker_that_was_killed_is_started_again_on_its_port_and_the_others_are_left_alone(local_workers):
    async with local_workers(2, keep=True) as workers:
        first, second = workers.pids
        ports = {pid: entry.port for pid, entry in zip(workers.pids, workers.entries, strict=True)}
        kill(first)
        await until(lambda: workers.pids[0] != first)
        assert workers.pids[1] == second
        [pid] = workers.pids[:1]
        await until(lambda: len(workers.starts) == 3)
        assert workers.starts[-1] == (pid, ports[first])
        assert is_running(pid)
        assert [entry.port for entry in workers.entries] == [ports[first], ports[second]]
    assert not any(map(is_running, (pid, second))), "it ends with the others"


async def test_without_keep_a_worker_that_was_killed_stays_dead(local_workers):
    async with local_workers(1) as workers:
        kill(workers.pids[0])
        await asyncio.sleep(0.2)
        assert len(workers.starts) == 1


async def test_a_worker_that_dies_again_and_again_is_given_up_after_growing_pauses(local_workers, monkeypatch, caplog):
    pauses = []
    sleep = asyncio.sleep

    async def note(seconds):
        pauses.append(seconds)
        await sleep(0)

    async with local_workers(1, keep=True) as workers:
        monkeypatch.setattr(launcher.asyncio, "sleep", note)
        workers.break_()
        kill(workers.pids[0])
        [keeper] = workers._keepers
        await keeper
        assert len(workers.starts) == 1 + launcher.MAX_RESTARTS
        assert pauses == pytest.approx([0.01 * 2**n for n in range(launcher.MAX_RESTARTS)])
    assert "local worker 0 ended with exit code 7 again; it is not started any more" in caplog.text


async def test_a_worker_that_lived_for_long_begins_a_new_row_of_restarts(local_workers, monkeypatch):
    monkeypatch.setattr(launcher, "STABLE_S", 0.0)  # so did each
    async with local_workers(1, keep=True) as workers:
        for _ in range(launcher.MAX_RESTARTS + 2):
            [victim] = workers.pids
            kill(victim)
            await until(lambda victim=victim: workers.pids != [victim])
        assert is_running(workers.pids[0])


async def test_a_worker_that_can_be_started_at_last_is_kept(local_workers):
    async with local_workers(1, keep=True) as workers:
        workers.break_()
        kill(workers.pids[0])
        await until(lambda: len(workers.starts) >= 2)
        workers.mend()
        await until(lambda: len(workers.starts) >= 3 and workers.pids == [workers.starts[-1][0]])
        await asyncio.sleep(0.1)
        assert is_running(workers.pids[0])


async def test_workers_that_are_stopped_are_not_started_again(local_workers, monkeypatch):
    """Neither one that ends because of that, nor one that died before and whose pause is not over."""
    monkeypatch.setattr(launcher, "FIRST_RESTART_S", 60.0)
    async with asyncio.timeout(20.0), local_workers(2, keep=True) as workers:
        pids = workers.pids
        kill(pids[0])
        await until(lambda: workers._processes[0].returncode is not None)
        await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "nobody is left who would start one"
    assert len(workers.starts) == 2
    assert not any(map(is_running, pids))
