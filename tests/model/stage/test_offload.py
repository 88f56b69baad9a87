"""Stages that keep some or all of their layers' weights on disk compute what those with all in memory compute."""

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

import pytest
import split_models as lab
import torch

from shardwright.errors import ConfigError, OffloadError
from shardwright.model import offload, offload_store
from shardwright.model.offload import OffloadPlan
from shardwright.model.offload_store import ALIGNMENT, DiskStore, HostStore, aligned_buffer
from shardwright.runtime.measure import cached_part

FAMILIES = ["gemma", "gemma2", "gemma3_text", "llama", "mixtral", "olmo2", "phi3", "qwen2", "qwen3_moe"]


def all_layers(folder):
    return lambda layers: OffloadPlan(layers=tuple(range(layers.start, layers.end)), tier="nvme", folder=folder)


def every_other_layer(folder):
    return lambda layers: OffloadPlan(layers=tuple(range(layers.start, layers.end, 2)), tier="nvme", folder=folder)


def close_all(split):
    for stage in split.stages:
        stage.close()


def offload_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("offload")]


def open_weight_files():
    """Files of offloaded weights that this process has open, by what the system says of them."""
    links = []
    for number in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(number.readlink()))
    return [link for link in links if offload_store.SUFFIX in link]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_whole_models_with_layers_on_disk(family, make_whole, tmp_path):
    """Ragged batches that sequences join and leave, prompts in chunks, in float32: all layers offloaded, and some."""
    whole = make_whole(family)
    expected = lab.whole_answers(whole.model, lab.RAGGED)
    for num_stages, choose in ((2, all_layers), (1, every_other_layer)):
        split = lab.SplitModel(whole.folder, num_stages, offload=choose(tmp_path))
        assert lab.serve(split, lab.RAGGED, seed=num_stages) == expected, f"{num_stages} stages"
        close_all(split)


def test_each_step_reads_every_offloaded_layer_and_the_first_ones_wait_for_the_next_step(make_whole, tmp_path):
    split = lab.SplitModel(make_whole("llama").folder, 1, offload=every_other_layer(tmp_path))
    stage = split.stages[0]
    plain = lab.SplitModel(make_whole("llama").folder, 1).stages[0]
    assert stage.offloaded_bytes > 0
    assert stage.weight_bytes < plain.weight_bytes  # three layers less, two buffers more
    lab.serve(split, [lab.Asked(prompt=[5], max_new_tokens=4)])
    layer = stage.offloaded_bytes // 3
    steps = 4
    deadline = time.monotonic() + 20
    while stage.offload_counts.read_bytes < (steps * 3 + 2) * layer and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stage.offload_counts.read_bytes == (steps * 3 + 2) * layer  # two are there before they are asked for
    assert stage.offload_counts.wait_s > 0
    close_all(split)


def test_no_thread_and_no_file_is_left_when_a_stage_is_closed(make_whole, tmp_path):
    split = lab.SplitModel(make_whole("llama").folder, 2, offload=all_layers(tmp_path))
    assert len(open_weight_files()) == 2
    assert list(tmp_path.iterdir()) == []  # the files have no names, so that nothing is left of a killed process
    assert offload_threads()
    close_all(split)
    close_all(split)
    assert open_weight_files() == []
    assert offload_threads() == []


def test_a_step_that_failed_between_two_layers_leaves_the_next_step_right(make_whole, tmp_path):
    """The thread has read on behind the layer that failed; the next step begins with the first layer again."""
    whole = make_whole("llama")
    split = lab.SplitModel(whole.folder, 1, offload=all_layers(tmp_path))
    third = split.stages[0]._model.model.layers[2]
    broken = third.mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("broken")))
    for _ in range(3):
        with pytest.raises(ValueError, match="broken"):
            lab.serve(split, lab.RAGGED)
    broken.remove()
    assert lab.serve(split, lab.RAGGED) == lab.whole_answers(whole.model, lab.RAGGED)
    close_all(split)


