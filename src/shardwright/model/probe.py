"""Runs a meta model once and writes down how its layers are wired. Computes nothing: meta tensors have no content.

Every tensor that depends on a module which only the first stage holds is marked, and so is every tensor that depends on
a layer. From the marks follows what must travel between stages, and whether the model can be cut at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.fx.experimental import _config as fx_config
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, KVSharingDict
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from shardwright.errors import UnsupportedModelError
from shardwright.model.attention import PORT_ATTRIBUTE, AttentionCall, paged_attention
from shardwright.model.kv_cache import KvShape

PROBE_NAME = "shardwright_probe"
_TOKENS = 7  # no family has a dimension of this size
_FARTHEST = 1 << 20  # positions; a window as long as this is none
_FROM_BEFORE, _FROM_LAYER = 1, 2
_SHAPE_ONLY = ("new_", "_like")  # operations that take no values from their argument


KeyPath: TypeAlias = tuple[Any, ...]
"""Where a tensor stands among a layer's (args, kwargs), as torch's pytree writes it."""

# some families keep what later layers reuse in this dictionary; without this its tensors are invisible to pytree
if KVSharingDict not in pytree.SUPPORTED_NODES:
    pytree.register_pytree_node(
        KVSharingDict,
        lambda shared: (list(shared.values()), list(shared)),
        lambda values, keys: KVSharingDict(dict(zip(keys, values, strict=True))),
        flatten_with_keys_fn=lambda shared: ([(pytree.MappingKey(k), v) for k, v in shared.items()], list(shared)),
    )


class ProbeError(Exception):
    """The model is wired in a way that a pipeline can't follow; the text says how."""


@dataclass(frozen=True, slots=True)
class OutputShape:
    """The shape of a tensor that has one dimension for the step's tokens and a batch dimension of 1."""

    shape: tuple[int, ...]
    token_axis: int

    @property
    def size_per_token(self) -> int:
        """Values of one token."""
        return torch.Size(self.shape[: self.token_axis] + self.shape[self.token_axis + 1 :]).numel()

    def for_tokens(self, tokens: int) -> tuple[int, ...]:
        """The shape for that many tokens."""
        return (*self.shape[: self.token_axis], tokens, *self.shape[self.token_axis + 1 :])

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """As it travels: [tokens, values of one token]."""
        return tensor.movedim(self.token_axis, 0).reshape(tensor.shape[self.token_axis], -1)

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """As the layers take it."""
        rest = self.shape[: self.token_axis] + self.shape[self.token_axis + 1 :]
        return tensor.view(tensor.shape[0], *rest).movedim(0, self.token_axis)


