"""Measures the product of activations with 16-bit weights: torch's, oneDNN's packed one and our own kernel's.

    python bench/linear.py                        Gemma-2B's and SmolLM2's shapes in bfloat16, all cores
    python bench/linear.py --threads 1 --dtype float16
    python bench/linear.py --inductor             also the kernels that torch.compile makes (minutes)

Each number of rows prints the bytes of weights read a second and the operations a second; the ratio is that to the
bandwidth of `torch.sum` over 1 GiB. All are taken in turn in one run, the fastest of some seconds' tries each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from shardwright.config import default_cache_dir
from shardwright.model.linear import PackedLinear, can_pack
from shardwright.model.product import find_product
from shardwright.runtime.kernel_cache import KernelCache

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from machine_limits import read_bandwidth, usable_threads  # noqa: E402

SHAPES = {"Gemma-2B, up": (16384, 2048), "Gemma-2B, down": (2048, 16384), "SmolLM2, up": (1536, 576)}
ROWS = (1, 2, 4, 8, 16, 64, 512)
BUDGET_S = 0.6


def measure(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each one's fastest try, in turn until the time is over."""
    best = dict.fromkeys(works, float("inf"))
    for work in works.values():
        work()
    end = time.perf_counter() + BUDGET_S * len(works)
    while time.perf_counter() < end:
        for name, work in works.items():
            began = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def inductor(weight: torch.Tensor, x: torch.Tensor) -> Callable[[], object]:
    """torch.compile's own template for this number of rows, tuned, with the weight frozen in."""
    from torch._inductor import config as options

    options.freezing = options.max_autotune = True
    options.max_autotune_gemm_backends = "CPP"
    torch.compiler.reset()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return partial(torch.compile(layer), x)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--inductor", action="store_true", help="also what torch.compile makes; minutes")
    arguments = parser.parse_args()
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[arguments.dtype]
    product = find_product(KernelCache(default_cache_dir()).folder)
    if product is None or not product.can_multiply(dtype):
        raise SystemExit("there is no kernel of our own on this machine; the warning above says why")
    bandwidth = read_bandwidth(arguments.threads)
    print(f"{arguments.threads} threads, {arguments.dtype}; torch.sum reads {bandwidth / 1e9:.1f} GB/s")
    with torch.no_grad():
        for title, (n, k) in SHAPES.items():
            weight = torch.randn(n, k).to(dtype)
            wide = weight.float()
            packed = PackedLinear(weight.clone(), None) if can_pack(dtype, weight.device) else None
            print(f"\n{title} [{n}, {k}]")
            print(f"{'rows':>5} {'':<22}{'us':>10}{'GB/s':>8}{'of sum':>8}{'GFLOP/s':>9}")
            for rows in ROWS:
                x = torch.randn(rows, k).to(dtype)
                works: dict[str, Callable[[], object]] = {
                    "plain": partial(functional.linear, x, weight),
                    "own kernel": partial(product.linear, x, weight, None),
                    "float32, for comparison": partial(functional.linear, x.float(), wide),
                }
                if packed is not None:
                    works["packed for oneDNN"] = partial(packed, x)
                if arguments.inductor:
                    works["torch.compile"] = inductor(weight, x)
                for name, seconds in measure(works).items():
                    read = n * k * (4 if name.startswith("float32") else dtype.itemsize) / seconds
                    print(
                        f"{rows:>5} {name:<22}{seconds * 1e6:>10.0f}{read / 1e9:>8.1f}{read / bandwidth:>8.2f}"
                        f"{2 * rows * n * k / seconds / 1e9:>9.1f}"
                    )


if __name__ == "__main__":
    main()