def test_weights_that_can_not_be_read_back_fail_each_step_with_the_reason(make_whole, tmp_path, monkeypatch):
    split = lab.SplitModel(make_whole("llama").folder, 1, offload=all_layers(tmp_path))
    lab.serve(split, [lab.Asked(prompt=[5], max_new_tokens=2)])

    def preadv(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(offload_store.os, "preadv", preadv)
    for _ in range(2):
        with pytest.raises(OffloadError, match=r"layer \d can't be read back: Input/output error"):
            lab.serve(split, [lab.Asked(prompt=[5], max_new_tokens=9)])
    close_all(split)
    assert offload_threads() == []


def test_a_disk_without_room_is_told_before_anything_is_written(make_whole, tmp_path, monkeypatch):
    monkeypatch.setattr(offload_store, "_KEPT_FREE_BYTES", 1 << 60)
    with pytest.raises(OffloadError, match=r"1 MiB of weights are to be offloaded, but its disk has only 0 MiB"):
        lab.SplitModel(make_whole("llama", hidden_size=96).folder, 1, offload=all_layers(tmp_path))
    assert open_weight_files() == []


def test_a_disk_that_runs_full_while_a_stage_is_loaded_is_told_and_leaves_nothing(make_whole, tmp_path, monkeypatch):
    calls = []

    def pwrite(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(arguments[1])

    monkeypatch.setattr(offload_store.os, "pwrite", pwrite)
    with pytest.raises(OffloadError, match=r"layer 2 can't be written: No space left .*make room or choose"):
        lab.SplitModel(make_whole("llama").folder, 1, offload=all_layers(tmp_path))
    assert open_weight_files() == []


def test_a_stage_that_is_given_up_while_it_is_loaded_leaves_nothing(make_whole, tmp_path):
    folder = make_whole("llama").folder

    def progress(num_bytes):
        if num_bytes > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.build_stage(
            config_json=(folder / "config.json").read_text(), layers=lab.LayerRange(0, 5), is_first=True, is_last=True,
            dtype="float32", device="cpu", num_blocks=4, block_size=4, raw=lab.MemoryTensors.of_folder(folder),
            progress=progress, offload=all_layers(tmp_path)(lab.LayerRange(0, 5)),
        )  # fmt: skip
    assert open_weight_files() == []
    assert offload_threads() == []


def test_a_folder_that_can_not_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OffloadError, match="Not a directory; choose another --cache-dir"):
        DiskStore(tmp_path / "file" / "offload", num_bytes=1)


def test_files_that_a_killed_process_left_are_removed(tmp_path):
    (tmp_path / f"77-abc{offload_store.SUFFIX}").touch()
    DiskStore(tmp_path, num_bytes=1).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("can_bypass", [True, False])
def test_a_store_gives_back_what_it_got(can_bypass, tmp_path, monkeypatch):
    """Past the page cache, and on a file system that can't do that; layers of several pieces and of less than one."""
    if not can_bypass:
        monkeypatch.setattr(offload_store.os, "O_DIRECT", 0)
    monkeypatch.setattr(offload_store, "_PIECE_BYTES", 2 * ALIGNMENT)
    sizes = {3: 7 * ALIGNMENT, 4: ALIGNMENT, 9: 4 * ALIGNMENT}
    layers = {index: aligned_buffer(size).random_(0, 256) for index, size in sizes.items()}
    for store in (DiskStore(tmp_path, num_bytes=1), HostStore(pinned=False)):
        assert getattr(store, "is_direct", can_bypass) in {can_bypass, False}
        for index, data in layers.items():
            store.write(index, data)
        for index in (9, 3, 4, 3):
            into = aligned_buffer(8 * ALIGNMENT)
            store.read(index, into)
            assert torch.equal(into[: sizes[index]], layers[index])
        store.close()


def test_what_was_read_is_not_in_the_page_cache(tmp_path):
    """Or offloaded weights would be in memory all the same, only counted to nobody."""
    store = DiskStore(tmp_path, num_bytes=4 << 20)
    store.write(0, aligned_buffer(4 << 20).random_(0, 256))
    store.read(0, aligned_buffer(4 << 20))
    cached = cached_part(store.fileno(), 4 << 20)
    store.close()
    assert cached < 0.3


def test_layers_in_the_hosts_memory_compute_the_same(make_whole, tmp_path, monkeypatch):
    """The way that a GPU's offloaded layers take, with memory that is not pinned and the CPU in the GPU's place."""
    monkeypatch.setattr(offload, "check_tier", lambda *_: None)
    monkeypatch.setattr(offload, "HostStore", lambda: HostStore(pinned=False))
    whole = make_whole("llama")
    split = lab.SplitModel(
        whole.folder,
        2,
        offload=lambda layers: OffloadPlan(
            layers=tuple(range(layers.start, layers.end)), tier="cpu", folder=tmp_path / "none"
        ),
    )
    assert lab.serve(split, lab.RAGGED) == lab.whole_answers(whole.model, lab.RAGGED)
    assert not (tmp_path / "none").exists()
    close_all(split)


def test_offloading_to_the_hosts_memory_needs_a_gpu(make_whole, tmp_path):
    with pytest.raises(ConfigError, match="the device is cpu; use nvme"):
        lab.SplitModel(
            make_whole("llama").folder,
            1,
            offload=lambda layers: OffloadPlan(layers=(layers.start,), tier="cpu", folder=tmp_path),
        )
