"""A step that hangs is noticed, by the thread that computes it or by the device; one that is slow is waited for."""

from __future__ import annotations

import queue
import sys
import threading
import time

import pytest

from shardwright.runtime.step_watch import StepWatch

HUNG_S = 0.4


class Device:
    """As far as a GPU has come with the layers that it was told."""

    def __init__(self, begun=0, done=0):
        self.begun, self.done = begun, done

    def finished(self):
        return self.done


@pytest.fixture
def lost():
    return queue.Queue()


@pytest.fixture
def watch(lost):
    watch = StepWatch(lost.put, hung_s=HUNG_S, first_s=3 * HUNG_S, interval_s=0.05)
    yield watch
    watch.close()
    watch._watcher.join()


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell nothing of threads")
def test_a_compute_thread_that_sleeps_in_a_step_for_ever_is_told_once(watch, lost):
    released = threading.Event()

    def compute():
        with watch.step(None):
            released.wait()

    thread = threading.Thread(target=compute)
    began = time.monotonic()
    thread.start()
    assert lost.get(timeout=10) == "its compute thread has stood still for 0.4 s"
    assert time.monotonic() - began >= HUNG_S
    released.set()
    thread.join()
    assert lost.empty()
    assert not watch._watcher.is_alive()


def test_a_step_that_computes_for_long_is_waited_for(watch, lost):
    with watch.step(None):
        spin(2.5 * HUNG_S)
    assert lost.empty()


def test_nothing_is_told_between_steps(watch, lost):
    for _ in range(3):
        with watch.step(None):
            pass
        time.sleep(HUNG_S)
    assert lost.empty()


def test_a_step_that_fails_is_over(watch, lost):
    def fail():
        with watch.step(Device(begun=2)):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  our own, with nothing to say
        fail()
    time.sleep(2.5 * HUNG_S)
    assert lost.empty()


def compute_on(watch, device, seconds):
    """A step whose thread waits actively for its device, as CUDA does it."""
    with watch.step(device):
        spin(seconds)


def warm(watch, device):
    """The first step of a stage is over."""
    with watch.step(device):
        pass


def test_a_device_that_finishes_no_layer_is_told_though_the_thread_is_busy(watch, lost):
    device = Device(begun=9, done=4)
    warm(watch, device)
    compute_on(watch, device, 2.5 * HUNG_S)
    assert lost.get_nowait() == "its device has not finished a layer for 0.4 s"


def test_a_device_that_goes_on_slowly_is_waited_for(watch, lost):
    device = Device(begun=9)
    warm(watch, device)

    def go_on():
        for _ in range(12):
            time.sleep(HUNG_S / 4)
            device.done += 1

    thread = threading.Thread(target=go_on)
    thread.start()
    compute_on(watch, device, 12 * HUNG_S / 4)
    thread.join()
    assert lost.empty()


def test_what_follows_the_last_layer_may_take_its_time(watch, lost):
    device = Device(begun=9, done=9)
    warm(watch, device)
    compute_on(watch, device, 2.5 * HUNG_S)
    assert lost.empty()


def test_the_first_step_of_a_stage_on_a_device_may_take_longer(watch, lost):
    device = Device(begun=1)
    compute_on(watch, device, 2 * HUNG_S)
    assert lost.empty()
    compute_on(watch, Device(begun=1), 4.5 * HUNG_S)  # another stage's first
    assert lost.get_nowait() == "its device has not finished a layer for 1.2 s"
