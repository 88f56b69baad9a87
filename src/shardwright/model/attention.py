"""Attends a ragged batch over paged K and V. Knows slots, block tables and masks; nothing of layers' other parts.

`transformers` calls `paged_attention` in place of its own kernels. The function finds its layer's cache and the batch
through the `AttentionPort` that the stage put on the attention module; nothing is global.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import torch
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from shardwright.errors import UnsupportedModelError
from shardwright.model.devices import to_device
from shardwright.model.kv_cache import LayerCache
from shardwright.model.product import Product
from shardwright.types import BlockId, SequenceSlice

ATTENTION_NAME = "shardwright_paged"
PORT_ATTRIBUTE = "shardwright_port"
_SHORT_CONTEXT = 128  # positions

MAX_KERNEL_PROMPT_TOKENS = 32
"""Up to so many tokens of prompts in a step are attended as decodes are, each by itself. That reads K and V anew for
each, which costs less than going through torch for every sequence and layer; with more, torch's kernels are faster."""

_MEANINGLESS = frozenset(
    {
        "dropout",  # never while serving
        "position_ids",  # the batch knows them
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
        "logits_to_keep",
        "num_items_in_batch",
    }
)
"""Keyword arguments that families hand through and that change nothing about causal attention over the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """What a layer asks for, beside its queries, keys and values."""

    scaling: float
    window: int | None  # each position sees itself and the `window - 1` before it
    softcap: float | None
    sinks: torch.Tensor | None  # [heads]; logits that take weight and give nothing


class AttentionPort(Protocol):
    """Where an attention module's call goes: to the paged cache, or to the probe that learns what a family asks for."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        call: AttentionCall,
    ) -> torch.Tensor:
        """[1, heads, tokens, key_dim], two of [1, kv_heads, tokens, *] -> [1, tokens, heads, value_dim]."""
        ...


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that `transformers` calls, under the name `ATTENTION_NAME`.

    Raises `UnsupportedModelError` for a keyword argument that it does not know: dropping one would give wrong tokens.
    """
    port: AttentionPort | None = getattr(module, PORT_ATTRIBUTE, None)
    if port is None:
        raise UnsupportedModelError(f"{type(module).__name__} attends outside the model's decoder layers")
    scaling = kwargs.pop("scaling", None)
    window = kwargs.pop("sliding_window", None)
    softcap = kwargs.pop("softcap", None)
    sinks = kwargs.pop("s_aux", None)
    if kwargs.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{type(module).__name__} attends to later positions too")
    for name, argument in kwargs.items():
        if name not in _MEANINGLESS and argument is not None and argument is not False:
            raise UnsupportedModelError(
                f"{type(module).__name__} asks its attention for {name!r}, which paged attention does not know"
            )
    call = AttentionCall(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window or None,
        softcap=softcap or None,
        sinks=sinks,
    )
    return port.attend(query, key, value, attention_mask, call), None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Sequences of a step that attend in one kernel call, as seen through one window.

    Either one sequence with `num_queries` new tokens, or several with one new token each.
    """

    rows: torch.Tensor | slice  # of the flattened batch
    num_sequences: int
    num_queries: int
    run: slice | None  # the keys' slots, where they follow each other
    blocks: torch.Tensor | None  # [sequences * blocks], else
    trim: slice | None  # of the gathered slots; only for one sequence
    causal: bool  # query i sees keys 0 to i
    mask: torch.Tensor | None  # [sequences, 1, queries, keys] of 0 and -inf, in the compute dtype


@dataclass(frozen=True, slots=True)
class KernelRows:
    """Rows of a step that our own kernel attends, each by itself, as seen through one window."""

    num_rows: int
    table: torch.Tensor  # as `Product.attend` reads it


_Draft: TypeAlias = Callable[[torch.Tensor], _Group]
"""Makes a group once the step's integers lie on the device."""


class _Integers:
    """A step's integers, collected so that one copy takes them all to the device."""

    def __init__(self) -> None:
        self._values: list[int] = []

    def place(self, values: Iterable[int]) -> slice:
        """Add some, and tell where they will be found."""
        start = len(self._values)
        self._values.extend(values)
        return slice(start, len(self._values))

    def copy_to(self, device: torch.device) -> torch.Tensor:
        return to_device(torch.tensor(self._values, dtype=torch.int64), device)


