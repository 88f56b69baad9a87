"""Streams the weights of layers that its device's memory can't hold, each shortly before its turn in every step.

While a stage is loaded, each offloaded layer's parameters are moved into a store (`offload_store.py`) once they are
complete. From then on a thread reads one layer after the other into a ring of `OFFLOAD_BUFFERS` buffers on the
device, in the order in which a forward takes them, and begins with the first again behind the last: the next step
finds its first layers there. Hooks around each layer wait for its buffer, make its parameters views of it, and give
it back to the thread behind the layer.

The parameters keep their values and their layout, so that what is computed does not depend on what is offloaded.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwright.errors import ConfigError, OffloadError
from shardwright.model.offload_store import DiskStore, HostStore, LayerStore, aligned_buffer, rounded_up
from shardwright.types import OFFLOAD_BUFFERS

_TENSOR_ALIGNMENT = 64  # as torch's own allocator gives: kernels may take another path for less


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPlan:
    """Which layers of a stage are offloaded, and where to."""

    layers: tuple[int, ...]
    tier: str  # one of `types.OFFLOADS`
    folder: Path  # for the disk's file


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadCounts:
    """What streaming has done since the stage was built."""

    read_bytes: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Place:
    """A parameter's place among its layer's bytes."""

    holders: tuple[tuple[nn.Module, str], ...]  # modules and attributes that it is
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size

    def view_of(self, buffer: torch.Tensor) -> nn.Parameter:
        flat = buffer[self.offset : self.offset + self.num_bytes].view(self.dtype)
        return nn.Parameter(flat.view(self.shape), requires_grad=False)

    def install(self, parameter: nn.Parameter) -> None:
        for module, name in self.holders:
            module._parameters[name] = parameter  # noqa: SLF001  a tenth of the time of `setattr`, which checks it


class _Slot:
    """One buffer of the ring."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        is_cpu = device.type == "cpu"
        self.buffer = aligned_buffer(num_bytes) if is_cpu else torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.views: dict[int, list[nn.Parameter]] = {}  # layer -> its parameters in this buffer
        self.used: Any = None  # the device's event behind the last layer that computed from here


def check_tier(tier: str, device: torch.device) -> None:
    """Raise `ConfigError` for a tier that makes no sense on the device."""
    if tier == "cpu" and device.type != "cuda":
        raise ConfigError(
            f"offload is 'cpu', which keeps a GPU's weights in the host's memory, but the device is {device.type}; "
            "use nvme"
        )


