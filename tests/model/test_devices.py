"""Which device a name means, what it computes in, and how small tensors get there."""

import re

import pytest
import torch

from shardwright.errors import ConfigError
from shardwright.model.attention import StepBatch
from shardwright.model.devices import available_devices, check_dtype, half_dtype, resolve_device, to_device
from shardwright.model.linear import can_pack
from shardwright.runtime import measure
from shardwright.types import SequenceSlice

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that says it has two CUDA GPUs, as far as naming them goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_names_lead_to_devices(two_gpus, name, expected):
    assert str(resolve_device(name)) == expected


def test_auto_is_the_cpu_without_a_gpu(no_gpu):
    assert available_devices() == ("cpu",)
    assert resolve_device("auto") == CPU


def test_auto_is_the_apple_gpu_where_there_is_one(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("mps") == torch.device("mps")


@pytest.mark.parametrize(
    "name", ["gpu", "tpu:0", "", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "CPU", "cpu:1", "mps:0", "cpu\n", "meta"]
)
def test_an_unknown_device_is_refused_with_those_that_exist(two_gpus, name):
    with pytest.raises(ConfigError, match=r"choose auto, cpu, cuda, cuda:N or mps .*cpu, cuda:0, cuda:1"):
        resolve_device(name)


def test_an_absent_device_is_refused_with_those_that_exist(two_gpus):
    with pytest.raises(ConfigError, match=re.escape("'cuda:7', but this machine has only cpu, cuda:0, cuda:1")):
        resolve_device("cuda:7")


def test_a_gpu_on_a_machine_without_one_is_refused(no_gpu):
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(ConfigError, match="this machine has only cpu;"):
            resolve_device(name)


def test_the_launcher_and_the_stage_ask_the_same_question(two_gpus):
    assert measure.resolve_device("cuda") == resolve_device("cuda") == GPU
    with pytest.raises(ConfigError, match="'cuda:2', but this machine has only"):
        measure.resolve_device("cuda:2")


# --- dtypes ------------------------------------------------------------------------------------------


@pytest.fixture(params=[(7, 5), (8, 0), (9, 0)], ids=["turing", "ampere", "hopper"])
def capability(request, monkeypatch):
    """A GPU that says it is of this generation."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Some GPU")
    return request.param


def test_bfloat16_is_for_gpus_that_multiply_it(capability):
    for dtype in (torch.float32, torch.float16):
        check_dtype(dtype, GPU)
    if capability >= (8, 0):
        check_dtype(torch.bfloat16, GPU)
        assert half_dtype(GPU) == "bfloat16"
        return
    assert half_dtype(GPU) == "float16"
    with pytest.raises(ConfigError, match=r"Some GPU, compute capability 7\.5.*--dtype float16 or float32"):
        check_dtype(torch.bfloat16, GPU)


def test_a_cpu_and_other_makers_gpus_take_bfloat16(monkeypatch):
    """ROCm's devices are called cuda too, with capabilities of their own counting."""
    for device in (CPU, torch.device("mps")):
        check_dtype(torch.bfloat16, device)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    check_dtype(torch.bfloat16, GPU)


@pytest.mark.parametrize("device", [GPU, torch.device("mps")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_layers_are_packed_on_a_cpu_only(device, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert not can_pack(dtype, device)


# --- how a step attends ------------------------------------------------------------------------------


def decode_of(seq_id: int, context: int, first_block: int) -> SequenceSlice:
    table = tuple(range(first_block, first_block + -(-context // 16)))
    return SequenceSlice(seq_id=seq_id, start_position=context - 1, token_ids=(5,), block_table=table, sampling=None)


@pytest.mark.parametrize(("device", "num_groups"), [(CPU, 3), (GPU, 1)])
def test_long_decodes_go_alone_on_a_cpu_and_together_on_a_gpu(device, num_groups):
    """A GPU's kernel call costs more than padding; a CPU reads a long run of K and V in place."""
    slices = [decode_of(1, 200, 0), decode_of(2, 300, 20), decode_of(3, 400, 40)]
    batch = StepBatch(slices, windows=[None], block_size=16, dtype=torch.float32, device=CPU)
    batch._device = device  # drafts are made of integers, wherever they go afterwards
    assert len(batch._draft_groups(None)) == num_groups


# --- copies ------------------------------------------------------------------------------------------


def test_only_copies_to_nvidias_gpus_are_pinned_and_not_waited_for():
    seen = []

    class Host:
        device = CPU

        def pin_memory(self):
            seen.append("pinned")
            return self

        def to(self, device, **options):
            seen.append((device, options))

    for device in (CPU, torch.device("mps"), GPU):
        to_device(Host(), device)
    assert seen == [(CPU, {}), (torch.device("mps"), {}), "pinned", (GPU, {"non_blocking": True})]
