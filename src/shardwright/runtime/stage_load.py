"""Builds a worker's stage on its compute thread, tells how far that is, and ends it when nobody wants it any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright.errors import ConfigError
from shardwright.runtime.stage_build import stage_builder, stage_fields
from shardwright.types import VOCABULARY_TENSOR, StageLoad
from shardwright.wire.messages import LoadProgress

if TYPE_CHECKING:
    from shardwright.model.offload import OffloadPlan
    from shardwright.model.stage import Stage
    from shardwright.runtime.offload_tier import OffloadTier
    from shardwright.runtime.ranks import RankedStage, Ranks
    from shardwright.runtime.weight_receiver import ReceivedTensors

PROGRESS_INTERVAL_S = 0.1


class _BuildStopped(Exception):  # noqa: N818  not an error: nobody wants the stage any more
    """Ends the building of a stage between two tensors."""


class StageBuilder:
    """Builds one stage after the other; with `ranks` over all of them."""

    def __init__(
        self,
        *,
        device: str,
        kernel_dir: Path | None,
        offload: OffloadTier | None,
        ranks: Ranks | None,
        compute: ThreadPoolExecutor,
        prepare: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """`prepare` is called on the compute thread before a stage is built."""
        self._device = device
        self._kernel_dir = kernel_dir
        self._offload = offload
        self._ranks = ranks
        self._compute = compute
        self._prepare = prepare
        self._now = clock
        self._stop = threading.Event()  # of the build that goes on now, if one does

    async def build(
        self, load: StageLoad, raw: ReceivedTensors, tell: Callable[[LoadProgress], None]
    ) -> Stage | RankedStage:
        """The stage, of tensors that are all there. `tell` is called on the event loop.

        Raises what `build_stage` does, and `ConfigError` for layers that this worker may not offload.
        """
        loop = asyncio.get_running_loop()
        weights = raw.without(VOCABULARY_TENSOR)
        total = sum(spec.num_bytes for spec in weights.specs.values())

        told_at = -PROGRESS_INTERVAL_S
        self._stop = stop = threading.Event()

        def progress(done: int) -> None:
            nonlocal told_at
            if stop.is_set():
                raise _BuildStopped
            now = self._now()
            if now - told_at < PROGRESS_INTERVAL_S and done < total:
                return
            told_at = now
            message = LoadProgress(phase="build", done_bytes=min(done, total), total_bytes=total)
            loop.call_soon_threadsafe(tell, message)

        def build() -> Stage | RankedStage:
            self._prepare()
            vocabulary = bytes(raw.read(VOCABULARY_TENSOR)) if VOCABULARY_TENSOR in raw.specs else None
            if self._ranks is not None:
                return self._ranks.build(
                    load, tensors=weights.as_fields(), raw=weights, vocabulary=vocabulary, progress=progress
                )
            # Here: importing it takes seconds, and heartbeats are answered.
            return stage_builder(stage_fields(load))(
                device=self._device,
                raw=weights,
                vocabulary=vocabulary,
                progress=progress,
                offload=self._offload_plan(load),
                kernel_dir=self._kernel_dir,
            )

        try:
            return await loop.run_in_executor(self._compute, build)
        except asyncio.CancelledError:
            stop.set()  # or two stages would be in memory once the next is built
            raise

    def stop(self) -> None:
        """End what is built now, between two tensors."""
        self._stop.set()

    def _offload_plan(self, load: StageLoad) -> OffloadPlan | None:
        """Which layers the stage keeps beside the memory. Raises `ConfigError` where this worker may not do that."""
        from shardwright.model.offload import OffloadPlan

        layers = load.assignment.offloaded_layers
        if not layers:
            return None
        if self._offload is None:
            raise ConfigError(
                f"{len(layers)} layers are to be offloaded, but this worker was started without --offload; start it "
                "with --offload nvme"
            )
        return OffloadPlan(layers=layers, tier=self._offload.name, folder=self._offload.folder)
