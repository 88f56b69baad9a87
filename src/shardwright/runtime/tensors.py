"""Where torch tensors become wire frames and back. Knows dtypes and layouts; nothing of steps or links."""

from __future__ import annotations

import torch

from shardwright.errors import FrameError
from shardwright.wire.messages import TensorFrame

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def frame_from_tensor(name: str, tensor: torch.Tensor) -> TensorFrame:
    """A frame that views the tensor's memory (a copy only from another device or a strided layout)."""
    flat = tensor.detach().to("cpu").contiguous()
    data = flat.view(-1).view(torch.uint8).numpy().data if flat.numel() else b""
    return TensorFrame(name=name, dtype=_NAMES[flat.dtype], shape=tuple(flat.shape), data=data)


def tensor_from_frame(frame: TensorFrame) -> torch.Tensor:
    """The frame's tensor, on the CPU.

    A writable buffer is viewed; a read-only one is copied, because torch has no read-only tensors. Raises
    `FrameError` for a dtype that the compute side does not know.
    """
    dtype = _DTYPES.get(frame.dtype)
    if dtype is None:
        raise FrameError(f"tensor {frame.name!r} has dtype {frame.dtype!r}; known: {', '.join(_DTYPES)}")
    view = memoryview(frame.data)
    if view.nbytes == 0:
        return torch.empty(frame.shape, dtype=dtype)
    buffer = bytearray(view) if view.readonly else frame.data
    return torch.frombuffer(buffer, dtype=dtype).reshape(frame.shape)
