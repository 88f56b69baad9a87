"""Computes one stage: its layers, over its own paged K and V, for one ragged batch after another.

A stage is a slice of a `transformers` model (`families.py`) with its weights (`weights.py`), whose attention runs over
the stage's KV blocks (`attention.py`). It has no thread and no lock: whoever calls `forward` computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shardwright.errors import ConfigError, FrameError
from shardwright.model.activation import swap_activations
from shardwright.model.attention import PORT_ATTRIBUTE, BatchCell, PagedLayer, StepBatch
from shardwright.model.devices import check_dtype, resolve_device, to_device
from shardwright.model.families import DTYPES, FamilyPlan, plan_family, slice_model
from shardwright.model.family_config import read_config
from shardwright.model.grammar import GrammarCompiler
from shardwright.model.kv_cache import LayerCache, make_layer_cache
from shardwright.model.layer_plan import RECORDED_ROWS
from shardwright.model.layer_progress import LayerProgress, layer_progress
from shardwright.model.linear import PackedLinear, choose_linears, pack_linear
from shardwright.model.norm import swap_norm
from shardwright.model.offload import OffloadCounts, OffloadedLayers, OffloadPlan
from shardwright.model.probe import AttentionFacts, KeyPath, OutputShape
from shardwright.model.product import Product
from shardwright.model.rank_plan import RankPlan, plan_ranks
from shardwright.model.raw_tensors import RawTensors
from shardwright.model.recording import LayerRecorder, shorten_loop
from shardwright.model.rotary import swap_rotary
from shardwright.model.sampler_state import SamplerStates, SequenceState
from shardwright.model.sampling import sample, score, select_rows
from shardwright.model.skeleton import StageEnd
from shardwright.model.tensor_parallel import RankGroup, cut_stage, join_ranks, plain_linear
from shardwright.model.vocabulary import decode_vocabulary
from shardwright.model.weights import load_weights
from shardwright.types import (
    MAX_TOP_LOGPROBS,
    LayerRange,
    PromptScores,
    SamplingParams,
    SequenceSlice,
    StepInput,
    TokenId,
    TokenOut,
    TokenScore,
)

HIDDEN = "hidden"

Lead: TypeAlias = Callable[[StepInput, Mapping[str, torch.Tensor], LayerProgress | None], AbstractContextManager[None]]
"""Lets the other ranks compute a step that is in order, for as long as rank 0 does; it gets the step, its input and how
far this rank's device is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """What leaves a stage: tensors for the next one, or the last stage's tokens."""

    tensors: dict[str, torch.Tensor]  # "hidden" [tokens, hidden] and what travels beside it
    tokens: tuple[TokenOut, ...]  # one for each slice that asked for one, in the step's order
    prompt_scores: tuple[PromptScores, ...] = ()  # of slices that asked for them, where a token of the prompt follows


def build_stage(
    *,
    config_json: str,
    layers: LayerRange,
    is_first: bool,
    is_last: bool,
    dtype: str,
    device: str,
    num_blocks: int,
    block_size: int,
    raw: RawTensors,
    progress: Callable[[int], None],
    vocabulary: bytes | None = None,
    offload: OffloadPlan | None = None,
    kernel_dir: Path | None = None,
    group: RankGroup | None = None,
    lead: Lead | None = None,
) -> Stage:
    """Build the model's slice, fill it from `raw` one tensor at a time and reserve its KV blocks.

    With a `group` this is one rank's part of it; rank 0 has to `lead` the others through each step.

    `progress` gets the bytes of `raw` used so far. `vocabulary` is the blob of the model's tokens (`vocabulary.py`),
    without which the last stage follows no grammars. `offload` names layers whose weights are not kept in the device's
    memory. `kernel_dir` keeps the compiled kernel of linear layers, without which they are torch's own. Raises
    `ConfigError` for a device or dtype that can't be used,
    `UnsupportedModelError` for a family that can't be cut, `CheckpointError` for weights or a vocabulary that don't
    fit, `OffloadError` where there is no room for what is offloaded.
    """
    torch_dtype, torch_device = find_dtype(dtype), resolve_device(device)
    check_dtype(torch_dtype, torch_device)
    tokens = None if vocabulary is None else decode_vocabulary(vocabulary)
    config = read_config(config_json)
    plan = plan_family(config)
    ranks = None if group is None else plan_ranks(config, plan, rank=group.rank, num_ranks=group.num_ranks)
    model = slice_model(config, layers, is_first=is_first, is_last=is_last, dtype=torch_dtype, plan=plan)
    if group is not None and ranks is not None:
        cut_stage(model, plan, ranks, layers, group)

    offloading = None if offload is None else _Offloading(model, plan, offload, torch_device)
    linears = choose_linears(torch_dtype, torch_device, kernel_dir)

    def finish(name: str) -> None:
        if group is not None and ranks is not None and (linears.packs or linears.product is not None):
            name = plain_linear(model, name, ranks, group)
        if offloading is None or not offloading.holds(name):
            if not pack_linear(model, name, linears):
                swap_norm(model, name, linears)
            return
        pack_linear(model, name, replace(linears, packs=False))  # packed, it has no bytes to read into a buffer
        offloading.take_if_complete(name)

    try:
        load_weights(
            model,
            config,
            raw,
            dtype=torch_dtype,
            device=torch_device,
            finish=finish,
            progress=progress,
            shards=None if ranks is None else ranks.shards,
        )
        if group is not None and ranks is not None:
            join_ranks(model, ranks, group)
        return Stage(
            model=model,
            plan=plan,
            layers=layers,
            is_first=is_first,
            is_last=is_last,
            dtype=torch_dtype,
            device=torch_device,
            num_blocks=num_blocks,
            block_size=block_size,
            compiler=None if tokens is None else GrammarCompiler(tokens.first(plan.vocabulary)),
            offloaded=None if offloading is None else offloading.start(),
            ranks=ranks,
            lead=lead,
            kernel=linears.kernel,
            product_rows=linears.product_rows,
        )
    except BaseException:
        if offloading is not None:
            offloading.close()
        raise


class _Offloading:
    """Hands layers that are to be offloaded over as soon as they are loaded."""

    def __init__(self, model: nn.Module, plan: FamilyPlan, offload: OffloadPlan, device: torch.device) -> None:
        self._model = model
        self._layers = {index: model.get_submodule(f"{plan.layers}.{index}") for index in offload.layers}
        self._prefixes = {f"{plan.layers}.{index}": index for index in offload.layers}
        self._depth = plan.layers.count(".") + 2  # of a layer's name
        num_bytes = sum(parameter.nbytes for layer in self._layers.values() for parameter in layer.parameters())
        self._streamed = OffloadedLayers(offload, num_bytes=num_bytes, device=device)
        self._taken: set[int] = set()

    def holds(self, module_name: str) -> bool:
        """Whether the module is of a layer that is to be offloaded."""
        return self._prefix(module_name) in self._prefixes

    def take_if_complete(self, module_name: str) -> None:
        """Take the layer of a module that was filled just now, if it was the layer's last."""
        index = self._prefixes[self._prefix(module_name)]
        if not any(parameter.is_meta for parameter in self._layers[index].parameters()):
            self._take(index)

    def _prefix(self, module_name: str) -> str:
        return ".".join(module_name.split(".")[: self._depth])

    def _take(self, index: int) -> None:
        layer = self._layers[index]
        own = {id(module) for module in layer.modules()}
        others = (module for module in self._model.modules() if id(module) not in own)
        self._taken.add(index)
        self._streamed.take(index, layer, keep=[p for other in others for p in other.parameters(recurse=False)])

    def start(self) -> OffloadedLayers:
        """Begin to stream; all layers are loaded."""
        for index in self._layers:  # of which the checkpoint had nothing: all of it was computed
            if index not in self._taken:
                self._take(index)
        self._streamed.start(self._layers)
        return self._streamed

    def close(self) -> None:
        """Give up: the stage could not be built."""
        self._streamed.close()


