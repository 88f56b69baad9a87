"""What 16-bit stages compute most on a CPU, by a kernel of our own that is compiled where it is used.

Products with weights, norms, rotary embedding, activation functions and the attention of decodes (`product.cpp`), and
whole layers of them (`layer.cpp`). Knows a compiler and a folder; nothing of models. Where there is no compiler, or
anything else is in the way, there is no kernel, and whoever asked goes on with torch's products.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional

from shardwright.model.kernel_build import BuildTimeoutError, cpu_identity, locked, run_build

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-fno-math-errno")
BUILD_TIMEOUT_S = 120.0

FORMS = (0, 1, 2)
"""Of a root-mean-square norm: `product.cpp` says which rounds where, and which adds 1 to the weight."""

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
"""As `layer.cpp` numbers them."""

NUM_BASES = 16
"""What a layer's operands may lie behind: `layer_plan.py` says what they are."""

_SOURCES = ("product.cpp", "layer.cpp")  # compiled as one text
_HEADS_FIRST_DIMS = 4  # [batch, heads, rows, size]
_KINDS = {torch.bfloat16: 0, torch.float16: 1}

log = logging.getLogger(__name__)


class KernelUnavailableError(Exception):
    """Why there is no kernel of our own; never leaves this file."""


class Tape(Protocol):
    """Is told of the kernel's computations (`recording.py`)."""

    def note(
        self, kind: str, tensors: tuple[torch.Tensor | None, ...], sizes: tuple[int, ...] = (), value: float = 0.0
    ) -> None:
        """What was read and written, in the order in which the method named `kind` takes and gives it."""
        ...


