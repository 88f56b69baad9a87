"""Rank 0's view of the other ranks of its worker: starts them, leads them through each step, and watches them.

A rank that dies, stands still or fails within a step takes the whole worker down: what it did not compute can't be
made up for, and the others would wait for it for ever.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shardwright.errors import ClusterError, ConfigError, UnsupportedModelError
from shardwright.runtime.rank_channel import Channel, Kind, Message
from shardwright.runtime.rank_watch import RankWatch, WatchedRank
from shardwright.runtime.stage_build import stage_builder, stage_fields
from shardwright.types import RankLoad, StepInput

if TYPE_CHECKING:
    import torch

    from shardwright.model.layer_progress import LayerProgress
    from shardwright.model.raw_tensors import RawTensors
    from shardwright.model.stage import Stage, StageOutput
    from shardwright.model.tensor_parallel import RankGroup
    from shardwright.runtime.measure import Speed
    from shardwright.types import StageLoad

JOIN_TIMEOUT_S = 180.0
_END_TIMEOUT_S = 2.0
_CAUSE_S = 0.5
"""How long a sum that breaks waits for the news of the rank that broke it."""

_GONE = "a rank of this worker is gone"


@dataclass(slots=True)
class _Process:
    """One rank's process, and what it said last."""

    watched: WatchedRank
    process: subprocess.Popen[bytes]
    channel: Channel
    listener: threading.Thread = field(default_factory=threading.Thread)
    answers: queue.SimpleQueue[Message | None] = field(default_factory=queue.SimpleQueue)  # None: it is gone
    figures: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Its number."""
        return self.watched.rank

    @property
    def device(self) -> str:
        """What it computes on."""
        return self.watched.device


class Ranks:
    """All ranks of one worker but rank 0, which is this process. `join` before anything else, `close` at the end."""

    def __init__(
        self, *, devices: Sequence[str], threads: int, on_lost: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        """Start the processes. Call on a thread that lives as long as they shall: the kernel ends them with it.

        `devices` are all ranks', `threads` each one's. `on_lost` is called once, on a thread of its own, with what
        happened to a rank; nothing works any more then, and the compute thread may stand still for ever. `say` tells
        the user what takes long or is not as it should be.
        """
        self.devices = tuple(devices)
        self.threads = threads
        self._on_lost = on_lost
        self._say = say
        self._folder = Path(tempfile.mkdtemp(prefix="shardwright-ranks-"))
        self._group: RankGroup | None = None
        self._kernel_dir: Path | None = None
        self._next_key = 1
        self._closing = False
        self._lost = threading.Lock()
        self._over = threading.Event()
        self._warm: set[int] = set()  # stages that have computed a step
        self._processes = [self._start(rank) for rank in range(1, len(devices))]
        for process in self._processes:
            process.listener = threading.Thread(
                target=self._listen, args=(process,), name=f"rank {process.rank}", daemon=True
            )
            process.listener.start()
        self._watch = RankWatch(
            [process.watched for process in self._processes],
            device=self.devices[0],
            waits=lambda: self._group is None or self._group.waits,
            on_stuck=self._lose,
        )
        self._watch.start()

    @property
    def num_ranks(self) -> int:
        """With rank 0."""
        return len(self.devices)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks from 1 on."""
        return [process.process.pid for process in self._processes]

    @property
    def all_reduce(self) -> str:
        """What adds up the ranks' tensors: `shm`, `gloo` or `nccl`."""
        assert self._group is not None
        return self._group.all_reduce

    @property
    def group(self) -> RankGroup:
        """Rank 0's place among the ranks."""
        assert self._group is not None, "join first"
        return self._group

    def loads(self) -> tuple[RankLoad, ...]:
        """What the ranks from 1 on said of themselves last. Any thread may ask."""
        return tuple(
            RankLoad(rank=each.rank, device=each.device, device_name=each.about.get("device_name", ""), **each.figures)
            for each in self._processes
            if each.figures
        )

    def memory_available(self) -> int | None:
        """The least that a rank from 1 on had available on its device when it was asked last; None before that."""
        return min((p.about["memory_available_bytes"] for p in self._processes if p.about), default=None)

    def memory_total(self) -> int | None:
        """The least that a rank's device has."""
        return min((p.about["memory_total_bytes"] for p in self._processes if p.about), default=None)

    # --- life --------------------------------------------------------------------------------------

    def _start(self, rank: int) -> _Process:
        process = subprocess.Popen(  # noqa: S603  our own module
            [
                sys.executable, "-m", "shardwright.runtime.rank_process",
                str(rank), str(self.num_ranks), self.devices[rank], str(self.threads), str(os.getpid()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        channel = Channel(reads=process.stdout.fileno(), writes=process.stdin.fileno())
        return _Process(WatchedRank(rank, self.devices[rank], process.pid), process, channel)

    def join(self, *, kernels: Path, all_reduce: str, kernel_dir: Path | None = None) -> None:
        """Let all ranks meet. Blocks for seconds, the first time for a minute. Call it where stages compute.

        `kernels` is where DeepSpeed's shared-memory all-reduce is kept; `all_reduce` is `auto`, `shm` or `gloo`.
        `kernel_dir` keeps the compiled kernel of linear layers (`model/product.py`).
        Raises `ConfigError` where DeepSpeed is missing, or `shm` was asked for and can't be had.
        """
        import torch

        from shardwright.model.deepspeed_kernel import check_deepspeed
        from shardwright.model.tensor_parallel import join_group

        check_deepspeed()
        torch.set_num_threads(self.threads)
        self._kernel_dir = kernel_dir
        folder = None
        if self.devices[0] == "cpu":
            folder = find_sum_kernel(kernels, all_reduce, num_threads=self.threads * self.num_ranks, say=self._say)
        meeting = self._folder / "meeting"
        fields = {
            "meeting": str(meeting),
            "kernels": None if folder is None else str(folder),
            "kernel_dir": None if kernel_dir is None else str(kernel_dir),
        }
        self._tell(Kind.JOIN, fields)
        self._group = join_group(
            rank=0, num_ranks=self.num_ranks, device=torch.device(self.devices[0]), meeting=meeting, kernels=folder
        )
        for each, answer in zip(self._processes, self._collect(JOIN_TIMEOUT_S), strict=True):
            each.about = answer
            each.watched.joined()

    def close(self) -> None:
        """End all ranks. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self._watch.close()
        for each in self._processes:
            with contextlib.suppress(OSError):
                assert each.process.stdin is not None
                each.process.stdin.close()
        for each in self._processes:
            try:
                each.process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()
            each.listener.join(_END_TIMEOUT_S)
            assert each.process.stdout is not None
            each.process.stdout.close()
        if self._group is not None:
            group, self._group = self._group, None
            group.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End all ranks at once; the worker itself ends too."""
        self._closing = True
        self._watch.close()
        for each in self._processes:
            with contextlib.suppress(OSError):
                each.process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _listen(self, each: _Process) -> None:
        """Take what one rank says, until it is gone."""
        with contextlib.suppress(OSError):
            while (message := each.channel.receive()) is not None:
                if message.kind is Kind.BEAT:
                    each.watched.beat(message.fields.pop("progress", None))
                    each.figures = message.fields
                elif message.kind is Kind.FAILED and message.fields.get("step"):
                    self._lose(f"rank {each.rank} failed in a step: {message.fields['reason']}")
                else:
                    each.answers.put(message)
        if not self._closing:
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = each.process.wait(_END_TIMEOUT_S)
            self._lose(f"{each.watched} ended{_ending(code)}")
        each.answers.put(None)

    def _lose(self, what: str) -> None:
        """The worker is lost with a rank. The first loss is the cause; the others follow from it."""
        if self._closing or not self._lost.acquire(blocking=False):
            return
        self._over.set()
        self._on_lost(f"{what}; without it this worker can't compute, and ends")

    # --- work --------------------------------------------------------------------------------------

    def _tell(self, kind: Kind, fields: dict[str, Any], data: bytes = b"") -> None:
        for each in self._processes:
            try:
                each.channel.send(kind, fields, data)
            except OSError:
                self._gone()

    def _gone(self) -> NoReturn:
        raise ClusterError(_GONE)

    def _collect(self, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """Every rank's answer. Raises the first error that one gave, after all have answered."""
        answers: list[Message] = []
        for each in self._processes:
            try:
                message = each.answers.get(timeout=timeout_s)
            except queue.Empty:
                raise ClusterError(f"rank {each.rank} did not answer within {timeout_s:.0f} s") from None
            if message is None:
                self._gone()
            answers.append(message)
        for each, answer in zip(self._processes, answers, strict=True):
            if answer.kind is Kind.FAILED:
                raise _error(each.rank, answer.fields)
        return [answer.fields for answer in answers]

    def measure(self, dtype: str, own: Callable[[], Speed]) -> Speed:
        """All devices at once, added up. Call it where stages compute."""
        from shardwright.runtime.measure import Speed

        self._tell(Kind.MEASURE, {"dtype": dtype})
        speed = own()
        answers = self._collect(JOIN_TIMEOUT_S)
        for each, answer in zip(self._processes, answers, strict=True):
            each.about["memory_available_bytes"] = answer["memory_available_bytes"]
        return Speed(
            read_bandwidth=speed.read_bandwidth + sum(answer["read_bandwidth"] for answer in answers),
            matrix_rate=speed.matrix_rate + sum(answer["matrix_rate"] for answer in answers),
        )

    def build(
        self,
        load: StageLoad,
        *,
        tensors: dict[str, Any],
        raw: RawTensors,
        vocabulary: bytes | None,
        progress: Callable[[int], None],
    ) -> RankedStage:
        """Build a stage over all ranks; `tensors` is `raw` as the others find it (`ReceivedTensors.as_fields`).

        Raises what `build_stage` does, on whichever rank it happened.
        """
        key = self._next_key
        self._next_key += 1
        fields = stage_fields(load)
        self._tell(Kind.BUILD, {"key": key, "stage": fields, "tensors": tensors})
        try:
            stage = stage_builder(fields)(
                device=self.devices[0],
                raw=raw,
                vocabulary=vocabulary,
                progress=progress,
                group=self.group,
                kernel_dir=self._kernel_dir,
                lead=functools.partial(self._lead, key),
            )
        except BaseException:
            self._tell(Kind.CANCEL, {"key": key})
            with contextlib.suppress(Exception):  # whatever they say: the first error is told
                self._collect()
            self._tell(Kind.CLOSE, {"key": key})
            raise
        try:
            others = self._collect()
        except BaseException:
            self._tell(Kind.CLOSE, {"key": key})
            raise
        return RankedStage(
            stage,
            weight_bytes=stage.weight_bytes + sum(other["weight_bytes"] for other in others),
            kv_bytes=stage.kv_bytes + sum(other["kv_bytes"] for other in others),
            close_others=lambda: self._tell(Kind.CLOSE, {"key": key}),
        )

    @contextlib.contextmanager
    def _lead(
        self, key: int, step: StepInput, inputs: Mapping[str, torch.Tensor], progress: LayerProgress | None
    ) -> Iterator[None]:
        """Let the other ranks compute the step too, and give them its input. An error in between is a lost worker.

        A GPU's `progress` is watched on behind the block, in which it is only told what to do.
        """
        import torch

        from shardwright.model.tensor_parallel import describe_tensors
        from shardwright.wire.limits import WireLimits
        from shardwright.wire.messages import StepMessage
        from shardwright.wire.step_codec import encode_step

        raw = encode_step(StepMessage(step=step, tensors=()), WireLimits())
        threads = torch.get_num_threads()
        self._watch.begin_step(progress, is_first=key not in self._warm)
        self._tell(Kind.STEP, {"key": key, "threads": threads, "tensors": describe_tensors(inputs)}, raw)
        group = self.group
        try:
            for tensor in inputs.values():
                group.share(tensor.to(group.device))
            yield
        except Exception as exc:
            self._watch.end_step(failed=True)
            if self._over.wait(_CAUSE_S):
                raise ClusterError(_GONE) from exc  # what the transport says of it is a consequence
            self._lose(f"rank 0 failed in a step: {type(exc).__name__}: {exc}")
            raise
        self._warm.add(key)
        self._watch.end_step()


class RankedStage:
    """A stage that all ranks hold parts of; computes as `model.stage.Stage` does."""

    def __init__(self, stage: Stage, *, weight_bytes: int, kv_bytes: int, close_others: Callable[[], None]) -> None:
        """`weight_bytes` and `kv_bytes` are all ranks'."""
        self._stage = stage
        self.progress = stage.progress
        self.weight_bytes = weight_bytes
        self.kv_bytes = kv_bytes
        self._close_others = close_others
        self.offloaded_bytes, self.offload_counts = (
            stage.offloaded_bytes,
            stage.offload_counts,
        )  # none: never with ranks

    def forward(self, step: StepInput, tensors: Mapping[str, torch.Tensor]) -> StageOutput:
        """Compute one step on all ranks."""
        return self._stage.forward(step, tensors)

    def close(self) -> None:
        """Drop weights and KV blocks on all ranks."""
        with contextlib.suppress(ClusterError):  # a rank that is gone holds nothing
            self._close_others()
        self._stage.close()


def find_sum_kernel(kernels: Path, all_reduce: str, *, num_threads: int, say: Callable[[str], None]) -> Path | None:
    """Where DeepSpeed's shared-memory all-reduce for CPUs is, compiled if need be; None: Gloo is to be used.

    `auto` takes it where all ranks' threads have cores of their own: it waits actively, and ranks that share a core
    would take it from each other. Raises `ConfigError` where `shm` was asked for and can't be compiled.
    """
    from shardwright.model.deepspeed_kernel import build_kernel
    from shardwright.runtime.measure import usable_cores

    if all_reduce == "gloo" or (all_reduce == "auto" and num_threads > usable_cores()):
        return None
    if not kernels.exists():
        say("DeepSpeed's shared-memory all-reduce is compiled for the first time, which takes about a minute")
    try:
        return build_kernel(kernels)
    except ConfigError as exc:
        missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
        why = f"{' and '.join(missing)} not found" if missing else str(exc)
        text = f"DeepSpeed's shared-memory all-reduce can't be compiled ({why}); it needs g++ and ninja"
        if all_reduce == "shm":
            raise ConfigError(f"{text}; --all-reduce gloo does without") from exc
        say(f"{text}. Gloo's slower one is used instead")
        return None


def rank_devices(device: torch.device, num_ranks: int) -> list[str]:
    """The devices of a worker's ranks, from rank 0's on. Raises `ConfigError` where the machine has too few."""
    if num_ranks == 1:
        return [str(device)]
    if device.type == "cpu":
        return ["cpu"] * num_ranks
    if device.type != "cuda":
        raise ConfigError(f"--tensor-parallel works on GPUs and CPUs, not on {device.type}; add --device cpu")
    import torch

    first, present = device.index or 0, torch.cuda.device_count()
    if first + num_ranks > present:
        raise ConfigError(
            f"--tensor-parallel {num_ranks} takes cuda:{first} to cuda:{first + num_ranks - 1}, but this machine has"
            f" {present} GPU{'s' if present != 1 else ''}"
        )
    return [f"cuda:{index}" for index in range(first, first + num_ranks)]


def _ending(code: int | None) -> str:
    if code is None:
        return ""
    return f" with signal {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"


def _error(rank: int, fields: dict[str, Any]) -> Exception:
    if fields["kind"] == "user":
        return UnsupportedModelError(fields["reason"])
    return ClusterError(f"rank {rank}: {fields['reason']}")
