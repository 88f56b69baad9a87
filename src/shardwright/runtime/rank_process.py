"""One rank of a worker, beside rank 0: `python -m shardwright.runtime.rank_process`, started by `runtime.ranks` alone.

It computes its part of what rank 0 computes, and ends when rank 0 does: its standard input closes then, and on Linux
the kernel ends it besides.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from shardwright.errors import ShardwrightError
from shardwright.runtime.lasting_imports import import_for_good
from shardwright.runtime.rank_channel import Channel, Kind, Message
from shardwright.runtime.stage_build import stage_builder
from shardwright.runtime.step_watch import device_state
from shardwright.runtime.stillness import python_threads, thread_state

if TYPE_CHECKING:
    import torch

    from shardwright.model.layer_progress import LayerProgress
    from shardwright.model.stage import Stage
    from shardwright.model.tensor_parallel import RankGroup
    from shardwright.runtime.telemetry import GpuWatch

BEAT_INTERVAL_S = 0.2
_PR_SET_PDEATHSIG = 1  # Linux's


class _BuildStopped(Exception):  # noqa: N818  not an error: nobody wants the stage any more
    """Ends the building of a stage between two tensors."""


class Rank:
    """The rank's state: its group, and the parts of stages that it holds."""

    def __init__(self, channel: Channel, *, rank: int, num_ranks: int, device: str, threads: int) -> None:
        self._channel = channel
        self._rank = rank
        self._num_ranks = num_ranks
        self._device_name = device
        self._threads = threads
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._stages: dict[int, Stage] = {}
        self._steps_done = 0
        self._progress_of: LayerProgress | None = None  # the stage of the last step
        self._gpu: GpuWatch | None = None
        self._device: torch.device
        self._group: RankGroup | None = None

    def run(self) -> None:
        """Do what rank 0 says until it is gone."""
        threading.Thread(target=self._listen, name="control", daemon=True).start()
        threading.Thread(target=self._beat, name="beats", daemon=True).start()
        import_for_good("shardwright.model.stage")  # takes seconds, in which rank 0 has the same to do

        while True:
            message = self._inbox.get()
            match message.kind:
                case Kind.JOIN:
                    self._answer(self._join, message)
                case Kind.BUILD:
                    self._answer(self._build, message)
                case Kind.MEASURE:
                    self._answer(self._measure, message)
                case Kind.CLOSE:
                    self._close(message.fields["key"])
                case Kind.STEP:
                    try:
                        self._step(message)
                    except Exception as exc:  # the top of the step: the other ranks wait for this one in vain
                        self._channel.send(Kind.FAILED, {"step": True, "reason": f"{type(exc).__name__}: {exc}"})
                        raise
                case _:
                    raise AssertionError(message.kind)

    def _listen(self) -> None:
        while (message := self._channel.receive()) is not None:
            if message.kind is Kind.CANCEL:
                self._cancelled.add(message.fields["key"])
            else:
                self._inbox.put(message)
        os._exit(0)  # rank 0 is gone; the compute thread may stand in a sum that will never be complete

    def _beat(self) -> None:
        process = psutil.Process()
        pause = threading.Event()
        while True:
            gpu = self._gpu.sample() if self._gpu is not None else None
            progress = self._progress()
            self._channel.send(
                Kind.BEAT,
                {
                    "process_memory_bytes": process.memory_info().rss,
                    "gpu_utilization": gpu and gpu.utilization,
                    "gpu_memory_used_bytes": gpu and gpu.memory_used,
                    "gpu_memory_total_bytes": gpu and gpu.memory_total,
                    "gpu_temperature_c": gpu and gpu.temperature,
                    "gpu_power_w": gpu and gpu.power,
                    "progress": progress,
                },
            )
            pause.wait(BEAT_INTERVAL_S)

    def _progress(self) -> dict[str, Any] | None:
        """Where the compute thread is. Rank 0 sees by `moves` whether it still is there: these are read first."""
        seen, group = thread_state("self", os.getpid()), self._group
        if seen is None or group is None:
            return None
        progress = self._progress_of
        return {
            "moves": seen.moves,
            "steps_done": self._steps_done,
            "waits": group.waits,
            "python_threads": sorted(python_threads()),
            "device": None if progress is None else device_state(progress),
        }

    def _answer(self, work: Any, message: Message) -> None:
        """Say how it went; what a user can change is told in its own words."""
        try:
            fields = work(message)
        except _BuildStopped:
            self._channel.send(Kind.FAILED, {"kind": "stopped", "reason": "nobody wants the stage any more"})
        except Exception as exc:  # noqa: BLE001  the top of what rank 0 asked for: it becomes rank 0's error
            kind = "user" if isinstance(exc, ShardwrightError) else "bug"
            text = str(exc) if kind == "user" else f"{type(exc).__name__}: {exc}"
            self._channel.send(Kind.FAILED, {"kind": kind, "reason": text})
        else:
            self._channel.send(Kind.DONE, fields)

    def _join(self, message: Message) -> dict[str, Any]:
        import torch

        from shardwright.model.tensor_parallel import join_group
        from shardwright.runtime.measure import device_memory, device_name
        from shardwright.runtime.probe import gpu_address
        from shardwright.runtime.telemetry import GpuProbe, GpuWatch, load_nvml

        torch.set_num_threads(self._threads)
        self._device = torch.device(self._device_name)
        kernels, kernel_dir = message.fields["kernels"], message.fields["kernel_dir"]
        self._kernel_dir = Path(kernel_dir) if kernel_dir is not None else None
        self._group = join_group(
            rank=self._rank,
            num_ranks=self._num_ranks,
            device=self._device,
            meeting=Path(message.fields["meeting"]),
            kernels=Path(kernels) if kernels is not None else None,
        )
        if self._device.type == "cuda":
            self._gpu = GpuWatch(GpuProbe(gpu_address(self._device), nvml=load_nvml()))

        memory = device_memory(self._device)
        return {
            "device_name": device_name(self._device),
            "memory_total_bytes": memory.total,
            "memory_available_bytes": memory.available,
        }

    def _build(self, message: Message) -> dict[str, Any]:
        from shardwright.runtime.weight_receiver import ReceivedTensors

        fields = message.fields
        key = int(fields["key"])

        def progress(_: int) -> None:
            if key in self._cancelled:
                raise _BuildStopped

        stage = stage_builder(fields["stage"])(
            device=self._device_name,
            raw=ReceivedTensors.from_fields(fields["tensors"]),
            progress=progress,
            group=self._group,
            kernel_dir=self._kernel_dir,
        )
        self._stages[key] = stage
        return {"weight_bytes": stage.weight_bytes, "kv_bytes": stage.kv_bytes}

    def _close(self, key: int) -> None:
        self._cancelled.discard(key)
        stage = self._stages.pop(key, None)
        if stage is not None:
            stage.close()

    def _measure(self, message: Message) -> dict[str, Any]:
        from shardwright.runtime.measure import device_memory, measure_speed

        speed = measure_speed(
            self._device, num_threads=self._threads, dtype=message.fields["dtype"], kernel_dir=self._kernel_dir
        )
        memory = device_memory(self._device)
        return {
            "read_bandwidth": speed.read_bandwidth,
            "matrix_rate": speed.matrix_rate,
            "memory_available_bytes": memory.available,
        }

    def _step(self, message: Message) -> None:
        import torch

        from shardwright.model.tensor_parallel import receive_tensors
        from shardwright.wire.limits import WireLimits
        from shardwright.wire.step_codec import decode_step

        threads = message.fields["threads"]
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        step = decode_step(message.data, WireLimits()).step
        assert self._group is not None, "it has joined"
        tensors = receive_tensors(message.fields["tensors"], self._group)
        stage = self._stages[message.fields["key"]]
        self._progress_of = stage.progress
        stage.forward(step, tensors)
        self._steps_done += 1


def main() -> None:
    """Read who this is from the command line, and serve rank 0 over standard input and output."""
    rank, num_ranks, device, threads, parent = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        return  # it died before the kernel was told to tell
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's; this process then ends with it
    writes = os.dup(1)
    os.dup2(2, 1)  # libraries print to standard output, which is the channel
    Rank(
        Channel(reads=0, writes=writes), rank=int(rank), num_ranks=int(num_ranks), device=device, threads=int(threads)
    ).run()


if __name__ == "__main__":
    main()
