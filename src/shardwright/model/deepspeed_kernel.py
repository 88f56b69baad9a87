"""DeepSpeed without its prints, and its shared-memory all-reduce: compiled once on each machine, loaded by each rank.

    <folder>/lock              held by who compiles or loads
    <folder>/<versions, hash>/ what torch's builder writes, and `built` once that is whole; its time is the last use

The hash is of the CPU and of where DeepSpeed and torch lie: the builder compiles anew when a path is another, so two
environments in one folder would undo each other's work.

It is compiled by a process of its own (`python -m shardwright.model.deepspeed_kernel FOLDER`): torch's builder can't be
stopped, and what it starts would outlive a worker that ends meanwhile. Ranks load what that process left without
asking the builder, which would compile anew, for a minute and within each start, wherever the sources are younger than
the library: after every reinstallation.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shardwright.errors import ConfigError
from shardwright.model.kernel_build import cpu_identity, locked, run_build

_KERNEL = "deepspeed_shm_comm"
_BUILT = "built"


def check_deepspeed() -> None:
    """Raise `ConfigError` where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "--tensor-parallel needs DeepSpeed, which is not installed; pip install 'shardwright[deepspeed]'"
        )


def build_kernel(folder: Path) -> Path:
    """Compile DeepSpeed's shared-memory all-reduce into `folder`, if it is not there; gives where it lies.

    The first time takes a minute. Raises `ConfigError` with what is missing where it can't be compiled.
    """
    if sys.platform != "linux":
        raise ConfigError("it is for Linux")
    where = hashlib.sha256(cpu_identity())
    for package in ("deepspeed", "torch"):
        found = importlib.util.find_spec(package)
        where.update(f"\n{found and found.origin}".encode())
    kernels = folder / f"torch-{version('torch')}-deepspeed-{version('deepspeed')}-{where.hexdigest()[:12]}"
    try:
        kernels.mkdir(parents=True, exist_ok=True)
        if not (kernels / _BUILT).exists():
            code, errors = run_build([sys.executable, "-m", "shardwright.model.deepspeed_kernel", str(kernels)])
            if code != 0:
                lines = errors.strip().splitlines()
                raise ConfigError(lines[-1] if lines else f"its compilation ended with exit code {code}")
        (kernels / _BUILT).touch()
    except OSError as exc:
        raise ConfigError(str(exc)) from exc
    return kernels


def load_kernel(kernels: Path) -> None:
    """Load what `build_kernel` gave into this process, for DeepSpeed. What was removed meanwhile is compiled again."""
    kernels.mkdir(parents=True, exist_ok=True)
    with locked(kernels.parent):
        library = kernels / _KERNEL / f"{_KERNEL}.so"
        builder = _builder()
        if not ((kernels / _BUILT).exists() and library.exists()):
            _compile(builder, kernels)
            return
        loader = importlib.machinery.ExtensionFileLoader(_KERNEL, str(library))
        spec = importlib.machinery.ModuleSpec(_KERNEL, loader, origin=str(library))
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        builder._loaded_ops[builder.name] = module  # noqa: SLF001  what its `load` gives from now on


def _builder() -> Any:
    accelerator: Any = importlib.import_module("deepspeed.accelerator")
    return accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")


def _compile(builder: Any, kernels: Path) -> None:
    """Compile what is missing or out of date in a folder whose parent this process has locked, and load it."""
    # torch has a lock file of its own, for which others wait for ever when a compiling process was killed.
    (kernels / _KERNEL / "lock").unlink(missing_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(kernels)
    builder.load()


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Keep DeepSpeed's prints and log lines, which go to standard output, away from it."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def import_deepspeed(*, kernel: bool) -> Any:
    """DeepSpeed, told whether it has its shared-memory all-reduce.

    Otherwise it finds out, for this and all its other kernels, by trying compiler and linker, which complain.
    """
    with quiet_deepspeed():
        deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__ = {_KERNEL: kernel}
    return deepspeed


def _end_with_parent() -> None:
    """Standard input is a pipe that the starting process holds: once it is gone, nobody waits for the kernel."""
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)  # the compilers too


def main() -> None:
    """Compile; what went wrong is the last line of standard error."""
    [kernels] = map(Path, sys.argv[1:])
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    os.environ["DS_ACCELERATOR"] = "cpu"
    import_deepspeed(kernel=True)
    kernels.mkdir(parents=True, exist_ok=True)
    try:
        with quiet_deepspeed(), locked(kernels.parent):
            _compile(_builder(), kernels)
    except Exception as exc:  # noqa: BLE001  whatever a compiler and its helpers may raise
        words = str(exc).strip().splitlines()
        sys.exit(words[0] if words else type(exc).__name__)


if __name__ == "__main__":
    main()
