"""Swaps linear layers for forms that run faster on their device, one at a time while a stage is loaded.

On a CPU there are three forms of a layer with 16-bit weights: plain (torch's product), packed for oneDNN, and plain
weights with our own kernel (`product.py`). `choose_linears` measures which is the fastest on this machine.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from shardwright.model.product import Product, find_product

MAX_PIECE_BYTES = 64 * 1024 * 1024
"""A larger weight (the head of a large vocabulary) is packed in pieces of whole rows, so that packing needs no room."""

_MADV_DONTNEED = 4  # Linux's

_TRIED_SHAPE = (8192, 2048)  # 32 MiB: more than one core's share of the caches
_TRIED_SHAPE_MANY = (768, 1024)  # enough for a rate where products are bound by arithmetic
_FEW_ROWS = (1, 8)
_MANY_ROWS = (256, 64, 32, 16)
_TRIES = 4
_MARGIN = 1.1  # torch's products have to be so much faster: with our own a layer also needs fewer calls
_UNBOUNDED = sys.maxsize

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linears:
    """What the linear layers of a stage become."""

    dtype: torch.dtype
    packs: bool = False  # for oneDNN
    product: Product | None = None  # or our own kernel
    product_rows: int = 0  # at up to so many rows; above, torch's product is faster on the same weight
    kernel: Product | None = None  # the same kernel for what is no product, whichever form is the fastest


class KernelLinear(nn.Module):
    """A linear layer whose product our own kernel computes, from the plain weight.

    The weight stays the parameter that it was: another module may share it (a tied embedding), and its storage may be
    filled anew.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, product: Product, product_rows: int) -> None:
        """`weight` and `bias` are the plain layer's parameters."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias
        self._linear = product.linear
        self._product_rows = product_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        # `self.weight` would ask the module's class first and take as long as half of the call into the kernel.
        weight, bias = self._parameters["weight"], self.bias
        assert weight is not None
        if x.dtype != weight.dtype or x.numel() > self._product_rows * self.in_features:
            return functional.linear(x, weight, bias)
        return self._linear(x, weight, bias)

    def extra_repr(self) -> str:
        """As `nn.Linear` prints itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in the order in which oneDNN's matrix product reads it.

    At a few rows a product is bound by reading the weight; packed once at load it is read about twice as fast as
    plain, which oneDNN would reorder or stride through on each call. The plain weight is not kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Pack `weight`; one of more than `MAX_PIECE_BYTES` is used up, since it would be in memory twice else."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rows = max(1, MAX_PIECE_BYTES // (self.in_features * weight.itemsize))
        # plain attributes: an opaque mkldnn tensor is neither a parameter nor a buffer to anyone else
        self._packed: list[torch.Tensor] = []
        for start in range(0, self.out_features, rows):
            piece = weight.detach()[start : start + rows]
            self._packed.append(torch.ops.mkldnn._reorder_linear_weight(piece))  # noqa: SLF001  torch's only name for it
            if self.out_features > rows:
                _give_back(piece)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if len(self._packed) == 1:
            return _multiply(x, self._packed[0], self._bias)
        result = torch.cat([_multiply(x, piece, None) for piece in self._packed], dim=-1)
        return result if self._bias is None else result + self._bias

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight and the bias."""
        bias = 0 if self._bias is None else self._bias.nbytes
        weight: int = self.in_features * self.out_features * self._packed[0].dtype.itemsize
        return weight + bias

    def extra_repr(self) -> str:
        """As `nn.Linear` prints itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # noqa: SLF001
    return result


