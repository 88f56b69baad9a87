"""One folder of compiled kernels for all processes that a run of the tests starts: compiling one takes seconds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

KERNELS = "TEST_KERNELS"
"""In the environment: the run's folder."""


def share_kernels(argv: Sequence[object]) -> None:
    """Put the compiled kernel into the cache folder that a command names."""
    folder = next((Path(str(value)) for option, value in pairwise(argv) if option == "--cache-dir"), None)
    if folder is None or (folder / "kernels").exists():
        return
    from shardwright.model.product import find_product  # imports torch, which those who only collect do without

    source = Path(os.environ[KERNELS])
    find_product(source)
    (folder / "kernels").mkdir(mode=0o700, parents=True)
    for path in source.glob("product-*.so"):
        shutil.copy2(path, folder / "kernels")
