"""Computes decoder layers in one call into our own kernel, where they ask for nothing that it can't compute.

A decode step of a small model takes most of its time on the way between operations: through modules, torch's
dispatcher and the ends of parallel regions, twenty times a layer. What a layer computes for rows that are attended each
by itself is the same list of operations in every step, so it is recorded once: the layer runs on a few random rows
while a `Recorder` is told of every operation of torch and of the kernel. If all of them are the kernel's, or sums and
products of rows, `layer.cpp` computes the list; else the layer stays as it is. A recorded layer is used only where it
gave the same bits as the layer itself, on rows of which there were more or fewer than in the recording.

Recorded layers that follow each other and read the same arguments are computed in one call when a step comes to the
first of them. The model's own loop goes on over them all the same, and finds each one's result ready; where the layers
of a stage are all of one run, it can be made to go over the first and the last of them alone (`shorten_loop`).

Layers keep their modules: steps with more than a few tokens of prompts run through them as ever.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.model.attention import PORT_ATTRIBUTE, BatchCell, PagedLayer, StepBatch
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
    Listed,
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

    def find(self, arguments: Any) -> Any:
        """What stands in its place; None where nothing does."""
        try:
            for key in self.path:
                arguments = arguments[key]
        except (LookupError, TypeError):
            return None
        return arguments

    def lies(self, tensor: Any, rows: int, dtype: torch.dtype) -> bool:
        """Whether it is one that the kernel can read."""
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.dtype == dtype
            and tensor.numel() == rows * self.row
            and tensor.is_contiguous()
        )


class RecordedLayer:
    """A layer's operations, and what they read of its arguments."""

    def __init__(self, plan: LayerPlan, *, inputs: Sequence[_Input], window: int | None) -> None:
        """`plan` is whole, `inputs` are what it reads beside the hidden states."""
        self.records = plan.records()
        self.arena_bytes = plan.arena_bytes
        self.inputs = tuple(inputs)
        self.window = window
        self.goes_on = True
        """Whether it was always called with the tensors that the layer before it was called with."""

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs themselves."""
        arguments = (args, kwargs)
        return [given.find(arguments) for given in self.inputs]


class RecordedRun:
    """Layers that follow each other, ready to be computed for rows that the kernel attends each by itself.

    The first that is asked for is computed with those behind it. Their results are given when they are asked for with
    the very tensors that they were computed from. A layer that is asked for with others is computed anew, and the run
    ends before it from then on.
    """

    def __init__(
        self,
        layers: Sequence[RecordedLayer],
        product: Product,
        dtype: torch.dtype,
        *,
        cell: BatchCell,
        arena: Arena,
        max_rows: int,
    ) -> None:
        """All `layers` have the same inputs and the same window."""
        self._layers = tuple(layers)
        self._product = product
        self._dtype = dtype
        lists = [Listed(ctypes.addressof(layer.records), len(layer.records)) for layer in layers]
        self._listed = (Listed * len(layers))(*lists)
        self._ends = [len(layers)] * len(layers)  # of what is computed with each
        self._bases = (ctypes.c_void_p * NUM_BASES)()
        self._inputs = layers[0].inputs
        self._window = layers[0].window
        self._cell = cell
        self._arena = arena
        self._max_rows = max_rows
        self._batch: StepBatch | None = None  # of which there are results
        self._leaves: list[Any] = []
        self._results: dict[int, torch.Tensor] = {}  # by layer
        arena.hold(max(layer.arena_bytes for layer in layers))

    def result(
        self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """What the layer of this index gives to [1, rows, width]; None where this step or these are not for the run."""
        batch = self.step()
        if batch is None:
            return None
        leaves = self._layers[index].leaves(args, kwargs)
        if batch is self._batch and index in self._results:
            if hidden is self._results.get(index - 1) and all(map(operator.is_, leaves, self._leaves)):
                return self._results[index]
            self._ends[:index] = [min(end, index) for end in self._ends[:index]]
        if not self._compute(index, batch, hidden, leaves):
            return None
        return self._results[index]

    def step(self) -> StepBatch | None:
        """The step that is computed now, where it is for the run as far as the step itself tells."""
        batch = self._cell.batch
        return batch if batch is not None and batch.is_for_kernel and batch.num_tokens <= self._max_rows else None

    def ready(self, index: int) -> torch.Tensor | None:
        """The result of the layer of this index, where it was computed in this step."""
        return self._results.get(index) if self._batch is self._cell.batch else None

    def _compute(self, index: int, batch: StepBatch, hidden: torch.Tensor, leaves: list[Any]) -> bool:
        rows = batch.num_tokens
        attended = batch.kernel_rows(self._window)
        if attended is None or hidden.dtype != self._dtype or not hidden.is_contiguous():
            return False
        bases = self._bases
        for given, leaf in zip(self._inputs, leaves, strict=True):
            if not given.lies(leaf, rows, self._dtype):
                return False
            bases[given.base] = leaf.data_ptr()
        count = self._ends[index] - index
        results = hidden.new_empty((count, *hidden.shape))
        bases[HIDDEN] = hidden.data_ptr()
        bases[RESULT] = results.data_ptr()
        bases[ARENA] = self._arena.address
        bases[SLOTS] = batch.slots.data_ptr()
        bases[TABLE] = attended.table.data_ptr()
        listed = ctypes.addressof(self._listed) + index * ctypes.sizeof(Listed)
        self._product.layers(listed, count, bases, rows=rows, result_bytes=hidden.nbytes, dtype=self._dtype)
        self._batch, self._leaves = batch, leaves
        self._results = dict(enumerate(results.unbind(), start=index))
        return True


_ATTRIBUTE: Final = "shardwright_recorded"
_SHORT: Final = "shardwright_short_loop"


@functools.cache
def _with_recording(family: type[nn.Module]) -> type[nn.Module]:
    """A class whose `forward` asks the recorded run first that the layer is of."""
    its_forward: Any = family.forward

    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        run, index = getattr(self, _ATTRIBUTE)
        given = run.result(index, hidden_states, args, kwargs)
        return its_forward(self, hidden_states, *args, **kwargs) if given is None else given

    return type(family.__name__, (family,), {"forward": forward, "__module__": family.__module__})


class _RunLead(nn.Module):
    """Stands in the model's loop for all layers of a run.

    Calls the first and the last as the loop would, with their hooks, and those between them only where the run did not
    compute them.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._run, _ = getattr(layers[0], _ATTRIBUTE)
        self._layers = tuple(layers)  # which are the model's, not this module's

    def __getattr__(self, name: str) -> Any:
        """What the loop asks of a layer, like its `attention_type`, it shall hear from the first."""
        if name in ("_run", "_layers"):
            raise AttributeError(name)
        return getattr(self._layers[0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As each of the layers."""
        first, *between, last = self._layers
        hidden: Any = first(hidden_states, *args, **kwargs)
        ready = self._run.ready(len(self._layers) - 2)
        if ready is None:
            for layer in between:
                hidden = layer(hidden, *args, **kwargs)
        else:
            hidden = ready
        return last(hidden, *args, **kwargs)


@functools.cache
def _with_short_loop(family: type[nn.ModuleList]) -> type[nn.ModuleList]:
    """A list whose slices, over which models loop, have the lead in place of the run in steps that are for the run."""

    def getitem(self: Any, index: Any) -> Any:
        if not isinstance(index, slice):
            return family.__getitem__(self, index)
        run, short = getattr(self, _SHORT)
        return list(self if run.step() is None else short)[index]

    return type(family.__name__, (family,), {"__getitem__": getitem, "__module__": family.__module__})


def shorten_loop(
    model_layers: nn.ModuleList,
    layers: Sequence[nn.Module],
    *,
    end: nn.Module | None,
    compute: Callable[[], torch.Tensor],
) -> bool:
    """Let the model's loop pass the layers of a stage in two calls, where they are of one run; whether it does then.

    `end` stands behind them in the loop if anything does. Whether the family's loop bears it shows in `compute`, which
    gives what comes of a step: it has to give the same bits.
    """
    runs = {id(getattr(layer, _ATTRIBUTE, (None, 0))[0]) for layer in layers}
    if len(layers) < 2 or len(runs) > 1 or not hasattr(layers[0], _ATTRIBUTE):
        return False
    if any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers[1:-1]):  # noqa: SLF001  no other name
        return False
    expected = compute()
    family = type(model_layers)
    run, _ = getattr(layers[0], _ATTRIBUTE)
    lead = _RunLead(layers).eval()
    model_layers.__dict__[_SHORT] = (run, (lead,) if end is None else (lead, end))
    model_layers.__class__ = _with_short_loop(family)  # type: ignore[arg-type]
    try:
        is_same = torch.equal(compute(), expected)
    except Exception:  # noqa: BLE001  a loop may ask anything of a layer
        is_same = False
    if not is_same:
        log.info("the model's loop over its layers stays as it is: it computes something else when it is shortened")
        model_layers.__class__ = family
        del model_layers.__dict__[_SHORT]
    return is_same


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
        self._order: list[nn.Module] = []
        self._arguments: Any = None  # of the layer that was called last

    def hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook with keyword arguments."""
        try:
            hidden, args, kwargs = _take_hidden(args, kwargs)
            if layer in self._found:
                self._try(layer, hidden, args, kwargs)
            elif layer not in self._refused:
                self._order.append(layer)
                self._found[layer] = self._record(layer, hidden, args, kwargs)
        except CannotRecordError as exc:
            self._found.pop(layer, None)
            self._refused[layer] = str(exc)
        self._arguments = (args, kwargs)

    def finish(self) -> None:
        """Have the layers that could be recorded computed so from now on."""
        runs: list[list[nn.Module]] = []
        before: RecordedLayer | None = None
        for layer in self._order:
            recorded = self._found.get(layer)
            if recorded is not None:
                if before is not None and recorded.goes_on and _are_alike(before, recorded):
                    runs[-1].append(layer)
                else:
                    runs.append([layer])
            before = recorded
        for layers in runs:
            run = self._run_of([self._found[layer] for layer in layers])
            for index, layer in enumerate(layers):
                setattr(layer, _ATTRIBUTE, (run, index))
                layer.__class__ = _with_recording(type(layer))  # type: ignore[arg-type]  # mypy takes classes for unhashable
        for why in dict.fromkeys(self._refused.values()):
            log.info("decode steps run through the modules of some layers: %s", why)

    def _run_of(self, layers: Sequence[RecordedLayer]) -> RecordedRun:
        return RecordedRun(
            layers, self._product, self._dtype, cell=self._cell, arena=self._arena, max_rows=self._max_rows
        )

    def _record(
        self, layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RecordedLayer:
        batch = self._cell.batch
        assert batch is not None, "a layer ran outside a step"
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
        used = [given for given in inputs.values() if given.base in plan.used]
        return RecordedLayer(plan, inputs=used, window=port.window)

    def _try(self, layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises `CannotRecordError` where the recording gives another bit than the layer."""
        recorded = self._found[layer]
        if self._arguments is not None:
            leaves = zip(recorded.leaves(args, kwargs), recorded.leaves(*self._arguments), strict=True)
            recorded.goes_on = recorded.goes_on and all(mine is its for mine, its in leaves)
        expected = type(layer).forward(layer, hidden, *args, **kwargs)
        given = self._run_of([recorded]).result(0, hidden, args, kwargs)
        if given is None or not torch.equal(given, expected):
            raise CannotRecordError("the recording gave something else than the layer")


def _are_alike(one: RecordedLayer, other: RecordedLayer) -> bool:
    """Whether they read the same of their arguments, and see through the same window."""
    return (one.inputs, one.window) == (other.inputs, other.window)


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