def _give_back(piece: torch.Tensor) -> None:
    """Return the whole pages under a tensor to the system while the rest of its storage is still in use.

    What it held is lost. Where the system has no such call, the memory is freed with the storage, a little later.
    """
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    begin = -(-piece.data_ptr() // page) * page
    end = (piece.data_ptr() + piece.nbytes) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing pays and keeps the numbers: bfloat16 on a CPU whose oneDNN computes in it.

    float32 stays with `F.linear`, so that it computes what `transformers` computes.
    """
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
    )


def choose_linears(dtype: torch.dtype, device: torch.device, kernel_dir: Path | None) -> Linears:
    """The form of linear layer that is the fastest here; the same for each call of a process.

    `kernel_dir` is where our own kernel is kept; without one it is not tried. With it, the first call takes some
    seconds where the kernel has to be compiled, and a tenth of one to measure. Call it on the thread that will compute.
    """
    if device.type != "cpu" or dtype not in {torch.bfloat16, torch.float16}:
        return Linears(dtype=dtype)
    return _choose(dtype, torch.get_num_threads(), kernel_dir)


@functools.cache
def _choose(dtype: torch.dtype, num_threads: int, kernel_dir: Path | None) -> Linears:
    packs = can_pack(dtype, torch.device("cpu"))
    product = None if kernel_dir is None else find_product(kernel_dir)
    if product is None or not product.can_multiply(dtype):
        return Linears(dtype=dtype, packs=packs)
    with torch.inference_mode():
        seconds = _time_few_rows(dtype, product, packs=packs)
        best = min(seconds, key=lambda form: seconds[form])
        if seconds["own kernel"] <= seconds[best] * _MARGIN:
            best = "own kernel"
        chosen = Linears(dtype=dtype, packs=best == "packed", kernel=product)
        if best == "own kernel":
            chosen = replace(chosen, product=product, product_rows=_rows_for(dtype, product))
    log.info(
        "linear layers in %s with %d threads: %s is the fastest (%s); own kernel for up to %s rows",
        str(dtype).removeprefix("torch."),
        num_threads,
        best,
        ", ".join(f"{form} {1e3 * value:.2f} ms" for form, value in seconds.items()),
        "any number of" if chosen.product_rows == _UNBOUNDED else chosen.product_rows,
    )
    return chosen


def _time_few_rows(dtype: torch.dtype, product: Product, *, packs: bool) -> dict[str, float]:
    """For each form the geometric mean of its times for one row and for eight."""
    weight = torch.full(_TRIED_SHAPE, 0.5, dtype=dtype)
    forms = _plain_forms(weight, product)
    if packs:
        forms["packed"] = PackedLinear(weight.clone(), None)
    means = dict.fromkeys(forms, 1.0)
    for rows in _FEW_ROWS:
        for form, value in _time(forms, torch.ones((rows, _TRIED_SHAPE[1]), dtype=dtype)).items():
            means[form] *= value ** (1 / len(_FEW_ROWS))
    return means


def _rows_for(dtype: torch.dtype, product: Product) -> int:
    """The number of rows up to which our own kernel is hardly slower than torch's product with the same weight."""
    forms = _plain_forms(torch.full(_TRIED_SHAPE_MANY, 0.5, dtype=dtype), product)
    for rows in _MANY_ROWS:
        seconds = _time(forms, torch.ones((rows, _TRIED_SHAPE_MANY[1]), dtype=dtype))
        if seconds["own kernel"] <= seconds["plain"] * _MARGIN:
            return _UNBOUNDED if rows == max(_MANY_ROWS) else rows
    return max(_FEW_ROWS)


def _plain_forms(weight: torch.Tensor, product: Product) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The products that read the weight in its plain order."""
    return {
        "plain": functools.partial(functional.linear, weight=weight),
        "own kernel": functools.partial(product.linear, weight=weight, bias=None),
    }


def _time(forms: Mapping[str, Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> dict[str, float]:
    """Seconds of each form's fastest try, taken in turn, so that what else runs hits all alike.

    Other workers of this machine may be loading or computing. A clock on the wall would count their turns on the cores
    too, many times as long as one product, and a stage would keep what chance chose. So these are seconds of computing:
    the calling thread's, or an even share of all threads' where that is more.
    """
    num_threads = torch.get_num_threads()
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(_TRIES):
        for form, work in forms.items():
            all_began, began = time.process_time(), time.thread_time()
            work(x)
            own_s, all_s = time.thread_time() - began, time.process_time() - all_began
            best[form] = min(best[form], max(own_s, all_s / num_threads))
    return best


def pack_linear(model: nn.Module, module_name: str, linears: Linears | None = None) -> bool:
    """Swap the named module for its faster form if it is a plain linear layer; tell whether it was.

    Without `linears` the form is oneDNN's packed one in bfloat16. A weight that another module shares (a tied
    embedding on the same stage) is never packed, because the lookup needs it plain and a packed copy would hold it
    twice; our own kernel reads it as it is.
    """
    linears = linears or Linears(dtype=torch.bfloat16, packs=True)
    module = model.get_submodule(module_name)
    # a subclass may compute something else; weights that a family keeps in float32 stay as they are
    if type(module) is not nn.Linear or module.weight.dtype != linears.dtype:
        return False
    same = getattr(module.bias, "dtype", linears.dtype) == linears.dtype
    if linears.product is not None and same and module.weight.is_contiguous():
        swapped: nn.Module = KernelLinear(module.weight, module.bias, linears.product, linears.product_rows)
    elif linears.packs and not _is_shared(model, module):
        swapped = PackedLinear(module.weight, module.bias)
    else:
        return False
    parent_name, _, name = module_name.rpartition(".")
    setattr(model.get_submodule(parent_name), name, swapped)
    return True


def _is_shared(model: nn.Module, module: nn.Linear) -> bool:
    """Whether another module holds the same weight."""
    holders = (name for name, p in model.named_parameters(remove_duplicate=False) if p is module.weight)
    return len(list(holders)) > 1
