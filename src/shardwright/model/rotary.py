"""Lets attention modules on a CPU turn 16-bit queries and keys by our own kernel, where that is the same.

A family's `apply_rotary_pos_emb` takes a dozen of torch's operations, each with its own trip through the interpreter.
Families differ in which positions of a head they turn into each other, how many, and where they round; what a
function does is not looked up but tried, on random heads of the size that it is called with.

The functions are called by name, out of their module's globals. Those stay as they are: a stage's attention modules get
a class whose `forward` is of the same code and finds ours under the name.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from shardwright.model.product import Product

_NAME: Final = "apply_rotary_pos_emb"
_TRIED_ROWS: Final = 8
_TRIED_HEADS: Final = (3, 2)


class KernelRotary:
    """A family's function, computed by our own kernel for all heads for which it was found to give the same bits."""

    def __init__(self, function: Callable[..., Any], product: Product) -> None:
        """`function` is the family's own, which goes on to serve whatever the kernel does not."""
        self._function = function
        self._rotate = product.rotate
        self._is_same: dict[tuple[torch.dtype, int], bool] = {}  # by dtype and size of a head

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's function. Each decoder layer calls it in every step, so it asks torch for little."""
        if len(args) != 4 or kwargs or not _is_for_kernel(*args):
            return self._function(*args, **kwargs)
        q = args[0]
        key = (q.dtype, q.shape[3])
        is_same = self._is_same.get(key)
        if is_same is None:
            is_same = self._is_same[key] = self._try(*key)
        return self._rotate(*args) if is_same else self._function(*args)

    def _try(self, dtype: torch.dtype, size: int) -> bool:
        """Whether the kernel gives what the function gives, bit for bit, for random heads of this size."""
        if size % 2 or dtype not in {torch.bfloat16, torch.float16}:
            return False
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        q, k = (random(1, _TRIED_ROWS, heads, size).transpose(1, 2) for heads in _TRIED_HEADS)
        cos, sin = random(1, _TRIED_ROWS, size), random(1, _TRIED_ROWS, size)
        try:
            given = self._rotate(q, k, cos, sin)
        except ValueError:
            return False
        expected = self._function(q, k, cos, sin)
        return all(
            mine.dtype == its.dtype and mine.shape == its.shape and torch.equal(mine, its)
            for mine, its in zip(given, expected, strict=True)
        )


def _is_for_kernel(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether they lie as the kernel takes them: [1, heads, rows, size] twice and [1, rows, size] twice."""
    shape, kv_shape, turns, dtype = q.shape, k.shape, cos.shape, q.dtype
    return (
        len(shape) == len(kv_shape) == 4
        and shape[0] == kv_shape[0] == 1
        and kv_shape[2:] == shape[2:]
        and turns == (1, *shape[2:])
        and sin.shape == turns
        and k.dtype == cos.dtype == sin.dtype == dtype
        and q.stride()[3] == k.stride()[3] == cos.stride()[2] == sin.stride()[2] == 1
    )


def swap_rotary(attention: nn.Module, product: Product) -> bool:
    """Have an attention module turn queries and keys by our kernel wherever that gives the same; tell whether it may.

    Only where its `forward` is plain code that calls its family's function by name. The module gets a class of its own
    kind: a `forward` among its attributes would hold the module itself, and its memory until Python looks for cycles.
    """
    mine = _with_kernel(type(attention), product)  # type: ignore[arg-type]  # mypy takes classes for unhashable
    if mine is None:
        return False
    attention.__class__ = mine
    return True


@functools.cache
def _with_kernel(family: type[nn.Module], product: Product) -> type[nn.Module] | None:
    """A class of the same code, for which the family's function is ours; None where its code calls no such function.

    What its module defines is taken as it is now: a name that is bound anew there later stays the old one here.
    """
    forward = family.forward
    if not isinstance(forward, types.FunctionType) or _NAME not in forward.__code__.co_names:
        return None
    function = forward.__globals__.get(_NAME)
    if not callable(function):
        return None
    scope = {**forward.__globals__, _NAME: KernelRotary(function, product)}
    mine = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    mine.__kwdefaults__ = forward.__kwdefaults__
    return type(family.__name__, (family,), {"forward": mine, "__module__": family.__module__})
