"""Computes whole decoder layers in one call into our own kernel, where a layer asks for nothing that it can't compute.

A decode step of a small model takes most of its time on the way between operations: through modules, torch's
dispatcher and the ends of parallel regions, twenty times a layer. What a layer computes for sequences with one new
token is the same list of operations in every step, so it is recorded once: the layer runs on a few random rows while a
`Recorder` is told of every operation of torch and of the kernel. If all of them are the kernel's, or sums and products
of rows, `layer.cpp` computes the list; else the layer stays as it is. A recorded layer is used only where it gave the
same bits as the layer itself, on rows of which there were more or fewer than in the recording.

The layer keeps its modules: steps with prompts run through them as ever.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.model.attention import PORT_ATTRIBUTE, BatchCell, PagedLayer
from shardwright.model.product import ACTIVATIONS, NUM_BASES, Product
MAX_ROWS: Final = 64
"""Steps with more sequences run through the modules; it is what a layer's intermediate results are kept for."""

_RECORDED_ROWS: Final = 3
_TRIED_ROWS: Final = (1, 5)
_ALIGNMENT: Final = 64

# Where operands lie: at an address of their own, or behind one that is another in each call.
_ABSOLUTE, _HIDDEN, _RESULT, _ARENA, _SLOTS, _TABLE, _FIRST_INPUT = range(7)
_NONE: Final = -1

# As `layer.cpp` numbers them, which also has their operands and sizes in order.
_WIDEN, _MULTIPLY, _NORM, _ROTATE, _KEEP, _ATTEND, _JOIN, _ADD, _TIMES, _SCALE, _ACTIVATE = range(11)
_NUM_OPERANDS, _NUM_SIZES = 6, 13
_MAX_OPERATIONS: Final = 64

_aten = torch.ops.aten
_MAKES_ROOM = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.empty_strided.default,
}

log = logging.getLogger(__name__)


class CannotRecordError(Exception):
    """What of a layer the kernel does not compute; never leaves this file."""


class KernelActivation(nn.Module):
    """An activation function that our own kernel computes."""

    def __init__(self, name: str, product: Product) -> None:
        """`name` is one of `product.ACTIVATIONS`."""
        super().__init__()
        self.name = name
        self._form = ACTIVATIONS[name]
        self._activate = product.activate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return self._activate(x, self._form)

    def extra_repr(self) -> str:
        """Which one."""
        return self.name


_MIN_EQUAL = 0.98
"""The share of values that must be equal to the last bit, as for norms: exponentials may differ in their last bit before
a value is rounded."""


def swap_activations(layer: nn.Module, product: Product, dtype: torch.dtype) -> None:
    """Have the kernel compute a layer's activation functions where it gives the same. Which they are is tried."""
    for parent in layer.modules():
        for name, module in parent.named_children():
            where = type(module).__module__
            if where.startswith(("transformers.activations", "torch.nn.modules.activation")):
                found = _find_activation(module, product, dtype)
                if found is not None:
                    setattr(parent, name, KernelActivation(found, product))