class Product:
    """`x @ weight.T + bias` for 16-bit CPU tensors, summed in float32 and rounded once.

    A row's result is the same whatever rows it comes with, and with any number of threads. The weight is read from
    its plain order, so that nothing is packed and other modules may hold it too.
    """

    def __init__(self, library: ctypes.CDLL, parallel: int, barrier: int) -> None:
        """The addresses of `GOMP_parallel` and `GOMP_barrier` in the OpenMP runtime that torch computes with."""
        self.tape: Tape | None = None
        """Who is told what is computed, of any thread."""
        self._parallel = parallel
        self._barrier = barrier
        self._multiply: Any = library.shardwright_multiply
        long, pointer = ctypes.c_long, ctypes.c_void_p
        self._multiply.argtypes = [
            *(pointer, long, pointer, long, pointer, pointer),
            *(long, long, long, ctypes.c_int, long, pointer),
        ]
        self._attend: Any = library.shardwright_attend
        self._attend.argtypes = [
            *(pointer, long, long, pointer, pointer, pointer, pointer),
            *(long, long, long, long, long, long, ctypes.c_float, ctypes.c_int, long, pointer),
        ]
        self._rotate: Any = library.shardwright_rotate
        self._rotate.argtypes = [*([pointer] * 6), *([long] * 14), ctypes.c_int, long, pointer]
        self._activate: Any = library.shardwright_activate
        self._activate.argtypes = [pointer, pointer, long, long, ctypes.c_int, ctypes.c_int, long, pointer]
        self._layers: Any = library.shardwright_layers
        self._layers.argtypes = [pointer, long, pointer, long, long, ctypes.c_int, long, pointer, pointer]
        self._wide_bytes: Any = library.shardwright_wide_bytes
        self._wide_bytes.argtypes = [long, ctypes.c_int]
        self._wide_bytes.restype = long
        self._norm: Any = library.shardwright_rms_norm
        self._norm.argtypes = [
            *(pointer, pointer, pointer),
            *(long, long, ctypes.c_float, ctypes.c_int, ctypes.c_int, long, pointer),
        ]

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[..., k], [n, k], [n] -> [..., n], all of one dtype and on the CPU; `weight` is contiguous.

        Each decoder layer calls this seven times a step, so it asks torch for as little as it can.
        """
        n, k = weight.shape
        y = x.new_empty((*x.shape[:-1], n))
        rows = x.numel() // k if k else 0
        if rows == 0 or n == 0:
            return y.zero_()
        stride = k
        if not x.is_contiguous():
            x = x.reshape(rows, k)
            if x.stride(1) != 1:
                x = x.contiguous()
            stride = x.stride(0)
        status = self._multiply(
            x.data_ptr(),
            stride,
            weight.data_ptr(),
            k,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
            n,
            k,
            _KINDS[weight.dtype],
            torch.get_num_threads(),
            self._parallel,
        )
        if status == 1:
            raise MemoryError(f"no memory for {rows} rows of {k} values in float32")
        if status:
            raise ValueError(f"the kernel does not know {weight.dtype} on this CPU")
        if self.tape is not None:
            self.tape.note("linear", (x, weight, bias, y), (stride, n, k))
        return y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, form: int) -> torch.Tensor:
        """[..., size], [size] -> [..., size], of one dtype and on the CPU; `weight` is contiguous.

        `form` is one of `FORMS`. The result lies as `x` does where that is dense: heads may stand in front of tokens.
        A row's result is the same whatever rows it comes with.
        """
        if not x.is_contiguous():
            if x.dim() == _HEADS_FIRST_DIMS and x.transpose(1, 2).is_contiguous():
                return self.rms_norm(x.transpose(1, 2), weight, epsilon, form).transpose(1, 2)
            x = x.contiguous()
        y = torch.empty_like(x)
        size = weight.numel()
        rows = x.numel() // size if size else 0
        status = self._norm(
            x.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            rows,
            size,
            epsilon,
            form,
            _KINDS[weight.dtype],
            torch.get_num_threads(),
            self._parallel,
        )
        if status:
            raise ValueError(f"the kernel does not know {weight.dtype} on this CPU")
        if self.tape is not None:
            self.tape.note("rms_norm", (x, weight, y), (size, form), epsilon)
        return y

    def activate(self, x: torch.Tensor, form: int) -> torch.Tensor:
        """Apply an activation function, one of `ACTIVATIONS`, to a CPU tensor of a kind that the kernel knows."""
        x = x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        rows = x.numel() // width if width else 0
        status = self._activate(
            x.data_ptr(),
            y.data_ptr(),
            rows,
            width,
            form,
            _KINDS[x.dtype],
            torch.get_num_threads(),
            self._parallel,
        )
        if status:
            raise ValueError(f"the kernel does not know {x.dtype} on this CPU")
        if self.tape is not None:
            self.tape.note("activate", (x, y), (width, form))
        return y

    def layers(
        self, listed: int, count: int, bases: ctypes.Array[Any], *, rows: int, result_bytes: int, dtype: torch.dtype
    ) -> None:
        """Compute recorded layers, each behind the one before it, for so many rows, all of which the kernel attends.

        `listed` is the address of `count` lists of operations (`layer_plan.py`), `bases` holds the addresses behind
        which the first one's operands lie. Each layer's result lies `result_bytes` behind that of the one before it.
        """
        status = self._layers(
            listed,
            count,
            bases,
            rows,
            result_bytes,
            _KINDS[dtype],
            torch.get_num_threads(),
            self._parallel,
            self._barrier,
        )
        if status == 1:
            raise MemoryError(f"no memory to attend {rows} rows")
        if status:
            raise ValueError(f"the kernel does not know an operation of these layers in {dtype}")

    def wide_bytes(self, k: int, dtype: torch.dtype) -> int:
        """Bytes of a row of k values as `layer.cpp` multiplies it; 0 for a dtype that the kernel does not know."""
        num_bytes: int = self._wide_bytes(k, _KINDS[dtype]) if dtype in _KINDS else 0
        return num_bytes

    def rotate(
        self, queries: torch.Tensor, keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding of [1, heads, rows, size] and [1, kv_heads, rows, size] by [1, rows, size].

        All are of one dtype, on the CPU and dense in their last dimension; the halves of a head are turned into each
        other. Each product and each sum is rounded, as torch's operations round.
        """
        _, heads, rows, size = queries.shape
        turned = torch.empty_like(queries), torch.empty_like(keys)
        q_in, k_in, q_out, k_out = queries.stride(), keys.stride(), turned[0].stride(), turned[1].stride()
        status = self._rotate(
            queries.data_ptr(),
            keys.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            turned[0].data_ptr(),
            turned[1].data_ptr(),
            *(q_in[2], k_in[2], q_out[2], k_out[2]),
            *(q_in[1], k_in[1], q_out[1], k_out[1]),
            cosines.stride(1),
            sines.stride(1),
            rows,
            heads,
            keys.shape[1],
            size,
            _KINDS[queries.dtype],
            torch.get_num_threads(),
            self._parallel,
        )
        if status:
            raise ValueError(f"the kernel does not know {queries.dtype} on this CPU")
        if self.tape is not None:
            self.tape.note("rotate", (queries, keys, cosines, sines, *turned))
        return turned

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        table: torch.Tensor,
        out: torch.Tensor,
        *,
        num_rows: int,
        block_size: int,
        scaling: float,
    ) -> None:
        """Attend rows, each over the blocks of K and V of its sequence, and write those of `out`.

        `query` [rows, heads, key_dim], dense in its last dimension; `keys` [slots, kv_heads, key_dim], `values`
        [slots, kv_heads, value_dim] and `out` [rows, heads, value_dim], contiguous. `table` is int64: for each of the
        `num_rows` which row it is, the first position that it sees, the one after the last, and where in the table its
        sequence's blocks begin, that of position 0 first; then the blocks. Computes in float32 and rounds once; a
        row's result is the same whatever rows it comes with. Raises `ValueError` for shapes that `can_attend` refuses.
        """
        _, kv_heads, key_dim = keys.shape
        status = self._attend(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            table.data_ptr(),
            num_rows,
            kv_heads,
            query.shape[1] // kv_heads,
            key_dim,
            values.shape[2],
            block_size,
            scaling,
            _KINDS[keys.dtype],
            torch.get_num_threads(),
            self._parallel,
        )
        if status == 1:
            raise MemoryError(f"no memory to attend {num_rows} rows")
        if status:
            raise ValueError(f"the kernel does not attend heads of {key_dim} and {values.shape[2]} in {keys.dtype}")
        if self.tape is not None:
            self.tape.note("attend", (query, keys, values, table, out), (num_rows, block_size), scaling)

    def can_attend(self, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
        """Whether the kernel attends such heads on this CPU, and computes what it should: a small case is tried."""
        if dtype not in _KINDS:
            return False
        generator = torch.Generator().manual_seed(0)
        query, keys, values = (
            torch.randn((rows, 2, dim), generator=generator).to(dtype)
            for rows, dim in ((1, key_dim), (4, key_dim), (4, value_dim))
        )
        out = torch.empty((1, 2, value_dim), dtype=dtype)
        table = torch.tensor([0, 1, 4, 4, 1, 0], dtype=torch.int64)  # of four slots in two blocks, in turned order
        try:
            self.attend(query, keys, values, table, out, num_rows=1, block_size=2, scaling=key_dim**-0.5)
        except ValueError:
            return False
        seen = [3, 0, 1]
        expected = functional.scaled_dot_product_attention(
            query.transpose(0, 1).float(), keys[seen].transpose(0, 1).float(), values[seen].transpose(0, 1).float()
        )
        return torch.allclose(out.float(), expected.transpose(0, 1), atol=2e-2, rtol=2e-2)

    def can_multiply(self, dtype: torch.dtype) -> bool:
        """Whether the kernel knows the dtype on this CPU, and computes what it should: one small product is tried."""
        if dtype not in _KINDS:
            return False
        x = torch.linspace(-1.0, 1.0, 5 * 77).view(5, 77).to(dtype)
        weight = torch.linspace(1.0, -0.5, 9 * 77).view(9, 77).to(dtype)
        expected = functional.linear(x.float(), weight.float())
        try:
            given = self.linear(x, weight, None)
        except ValueError:
            return False
        return torch.allclose(given.float(), expected, atol=1e-2, rtol=1e-2)


def built_product(folder: Path) -> Product | None:
    """The kernel if it was built for this CPU in `folder` before; nothing is built and nothing logged."""
    try:
        return find_product(folder) if _library(folder)[0].exists() else None
    except (KernelUnavailableError, OSError):
        return None


@functools.cache
def find_product(folder: Path) -> Product | None:
    """The kernel, built for this CPU in `folder` unless it lies there already; None where that can't be.

    Building takes some seconds. Any number of processes may ask at once: one builds, the others wait for it.
    """
    try:
        return Product(ctypes.CDLL(str(_built(folder))), _openmp("GOMP_parallel"), _openmp("GOMP_barrier"))
    except (KernelUnavailableError, OSError, AttributeError) as exc:
        log.warning("linear layers stay with torch's own products: %s", exc)
        return None


def _openmp(name: str) -> int:
    """Where torch's OpenMP runtime takes parallel work, or its threads wait; torch loads it for the whole process."""
    try:
        entry = getattr(ctypes.CDLL(None), name)
    except AttributeError as exc:
        raise KernelUnavailableError(f"torch's OpenMP runtime has no {name}") from exc
    address: int | None = ctypes.cast(entry, ctypes.c_void_p).value
    assert address is not None
    return address


def _library(folder: Path) -> tuple[Path, list[str], bytes]:
    """The library's path, whether it exists or not, and the command and the source that it is made with."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise KernelUnavailableError(f"no C++ compiler is installed (looked for {', '.join(COMPILERS)})")
    source = b"".join(resources.files("shardwright.model").joinpath(name).read_bytes() for name in _SOURCES)
    native = "-mcpu=native" if platform.machine() in {"aarch64", "arm64"} else "-march=native"
    command = [compiler, *FLAGS, native]
    parts = (source, " ".join(command).encode(), _compiler_version(compiler), cpu_identity())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return folder / f"product-{key[:32]}.so", command, source


def _built(folder: Path) -> Path:
    """The path of the library, which exists."""
    library, command, source = _library(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    if not library.exists():
        with locked(folder):
            if not library.exists():  # another process may have built it while this one waited
                for left in folder.glob("build-*"):  # by a process that was killed: whoever builds holds the lock
                    shutil.rmtree(left, ignore_errors=True)
                _build(command, source, library)
    _check_private(library)
    with contextlib.suppress(OSError):
        library.touch()  # a kernel's time is its last use, for whoever looks through the cache
    return library


def _build(command: list[str], source: bytes, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
        made = Path(scratch) / "product.so"
        text = Path(scratch) / "product.cpp"
        text.write_bytes(source)
        try:
            code, errors = run_build([*command, "-o", str(made), str(text)], timeout_s=BUILD_TIMEOUT_S)
        except BuildTimeoutError as exc:
            raise KernelUnavailableError(str(exc)) from exc
        if code != 0:
            lines = errors.strip().splitlines()
            said = next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")
            raise KernelUnavailableError(f"{command[0]} failed with exit code {code}: {said[:300]}")
        made.chmod(0o700)
        made.replace(library)


def _check_private(path: Path) -> None:
    """Code is loaded only from where nobody else can write."""
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise KernelUnavailableError(f"{path} belongs to another user or can be written by others")


def _compiler_version(compiler: str) -> bytes:
    try:
        return subprocess.run(  # noqa: S603  the compiler was looked up
            [compiler, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False
        ).stdout
    except subprocess.TimeoutExpired as exc:
        raise KernelUnavailableError(f"{compiler} does not answer") from exc
