"""`make gpu-check` tells what happened, and makes nothing of a machine without GPUs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def machine_with(tool, num_gpus):
    gpu = tool.Gpu(name="Some | GPU", capability="9.0", memory_bytes=80 * 10**9)
    return tool.Machine(
        system="Linux",
        python="3.12.1",
        torch="2.13.0",
        cuda="13.0",
        driver="580.1",
        transformers="5.23.0",
        shardwright="0.1",
        gpus=(gpu,) * num_gpus,
    )


def run_of(tool, *outcomes, exit_code=0):
    made = [tool.Outcome(name=f"a.py::{n}", outcome=word, seconds=1.5, reason=why) for n, word, why in outcomes]
    return tool.TestRun(outcomes=tuple(made), exit_code=exit_code)


def speed_of(tool, device):
    figure = tool.Figure(what="decode of 1", tokens_per_s=750.0, limit_tokens_per_s=1000.0, bound_by="reading weights")
    return tool.Speed(
        device=device,
        shape="16 layers",
        dtype="bfloat16",
        read_bandwidth=3e12,
        matrix_rate=8e14,
        figures=(figure,),
    )


def check(tool, folder, run, *, num_gpus=1, speed=None):
    path = folder / "there" / "report.md"
    code = tool.check(
        report_path=path,
        machine=machine_with(tool, num_gpus),
        tests=lambda: run,
        speed=speed or (lambda device: speed_of(tool, device)),
    )
    return code, path.read_text(), json.loads(path.with_suffix(".json").read_text())


GOOD = [("test_one", "passed", ""), ("test_two_gpus", "skipped", "needs two GPUs, this machine has 1")]


def test_a_good_run_is_reported_with_its_figures_and_what_was_left_out(tool, tmp_path):
    code, text, fields = check(tool, tmp_path, run_of(tool, *GOOD), num_gpus=2)
    assert code == 0
    assert "**Passed**: 1 tests passed, 0 failed, 1 skipped." in text
    assert "| a.py::test_two_gpus | skipped | 1.5 | needs two GPUs, this machine has 1 |" in text
    assert "| decode of 1 | 750 | 1000 | 75% | reading weights |" in text
    assert text.count("| Some \\| GPU | 9.0 | 80.0 GB |") == 2
    assert fields["passed"] is True
    assert [s["device"] for s in fields["speeds"]] == ["cuda:0", "cuda:1"]
    assert fields["speeds"][0]["figures"][0]["share_of_limit"] == 0.75
    assert fields["machine"]["driver"] == "580.1"
    assert [o["outcome"] for o in fields["tests"]["outcomes"]] == ["passed", "skipped"]


@pytest.mark.parametrize(
    ("outcomes", "exit_code", "problem"),
    [
        ([*GOOD, ("test_three", "failed", "assert 1 == 2")], 1, "1 of 3 tests failed"),
        ([("test_two", "skipped", "no")], 0, "no test passed"),
        ([], 5, "no test passed"),
        (GOOD, 2, "pytest ended with 2 before all tests were through"),
        (GOOD, -11, "pytest ended with -11 before all tests were through"),
        (GOOD, 1, "pytest failed, but no test did"),
    ],
)
def test_what_is_no_success_is_not_reported_as_one(tool, tmp_path, capsys, *, outcomes, exit_code, problem):
    code, text, fields = check(tool, tmp_path, run_of(tool, *outcomes, exit_code=exit_code))
    assert code == 1
    assert "**Failed**" in text
    assert f"- {problem}" in text
    assert fields["passed"] is False
    assert problem in fields["problems"]
    assert problem in capsys.readouterr().err


def test_failed_tests_come_first(tool, tmp_path):
    outcomes = [("a", "passed", ""), ("b", "skipped", "why"), ("c", "failed", "assert 1\n  == 2")]
    _, text, _ = check(tool, tmp_path, run_of(tool, *outcomes, exit_code=1))
    assert text.index("a.py::c | failed | 1.5 | assert 1 == 2") < text.index("a.py::b") < text.index("a.py::a")


def test_a_speed_that_cannot_be_measured_is_a_failure(tool, tmp_path):
    def broken(device):
        raise RuntimeError(f"out of memory on {device}")

    code, text, fields = check(tool, tmp_path, run_of(tool, *GOOD), speed=broken)
    assert code == 1
    assert "cuda:0: not measured, RuntimeError: out of memory on cuda:0" in text
    assert fields["speeds"][0]["figures"] == []


def test_without_a_gpu_nothing_is_run_and_nothing_written(tool, tmp_path, capsys):
    def never(*_):
        raise AssertionError("there is nothing to run on")

    path = tmp_path / "report.md"
    assert tool.check(report_path=path, machine=machine_with(tool, 0), tests=never, speed=never) == 2
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert said == "torch 2.13.0 (built for CUDA: 13.0) finds no GPU here, so nothing was checked.\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_command_says_so_itself(tmp_path):
    command = [sys.executable, str(SCRIPT), "--report", str(tmp_path / "report.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "finds no GPU here" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_outcomes_are_read_from_what_pytest_writes(tool, tmp_path):
    test = tmp_path / "test_some.py"
    test.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_left(): pytest.skip('needs two GPUs')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no driver')\n"
        "def test_unset(broken): pass\n"
    )
    found = tmp_path / "outcomes.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={found}", str(test)],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    outcomes = {o.name.partition("::")[2]: o for o in tool.read_outcomes(found)}
    assert {name: o.outcome for name, o in outcomes.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_left": "skipped",
        "test_unset": "failed",
    }
    assert outcomes["test_left"].reason == "needs two GPUs"
    assert "assert 1 == 2" in outcomes["test_bad"].reason
    assert "no driver" in outcomes["test_unset"].reason
    assert tool.read_outcomes(tmp_path / "none.xml") == ()


def test_a_stages_speed_is_measured_against_the_devices_limits(tool):
    """On the CPU, with a model of a few kilobytes: what is measured, not how fast it is."""
    shape = tool.Shape(
        hidden=64, layers=2, intermediate=96, heads=4, kv_heads=2, vocabulary=151, context=20, prompt=40, batches=(1, 3)
    )
    speed = tool.measure_stage("cpu", shape, repeats=2)
    assert [f.what for f in speed.figures] == ["decode of 1", "decode of 3", "prefill of 40"]
    assert all(f.tokens_per_s > 0 < f.limit_tokens_per_s for f in speed.figures)
    assert speed.read_bandwidth > 0 < speed.matrix_rate
    weights = 2 * (2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3 + 2 * 64) + 64 + 151 * 64)  # bytes of a step
    by_reading = speed.read_bandwidth / weights
    assert speed.figures[0].limit_tokens_per_s == pytest.approx(min(by_reading, speed.matrix_rate / weights), rel=0.01)