def _find_activation(module: nn.Module, product: Product, dtype: torch.dtype) -> str | None:
    if next(module.parameters(), None) is not None:
        return None
    x = torch.randn((64, 96), generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor([0.1, 1.0, 3.0, 20.0]).repeat(16)[:, None]).to(dtype)
    with torch.inference_mode():
        expected = module(x)
        if expected.dtype != dtype or expected.shape != x.shape:
            return None
        for name, form in ACTIVATIONS.items():
            given = product.activate(x, form)
            # Where torch's own sum of 1 and a tanh near -1 leaves few bits, they are noise.
            close = torch.allclose(given.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
            if close and float((given == expected).float().mean()) >= _MIN_EQUAL:
                return name
    return None


@dataclass(frozen=True, slots=True)
class _Note:
    """An operation: what it read and wrote, and its sizes in the order of the method that computed it."""

    kind: str
    tensors: tuple[torch.Tensor | None, ...]
    sizes: tuple[int, ...] = ()
    value: float = 0.0


class Recorder(TorchDispatchMode):
    """Notes what this thread computes by torch and by the kernel. Views and room for results are no operations."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[_Note] = []
        self._kept: list[Any] = []  # that no memory is given out twice
        self._thread = threading.get_ident()

    def note(
        self, kind: str, tensors: tuple[torch.Tensor | None, ...], sizes: tuple[int, ...] = (), value: float = 0.0
    ) -> None:
        """Of the kernel; what other threads compute meanwhile is not of the layer."""
        if threading.get_ident() == self._thread:
            self.notes.append(_Note(kind, tensors, sizes, value))

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
                self.notes.append(_Note("add", (*args, result)))
            case _aten.mul.Tensor, (torch.Tensor(), torch.Tensor()):
                self.notes.append(_Note("times", (*args, result)))
            case _aten.mul.Tensor, (torch.Tensor() as x, float() | int() as factor):
                self.notes.append(_Note("scale", (x, result), value=float(factor)))
            case _aten.index_copy_.default, (target, 0, index, source):
                self.notes.append(_Note("keep", (source, target, index)))
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


@dataclass(slots=True, eq=False)
class _Operation:
    """As `layer.cpp` reads it, and what its place in the order depends on."""

    kind: int
    places: tuple[tuple[int, int], ...]  # base and bytes behind it
    sizes: tuple[int, ...]
    value: float
    phase: int
    joined: _Operation | None = None  # whose parts it brings together


class Arena:
    """Room for intermediate results, which the layers of a stage use one after the other."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.address = 0

    def hold(self, num_bytes: int) -> None:
        """Have at least so many."""
        if num_bytes > self._memory.numel():
            memory = torch.empty(num_bytes + _ALIGNMENT, dtype=torch.uint8)
            self._memory = memory
            self.address = -(-memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT


class _Plan:
    """A layer's operations in phases, made from what was noted of some rows.

    Raises `CannotRecordError` wherever something would lie elsewhere with more rows, or is not known to stay.
    """

    def __init__(
        self, product: Product, dtype: torch.dtype, *, named: Mapping[int, int], fixed: Iterable[torch.Tensor]
    ) -> None:
        """`named` gives the bases of what the layer is called with, by address; `fixed` stays where it is."""
        self.product = product
        self.dtype = dtype
        self.used: set[int] = set()  # bases
        self.arena_bytes = 0
        self._named = named
        self._fixed = {_storage(tensor) for tensor in fixed}
        self._operations: list[_Operation] = []
        self._kinds: list[str] = []  # of the phases: "rows", "multiply" or "attend"
        self._buffers: dict[int, tuple[int, int, int]] = {}  # by storage: base, start, bytes of a row
        self._widened: dict[tuple[int, int, int], tuple[int, int]] = {}
        self._writers: dict[int, list[_Operation]] = {}  # by storage, or by a negative number for room of the kernel's

    def gives(self, tensor: torch.Tensor) -> None:
        """What the layer gives back is written where its caller wants it. To be told first."""
        if not tensor.is_contiguous():
            raise CannotRecordError("a result whose rows don't follow each other")
        self._buffers[_storage(tensor)] = (_RESULT, 0, tensor.nbytes // _RECORDED_ROWS)

    def add(self, note: _Note) -> None:
        """The operation that was noted next."""
        tensors = [tensor for tensor in note.tensors if tensor is not None]
        match note.kind:
            case "linear":
                self._add_linear(note)
            case "rms_norm":
                self._add_norm(note, *tensors)
            case "rotate":
                self._add_rotary(*tensors)
            case "keep":
                self._add_keeping(*tensors)
            case "attend":
                self._add_attention(note, *tensors)
            case "add" | "times":
                self._add_rowwise(_ADD if note.kind == "add" else _TIMES, *tensors)
            case "scale":
                x, y = tensors
                self._add_rowwise(_SCALE, x, x, y, value=note.value)
            case _:
                assert note.kind == "activate", note.kind
                x, y = tensors
                self._add_rowwise(_ACTIVATE, x, x, y, form=note.sizes[1])

    def _add_linear(self, note: _Note) -> None:
        x, weight, bias, y = note.tensors
        assert x is not None
        assert weight is not None
        assert y is not None
        stride, n, k = note.sizes
        if self._row(x) != stride:
            raise CannotRecordError("a product of rows that are not the step's")
        place = self._place(x)
        wide = self._widened.get((*place, k))
        if wide is None:  # several products of the same rows copy them once
            wide = self._widened[*place, k] = self._room(self.product.wide_bytes(k, self.dtype))
            self._put(_WIDEN, "rows", [_storage(x)], [-1 - wide[1]], (place, wide), (stride, k))
        places = (wide, self._lasting(weight), (_NONE, 0) if bias is None else self._lasting(bias), self._make(y))
        if self._row(y) != n:
            raise CannotRecordError("a product whose rows are not the step's")
        self._put(_MULTIPLY, "multiply", [-1 - wide[1]], [_storage(y)], places, (n, k))

    def _add_norm(self, note: _Note, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        size, form = note.sizes
        places = (self._place(x), self._lasting(weight), self._make(y))
        row = self._row(y)
        if self._row(x) != row or row % size:
            raise CannotRecordError("a norm of rows that don't follow each other")
        self._put(_NORM, "rows", [_storage(x)], [_storage(y)], places, (row // size, size, form), note.value)

    def _add_rotary(self, *tensors: torch.Tensor) -> None:
        q, k, cos, sin, q_out, k_out = tensors
        places = (*(self._place(t) for t in (q, k, cos, sin)), self._make(q_out), self._make(k_out))
        turned = [t.transpose(1, 2) for t in (q, k, q_out, k_out)]
        sizes = (
            *(self._row(t) for t in turned),
            *(t.stride(2) for t in turned),
            *(self._row(t) for t in (cos, sin)),
            *(q.shape[1], k.shape[1], q.shape[3]),
        )
        written = [_storage(q_out), _storage(k_out)]
        self._put(_ROTATE, "rows", [_storage(t) for t in (q, k, cos, sin)], written, places, sizes)

    def _add_keeping(self, source: torch.Tensor, target: torch.Tensor, index: torch.Tensor) -> None:
        heads, size = target.shape[1:]
        if source.shape != (_RECORDED_ROWS, heads, size) or source.stride(2) != 1 or not target.is_contiguous():
            raise CannotRecordError("K or V that don't lie as they are kept")
        places = (self._place(source), self._lasting(target), self._place(index))
        sizes = (self._row(source), source.stride(1), heads, size)
        self._put(_KEEP, "rows", [_storage(source)], [_storage(target)], places, sizes)

    def _add_attention(self, note: _Note, *tensors: torch.Tensor) -> None:
        query, keys, values, table, out = tensors
        num_sequences, block_size = note.sizes
        places = (self._place(query), self._lasting(keys), self._lasting(values), self._make(out), self._place(table))
        heads, value_dim = out.shape[1:]
        if num_sequences != _RECORDED_ROWS or self._row(out) != heads * value_dim:
            raise CannotRecordError("attention of other rows than the step's")
        kv_heads, key_dim = keys.shape[1:]
        sizes = (
            *(self._row(query), query.stride(1), kv_heads, heads // kv_heads),
            *(key_dim, value_dim, block_size),
        )
        _, parts = self._room(1)  # a name for what the kernel keeps between the two
        reads = [_storage(t) for t in (query, keys, values)]
        attending = self._put(_ATTEND, "attend", reads, [-1 - parts], places, sizes, note.value)
        joining = self._put(_JOIN, "rows", [-1 - parts], [_storage(out)], (), ())
        joining.joined = attending

    def _add_rowwise(
        self, kind: int, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor, *, form: int = 0, value: float = 0.0
    ) -> None:
        places = (self._place(a), self._place(b), self._make(y))
        width, *others = (self._width(tensor) for tensor in (a, b, y))
        if others != [width, width]:
            raise CannotRecordError("a sum or product of rows of unlike lengths")
        sizes = (*(self._row(tensor) for tensor in (a, b, y)), width, form)
        self._put(kind, "rows", [_storage(a), _storage(b)], [_storage(y)], places, sizes, value)

    def _width(self, tensor: torch.Tensor) -> int:
        """Values of a row, which follow each other."""
        row = tensor[(0,) * (_token_dim(tensor) + 1)]
        if not row.is_contiguous() or tensor.dtype != self.dtype:
            raise CannotRecordError("a row whose values don't follow each other, or of another dtype")
        return row.numel()

    def _row(self, tensor: torch.Tensor) -> int:
        """How many values apart the rows lie, whatever their number."""
        stride = tensor.stride(_token_dim(tensor))
        buffer = self._buffers.get(_storage(tensor))
        if buffer is not None and stride * tensor.itemsize != buffer[2]:
            raise CannotRecordError("rows that lie further apart the more there are")
        return stride

    def _place(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Where something lies that an operation before has made, or that the layer was called with."""
        address = tensor.data_ptr()
        buffer = self._buffers.get(_storage(tensor))
        if buffer is not None:
            return buffer[0], buffer[1] + address - _storage(tensor)
        base = self._named.get(address)
        if base is None:
            raise CannotRecordError(f"a tensor of the shape {list(tensor.shape)} that comes from elsewhere")
        self.used.add(base)
        return base, 0

    def _make(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Where an operation's result shall lie."""
        storage = _storage(tensor)
        if storage not in self._buffers:
            num_bytes = tensor.untyped_storage().nbytes()
            if tensor.data_ptr() != storage or num_bytes != tensor.nbytes:
                raise CannotRecordError("an operation that writes a part of a tensor")
            self._buffers[storage] = (*self._room(num_bytes // _RECORDED_ROWS), num_bytes // _RECORDED_ROWS)
        return self._place(tensor)

    def _lasting(self, tensor: torch.Tensor) -> tuple[int, int]:
        if _storage(tensor) not in self._fixed:
            raise CannotRecordError(f"a weight of the shape {list(tensor.shape)} that comes from elsewhere")
        return _ABSOLUTE, tensor.data_ptr()

    def _room(self, row_bytes: int) -> tuple[int, int]:
        start = self.arena_bytes
        self.arena_bytes += -(-row_bytes * MAX_ROWS // _ALIGNMENT) * _ALIGNMENT
        return _ARENA, start

    def _put(
        self,
        kind: int,
        phase_kind: str,
        reads: Iterable[int],
        writes: Iterable[int],
        places: tuple[tuple[int, int], ...],
        sizes: tuple[int, ...],
        value: float = 0.0,
    ) -> _Operation:
        """Into the first phase of its kind behind all that it waits for. Rows wait for nothing else of their row."""
        phase = 0
        for storage in reads:
            for writer in self._writers.get(storage, ()):
                together = phase_kind == self._kinds[writer.phase] == "rows"
                phase = max(phase, writer.phase + (0 if together else 1))
        while phase < len(self._kinds) and self._kinds[phase] != phase_kind:
            phase += 1
        if phase == len(self._kinds):
            self._kinds.append(phase_kind)
        operation = _Operation(kind, places, sizes, value, phase)
        self._operations.append(operation)
        for storage in writes:
            self._writers.setdefault(storage, []).append(operation)
        return operation

    def records(self) -> ctypes.Array[_Record]:
        """The operations in their order, as `layer.cpp` reads them."""
        ordered = sorted(self._operations, key=lambda operation: operation.phase)  # stable
        if len(ordered) > _MAX_OPERATIONS:
            raise CannotRecordError(f"{len(ordered)} operations")
        records = (_Record * len(ordered))()
        for record, operation in zip(records, ordered, strict=True):
            record.kind, record.phase, record.value = operation.kind, operation.phase, operation.value
            places = (*operation.places, *[(_NONE, 0)] * (_NUM_OPERANDS - len(operation.places)))
            for index, (base, offset) in enumerate(places):
                record.base[index], record.offset[index] = base, offset
            sizes = operation.sizes if operation.joined is None else (ordered.index(operation.joined),)
            for index, size in enumerate(sizes):
                record.size[index] = size
        return records


def _token_dim(tensor: torch.Tensor) -> int:
    """The dimension of rows: the first, but for one of one."""
    shape = tensor.shape
    dim = 1 if len(shape) > 1 and shape[0] == 1 else 0
    if shape[dim] != _RECORDED_ROWS:
        raise CannotRecordError(f"a tensor of the shape {list(shape)}, whose rows are not the step's")
    return dim


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Record(ctypes.Structure):
    """`Record` of `layer.cpp`."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        ("phase", ctypes.c_int64),
        ("base", ctypes.c_int64 * _NUM_OPERANDS),
        ("offset", ctypes.c_int64 * _NUM_OPERANDS),
        ("size", ctypes.c_int64 * _NUM_SIZES),
        ("value", ctypes.c_double),
    ]


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
    """A layer's operations, ready to be computed for some sequences with one new token each."""

    def __init__(
        self, plan: _Plan, *, inputs: Sequence[_Input], window: int | None, cell: BatchCell, arena: Arena, max_rows: int
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
        decodes = batch.decodes(self._window)
        if rows > self._max_rows or decodes is None or hidden.dtype != self._dtype or not hidden.is_contiguous():
            return None
        bases = self._bases
        for given in self._inputs:
            address = given.address((args, kwargs), rows, self._dtype)
            if address is None:
                return None
            bases[given.base] = address
        result = torch.empty_like(hidden)
        bases[_HIDDEN] = hidden.data_ptr()
        bases[_RESULT] = result.data_ptr()
        bases[_ARENA] = self._arena.address
        bases[_SLOTS] = batch.slots.data_ptr()
        bases[_TABLE] = decodes.table.data_ptr()
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

    rows: Final = (_RECORDED_ROWS, *_TRIED_ROWS)
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

    def finish(self) -> int:
        """Have the layers that could be recorded computed so from now on, and tell how many these are."""
        for layer, recorded in self._found.items():
            setattr(layer, _ATTRIBUTE, recorded)
            layer.__class__ = _with_recording(type(layer))  # type: ignore[arg-type]  # mypy takes classes for unhashable
        for why in dict.fromkeys(self._refused.values()):
            log.info("decode steps run through the modules of some layers: %s", why)
        return len(self._found)

    def _record(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedLayer:
        batch = self._cell.batch
        assert batch is not None, "a layer ran outside a step"
        hidden, args, kwargs = _take_hidden(args, kwargs)
        ports = [port for module in layer.modules() if (port := getattr(module, PORT_ATTRIBUTE, None)) is not None]
        if len(ports) != 1 or not isinstance(ports[0], PagedLayer):
            raise CannotRecordError(f"{len(ports)} attention modules")
        port = ports[0]
        decodes = batch.decodes(port.window)
        assert decodes is not None
        inputs = _find_inputs((args, kwargs), self._dtype)
        named = {given.pointer: _FIRST_INPUT + index for index, given in enumerate(inputs)}
        named |= {hidden.data_ptr(): _HIDDEN, batch.slots.data_ptr(): _SLOTS, decodes.table.data_ptr(): _TABLE}
        type(layer).forward(layer, hidden, *args, **kwargs)  # what is tried only once is no part of the layer
        with Recorder() as recorder, _told(self._product, recorder):
            result = type(layer).forward(layer, hidden, *args, **kwargs)
        if not isinstance(result, torch.Tensor) or result.shape != hidden.shape or not hidden.is_contiguous():
            raise CannotRecordError("a layer that gives more than hidden states")
        plan = _Plan(
            self._product, self._dtype, named=named, fixed=(*layer.parameters(), port.cache.keys, port.cache.values)
        )
        plan.gives(result)
        for note in recorder.notes:
            plan.add(note)
        return RecordedLayer(
            plan,
            inputs=[
                _Input(_FIRST_INPUT + index, given.path, given.row)
                for index, given in enumerate(inputs)
                if _FIRST_INPUT + index in plan.used
            ],
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


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor among a layer's arguments."""

    pointer: int
    path: tuple[Any, ...]
    row: int


def _find_inputs(arguments: Any, dtype: torch.dtype) -> list[_Found]:
    """Those that are made of the step's rows."""
    found = []
    for path, leaf in pytree.tree_flatten_with_path(arguments)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.dtype == dtype and leaf.is_contiguous():
            keys = tuple(key.key if isinstance(key, pytree.MappingKey) else getattr(key, "idx", None) for key in path)
            if None not in keys and leaf.dim() > 1 and leaf.shape[:2] == (1, _RECORDED_ROWS):
                found.append(_Found(leaf.data_ptr(), keys, leaf.numel() // _RECORDED_ROWS))
    if len(found) > NUM_BASES - _FIRST_INPUT:
        raise CannotRecordError(f"{len(found)} tensors beside the hidden states")
    return found
