"""Tells which of several computations of our kernel gives what a family's module gives, by trying them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key")

_MIN_EQUAL = 0.98
"""The share of values that must be equal to the last bit. Sums in another order, and exponentials, now and then turn a
value that lies between two others; what rounds elsewhere differs in one of seven or more."""


def best_match(given: Mapping[Key, torch.Tensor], expected: torch.Tensor, *, atol: float) -> Key | None:
    """The key of the one with the most values equal to those expected; None where none is near enough.

    Values may differ by two roundings of their dtype, each of which may turn once, and by `atol`.
    """
    rtol = 2 * torch.finfo(expected.dtype).eps
    shares = {
        key: float((values == expected).float().mean())
        for key, values in given.items()
        if torch.allclose(values.float(), expected.float(), rtol=rtol, atol=atol)
    }
    best = max(shares, key=lambda key: shares[key], default=None)
    return best if best is not None and shares[best] >= _MIN_EQUAL else None
