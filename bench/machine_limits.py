"""What this machine can do at best with a model's weights: read them, and multiply with them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from shardwright.config import default_cache_dir
from shardwright.model.linear import PackedLinear, can_pack
from shardwright.model.product import find_product
from shardwright.runtime.kernel_cache import KernelCache
from shardwright.types import ModelCosts

READ_BYTES = 1 << 30
TRIES = 5
LONG_S = 3.0
SQUARE_SIZES = (1024, 2048, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The best of several products, in operations/s, and which it was."""

    operations_per_s: float
    product: str


def usable_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def read_bandwidth(threads: int = 0) -> float:
    """Bytes/s of a streaming sum with all cores or so many threads, the best of several. Blocks for half a second."""
    torch.set_num_threads(threads or usable_threads())
    data = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _best_s(data.sum)


def matrix_rate(config_json: str, *, num_tokens: int) -> Rate:
    """The best rate of a bfloat16 product with all cores: square ones, and the model's own with so many tokens.

    The model's are tried in each form that stages may hold, and in float32. Takes a few seconds; blocks.
    """
    torch.set_num_threads(usable_threads())
    config = json.loads(config_json)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * (config.get("head_dim") or hidden // config["num_attention_heads"])
    product = find_product(KernelCache(default_cache_dir()).folder)
    found: list[Rate] = []
    slow_alone = False
    with torch.inference_mode():
        for size in SQUARE_SIZES:
            left, right = (_random(size, size) for _ in range(2))
            widened = left.float(), right.float()
            found.append(_rate(f"{size} x {size} squared, in float32", size**3, partial(torch.mm, *widened)))
            if not slow_alone:  # on CPUs without bfloat16 torch takes minutes for what it does in a second in float32
                alone = _rate(f"{size} x {size} squared", size**3, partial(torch.mm, left, right))
                slow_alone = alone.operations_per_s < found[-1].operations_per_s / 4
                found.append(alone)
        for inputs, outputs in ((hidden, wide), (wide, hidden), (hidden, heads)):
            x, weight = _random(num_tokens, inputs), _random(outputs, inputs)
            name, count = f"{num_tokens} x {inputs} x {outputs}", num_tokens * inputs * outputs
            if not slow_alone:
                found.append(_rate(f"{name}, plain", count, partial(functional.linear, x, weight)))
            if can_pack(weight.dtype, weight.device):
                found.append(_rate(f"{name}, packed", count, partial(PackedLinear(weight.clone(), None), x)))
            if product is not None:
                found.append(_rate(f"{name}, own kernel", count, partial(product.linear, x, weight, None)))
            # a product that first widens both sides would be a stage's too, if it were the fastest
            found.append(_rate(f"{name}, in float32", count, partial(functional.linear, x.float(), weight.float())))
    return max(found, key=lambda rate: rate.operations_per_s)


def decode_weight_bytes(costs: ModelCosts) -> int:
    """Bytes of the weights that one decode step reads: every layer, the norm and the head."""
    return sum(costs.layer_bytes) + costs.head_bytes


def prefill_operations(costs: ModelCosts, *, num_tokens: int) -> float:
    """Operations with the layers' weights that a prompt of so many tokens takes: two for each weight and token."""
    return 2 * sum(costs.layer_bytes) / costs.element_bytes * num_tokens


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def _rate(product: str, count: int, work: Callable[[], object]) -> Rate:
    return Rate(operations_per_s=2 * count / _best_s(work), product=product)


def _best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest try after one that warms up; fewer tries of what takes long."""
    work()
    times: list[float] = []
    while len(times) < TRIES and sum(times) < LONG_S:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
