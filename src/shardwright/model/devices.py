"""Which devices there are, what they compute in, and how small things get to them. Knows torch; nothing of models."""

from __future__ import annotations

import re

import torch

from shardwright.errors import ConfigError

_BFLOAT16_SINCE = (8, 0)
"""The compute capability from which NVIDIA's GPUs multiply bfloat16; older ones emulate it, many times slower."""


def available_devices() -> tuple[str, ...]:
    """Every device that torch can use here; `cpu` is always the first."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ("cpu", *gpus, *mps)


def resolve_device(name: str) -> torch.device:
    """The device of a name: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N`, `mps`.

    A GPU of NVIDIA's always comes with its number, so that equal devices have equal names. Raises `ConfigError` for a
    name that is none of these and for a device that this machine lacks; the message lists those that it has.
    """
    present = available_devices()
    if name == "auto":
        return torch.device(present[min(1, len(present) - 1)])  # the first GPU, if there is one
    if re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name) is None:
        raise ConfigError(
            f"device is {name!r}; choose auto, cpu, cuda, cuda:N or mps (this machine has {', '.join(present)})"
        )
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in present:
        raise ConfigError(
            f"device is {name!r}, but this machine has only {', '.join(present)}; use one of these or auto"
        )
    return torch.device(wanted)


def half_dtype(device: torch.device) -> str:
    """The two-byte dtype that the device multiplies at full speed: `float16` on NVIDIA's GPUs before Ampere."""
    return "bfloat16" if _multiplies_bfloat16(device) else "float16"


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what the device only emulates. Raises `ConfigError`.

    All stages of a model compute in one dtype, the one that it was saved in unless the user says another. A worker
    never takes another by itself: a model made for bfloat16 may have values that float16 can't hold.
    """
    if dtype == torch.bfloat16 and not _multiplies_bfloat16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"the GPU {device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor}) does not"
            " compute in bfloat16; start the master with --dtype float16 or float32, or this worker with --device cpu"
        )


def _multiplies_bfloat16(device: torch.device) -> bool:
    # ROCm's builds call their devices cuda too, but count capabilities otherwise
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= _BFLOAT16_SINCE


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device; the caller does not write it afterwards.

    A plain copy to a GPU makes the host wait until the GPU has done all that was asked of it. From pinned memory it
    takes its turn behind that, and torch keeps the memory until it was read.
    """
    if device.type != "cuda" or host.device == device:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