class StepBatch:
    """One step's ragged batch as tensors: made once before the layers, read by each of them.

    `input_ids` and `position_ids` are [1, tokens], `slots` is [tokens], `logit_rows` those of the activation's rows
    whose logits are needed (None: no row's). Groups of sequences and their masks are made for each of `windows`, and
    shared by the layers that have it. Everything that a layer needs is on the device before the first one starts:
    on a GPU the host must not wait between layers.

    With a `kernel` (`product.py`), sequences with one new token are in none of the groups: it attends them where their
    blocks lie. In a step with few tokens of prompts, neither are these.
    """

    def __init__(
        self,
        slices: Sequence[SequenceSlice],
        *,
        windows: Iterable[int | None],
        logit_rows: Sequence[int] = (),
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kernel: Product | None = None,
    ) -> None:
        self.kernel = kernel
        self.num_tokens = sum(s.num_tokens for s in slices)
        prompt_tokens = sum(s.num_tokens for s in slices if s.num_tokens > 1)
        self.is_for_kernel = kernel is not None and prompt_tokens <= MAX_KERNEL_PROMPT_TOKENS
        """Whether the kernel attends all rows."""
        self._slices = slices
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._integers = _Integers()
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for part in slices:
            ids.extend(part.token_ids)
            for position in range(part.start_position, part.context_length):
                positions.append(position)
                slots.append(part.block_table[position // block_size] * block_size + position % block_size)
        places = [self._integers.place(values) for values in (ids, positions, slots, logit_rows)]
        drafts = {window: self._draft_groups(window) for window in windows}
        tables = {} if kernel is None else {window: self._place_rows(window) for window in drafts}
        integers = self._integers.copy_to(device)
        self.input_ids, self.position_ids = integers[places[0]][None], integers[places[1]][None]
        self.slots = integers[places[2]]
        self.logit_rows = integers[places[3]] if logit_rows else None
        self._groups = {window: [finish(integers) for finish in some] for window, some in drafts.items()}
        self._rows = {window: KernelRows(count, integers[place]) for window, (count, place) in tables.items() if count}

    def groups(self, window: int | None) -> list[_Group]:
        """The step's sequences as seen through `window`; with `kernel_rows` they hold every row once."""
        return self._groups[window]

    def kernel_rows(self, window: int | None) -> KernelRows | None:
        """Those that the kernel attends; None if there are none."""
        return self._rows.get(window)

    def _is_kernels(self, part: SequenceSlice) -> bool:
        return self.is_for_kernel or (self.kernel is not None and part.num_tokens == 1)

    def _place_rows(self, window: int | None) -> tuple[int, slice]:
        """How many rows the kernel attends, and where its table of them will be found."""
        attended = [part for part in self._slices if self._is_kernels(part)]
        count = sum(part.num_tokens for part in attended)
        place = 4 * count  # of a sequence's blocks, behind all rows
        table: list[int] = []
        row = 0
        for part in self._slices:
            if self._is_kernels(part):
                for position in range(part.start_position, part.context_length):
                    first = _first_key(position, window)
                    table += (row + position - part.start_position, first, position + 1, place)
                place += len(part.block_table)
            row += part.num_tokens
        for part in attended:
            table += part.block_table
        return count, self._integers.place(table)

    def _draft_groups(self, window: int | None) -> list[_Draft]:
        groups: list[_Draft] = []
        decodes: list[tuple[int, SequenceSlice]] = []
        row = 0
        for part in self._slices:
            if self._is_kernels(part):
                pass  # it is in the kernel's table
            elif part.num_tokens > 1 or self._pays_alone(part):
                groups.append(self._single(row, part, window))
            else:
                decodes.append((row, part))
            row += part.num_tokens
        if len(decodes) == 1:
            groups.append(self._single(*decodes[0], window))
        elif decodes:
            groups.append(self._padded(decodes, window))
        return groups

    def _pays_alone(self, part: SequenceSlice) -> bool:
        """Whether one new token is attended faster by itself than in a padded group.

        On a CPU a kernel call costs some 10 us, and copying K and V of a hundred positions more than that; a sequence
        whose blocks follow each other needs no copy. Elsewhere few kernel calls are worth more.
        """
        table = part.block_table
        return self._device.type == "cpu" and part.context_length > _SHORT_CONTEXT and _follow(table)

    def _single(self, row: int, part: SequenceSlice, window: int | None) -> _Draft:
        size = self._block_size
        start, end = _first_key(part.start_position, window), part.context_length
        first_block = start // size
        table = part.block_table[first_block : (end - 1) // size + 1]
        offset = start - first_block * size
        run = place = trim = None
        if _follow(table):
            base = table[0] * size + offset
            run = slice(base, base + end - start)
        else:
            place = self._integers.place(table)
            trim = slice(offset, offset + end - start)
        seen_by_all = part.num_tokens == 1
        causal = not seen_by_all and part.start_position == 0 and (window is None or end <= window)
        mask = None
        if not seen_by_all and not causal:
            queries = torch.arange(part.start_position, end, device=self._device)[:, None]
            keys = torch.arange(start, end, device=self._device)[None, :]
            mask = self._additive(keys, queries, window)[None, None]
        rows = slice(row, row + part.num_tokens)
        return lambda integers: _Group(
            rows=rows,
            num_sequences=1,
            num_queries=part.num_tokens,
            run=run,
            blocks=None if place is None else integers[place],
            trim=trim,
            causal=causal,
            mask=mask,
        )

    def _padded(self, decodes: list[tuple[int, SequenceSlice]], window: int | None) -> _Draft:
        """One group of all sequences with one new token: their blocks are padded to the longest with its own first."""
        size = self._block_size
        tables: list[tuple[int, ...]] = []
        first_keys: list[int] = []
        for _, part in decodes:
            first_block = _first_key(part.start_position, window) // size
            tables.append(part.block_table[first_block : (part.context_length - 1) // size + 1])
            first_keys.append(first_block * size)
        width = max(len(t) for t in tables)
        flat = [b for t in tables for b in t + t[:1] * (width - len(t))]
        rows = [row for row, _ in decodes]
        together = rows[-1] - rows[0] + 1 == len(rows)
        rows_place = None if together else self._integers.place(rows)
        blocks_place, first_place = self._integers.place(flat), self._integers.place(first_keys)
        position_place = self._integers.place(p.start_position for _, p in decodes)

        def finish(integers: torch.Tensor) -> _Group:
            keys = integers[first_place][:, None] + torch.arange(width * size, device=self._device)
            queries = integers[position_place][:, None]
            return _Group(
                rows=slice(rows[0], rows[-1] + 1) if rows_place is None else integers[rows_place],
                num_sequences=len(decodes),
                num_queries=1,
                run=None,
                blocks=integers[blocks_place],
                trim=None,
                causal=False,
                mask=self._additive(keys, queries, window)[:, None, None, :],
            )

        return finish

    def _additive(self, keys: torch.Tensor, queries: torch.Tensor, window: int | None) -> torch.Tensor:
        """0 where a query's position sees a key's, -inf elsewhere."""
        hidden = keys > queries
        if window is not None:
            hidden = hidden | (keys <= queries - window)
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, float("-inf"))


def _first_key(position: int, window: int | None) -> int:
    """The first position that a token at this one sees."""
    return 0 if window is None else max(0, position - window + 1)


def _follow(table: Sequence[BlockId]) -> bool:
    """Whether blocks lie one behind the other."""
    return table[-1] - table[0] == len(table) - 1 and all(b - a == 1 for a, b in pairwise(table))


class BatchCell:
    """Holds the step that a stage computes now; the stage fills it before each forward and empties it after."""

    __slots__ = ("batch",)

    def __init__(self) -> None:
        self.batch: StepBatch | None = None


class PagedLayer:
    """A layer's port to its paged cache."""

    __slots__ = ("_cache", "_cell", "_window")

    def __init__(self, cache: LayerCache, cell: BatchCell, window: int | None) -> None:
        """`window` is the family's mask's: with other kernels the mask decides, and the argument is only advice."""
        self._cache = cache
        self._cell = cell
        self._window = window

    @property
    def cache(self) -> LayerCache:
        """Where its K and V lie."""
        return self._cache

    @property
    def window(self) -> int | None:
        """How far the layer sees."""
        return self._window

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Write the new tokens' K and V into their slots, then attend every sequence over its own block table."""
        assert mask is None, "no mask is built for this attention function"
        batch = self._cell.batch
        assert batch is not None, "a layer ran outside a step"
        cache = self._cache
        cache.keys.index_copy_(0, batch.slots, key[0].transpose(0, 1))
        cache.values.index_copy_(0, batch.slots, value[0].transpose(0, 1))
        groups, rows = batch.groups(self._window), batch.kernel_rows(self._window)
        if len(groups) == 1 and rows is None:
            return _attend_group(query[0], cache, groups[0], call)[None]
        out = query.new_empty((batch.num_tokens, query.shape[1], cache.values.shape[-1]))
        for group in groups:
            out[group.rows] = _attend_group(query[0][:, group.rows], cache, group, call)
        if rows is not None:
            assert batch.kernel is not None, "there are rows for the kernel alone"
            assert call.softcap is None, "the stage gives no kernel to a family with caps"
            assert call.sinks is None, "the stage gives no kernel to a family with sinks"
            queries = query[0].transpose(0, 1)
            batch.kernel.attend(
                queries if queries.stride(2) == 1 else queries.contiguous(),
                cache.keys,
                cache.values,
                rows.table,
                out,
                num_rows=rows.num_rows,
                block_size=cache.block_size,
                scaling=call.scaling,
            )
        return out[None]


def _attend_group(query: torch.Tensor, cache: LayerCache, group: _Group, call: AttentionCall) -> torch.Tensor:
    """[heads, rows, key_dim] -> [rows, heads, value_dim].

    Query heads that share a KV head are laid along a dimension of their own, so that K and V are never repeated.
    """
    heads, rows, key_dim = query.shape
    keys, values = _gather(cache.keys, cache, group), _gather(cache.values, cache, group)  # [seqs, keys, kv_heads, dim]
    kv_heads, value_dim = keys.shape[2], values.shape[3]
    shared = heads // kv_heads
    if group.num_queries == 1:
        # [seqs, kv_heads, shared, dim]: the query heads of a KV head stand where queries stand
        q = query.transpose(0, 1).reshape(rows, kv_heads, shared, key_dim)
        out = _kernel(q, keys.transpose(1, 2), values.transpose(1, 2), group, call, sink_shape=(1, kv_heads, shared, 1))
        return out.reshape(rows, heads, value_dim)
    # [kv_heads, shared, queries, dim]: a KV head stands where a sequence stands, and is expanded without a copy
    q = query.reshape(kv_heads, shared, rows, key_dim)
    k = keys.permute(2, 0, 1, 3).expand(-1, shared, -1, -1)
    v = values.permute(2, 0, 1, 3).expand(-1, shared, -1, -1)
    out = _kernel(q, k, v, group, call, sink_shape=(kv_heads, shared, 1, 1))
    return out.reshape(heads, rows, value_dim).transpose(0, 1)


def _gather(slots: torch.Tensor, cache: LayerCache, group: _Group) -> torch.Tensor:
    """[num_slots, kv_heads, dim] -> [sequences, keys, kv_heads, dim]; a view where the blocks follow each other."""
    if group.run is not None:
        return slots[group.run][None]
    assert group.blocks is not None
    kv_heads, dim = slots.shape[1:]
    blocks = slots.view(-1, cache.block_size * kv_heads * dim).index_select(0, group.blocks)
    gathered = blocks.view(group.num_sequences, -1, kv_heads, dim)
    return gathered if group.trim is None else gathered[:, group.trim]


def _kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: _Group,
    call: AttentionCall,
    *,
    sink_shape: tuple[int, int, int, int],
) -> torch.Tensor:
    """Attend four-dimensional q, k, v, with torch's fused kernel or, for caps and sinks, step by step.

    The steps and their dtypes are those of `transformers`' `eager_attention_forward` (gemma2, gpt_oss).
    """
    if call.softcap is None and call.sinks is None:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=group.mask, is_causal=group.causal, scale=call.scaling
        )
    scores = torch.matmul(q, k.transpose(-2, -1)) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if group.causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu_(1), float("-inf"))
    elif group.mask is not None:
        scores = scores + group.mask
    if call.sinks is None:
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        sinks = call.sinks.to(scores.dtype).view(sink_shape).expand(*scores.shape[:-1], 1)
        weights = functional.softmax(torch.cat([scores, sinks], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    return torch.matmul(weights.to(q.dtype), v)
