"""Real workers on real GPUs: stages that share one, stages on several, ranks, and what the driver says of them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from real_processes import port_of, processes_in, write_registry
from tiny_models import greedy_answer, save_whole

from shardwright.runtime.measure import resolve_device
from shardwright.runtime.probe import gpu_address
from shardwright.runtime.telemetry import GpuProbe, load_nvml

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 17, 3], [99], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]
NEW_TOKENS = 16


@pytest.fixture(scope="module", params=["gemma3_text", "llama"])
def whole(request, tmp_path_factory):
    return save_whole(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def processes(tmp_path):
    with processes_in(tmp_path) as started:
        yield started


def generate(processes, whole, *options):
    """The tokens and the number of stages of each prompt's answer, from `shardwright generate`."""
    running = processes.run(
        *("generate", "--model", whole.folder, "--dtype", "float32", "--json", "--ignore-eos", "--token-budget", 8),
        *("--max-new-tokens", NEW_TOKENS, "--cache-dir", processes.folder / "cache"),
        *(part for prompt in PROMPTS for part in ("--prompt-ids", ",".join(map(str, prompt)))),
        *options,
    )
    assert running.wait(timeout_s=240) == 0, running.err
    answers = [json.loads(line) for line in running.out.splitlines()]
    return [answer["token_ids"] for answer in answers], [len(answer["stages"]) for answer in answers]


def expected(whole):
    return [greedy_answer(whole.model, prompt, NEW_TOKENS) for prompt in PROMPTS]


def needs_two_gpus():
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs two GPUs, this machine has {count}")


def test_two_workers_share_one_gpu(processes, whole):
    found = generate(processes, whole, "--device", "cuda:0", "--local-workers", 2)
    assert found == (expected(whole), [2] * len(PROMPTS))


def test_two_workers_on_a_gpu_each(processes, whole):
    needs_two_gpus()
    ports = [port_of(processes.worker("--device", f"cuda:{index}")[0]) for index in range(2)]
    registry = write_registry(processes.folder / "workers.json", ports)
    assert generate(processes, whole, "--registry", registry)[0] == expected(whole)


def test_one_worker_of_two_ranks(processes, whole):
    needs_two_gpus()
    assert generate(processes, whole, "--local-workers", 1, "--tensor-parallel", 2)[0] == expected(whole)


def test_a_worker_says_which_gpu_it_computes_on(processes):
    port = port_of(processes.worker("--device", "cuda:0")[0])
    registry = write_registry(processes.folder / "workers.json", [port])
    running = processes.run("workers", "--registry", registry, "--json")
    assert running.wait() == 0, running.err
    assert torch.cuda.get_device_name(0) in running.out


def test_nvml_reads_what_nvidia_smi_reads():
    device = resolve_device("cuda")
    held = torch.ones(256 * 1024**2, dtype=torch.uint8, device=device)  # so that some is in use
    address = gpu_address(device)
    asked = "--query-gpu=memory.total,memory.used,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", asked, "--format=csv,noheader,nounits", f"--id=GPU-{address.uuid}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except FileNotFoundError:
        pytest.skip("nvidia-smi is not installed")
    sample = GpuProbe(address, nvml=load_nvml()).sample()
    total, used, temperature = (field.strip() for field in done.stdout.split(","))
    assert sample.memory_total == pytest.approx(int(total) * 1024**2, rel=0.01)
    assert sample.memory_used == pytest.approx(int(used) * 1024**2, rel=0.1, abs=600 * 1024**2)
    assert sample.memory_used > held.nbytes
    assert 0.0 <= sample.utilization <= 100.0
    if temperature.isdecimal():
        assert sample.temperature == pytest.approx(int(temperature), abs=15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "shardwright", "worker", "--device", "cuda:99", "--host", "127.0.0.1"],
        cwd=tmp_path,
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "cuda:99" in done.stderr
    assert "Traceback" not in done.stderr
