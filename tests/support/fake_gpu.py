"""A GPU that computes nothing, on machines without one: torch's fake tensors on the device `cuda:0`.

Fake tensors have shapes, dtypes and devices, and no content. An operation that mixes devices raises, and so does one
whose result depends on content that the host would have to wait for. `HostWatch` adds what they let pass.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from split_models import even_cuts
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from shardwright.model import buffers
from shardwright.model.families import plan_family, slice_model
from shardwright.model.outline import draw_outline
from shardwright.model.stage import Stage

CUDA = torch.device("cuda", 0)
_CUDA_SLOT, _META_SLOT = 1, 14  # c10::DeviceType
AMPERE = (8, 0)

_READS_ON_THE_HOST = (
    "aten._local_scalar_dense",
    "aten.item",
    "aten.nonzero",
    "aten.masked_select",
    "aten.unique",
    "aten._unique2",
    "aten.unique_dim",
    "aten.unique_consecutive",
    "aten.equal",
    "aten.is_nonzero",
    "aten.bincount",
    "aten.allclose",
    "transformers.grouped_mm_fallback",  # a loop over experts, whose bounds it reads
)


class HostWaitedError(AssertionError):
    """The host waits for the GPU, or a tensor lies elsewhere than on it, where neither may be."""


@contextmanager
def fake_gpu(capability: tuple[int, int] = AMPERE, *, reads_real_tensors: bool = False) -> Iterator[FakeTensorMode]:
    """Within it this process has one GPU, `cuda:0`; every tensor that is made is a fake one."""
    with ExitStack() as stack:
        stack.enter_context(_device_guard())
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_capability": lambda _=None: capability,
            "Event": FakeEvent,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pin))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=reads_real_tensors))


class FakeEvent:
    """Of a GPU that has finished all that it was told."""

    def record(self) -> None:
        """It is told nothing."""

    def query(self) -> bool:
        return True


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    """A build of torch without CUDA has no pinned memory: the copy is marked."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)  # a clone of one number would be computed with
    copy.is_pinned_here = True
    return copy


