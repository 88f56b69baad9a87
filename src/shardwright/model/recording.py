"""Computes whole decoder layers in one call into our own kernel, where a layer asks for nothing that it can't compute.

A decode step of a small model takes most of its time on the way between operations: through modules, torch's
dispatcher and the ends of parallel regions, twenty times a layer. What a layer computes for rows that are attended each
by itself is the same list of operations in every step, so it is recorded once: the layer runs on a few random rows
while a `Recorder` is told of every operation of torch and of the kernel. If all of them are the kernel's, or sums and
products of rows, `layer.cpp` computes the list; else the layer stays as it is. A recorded layer is used only where it
gave the same bits as the layer itself, on rows of which there were more or fewer than in the recording.

The layer keeps its modules: steps with more than a few tokens of prompts run through them as ever.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.model.attention import PORT_ATTRIBUTE, BatchCell, PagedLayer
from shardwright.model.layer_plan import (
    ALIGNMENT,
    ARENA,
    FIRST_INPUT,
    HIDDEN,
    MAX_ROWS,
    RECORDED_ROWS,
    RESULT,
    SLOTS,
    TABLE,
    CannotRecordError,
    LayerPlan,
    Note,
)
from shardwright.model.product import NUM_BASES, Product

_TRIED_ROWS: Final = (1, 5)

_aten = torch.ops.aten
_MAKES_ROOM = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.empty_strided.default,
}

log = logging.getLogger(__name__)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Notes what this thread computes by torch and by the kernel. Views and room for results are no operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.notes: list[Note] = []
        self._kept: list[Any] = []  # that no memory is given out twice
        self._thread = threading.get_ident()

    def note(
        self, kind: str, tensors: tuple[torch.Tensor | None, ...], sizes: tuple[int, ...] = (), value: float = 0.0
    ) -> None:
        """Of the kernel; what other threads compute meanwhile is not of the layer."""
        if threading.get_ident() == self._thread:
            self.notes.append(Note(kind, tensors, sizes, value))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute as ever. Raises `CannotRecordError` for what `layer.cpp` has no operation for."""
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._kept.append(result)
        if func in _MAKES_ROOM or _is_view(func, args, result):
            return result
        match func, args:
            case _aten.add.Tensor, (torch.Tensor(), torch.Tensor()) if not kwargs:
                self.notes.append(Note("add", (*args, result)))
            case _aten.mul.Tensor, (torch.Tensor(), torch.Tensor()):
                self.notes.append(Note("times", (*args, result)))
            case _aten.mul.Tensor, (torch.Tensor() as x, float() | int() as factor):
                self.notes.append(Note("scale", (x, result), value=float(factor)))
            case _aten.index_copy_.default, (target, 0, index, source):
                self.notes.append(Note("keep", (source, target, index)))
            case _:
                raise CannotRecordError(str(func))
        return result


