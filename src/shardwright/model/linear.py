"""Swaps linear layers for forms that run faster on their device, one at a time while a stage is loaded."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import nn

MAX_PIECE_BYTES = 64 * 1024 * 1024
"""A larger weight (the head of a large vocabulary) is packed in pieces of whole rows, so that packing needs no room."""

_MADV_DONTNEED = 4  # Linux's


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


def pack_linear(model: nn.Module, module_name: str) -> bool:
    """Swap the named module for its packed form if it is a plain linear layer; tell whether it was.

    A weight that another module shares (a tied embedding on the same stage) stays plain, because the lookup needs
    it so and a packed copy would hold it twice.
    """
    module = model.get_submodule(module_name)
    # a subclass may compute something else; weights that a family keeps in float32 stay as they are
    if type(module) is not nn.Linear or module.weight.dtype != torch.bfloat16 or _is_shared(model, module):
        return False
    parent_name, _, name = module_name.rpartition(".")
    parent = model.get_submodule(parent_name)
    packed = PackedLinear(module.weight, module.bias)
    setattr(parent, name, packed)
    return True


def _is_shared(model: nn.Module, module: nn.Linear) -> bool:
    """Whether another module holds the same weight."""
    holders = (name for name, p in model.named_parameters(remove_duplicate=False) if p is module.weight)
    return len(list(holders)) > 1