@dataclass(frozen=True, slots=True)
class Carried:
    """A tensor beside the hidden states that later layers are given too."""

    shape: OutputShape
    origin: int  # the layer that makes it; -1 for what is made before the layers


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """One attention of a layer: where it is, what it keeps and how far it sees."""

    module: str  # a path inside the layer; empty for the layer itself
    kv: KvShape
    window: int | None  # each position sees itself and the `window - 1` before it
    query_heads: int
    is_plain: bool  # a softmax of scaled products, without caps or sinks

    @property
    def operations_per_position(self) -> int:
        """Floating-point operations of one token for each position that it attends to."""
        return 2 * self.query_heads * (self.kv.key_dim + self.kv.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What one layer keeps, asks for, takes and returns."""

    attentions: tuple[AttentionFacts, ...]
    num_outputs: int | None  # length of the tuple that it returns; None if it returns the hidden states alone
    carried: tuple[tuple[KeyPath, str], ...]  # (place among the arguments, name) of what else is computed before it

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one position's K and V."""
        return sum(attention.kv.bytes_per_token(dtype) for attention in self.attentions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What one forward of a meta model shows."""

    hidden: OutputShape
    layers: tuple[LayerFacts, ...]
    before: dict[str, OutputShape]  # modules with parameters that run before the layers only, and what they return
    after: tuple[str, ...]  # modules with parameters that run after the layers only
    unused: tuple[str, ...]  # modules whose parameters have no part in it, as a vision tower's
    carried: dict[str, Carried]  # what travels beside the hidden states

    def crossing(self, layer: int) -> list[str]:
        """What must travel with the hidden states from layer `layer - 1` to layer `layer`, in a fixed order."""
        used = dict.fromkeys(name for facts in self.layers[layer:] for _, name in facts.carried)
        return [name for name in used if self.carried[name].origin < layer]


def probe(model: Any, layers: str) -> Probed:
    """Run the meta model (built for `PROBE_NAME`) on one made-up sequence. Raises `ProbeError`."""
    recorder = _Recorder(model, layers)
    experts = getattr(model.config, "_experts_implementation", None)
    if experts is not None:
        # the only implementation whose shapes do not depend on values
        model.config._experts_implementation = "batched_mm"  # noqa: SLF001
    ids = torch.zeros((1, _TOKENS), dtype=torch.int64, device="meta")
    positions = torch.zeros((1, _TOKENS), dtype=torch.int64, device="meta")
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # given as positions, nothing is left out before the head
        options["logits_to_keep"] = torch.zeros((_TOKENS,), dtype=torch.int64, device="meta")
    try:
        # mixtures of experts ask which tokens an expert has; on the meta device: all of them
        counting = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
        with recorder, counting, torch.no_grad(), _Marks(recorder.used):
            model(input_ids=ids, position_ids=positions, **options)
    except UnsupportedModelError as exc:
        raise ProbeError(str(exc)) from exc
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError, KeyError) as exc:
        raise ProbeError(f"its forward can't be followed ({type(exc).__name__}: {str(exc).splitlines()[0]})") from exc
    probed = recorder.result()
    _check_cache(model, probed)
    return probed


def _check_cache(model: Any, probed: Probed) -> None:
    """Refuse a model whose own cache forgets positions that its mask lets through: its answer depends on chunks."""
    for index, cached in enumerate(DynamicCache(config=model.config.get_text_config(decoder=True)).layers):
        reach = getattr(cached, "sliding_window", None)
        if reach is None or index >= len(probed.layers):
            continue
        if any(a.window is None or a.window > reach for a in probed.layers[index].attentions):
            raise ProbeError(f"layer {index}'s cache forgets positions that its attention mask lets through")


class _Marks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands the marks of an operation's arguments on to its results, and notes which parameters are used at all."""

    def __init__(self, used: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._used = used

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype is torch.bool:  # noqa: SLF001
            # Do all positions belong to one sequence? Yes. Is a position beyond some length? No.
            return getattr(args[0], "shardwright_all", False)
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.all.default:
            result.shardwright_all = True
        name = func.__name__
        if any(part in name for part in _SHAPE_ONLY):
            return result
        mark = 0
        for leaf in pytree.tree_leaves((args, kwargs)):
            mark |= _mark_of(leaf)
            if isinstance(leaf, nn.Parameter):
                self._used.add(id(leaf))
        if mark:
            _set_mark(result, mark)
        return result


def _mark_of(leaf: object) -> int:
    return getattr(leaf, "shardwright_mark", 0) if isinstance(leaf, torch.Tensor) else 0


def _set_mark(tree: Any, mark: int) -> None:
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            leaf.shardwright_mark = _mark_of(leaf) | mark  # type: ignore[attr-defined]


def _probe_mask(*_: Any, mask_function: Callable[..., Any], **__: Any) -> torch.Tensor:
    """Stands for an attention mask; carries the function that says who sees whom."""
    marker = torch.zeros((1, 1, _TOKENS, _TOKENS), dtype=torch.bool, device="meta")
    marker.shardwright_mask = mask_function  # type: ignore[attr-defined]
    return marker


AttentionInterface.register(PROBE_NAME, paged_attention)
AttentionMaskInterface.register(PROBE_NAME, _probe_mask)


@dataclass(slots=True)
class _SeenLayer:
    index: int
    hidden_in: torch.Tensor | None = None
    hidden_out: torch.Tensor | None = None
    num_outputs: int | None = None
    arguments: list[tuple[KeyPath, Any]] = field(default_factory=list)
    attentions: list[AttentionFacts] = field(default_factory=list)


class _Port:
    """The probe's port: notes what an attention module asks for."""

    def __init__(self, seen: _SeenLayer, name: str) -> None:
        self._seen = seen
        self._name = name

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Note the shapes and the mask; return a tensor of the right shape that depends on all three."""
        if key.shape[0] != 1 or key.shape[2] != _TOKENS or query.shape[2] != _TOKENS:
            raise ProbeError(f"layer {self._seen.index} attends to something other than the step's tokens")
        if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1] or query.shape[3] != key.shape[3]:
            raise ProbeError(f"layer {self._seen.index} has heads that don't fit each other")
        shape = KvShape(heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3])
        window = call.window if mask is None else _window_of(mask, self._seen.index)
        is_plain = call.softcap is None and call.sinks is None
        self._seen.attentions.append(AttentionFacts(self._name, shape, window, query.shape[1], is_plain))
        out = query.new_empty((1, _TOKENS, query.shape[1], value.shape[3]))
        _set_mark(out, _mark_of(query) | _mark_of(key) | _mark_of(value))
        return out


def _window_of(mask: torch.Tensor, layer: int) -> int | None:
    """How far back a mask lets a position see; None for all the way. Raises `ProbeError` for any other pattern."""
    see = getattr(mask, "shardwright_mask", None)
    if see is None:
        raise ProbeError(f"layer {layer} attends under a mask of the family's own making")
    zero, far = torch.tensor(0), _FARTHEST - 1
    visible = int(see(zero, zero, torch.tensor(far), torch.arange(_FARTHEST)).expand(_FARTHEST).sum())
    window = None if visible == _FARTHEST else visible
    edge = window or 64
    places = sorted({0, 1, 2, 31, 200, *(n * edge + d for n in (1, 2) for d in (-1, 0, 1))})
    queries, keys = torch.tensor(places)[:, None], torch.tensor(places)[None, :]
    expected = keys <= queries
    if window is not None:
        expected &= keys > queries - window
    if not torch.equal(see(zero, zero, queries, keys).expand_as(expected), expected):
        raise ProbeError(f"layer {layer} attends under a mask that is neither causal nor a sliding window")
    return window


class _Recorder:
    """Hooks on every module of interest, for the time of one forward."""

    def __init__(self, model: nn.Module, layers: str) -> None:
        stack = model.get_submodule(layers)
        self._model = model
        self._layers = list(stack.children())
        self._seen = [_SeenLayer(i) for i in range(len(self._layers))]
        self._order: list[int] = []
        inside = {id(m) for layer in self._layers for m in layer.modules()}
        self._outer = {
            name: m
            for name, m in model.named_modules()
            if id(m) not in inside and any(p is not None for p in m._parameters.values())  # noqa: SLF001
        }
        self._phases: dict[str, set[str]] = {}
        self._shapes: dict[str, Any] = {}
        self._handles: list[Any] = []
        self.used: set[int] = set()  # ids of the parameters that some operation takes

    def __enter__(self) -> None:
        for index, layer in enumerate(self._layers):
            seen = self._seen[index]
            self._handles.append(layer.register_forward_pre_hook(self._enter(seen), with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._leave(seen)))
            for name, module in layer.named_modules():
                setattr(module, PORT_ATTRIBUTE, _Port(seen, name))
        for name, module in self._outer.items():
            self._handles.append(module.register_forward_hook(self._note(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            for module in layer.modules():
                vars(module).pop(PORT_ATTRIBUTE, None)

    def _enter(self, seen: _SeenLayer) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._order.append(seen.index)
            hidden = args[0] if args else kwargs.get("hidden_states")
            seen.hidden_in = hidden if isinstance(hidden, torch.Tensor) else None
            seen.arguments = pytree.tree_flatten_with_path((args, kwargs))[0]
            _set_mark(hidden, _FROM_LAYER)

        return hook

    def _leave(self, seen: _SeenLayer) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            seen.num_outputs = len(output) if isinstance(output, tuple) else None
            first = output[0] if isinstance(output, tuple) else output
            seen.hidden_out = first if isinstance(first, torch.Tensor) else None
            _set_mark(output, _FROM_LAYER)

        return hook

    def _note(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            phase = "before" if not self._order else "after" if len(self._order) >= len(self._layers) else "between"
            self._phases.setdefault(name, set()).add(phase)
            if phase == "before":
                self._shapes[name] = output
                _set_mark(output, _FROM_BEFORE)

        return hook

    def result(self) -> Probed:
        """Check the wiring and put together what was seen."""
        if self._order != list(range(len(self._layers))):
            raise ProbeError("its layers don't run once each, one after the other")
        hidden = self._hidden()
        carried: dict[str, Carried] = {}
        first_seen: dict[int, int] = {}
        for seen in self._seen:
            for _, leaf in seen.arguments:
                first_seen.setdefault(id(leaf), seen.index)
        facts = tuple(self._facts(seen, carried, first_seen) for seen in self._seen)
        return Probed(
            hidden=hidden,
            layers=facts,
            before={n: _output_shape(self._shapes[n], n) for n, p in self._phases.items() if p == {"before"}},
            after=tuple(n for n, p in self._phases.items() if p == {"after"}),
            unused=tuple(n for n, m in self._outer.items() if not any(id(p) in self.used for p in m.parameters())),
            carried=carried,
        )

    def _hidden(self) -> OutputShape:
        """The shape of the hidden states, after checking that each layer takes exactly what the one before gave."""
        previous: torch.Tensor | None = None
        for seen in self._seen:
            if seen.hidden_in is None or seen.hidden_out is None:
                raise ProbeError(f"layer {seen.index} does not take and return hidden states as one tensor")
            if previous is not None and seen.hidden_in is not previous:
                raise ProbeError(
                    f"something is done to the hidden states between layers {seen.index - 1} and {seen.index}"
                )
            if seen.hidden_in.shape != seen.hidden_out.shape:
                raise ProbeError(f"layer {seen.index} changes the shape of the hidden states")
            previous = seen.hidden_out
        return _output_shape(previous, "the last layer")

    def _facts(self, seen: _SeenLayer, carried: dict[str, Carried], first_seen: dict[int, int]) -> LayerFacts:
        if not seen.attentions:
            raise ProbeError(f"layer {seen.index} keeps a state other than K and V, or attends by code of its own")
        if len({attention.module for attention in seen.attentions}) != len(seen.attentions):
            raise ProbeError(f"a module of layer {seen.index} attends more than once")
        travels: list[tuple[KeyPath, str]] = []
        for path, leaf in seen.arguments:
            if leaf is seen.hidden_in or not _mark_of(leaf):
                continue
            name = f"beside.{list(first_seen).index(id(leaf))}"
            if name not in carried:
                made_by_layer = _mark_of(leaf) & _FROM_LAYER
                shape = _output_shape(leaf, f"an argument of layer {seen.index}")
                carried[name] = Carried(shape, first_seen[id(leaf)] - 1 if made_by_layer else -1)
            travels.append((path, name))
        return LayerFacts(attentions=tuple(seen.attentions), num_outputs=seen.num_outputs, carried=tuple(travels))


def _output_shape(output: Any, name: str) -> OutputShape:
    if not isinstance(output, torch.Tensor):
        raise ProbeError(f"{name} returns something other than one tensor")
    axes = [i for i, size in enumerate(output.shape) if size == _TOKENS]
    if len(axes) != 1:
        raise ProbeError(f"{name} returns a tensor of shape {tuple(output.shape)}, in which the tokens can't be told")
    return OutputShape(tuple(output.shape), axes[0])
