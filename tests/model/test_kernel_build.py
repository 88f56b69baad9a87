"""Compilers run where nobody else compiles, and end with whoever waits for them."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from shardwright.config import default_cache_dir
from shardwright.errors import ConfigError
from shardwright.model import deepspeed_kernel
from shardwright.model.deepspeed_kernel import build_kernel
from shardwright.model.kernel_build import BuildTimeoutError, locked, locked_if_free, run_build, stop_building


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def is_gone(pid):
    """Whether no such process runs; one that nobody has waited for yet is gone too."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def compiler_with_child(tmp_path):
    """A compiler that waits for a child of its own for ever, as drivers do, and a file with both process ids."""
    pids = tmp_path / "pids"
    script = f'sleep 600 & echo "$$ $!" > {pids}.part; mv {pids}.part {pids}; wait'
    return ["/bin/sh", "-c", script], pids


def test_the_exit_code_and_the_errors_of_a_compiler_come_back():
    assert run_build(["/bin/sh", "-c", "echo ignored; echo wrong >&2; exit 3"]) == (3, "wrong\n")


def test_a_compiler_that_is_stopped_ends_with_its_children(tmp_path):
    command, pids = compiler_with_child(tmp_path)
    results = []
    builder = threading.Thread(target=lambda: results.append(run_build(command)))
    builder.start()
    wait_until(pids.exists)
    stop_building()
    builder.join(20)
    assert results == [(-signal.SIGKILL, "")]
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: is_gone(pid))


def test_a_compiler_that_takes_too_long_ends_with_its_children(tmp_path):
    command, pids = compiler_with_child(tmp_path)
    with pytest.raises(BuildTimeoutError, match=r"/bin/sh took longer than 1 s"):
        run_build(command, timeout_s=1)
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: is_gone(pid))


def test_a_folder_is_one_process_s_at_a_time(tmp_path):
    with locked(tmp_path), locked_if_free(tmp_path) as is_free:
        assert not is_free
    with locked_if_free(tmp_path) as is_free:
        assert is_free
        with locked_if_free(tmp_path) as is_free_for_another:
            assert not is_free_for_another


# --- DeepSpeed's -----------------------------------------------------------------------------------------------


def test_deepspeed_s_kernel_is_compiled_once_by_a_process_of_its_own(tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        return 0, ""

    monkeypatch.setattr(deepspeed_kernel, "run_build", run)
    kernels = build_kernel(tmp_path / "deepspeed")
    assert build_kernel(tmp_path / "deepspeed") == kernels
    assert kernels.parent == tmp_path / "deepspeed"
    assert commands == [[sys.executable, "-m", "shardwright.model.deepspeed_kernel", str(kernels)]]


def test_deepspeed_s_kernel_is_another_in_another_environment(tmp_path, monkeypatch):
    """The builder would compile it anew each time that the other one was used in between."""
    monkeypatch.setattr(deepspeed_kernel, "run_build", lambda _: (0, ""))
    here = build_kernel(tmp_path)
    elsewhere = SimpleNamespace(origin=str(tmp_path / "site-packages" / "deepspeed" / "__init__.py"))
    with monkeypatch.context() as moved:
        moved.setattr(importlib.util, "find_spec", lambda _: elsewhere)
        assert build_kernel(tmp_path) != here
    assert build_kernel(tmp_path) == here


def test_what_could_not_be_compiled_is_tried_again_and_its_last_words_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_kernel, "run_build", lambda _: (1, "a warning\nninja is not installed\n"))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^ninja is not installed$"):
            build_kernel(tmp_path / "deepspeed")


def test_the_compilation_of_deepspeed_s_kernel_ends_with_a_worker_that_is_killed(tmp_path):
    """DeepSpeed is a stand-in whose builder starts a process, as ninja is started, and waits for it."""
    package = tmp_path / "deepspeed"
    package.mkdir()
    pids = tmp_path / "pids"
    (package / "__init__.py").write_text("class ops: pass\n")
    (package / "accelerator.py").write_text(
        textwrap.dedent(f"""
            import os, pathlib, subprocess

            class Accelerator:
                def create_op_builder(self, name):
                    return self

                def load(self):
                    compiler = subprocess.Popen(["sleep", "600"])
                    part = pathlib.Path({str(pids)!r} + ".part")
                    part.write_text(f"{{os.getpid()}} {{compiler.pid}}")
                    part.rename({str(pids)!r})
                    compiler.wait()

            get_accelerator = Accelerator
        """)
    )
    kernels = tmp_path / "kernels" / "of-this-cpu"
    code = textwrap.dedent(f"""
        import sys
        from shardwright.model.kernel_build import run_build
        run_build([sys.executable, "-m", "shardwright.model.deepspeed_kernel", {str(kernels)!r}])
    """)
    path = os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))
    worker = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    try:
        wait_until(pids.exists)
        with locked_if_free(kernels.parent) as is_free:
            assert not is_free, "nobody else may compile meanwhile"
    finally:
        worker.kill()
        worker.wait()
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: is_gone(pid))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="it is for Linux")
def test_ranks_load_what_was_compiled_though_its_sources_are_younger(tmp_path):
    """As after a reinstallation. Nothing could be compiled here: there is no compiler on the path."""
    kernels = tmp_path / "kernels" / "of-this-cpu"
    shutil.copytree(build_kernel(default_cache_dir() / "kernels" / "deepspeed"), kernels)
    old = [path for path in kernels.rglob("*") if path.is_file()]
    assert any(path.suffix == ".so" for path in old)
    for path in old:
        os.utime(path, (0, 0))
    code = textwrap.dedent(f"""
        import pathlib
        from shardwright.model.deepspeed_kernel import import_deepspeed, load_kernel
        deepspeed = import_deepspeed(kernel=True)
        load_kernel(pathlib.Path({str(kernels)!r}))
        builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
        print(builder.load().__spec__.origin)
    """)
    environ = {**os.environ, "PATH": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, [str(next(kernels.rglob("*.so")))]), done.stderr