def _is_view(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    """Whether nothing was computed: what was given back lies in what was given."""
    if func._schema.is_mutable:  # noqa: SLF001  torch's only name for it
        return False
    given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
    got = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    return bool(got) and all(t.untyped_storage().data_ptr() in given for t in got)


class Arena:
    """Room for intermediate results, which the layers of a stage use one after the other."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.address = 0

    def hold(self, num_bytes: int) -> None:
        """Have at least so many."""
        if num_bytes > self._memory.numel():
            memory = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
            self._memory = memory
            self.address = -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class _Input:
    """A tensor that the layer is called with beside the hidden states, as it has to lie."""

    base: int
    path: tuple[Any, ...]
    row: int  # values of one

    def address(self, arguments: Any, rows: int, dtype: torch.dtype) -> int | None:
        """None where it is missing or lies otherwise."""
        try:
            for key in self.path:
                arguments = arguments[key]
        except (LookupError, TypeError):
            return None
        if (
            not isinstance(arguments, torch.Tensor)
            or arguments.dtype != dtype
            or arguments.numel() != rows * self.row
            or not arguments.is_contiguous()
        ):
            return None
        return arguments.data_ptr()


class RecordedLayer:
    """A layer's operations, ready to be computed for rows that the kernel attends each by itself."""

    def __init__(
        self,
        plan: LayerPlan,
        *,
        inputs: Sequence[_Input],
        window: int | None,
        cell: BatchCell,
        arena: Arena,
        max_rows: int,
    ) -> None:
        """`plan` is whole, `inputs` are what it reads of the layer's arguments."""
        self._product = plan.product
        self._dtype = plan.dtype
        self._records = plan.records()
        self._count = len(self._records)
        self._address = ctypes.addressof(self._records)
        self._bases = (ctypes.c_void_p * NUM_BASES)()
        self._inputs = tuple(inputs)
        self._window = window
        self._cell = cell
        self._arena = arena
        self._max_rows = max_rows
        arena.hold(plan.arena_bytes)

    def __call__(self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """[1, rows, width] -> the same; None where this step or these arguments are not for the recording."""
        batch = self._cell.batch
        if batch is None or not batch.is_for_kernel:
            return None
        rows = batch.num_tokens
        attended = batch.kernel_rows(self._window)
        if rows > self._max_rows or attended is None or hidden.dtype != self._dtype or not hidden.is_contiguous():
            return None
        bases = self._bases
        for given in self._inputs:
            address = given.address((args, kwargs), rows, self._dtype)
            if address is None:
                return None
            bases[given.base] = address
        result = torch.empty_like(hidden)
        bases[HIDDEN] = hidden.data_ptr()
        bases[RESULT] = result.data_ptr()
        bases[ARENA] = self._arena.address
        bases[SLOTS] = batch.slots.data_ptr()
        bases[TABLE] = attended.table.data_ptr()
        self._product.layer(self._address, self._count, bases, rows, self._dtype)
        return result


_ATTRIBUTE: Final = "shardwright_recorded"


@functools.cache
def _with_recording(family: type[nn.Module]) -> type[nn.Module]:
    """A class whose `forward` asks the layer's recording first."""
    its_forward: Any = family.forward

    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        recorded: RecordedLayer = getattr(self, _ATTRIBUTE)
        given = recorded(hidden_states, args, kwargs)
        return its_forward(self, hidden_states, *args, **kwargs) if given is None else given

    return type(family.__name__, (family,), {"forward": forward, "__module__": family.__module__})


class LayerRecorder:
    """Records a stage's layers while it computes a few steps of nonsense.

    Its hook, put before a layer, records the layer in the first step and tries the recording in those after it.
    """

    rows: Final = (RECORDED_ROWS, *_TRIED_ROWS)
    """Of these steps: sequences with one new token."""

    def __init__(self, product: Product, dtype: torch.dtype, *, cell: BatchCell, max_rows: int) -> None:
        """Rows are products' of the kernel up to `max_rows`."""
        self._product = product
        self._dtype = dtype
        self._cell = cell
        self._max_rows = min(max_rows, MAX_ROWS)
        self._arena = Arena()
        self._found: dict[nn.Module, RecordedLayer] = {}
        self._refused: dict[nn.Module, str] = {}

    def hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook with keyword arguments."""
        if layer in self._refused:
            return
        try:
            if layer not in self._found:
                self._found[layer] = self._record(layer, args, kwargs)
            else:
                self._try(layer, args, kwargs)
        except CannotRecordError as exc:
            self._found.pop(layer, None)
            self._refused[layer] = str(exc)

    def finish(self) -> None:
        """Have the layers that could be recorded computed so from now on."""
        for layer, recorded in self._found.items():
            setattr(layer, _ATTRIBUTE, recorded)
            layer.__class__ = _with_recording(type(layer))  # type: ignore[arg-type]  # mypy takes classes for unhashable
        for why in dict.fromkeys(self._refused.values()):
            log.info("decode steps run through the modules of some layers: %s", why)

    def _record(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedLayer:
        batch = self._cell.batch
        assert batch is not None, "a layer ran outside a step"
        hidden, args, kwargs = _take_hidden(args, kwargs)
        ports = [port for module in layer.modules() if (port := getattr(module, PORT_ATTRIBUTE, None)) is not None]
        if len(ports) != 1 or not isinstance(ports[0], PagedLayer):
            raise CannotRecordError(f"{len(ports)} attention modules")
        port = ports[0]
        attended = batch.kernel_rows(port.window)
        assert attended is not None
        inputs = _find_inputs((args, kwargs), self._dtype)
        named = {address: given.base for address, given in inputs.items()}
        named |= {hidden.data_ptr(): HIDDEN, batch.slots.data_ptr(): SLOTS, attended.table.data_ptr(): TABLE}
        type(layer).forward(layer, hidden, *args, **kwargs)  # what is tried only once is no part of the layer
        with Recorder() as recorder, _told(self._product, recorder):
            result = type(layer).forward(layer, hidden, *args, **kwargs)
        if not isinstance(result, torch.Tensor) or result.shape != hidden.shape or not hidden.is_contiguous():
            raise CannotRecordError("a layer that gives more than hidden states")
        plan = LayerPlan(
            self._product, self._dtype, named=named, fixed=(*layer.parameters(), port.cache.keys, port.cache.values)
        )
        plan.gives(result)
        for note in recorder.notes:
            plan.add(note)
        return RecordedLayer(
            plan,
            inputs=[given for given in inputs.values() if given.base in plan.used],
            window=port.window,
            cell=self._cell,
            arena=self._arena,
            max_rows=self._max_rows,
        )

    def _try(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises `CannotRecordError` where the recording gives another bit than the layer."""
        hidden, args, kwargs = _take_hidden(args, kwargs)
        expected = type(layer).forward(layer, hidden, *args, **kwargs)
        given = self._found[layer](hidden, args, kwargs)
        if given is None or not torch.equal(given, expected):
            raise CannotRecordError("the recording gave something else than the layer")


@contextmanager
def _told(product: Product, recorder: Recorder) -> Iterator[None]:
    product.tape = recorder
    try:
        yield
    finally:
        product.tape = None


def _take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    hidden = kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise CannotRecordError("a layer that is called without hidden states")
    return hidden, (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _find_inputs(arguments: Any, dtype: torch.dtype) -> dict[int, _Input]:
    """Those that are made of the step's rows, by address."""
    found: dict[int, _Input] = {}
    for path, leaf in pytree.tree_flatten_with_path(arguments)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.dtype == dtype and leaf.is_contiguous():
            keys = tuple(key.key if isinstance(key, pytree.MappingKey) else getattr(key, "idx", None) for key in path)
            if None not in keys and leaf.dim() > 1 and leaf.shape[:2] == (1, RECORDED_ROWS):
                given = _Input(FIRST_INPUT + len(found), keys, leaf.numel() // RECORDED_ROWS)
                found.setdefault(leaf.data_ptr(), given)
    if len(found) > NUM_BASES - FIRST_INPUT:
        raise CannotRecordError(f"{len(found)} tensors beside the hidden states")
    return found
