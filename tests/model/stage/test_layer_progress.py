"""What a device has finished is counted in the order in which it was told, on whichever thread one asks."""

import pytest
import torch
from fake_device import FakeDevice
from split_models import Asked, SplitModel, serve

from shardwright.model import layer_progress as progress_module
from shardwright.model.layer_progress import LayerProgress, layer_progress


@pytest.fixture
def device():
    return FakeDevice()


def test_layers_count_as_finished_when_the_device_says_so(device):
    progress = LayerProgress(device.mark)
    for _ in range(5):
        progress.mark()
    assert (progress.begun, progress.finished()) == (5, 0)
    device.done = 3
    assert progress.finished() == 3
    assert progress.finished() == 3
    device.done = 5
    assert (progress.begun, progress.finished()) == (5, 5)


def test_marks_that_nobody_asks_for_do_not_pile_up(device):
    progress = LayerProgress(device.mark)
    for _ in range(3 * progress_module._MAX_OPEN):
        progress.mark()
        device.done += 1
    assert len(progress._open) <= progress_module._MAX_OPEN
    assert progress.finished() == progress.begun == 3 * progress_module._MAX_OPEN


def test_a_stage_marks_each_of_its_layers_in_each_step(make_whole, device, monkeypatch):
    monkeypatch.setattr("shardwright.model.stage.layer_progress", lambda _: LayerProgress(device.mark))
    split = SplitModel(make_whole("llama").folder, 2)
    serve(split, [Asked([5, 17, 3], max_new_tokens=4)])
    assert split.steps == 4
    assert [stage.progress.begun for stage in split.stages] == [4 * len(stage.layers) for stage in split.stages]


def test_layers_on_a_cpu_are_finished_when_their_call_returns():
    assert layer_progress(torch.device("cpu")) is None