@contextmanager
def _device_guard() -> Iterator[None]:
    """Lets a build of torch without CUDA index tensors whose device is called cuda.

    torch's C++ code asks the device's guard to make the device the current one before it looks at an index, and in
    such a build there is none. The meta device's, which does nothing, stands in for it.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    library = next(p for p in (Path(torch.__file__).parent / "lib").glob("libc10.*") if p.suffix in {".so", ".dylib"})
    guards = (ctypes.c_void_p * (_META_SLOT + 1)).in_dll(
        ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE"
    )
    assert guards[_CUDA_SLOT] is None
    assert guards[_META_SLOT] is not None
    guards[_CUDA_SLOT] = guards[_META_SLOT]
    try:
        yield
    finally:
        guards[_CUDA_SLOT] = None


class HostWatch(TorchDispatchMode):
    """Raises `HostWaitedError` for what a layer may not do on a GPU, while one of the watched layers is running.

    No operation reads a result on the host, none takes or gives a tensor on the CPU, and nothing is copied from or to
    it. Outside layers nothing may be copied back, and what goes to the GPU comes from pinned memory without a wait; how
    often is counted. With `allow_outside`, copies that wait are counted too, outside layers.
    """

    def __init__(self, *, allow_outside: bool = False) -> None:
        super().__init__()
        self._allow_outside = allow_outside
        self.waits_outside = 0
        self._layers: list[str] = []
        self.copies_in = 0

    def watch(self, layer: nn.Module, name: str) -> None:
        """Know when the layer is running. Hooks that put tensors in place come before it, and others after."""

        def begin(*_: Any) -> None:
            self._layers.append(name)

        layer.register_forward_pre_hook(begin, prepend=True)
        layer.register_forward_hook(lambda *_: self._layers.pop() and None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removesuffix(".default")
        if name.startswith("prim."):  # asks a tensor for its device or layout
            return func(*args, **kwargs)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        where = f"{name} in {self._layers[-1]}" if self._layers else name
        if name.startswith(_READS_ON_THE_HOST) and any(t.device == CUDA for t in given):
            raise HostWaitedError(f"{where} makes the host wait for the GPU")
        if name.startswith(("aten.index", "aten._index_put")) and _counts_a_mask(given):
            raise HostWaitedError(f"{where} takes a mask as index: the host waits for how many it has")
        if name.startswith(("aten._grouped_mm", "aten.grouped_mm")) and given[0].dtype != torch.bfloat16:
            raise HostWaitedError(f"{where} has a kernel for bfloat16 only; in {given[0].dtype} it reads the sizes")
        with self:  # in inference mode torch hands over what consists of other operations
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self._check_copy(where, name, given, made, kwargs)
        if self._layers:
            strays = [t for t in (*given, *made) if t.device != CUDA]
            if strays:
                raise HostWaitedError(f"{where} has a tensor {list(strays[0].shape)} on {strays[0].device}")
        return result

    def _check_copy(self, where: str, name: str, given: Any, made: Any, kwargs: dict[str, Any]) -> None:
        if name.startswith("aten.copy_"):
            (target, source), waits = given[:2], True
        elif name.startswith("aten._to_copy"):
            (target,), (source, *_), waits = made, given, not kwargs.get("non_blocking")
        else:
            return
        if target.device == source.device:
            return
        if source.device == CUDA:
            raise HostWaitedError(f"{where} copies {list(source.shape)} from the GPU")
        if self._allow_outside and not self._layers and not hasattr(source, "is_pinned_here"):
            self.waits_outside += 1
            return
        if waits or not hasattr(source, "is_pinned_here"):
            raise HostWaitedError(f"{where} copies {list(source.shape)} to the GPU and waits for it")
        self.copies_in += 1


def _counts_a_mask(given: list[torch.Tensor]) -> bool:
    """Whether an index is a mask; to write one value under it torch fills instead, and counts nothing."""
    return any(t.dtype == torch.bool for t in given[1:]) and not (len(given) == 3 and given[2].numel() == 1)


class HostReads:
    """Counts how often a fake GPU's results are read on the host, and gives the host something to read."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, finish in {"cpu": lambda t: t, "tolist": torch.Tensor.tolist, "item": torch.Tensor.item}.items():
                replaced = self._reading(getattr(torch.Tensor, name), finish)
                stack.enter_context(mock.patch.object(torch.Tensor, name, replaced))
            stack.enter_context(mock.patch.object(torch.Tensor, "numpy", _outside_modes(torch.Tensor.numpy)))
            yield

    def _reading(self, original: Callable[..., Any], finish: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
        def read(tensor: torch.Tensor, *args: Any) -> Any:
            if tensor.device != CUDA:
                return original(tensor, *args)
            self.count += 1
            with unset_fake_temporarily():
                return finish(_some_values(tuple(tensor.shape), tensor.dtype))

        return read


def _outside_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return call


def _some_values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Falling along the last dimension, none equal to its neighbour and none negative, as sorted logits are."""
    row = torch.arange(shape[-1] if shape else 1).flip(0)
    return row.expand(shape or (1,)).to(dtype).reshape(shape).clone()


def fake_stages(
    config: PreTrainedConfig, num_stages: int, *, dtype: torch.dtype, watch: HostWatch | None = None
) -> list[Stage]:
    """The model's stages with weights on the fake GPU. Call within `fake_gpu`.

    Planning and slicing work on the meta device, as ever; what `build_stage` reads from a checkpoint has no content
    here.
    """
    with unset_fake_temporarily():
        plan = plan_family(config)
        outline = None
    stages = []
    for layers in even_cuts(plan.num_layers, num_stages):
        ends = {"is_first": layers.start == 0, "is_last": layers.end == plan.num_layers}
        with unset_fake_temporarily():
            model = slice_model(config, layers, dtype=dtype, plan=plan, **ends)
            outline = outline or draw_outline(model, config, dtype)
        _fill(model, outline)
        for index in range(layers.start, layers.end):
            if watch is not None:
                watch.watch(model.get_submodule(f"{plan.layers}.{index}"), f"layer {index}")
        stages.append(
            Stage(model=model, plan=plan, layers=layers, dtype=dtype, device=CUDA, num_blocks=64, block_size=4, **ends)
        )
    return stages


def _fill(model: nn.Module, outline: Any) -> None:
    """Buffers by the stage's own code, then parameters in the dtypes in which they are loaded."""
    filled: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # what a checkpoint holds is not made up
    mode = detect_fake_mode()
    with (  # parameters are real meta tensors then
        mock.patch.object(mode, "allow_non_fake_inputs", True),
        mock.patch.object(buffers, "_is_poisoned", lambda tensor: tensor.device != CUDA),
    ):
        buffers.fill_computed_tensors(model, outline, CUDA)
    for name, meta in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        if id(meta) not in filled:
            values = torch.empty(meta.shape, dtype=outline.dtypes.get(name, meta.dtype), device=CUDA)
            filled[id(meta)] = nn.Parameter(values, requires_grad=False)
        setattr(model.get_submodule(path), leaf, filled[id(meta)])
    for name, meta in list(model.named_buffers()):
        if name in outline.state:
            path, _, leaf = name.rpartition(".")
            values = torch.empty(meta.shape, dtype=outline.dtypes.get(name, meta.dtype), device=CUDA)
            setattr(model.get_submodule(path), leaf, values)
