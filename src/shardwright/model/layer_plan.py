"""Turns what was noted of a layer into the list of operations that `layer.cpp` computes, in as few phases as it takes.

Knows where tensors lie and which operation waits for which; nothing of models, nor of how notes are taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from shardwright.model.product import Product

MAX_ROWS: Final = 64
"""Of a step, for which there is room: steps with more sequences run through the modules."""

RECORDED_ROWS: Final = 3
"""That what was noted had."""

ALIGNMENT: Final = 64

# Where operands lie: at an address of their own, or behind one that is another in each call. `layer.cpp` knows `HIDDEN`
# and `RESULT`.
ABSOLUTE, HIDDEN, RESULT, ARENA, SLOTS, TABLE, FIRST_INPUT = range(7)
_NONE: Final = -1

# As `layer.cpp` numbers them, which also has their operands and sizes in order.
_WIDEN, _MULTIPLY, _NORM, _ROTATE, _KEEP, _ATTEND, _JOIN, _ADD, _TIMES, _SCALE, _ACTIVATE = range(11)
_NUM_OPERANDS, _NUM_SIZES = 6, 13
_MAX_OPERATIONS: Final = 64


class CannotRecordError(Exception):
    """What of a layer the kernel does not compute; never leaves this room."""


@dataclass(frozen=True, slots=True)
class Note:
    """An operation: what it read and wrote, and its sizes in the order of the method that computed it."""

    kind: str
    tensors: tuple[torch.Tensor | None, ...]
    sizes: tuple[int, ...] = ()
    value: float = 0.0


@dataclass(slots=True, eq=False)
class _Operation:
    """As `layer.cpp` reads it, and what its place in the order depends on."""

    kind: int
    places: tuple[tuple[int, int], ...]  # base and bytes behind it
    sizes: tuple[int, ...]
    value: float
    phase: int
    joined: _Operation | None = None  # whose parts it brings together


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


class Listed(ctypes.Structure):
    """`Listed` of `layer.cpp`: a layer's operations."""

    _fields_ = [("records", ctypes.c_void_p), ("count", ctypes.c_int64)]


class LayerPlan:
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
        self._buffers[_storage(tensor)] = (RESULT, 0, tensor.nbytes // RECORDED_ROWS)

    def add(self, note: Note) -> None:
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

    def _add_linear(self, note: Note) -> None:
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
            self._put(_WIDEN, "rows", (place, wide), (stride, k), reads=[_storage(x)], writes=[-1 - wide[1]])
        places = (wide, self._lasting(weight), (_NONE, 0) if bias is None else self._lasting(bias), self._make(y))
        if self._row(y) != n:
            raise CannotRecordError("a product whose rows are not the step's")
        self._put(_MULTIPLY, "multiply", places, (n, k), reads=[-1 - wide[1]], writes=[_storage(y)])

    def _add_norm(self, note: Note, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        size, form = note.sizes
        places = (self._place(x), self._lasting(weight), self._make(y))
        row = self._row(y)
        if self._row(x) != row or row % size:
            raise CannotRecordError("a norm of rows that don't follow each other")
        sizes = (row // size, size, form)
        self._put(_NORM, "rows", places, sizes, reads=[_storage(x)], writes=[_storage(y)], value=note.value)

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
        self._put(_ROTATE, "rows", places, sizes, reads=[_storage(t) for t in (q, k, cos, sin)], writes=written)

    def _add_keeping(self, source: torch.Tensor, target: torch.Tensor, index: torch.Tensor) -> None:
        heads, size = target.shape[1:]
        if source.shape != (RECORDED_ROWS, heads, size) or source.stride(2) != 1 or not target.is_contiguous():
            raise CannotRecordError("K or V that don't lie as they are kept")
        places = (self._place(source), self._lasting(target), self._place(index))
        sizes = (self._row(source), source.stride(1), heads, size)
        self._put(_KEEP, "rows", places, sizes, reads=[_storage(source)], writes=[_storage(target)])

    def _add_attention(self, note: Note, *tensors: torch.Tensor) -> None:
        query, keys, values, table, out = tensors
        num_rows, block_size = note.sizes
        places = (self._place(query), self._lasting(keys), self._lasting(values), self._make(out), self._place(table))
        heads, value_dim = out.shape[1:]
        if num_rows != RECORDED_ROWS or self._row(out) != heads * value_dim:
            raise CannotRecordError("attention of other rows than the step's")
        kv_heads, key_dim = keys.shape[1:]
        sizes = (
            *(self._row(query), query.stride(1), kv_heads, heads // kv_heads),
            *(key_dim, value_dim, block_size),
        )
        _, parts = self._room(1)  # a name for what the kernel keeps between the two
        reads = [_storage(t) for t in (query, keys, values)]
        attending = self._put(_ATTEND, "attend", places, sizes, reads=reads, writes=[-1 - parts], value=note.value)
        joining = self._put(_JOIN, "rows", (), (), reads=[-1 - parts], writes=[_storage(out)])
        joining.joined = attending

    def _add_rowwise(
        self, kind: int, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor, *, form: int = 0, value: float = 0.0
    ) -> None:
        places = (self._place(a), self._place(b), self._make(y))
        width, *others = (self._width(tensor) for tensor in (a, b, y))
        if others != [width, width]:
            raise CannotRecordError("a sum or product of rows of unlike lengths")
        sizes = (*(self._row(tensor) for tensor in (a, b, y)), width, form)
        self._put(kind, "rows", places, sizes, reads=[_storage(a), _storage(b)], writes=[_storage(y)], value=value)

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
            self._buffers[storage] = (*self._room(num_bytes // RECORDED_ROWS), num_bytes // RECORDED_ROWS)
        return self._place(tensor)

    def _lasting(self, tensor: torch.Tensor) -> tuple[int, int]:
        if _storage(tensor) not in self._fixed:
            raise CannotRecordError(f"a weight of the shape {list(tensor.shape)} that comes from elsewhere")
        return ABSOLUTE, tensor.data_ptr()

    def _room(self, row_bytes: int) -> tuple[int, int]:
        start = self.arena_bytes
        self.arena_bytes += -(-row_bytes * MAX_ROWS // ALIGNMENT) * ALIGNMENT
        return ARENA, start

    def _put(
        self,
        kind: int,
        phase_kind: str,
        places: tuple[tuple[int, int], ...],
        sizes: tuple[int, ...],
        *,
        reads: Iterable[int],
        writes: Iterable[int],
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
    if shape[dim] != RECORDED_ROWS:
        raise CannotRecordError(f"a tensor of the shape {list(shape)}, whose rows are not the step's")
    return dim


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
