"""What adds up the ranks' tensors: NCCL on GPUs, DeepSpeed's kernel or Gloo on CPUs."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from shardwright.errors import ConfigError
from shardwright.model import deepspeed_kernel, tensor_parallel
from shardwright.model.tensor_parallel import join_group
from shardwright.runtime import measure
from shardwright.runtime.ranks import find_sum_kernel


@pytest.fixture
def joins(monkeypatch):
    """What a process that joins a group asks torch and DeepSpeed for; nothing of it is done."""
    asked = []

    def note(name):
        return lambda *args, **kwargs: asked.append((name, *args, *kwargs.values()))

    comm = SimpleNamespace(init_distributed=note("deepspeed"), get_world_group=lambda: "world")
    monkeypatch.setattr(tensor_parallel, "importlib", SimpleNamespace(import_module=lambda _: comm))
    monkeypatch.setattr(tensor_parallel, "import_deepspeed", note("import"))
    monkeypatch.setattr(tensor_parallel, "load_kernel", note("kernel"))
    monkeypatch.setattr(torch.cuda, "set_device", note("device"))
    monkeypatch.setattr(torch.distributed, "barrier", note("barrier"))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **kwargs: asked.append((backend, kwargs["rank"]))
    )
    with mock.patch.dict(os.environ):
        os.environ.pop("DS_ACCELERATOR", None)
        yield asked


def join(device, folder, *, kernels=None):
    return join_group(rank=1, num_ranks=2, device=torch.device(device), meeting=folder / "meeting", kernels=kernels)


def test_ranks_on_gpus_meet_over_nccl_each_on_its_own(joins, tmp_path):
    group = join("cuda:1", tmp_path)
    assert joins == [
        ("device", torch.device("cuda:1")), ("import", False), ("nccl", 1), ("deepspeed", "nccl", False, False),
    ]  # fmt: skip
    assert (group.all_reduce, group.device) == ("nccl", torch.device("cuda:1"))
    assert "DS_ACCELERATOR" not in os.environ, "DeepSpeed finds the GPU by itself"
    assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_SIZE"]) == ("1", "2")


@pytest.mark.parametrize("with_kernel", [False, True])
def test_ranks_on_cpus_meet_over_gloo_and_sum_by_the_kernel_where_there_is_one(joins, tmp_path, with_kernel):
    group = join("cpu", tmp_path, kernels=tmp_path if with_kernel else None)
    assert ("gloo", 1) in joins
    assert (("kernel", tmp_path) in joins) == with_kernel
    assert group.all_reduce == ("shm" if with_kernel else "gloo")
    assert os.environ["DS_ACCELERATOR"] == "cpu"


@pytest.fixture
def said():
    return []


@pytest.fixture
def find(monkeypatch, tmp_path, said):
    """Looks for the kernel with two threads on so many cores."""

    def look(all_reduce, *, cores=2, built=True):
        def build(folder):
            if not built:
                raise ConfigError("the compiler said no")
            return folder / "built"

        monkeypatch.setattr(measure, "usable_cores", lambda: cores)
        monkeypatch.setattr(deepspeed_kernel, "build_kernel", build)
        return find_sum_kernel(tmp_path / "kernels", all_reduce, num_threads=2, say=said.append)

    return look


def test_the_kernel_is_taken_where_every_thread_has_a_core(find, tmp_path, said):
    assert find("auto") == tmp_path / "kernels" / "built"
    assert "compiled for the first time" in said[0]
    assert find("auto", cores=1) is None


def test_what_was_asked_for_is_taken_whatever_the_cores(find, tmp_path):
    assert find("shm", cores=1) == tmp_path / "kernels" / "built"
    assert find("gloo", cores=64) is None


def test_without_a_compiler_gloo_is_taken_and_what_is_missing_is_said(find, said, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ninja" else f"/usr/bin/{name}")
    assert find("auto", built=False) is None
    assert "(ninja not found); it needs g++ and ninja. Gloo's slower one is used instead" in said[-1]
    with pytest.raises(ConfigError, match=r"ninja not found.*--all-reduce gloo does without"):
        find("shm", built=False)