class OffloadedLayers:
    """The offloaded layers of one stage: filled while it is loaded, then streamed until it is closed."""

    def __init__(self, plan: OffloadPlan, *, num_bytes: int, device: torch.device) -> None:
        """`num_bytes` is about what the layers weigh together. Raises `OffloadError` where there is no room."""
        check_tier(plan.tier, device)
        self._order = plan.layers
        self._device = device
        self._store: LayerStore = HostStore() if plan.tier == "cpu" else DiskStore(plan.folder, num_bytes=num_bytes)
        self._goes_straight = plan.tier == "cpu" or device.type == "cpu"  # from the store into a slot
        self._places: dict[int, list[_Place]] = {}
        self._sizes: dict[int, int] = {}
        self._changed = threading.Condition()
        self._ready: deque[tuple[int, _Slot]] = deque()
        self._slots: tuple[_Slot, ...] = ()
        self._free: list[_Slot] = []
        self._current: tuple[int, _Slot] | None = None
        self._next = 0  # in `_order`, of the layer that is read next
        self._round = 0  # raised when the order is left; what was read for an earlier one is void
        self._trouble: OffloadError | None = None
        self._closing = False
        self._read_bytes = 0
        self._wait_s = 0.0
        self._thread: threading.Thread | None = None

    @property
    def offloaded_bytes(self) -> int:
        """Bytes that are kept in the store."""
        return sum(self._sizes.values())

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the device's memory that they are read into."""
        return OFFLOAD_BUFFERS * max(self._sizes.values(), default=0)

    @property
    def parameter_ids(self) -> set[int]:
        """Of all parameters that are views of the buffers."""
        return {id(p) for slot in self._slots for views in slot.views.values() for p in views}

    @property
    def counts(self) -> OffloadCounts:
        """May be asked from any thread."""
        return OffloadCounts(read_bytes=self._read_bytes, wait_s=self._wait_s)

    # --- loading -----------------------------------------------------------------------------------

    def take(self, index: int, layer: nn.Module, keep: Iterable[nn.Parameter]) -> None:
        """Move a complete layer's parameters into the store; those in `keep` are used by others too, and stay."""
        assert index not in self._places, f"layer {index} was taken already"
        kept = {id(parameter) for parameter in keep}
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        parameters: dict[int, nn.Parameter] = {}
        for module in layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in kept:
                    holders.setdefault(id(parameter), []).append((module, name))
                    parameters[id(parameter)] = parameter
        places, end = [], 0
        for key, parameter in parameters.items():
            assert parameter.is_contiguous(), f"a parameter of layer {index} is not contiguous"
            places.append(_Place(tuple(holders[key]), end, parameter.nbytes, parameter.dtype, parameter.shape))
            end = rounded_up(end + parameter.nbytes, _TENSOR_ALIGNMENT)
        data = aligned_buffer(rounded_up(max(end, 1)))
        for place, parameter in zip(places, parameters.values(), strict=True):
            flat = parameter.detach().reshape(-1).view(torch.uint8)
            data[place.offset : place.offset + place.num_bytes].copy_(flat)
            place.install(nn.Parameter(torch.empty(0, dtype=place.dtype, device=self._device), requires_grad=False))
        self._store.write(index, data)
        self._places[index], self._sizes[index] = places, len(data)

    def start(self, layers: dict[int, nn.Module]) -> None:
        """Hook the layers and begin to read. Call once all of them were taken."""
        assert tuple(layers) == self._order == tuple(self._places), f"{self._order} were to be taken"
        largest = max(self._sizes.values())
        for _ in range(OFFLOAD_BUFFERS):
            slot = _Slot(largest, self._device)
            slot.views = {
                index: [place.view_of(slot.buffer) for place in places] for index, places in self._places.items()
            }
            self._free.append(slot)
        self._slots = tuple(self._free)
        for index, layer in layers.items():
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            layer.register_forward_hook(lambda *_, index=index: self._leave(index), always_call=True)
        self._thread = threading.Thread(target=self._run, name="offload", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, give buffers and store back. Safe to call twice, and for layers that were never started."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._ready.clear()
        self._free.clear()
        self._slots = ()
        self._current = None
        self._places.clear()
        self._store.close()

    # --- computing: the thread that calls the stage's forward ----------------------------------------

    def _enter(self, index: int) -> None:
        """Wait for the layer's weights and put them in their places."""
        began = time.perf_counter()
        with self._changed:
            while not self._ready or self._ready[0][0] != index:
                if self._trouble is not None:
                    raise OffloadError(str(self._trouble)) from self._trouble
                if self._closing:
                    raise OffloadError(f"the weights of layer {index} are gone: the stage was closed")
                if not self._is_coming(index):
                    self._begin_at(index)
                self._changed.wait()
            self._current = self._ready.popleft()
        slot = self._current[1]
        for place, view in zip(self._places[index], slot.views[index], strict=True):
            place.install(view)
        self._wait_s += time.perf_counter() - began

    def _leave(self, index: int) -> None:
        """Give the layer's buffer back; also where the layer failed."""
        if self._current is None or self._current[0] != index:
            return
        slot, self._current = self._current[1], None
        if self._device.type == "cuda":
            slot.used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.used.record()
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def _is_coming(self, index: int) -> bool:
        """Whether the layer is the next one that the thread brings."""
        return not self._ready and self._order[self._next] == index

    def _begin_at(self, index: int) -> None:
        """Go on with another layer: a step ended before its last one."""
        self._round += 1
        self._next = self._order.index(index)
        self._free.extend(slot for _, slot in self._ready)
        self._ready.clear()
        self._changed.notify_all()

    # --- reading: the thread of its own --------------------------------------------------------------

    def _run(self) -> None:
        staging = None if self._goes_straight else aligned_buffer(max(self._sizes.values()), pinned=True)
        is_cuda = self._device.type == "cuda"
        stream = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]
        while (work := self._take_work()) is not None:
            position, slot, begun = work
            index = self._order[position]
            try:
                self._fill(index, slot, staging, stream)
            except OffloadError as exc:
                with self._changed:
                    self._trouble = exc
                    self._changed.notify_all()
                return
            with self._changed:
                self._read_bytes += self._sizes[index]
                if begun == self._round:
                    self._ready.append((index, slot))
                    self._next = (position + 1) % len(self._order)
                else:
                    self._free.append(slot)
                self._changed.notify_all()

    def _take_work(self) -> tuple[int, _Slot, int] | None:
        """The next layer's position, a buffer for it and the round; waits for these. None: the end."""
        with self._changed:
            while not self._free and not self._closing:
                self._changed.wait()
            if self._closing:
                return None
            return self._next, self._free.pop(), self._round

    def _fill(self, index: int, slot: _Slot, staging: torch.Tensor | None, stream: Any) -> None:
        if slot.used is not None:
            slot.used.synchronize()  # the device may still compute from it
        if staging is not None:
            self._store.read(index, staging)
        if stream is None:
            self._store.read(index, slot.buffer)
            return
        with torch.cuda.stream(stream):
            if staging is None:
                self._store.read(index, slot.buffer)
            else:
                size = self._sizes[index]
                slot.buffer[:size].copy_(staging[:size], non_blocking=True)
        stream.synchronize()  # in this thread alone: whoever finds the buffer ready need not wait