def _if_fit(kernel: Product | None, attentions: list[AttentionFacts], dtype: torch.dtype) -> Product | None:
    """The kernel, if it attends as all these layers do; each size of heads is tried once."""
    sizes = {(attention.kv.key_dim, attention.kv.value_dim) for attention in attentions}
    if kernel is None or not all(attention.is_plain for attention in attentions):
        return None
    return kernel if all(kernel.can_attend(dtype, *size) for size in sizes) else None


def find_dtype(name: str) -> torch.dtype:
    """The compute dtype of that name. Raises `ConfigError`."""
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


class Stage:
    """A filled slice of a model and its KV blocks. One forward at a time."""

    def __init__(
        self,
        *,
        model: nn.Module,
        plan: FamilyPlan,
        layers: LayerRange,
        is_first: bool,
        is_last: bool,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        block_size: int,
        compiler: GrammarCompiler | None = None,
        offloaded: OffloadedLayers | None = None,
        ranks: RankPlan | None = None,
        lead: Lead | None = None,
        kernel: Product | None = None,
        product_rows: int = 0,
    ) -> None:
        self.layers = layers
        self.is_first = is_first
        self.is_last = is_last
        self._model: Any = model
        self._plan = plan
        self._offloaded = offloaded
        self._dtype = dtype
        self._device = device
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._vocabulary = plan.vocabulary
        self._states = SamplerStates(plan.vocabulary, compiler)
        self._samples = ranks is None or ranks.rank == 0
        self._lead: Lead = lead or (lambda _step, _tensors, _progress: contextlib.nullcontext())
        self._cell = BatchCell()
        self._inbox: Mapping[str, torch.Tensor] = {}
        self._captured: dict[str, torch.Tensor] = {}
        self._windows: dict[int | None, None] = {}  # that the stage's layers see through
        self._logit_rows: torch.Tensor | None = None
        self._caches: list[LayerCache] = []
        self._arriving = [] if is_first else plan.probed.crossing(layers.start)
        self._leaving = [] if is_last else plan.probed.crossing(layers.end)
        attentions: list[AttentionFacts] = []
        for index in range(layers.start, layers.end):
            facts = plan.probed.layers[index] if ranks is None else ranks.layers[index]
            layer = model.get_submodule(f"{plan.layers}.{index}")
            for attention in facts.attentions:
                attentions.append(attention)
                cache = make_layer_cache(
                    attention.kv, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device
                )
                port = PagedLayer(cache, self._cell, attention.window)
                module = layer.get_submodule(attention.module)
                setattr(module, PORT_ATTRIBUTE, port)
                if kernel is not None:
                    swap_rotary(module, kernel)
                self._caches.append(cache)
                self._windows[attention.window] = None
            if kernel is not None:
                swap_activations(layer, kernel, dtype)
        self._kernel = _if_fit(kernel, attentions, dtype)
        self.progress = layer_progress(device)
        """The layers that the device has finished; None where that needs no telling."""
        self._hook_layers()
        if offloaded is None and ranks is None and product_rows:
            self._record_layers(product_rows)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held in the device's memory, each shared one once, and of what offloaded ones pass."""
        streams = self._offloaded
        streamed = set() if streams is None else streams.parameter_ids
        tensors = (*self._model.parameters(), *self._model.buffers())
        held: dict[int, int] = {id(t): t.nbytes for t in tensors if id(t) not in streamed}
        packed: int = sum(m.num_bytes for m in self._model.modules() if isinstance(m, PackedLinear))
        return sum(held.values()) + packed + (0 if streams is None else streams.buffer_bytes)

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the weights that are kept beside the device's memory."""
        return 0 if self._offloaded is None else self._offloaded.offloaded_bytes

    @property
    def offload_counts(self) -> OffloadCounts:
        """What was read of them, and how long steps waited for it. May be asked from any thread."""
        return OffloadCounts() if self._offloaded is None else self._offloaded.counts

    @property
    def kv_bytes(self) -> int:
        """Bytes reserved for K and V."""
        return sum(cache.num_bytes for cache in self._caches)

    def close(self) -> None:
        """Drop weights and KV blocks. The stage can't be used afterwards."""
        self._model = nn.Module()
        if self._offloaded is not None:
            self._offloaded.close()
        self._caches.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def forward(self, step: StepInput, tensors: Mapping[str, torch.Tensor]) -> StageOutput:
        """Compute one step: write the new tokens' K and V, and give what leaves the last layer, or the tokens.

        `tensors` is what the previous stage gave (empty on the first). Raises `FrameError` when it doesn't fit the
        step.
        """
        self._check(step)
        wanted = self._wanted(step)
        received = self._received(tensors, step.num_tokens)
        with self._in_step(step.slices, received, wanted.rows) as batch, self._lead(step, tensors, self.progress):
            try:
                output = self._model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
            except StageEnd as end:
                return StageOutput(tensors={} if self.is_last else self._sent(end.hidden), tokens=())
        logits = output.logits[0]
        return StageOutput(
            tensors={}, tokens=_sample(logits, wanted), prompt_scores=_score(logits, wanted) if wanted.scored else ()
        )

    @contextlib.contextmanager
    def _in_step(
        self, slices: Sequence[SequenceSlice], received: Mapping[str, torch.Tensor], logit_rows: Sequence[int]
    ) -> Iterator[StepBatch]:
        """Let the layers find a step's batch and what came with it."""
        self._inbox = received
        self._cell.batch = batch = StepBatch(
            slices,
            windows=self._windows,
            logit_rows=logit_rows,
            block_size=self._block_size,
            dtype=self._dtype,
            device=self._device,
            kernel=self._kernel,
        )
        self._logit_rows = batch.logit_rows
        try:
            yield batch
        finally:
            self._cell.batch = None
            self._inbox, self._captured = {}, {}

    @torch.inference_mode()
    def _record_layers(self, product_rows: int) -> None:
        """Have decode steps computed layer by layer in one call, where that can be (`recording.py`).

        Some steps of random tokens overwrite the first K and V.
        """
        if self._kernel is None:
            return
        recorder = LayerRecorder(self._kernel, self._dtype, cell=self._cell, max_rows=product_rows)
        if self._num_blocks * self._block_size < max(recorder.rows):
            return
        names = (f"{self._plan.layers}.{index}" for index in range(self.layers.start, self.layers.end))
        layers = [self._model.get_submodule(name) for name in names]
        hooks = [layer.register_forward_pre_hook(recorder.hook, with_kwargs=True) for layer in layers]
        try:
            for rows in recorder.rows:
                self._compute_nonsense(rows)
        finally:
            for hook in hooks:
                hook.remove()
        recorder.finish()
        if not self._leaving:
            model_layers = self._model.get_submodule(self._plan.layers)
            shorten_loop(
                model_layers,
                layers,
                end=None if self.is_last else model_layers[len(model_layers) - 1],
                compute=lambda: self._compute_nonsense(RECORDED_ROWS),
            )

    def _compute_nonsense(self, rows: int) -> torch.Tensor:
        """What leaves the last layer in a step of random tokens, each behind one token more than the one before it."""
        generator = torch.Generator().manual_seed(rows)
        tokens = torch.randint(self._vocabulary, (rows,), generator=generator).tolist()
        slices = [
            SequenceSlice(
                seq_id=row,
                token_ids=(token,),
                start_position=row,
                block_table=tuple(range(row // self._block_size + 1)),
                sampling=None,
            )
            for row, token in enumerate(tokens)
        ]
        received = {
            name: shape.unpack(torch.randn((rows, shape.size_per_token), generator=generator).to(self._dtype))
            for name, shape in self._arriving_shapes().items()
        }
        with self._in_step(slices, received, ()) as batch:
            try:
                self._model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
            except StageEnd as end:
                return end.hidden
        raise AssertionError("a step without logits went on behind the last layer")

    def _arriving_shapes(self) -> dict[str, OutputShape]:
        shapes = {} if self.is_first else {HIDDEN: self._plan.probed.hidden}
        return shapes | {name: self._plan.probed.carried[name].shape for name in self._arriving}

    def _check(self, step: StepInput) -> None:
        """Refuse token ids and blocks that don't exist: on a GPU they would end the process, on a CPU the step."""
        for part in step.slices:
            if not 0 <= min(part.token_ids) <= max(part.token_ids) < self._vocabulary:
                raise FrameError(f"sequence {part.seq_id} has a token that is not one of {self._vocabulary}")
            if len(part.block_table) * self._block_size < part.context_length:
                raise FrameError(f"sequence {part.seq_id} has too few blocks for {part.context_length} positions")
            if not 0 <= min(part.block_table) <= max(part.block_table) < self._num_blocks:
                raise FrameError(f"sequence {part.seq_id} names a block that is not one of {self._num_blocks}")
            if part.num_prompt_logprobs is not None and not 0 <= part.num_prompt_logprobs <= MAX_TOP_LOGPROBS:
                raise FrameError(f"sequence {part.seq_id} wants {part.num_prompt_logprobs} likeliest tokens of each")
            if part.next_token_id is not None and not 0 <= part.next_token_id < self._vocabulary:
                raise FrameError(f"sequence {part.seq_id} goes on with a token that is not one of {self._vocabulary}")

    def _wanted(self, step: StepInput) -> _Wanted:
        """What the last stage has to answer to a step; nothing on the others. Raises `FrameError`."""
        wanted = _Wanted()
        if not self.is_last:
            return wanted
        self._states.forget(step.dropped)
        row = 0
        for part in step.slices:
            last = row + part.num_tokens - 1
            scored = 0
            if part.num_prompt_logprobs is not None:
                following = part.token_ids[1:] + (() if part.next_token_id is None else (part.next_token_id,))
                scored = len(following)
                if scored:
                    wanted.scored.append(_Scored(part, len(wanted.rows), following))
                    wanted.rows.extend(range(row, row + scored))
            if part.sampling is not None:
                if scored < part.num_tokens:
                    wanted.rows.append(last)
                if self._samples:
                    wanted.sampled.append(_Sampled(part, part.sampling, len(wanted.rows) - 1, self._states.find(part)))
            elif part.setup is not None:
                raise FrameError(f"sequence {part.seq_id} came with what its next token depends on, but needs none yet")
            row = last + 1
        return wanted

    def _received(self, tensors: Mapping[str, torch.Tensor], num_tokens: int) -> dict[str, torch.Tensor]:
        """The previous stage's tensors on this stage's device, in the shapes that the layers take."""
        shapes = self._arriving_shapes()
        if tensors.keys() != shapes.keys():
            raise FrameError(f"the stage of layers {self.layers} takes {sorted(shapes)}, but got {sorted(tensors)}")
        for name, shape in shapes.items():
            expected = (num_tokens, shape.size_per_token)
            if tuple(tensors[name].shape) != expected:
                raise FrameError(f"{name!r} has the shape {list(tensors[name].shape)}, not {list(expected)}")
            if not tensors[name].is_floating_point():
                raise FrameError(f"{name!r} has the dtype {tensors[name].dtype}, which no activation has")
        return {name: shape.unpack(to_device(tensors[name], self._device)) for name, shape in shapes.items()}

    def _sent(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the next stage takes: the hidden states, and for it and those behind it what travels beside them."""
        held = {**self._inbox, **self._captured}
        beside = {name: self._plan.probed.carried[name].shape.pack(held[name]) for name in self._leaving}
        return {HIDDEN: self._plan.probed.hidden.pack(hidden), **beside}

    def _hook_layers(self) -> None:
        """Put what comes from other stages in its place, and take out what goes to them."""
        progress = self.progress
        for index, facts in enumerate(self._plan.probed.layers):
            layer = self._model.get_submodule(f"{self._plan.layers}.{index}")
            if index in self.layers:
                places = [(path, name) for path, name in facts.carried if name in self._arriving]
                takes_hidden = not self.is_first and index == self.layers.start
                if takes_hidden or places:
                    layer.register_forward_pre_hook(self._inject(places, takes_hidden=takes_hidden), with_kwargs=True)
                if progress is not None:
                    layer.register_forward_hook(lambda *_: progress.mark())
            elif index >= self.layers.end:
                places = [(path, name) for path, name in facts.carried if name in self._leaving]
                places = [(path, name) for path, name in places if name not in self._arriving]
                if places:
                    layer.register_forward_pre_hook(self._capture(places), with_kwargs=True)
        if self.is_last:
            layer = self._model.get_submodule(f"{self._plan.layers}.{self.layers.end - 1}")
            layer.register_forward_hook(self._end_without_logits)
            self._model.get_submodule(self._plan.head).register_forward_pre_hook(self._select_rows)

    def _inject(self, places: list[tuple[KeyPath, str]], *, takes_hidden: bool) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for path, name in places:
                args, kwargs = _put((args, kwargs), path, self._inbox[name])
            if not takes_hidden:
                return args, kwargs
            if args:
                return (self._inbox[HIDDEN], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._inbox[HIDDEN]}

        return hook

    def _capture(self, places: list[tuple[KeyPath, str]]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._captured.update({name: pytree.key_get((args, kwargs), path) for path, name in places})

        return hook

    def _end_without_logits(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Leave out norm and head for a step in which no sequence needs a token or a score."""
        if self._logit_rows is None:
            raise StageEnd(output[0] if isinstance(output, tuple) else output)

    def _select_rows(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the head only the rows whose logits are needed."""
        assert self._logit_rows is not None
        return (args[0].index_select(-2, self._logit_rows), *args[1:])


@dataclass(frozen=True, slots=True)
class _Sampled:
    """A slice whose last row gives a token: how, from which row of the logits, and what its sequence remembers."""

    part: SequenceSlice
    params: SamplingParams
    row: int
    state: SequenceState | None


@dataclass(frozen=True, slots=True)
class _Scored:
    """A slice whose rows score the prompt's tokens that follow them; the first of these rows of the logits."""

    part: SequenceSlice
    row: int
    following: tuple[TokenId, ...]


@dataclass(slots=True)
class _Wanted:
    """What a step wants of the last stage."""

    rows: list[int] = field(default_factory=list)  # of the activation, whose logits are needed, rising
    sampled: list[_Sampled] = field(default_factory=list)
    scored: list[_Scored] = field(default_factory=list)


def _sample(logits: torch.Tensor, wanted: _Wanted) -> tuple[TokenOut, ...]:
    """Pick the tokens and let the sequences' memories go on behind them."""
    sampled = wanted.sampled
    if not sampled:
        return ()
    if wanted.scored:
        logits = select_rows(logits, [one.row for one in sampled])
    picks = sample(
        logits,
        [one.params for one in sampled],
        [one.part.context_length for one in sampled],
        [one.state for one in sampled],
    )
    for one, pick in zip(sampled, picks, strict=True):
        if one.state is not None:
            one.state.add(pick.token_id)
    return tuple(
        TokenOut(seq_id=one.part.seq_id, token_id=pick.token_id, logprob=pick.logprob, top=pick.top)
        for one, pick in zip(sampled, picks, strict=True)
    )


def _score(logits: torch.Tensor, wanted: _Wanted) -> tuple[PromptScores, ...]:
    """How likely the prompts' own tokens are, one sequence after the other."""
    scores: list[PromptScores] = []
    for one in wanted.scored:
        count = len(one.following)
        num_top = one.part.num_prompt_logprobs or 0
        picks = score(logits[one.row : one.row + count], one.following, [num_top] * count)
        scores.append(
            PromptScores(
                seq_id=one.part.seq_id,
                first_position=one.part.start_position + 1,
                scores=tuple(TokenScore(token_id=p.token_id, logprob=p.logprob, top=p.top) for p in picks),
            )
        )
    return tuple(scores)


def _put(tree: Any, path: KeyPath, leaf: torch.Tensor) -> Any:
    """Set the leaf at `path`, making the tuples on the way where another stage's layer would have made them."""
    if not path:
        return leaf
    key, rest = path[0], path[1:]
    if isinstance(key, pytree.MappingKey):
        tree[key.key] = _put(tree.get(key.key), rest, leaf)
        return tree
    items = list(tree or ())
    items += [None] * (key.idx + 1 - len(items))
    items[key.idx] = _put(items[key.idx], rest, leaf)
    return items if isinstance(tree, list) else tuple(items)
