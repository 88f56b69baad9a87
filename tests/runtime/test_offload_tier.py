"""What a worker finds out about the place that it may keep weights in beside its memory."""

import pytest
import torch

from shardwright.errors import ConfigError
from shardwright.model import offload_store
from shardwright.runtime import offload_tier
from shardwright.runtime.measure import Speed
from shardwright.runtime.offload_tier import find_tier
from shardwright.runtime.probe import Machine

CPU = torch.device("cpu")
SPEED = Speed(read_bandwidth=1.0, matrix_rate=1.0)


def test_a_disk_is_measured_and_nothing_is_left_on_it(tmp_path):
    tier = find_tier("nvme", CPU, tmp_path)
    assert tier.bandwidth > 1e6
    assert tier.room_bytes() > 0
    assert list((tmp_path / "offload").iterdir()) == []


def test_a_folder_that_can_not_be_used_is_told_with_what_to_do(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError, match=r"offload is 'nvme', but .*Not a directory; choose another --cache-dir"):
        find_tier("nvme", CPU, tmp_path / "cache")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(offload_store, "_KEPT_FREE_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match=r"offload is 'nvme', but .*has only 0 MiB to spare"):
        find_tier("nvme", CPU, tmp_path)


def test_a_folder_in_memory_is_refused(tmp_path, monkeypatch):
    """Weights there would be in memory all the same."""
    monkeypatch.setattr(offload_store.os, "O_DIRECT", 0)
    monkeypatch.setattr(offload_tier, "cached_part", lambda *_: 1.0)
    with pytest.raises(ConfigError, match="lies in memory"):
        find_tier("nvme", CPU, tmp_path)


def test_the_hosts_memory_is_refused_without_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match=r"offload is 'cpu', .* but the device is cpu; use nvme"):
        find_tier("cpu", CPU, tmp_path)


def test_a_worker_tells_its_tier_and_one_without_tells_none(tmp_path, monkeypatch):
    monkeypatch.setattr("shardwright.runtime.probe.measure_speed", lambda *_, **__: SPEED)
    about = Machine(device="cpu", threads=1, memory_bytes=0, cache_dir=tmp_path, offload="nvme").describe()
    assert about.offload == "nvme"
    assert about.offload_bytes > 0 < about.offload_bandwidth
    about = Machine(device="cpu", threads=1, memory_bytes=0, cache_dir=tmp_path).describe()
    assert (about.offload, about.offload_bytes, about.offload_bandwidth) == ("", 0, 0.0)
