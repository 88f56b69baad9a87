"""Decides how each tensor of a model is cut for a number of ranks. Knows modules and shapes; no process, no DeepSpeed.

What is cut in columns (rows of the weight) and what in rows is the family's own tensor-parallel plan. Beside it stands
what the plan can't say: the parts of a projection that a family fused, the heads that share a K and V, a norm over all
heads. The cut model's shapes are then held against one forward of it on the `meta` device, as a family's are in
`families.py`, so that a family whose code does not work on parts of its heads is refused and never computes nonsense.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from shardwright.errors import UnsupportedModelError
from shardwright.model.construction import CONSTRUCTION
from shardwright.model.families import FamilyPlan, build_meta_model
from shardwright.model.probe import PROBE_NAME, AttentionFacts, LayerFacts, ProbeError, probe
from shardwright.model.shardable import SHARDABLE_FAMILIES
from shardwright.model.shards import Shard
from shardwright.types import LayerRange

MAX_RANKS = 64

_COLUMNS = frozenset({"colwise", "colwise_gather_output", "colwise_rep"})
_ROWS = frozenset({"rowwise", "rowwise_split_input"})
_WHOLE = frozenset({"replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params", "embedding_rowwise"})
_EXPERTS = frozenset({"moe_tp_experts", "packed_colwise", "packed_rowwise"})  # in the plan of models without any, too
_COMMON_STYLES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"), "colwise"),
    **dict.fromkeys(("o_proj", "out_proj", "down_proj", "fc2"), "rowwise"),
}
"""For families without a plan: the names that DeepSpeed's AutoTP goes by."""
_QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_COUNTS = ("num_key_value_heads", "num_kv_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class JointNorm:
    """A norm over all heads at once: each rank has some heads, so they are put together before it and parted after."""

    module: str
    size: int  # features of all heads


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """What one rank of `num_ranks` holds. Names are the whole model's."""

    rank: int
    num_ranks: int
    shards: dict[str, Shard]  # by parameter; what is not here every rank holds whole
    columns: frozenset[str]  # linear layers whose outputs are cut
    rows: frozenset[str]  # linear layers whose outputs are partial sums
    fused: dict[str, tuple[int, ...]]  # of `columns`: the sizes of the projections in one weight, each cut by itself
    joint_norms: tuple[JointNorm, ...]
    layers: tuple[LayerFacts, ...]  # as the rank's own model is wired: with its heads only
    embedding: str
    head: str
    vocabulary: tuple[int, ...]  # rows of the embedding and of the head on each rank


class _CannotShardError(Exception):
    """The text says why; who catches it knows the family."""


@dataclass(slots=True)
class _Draft:
    """One rank's plan while it is made."""

    rank: int
    num_ranks: int
    shards: dict[str, Shard] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)
    rows: set[str] = field(default_factory=set)
    fused: dict[str, tuple[int, ...]] = field(default_factory=dict)
    norms: list[JointNorm] = field(default_factory=list)


def plan_ranks(config: PreTrainedConfig, plan: FamilyPlan, *, rank: int, num_ranks: int) -> RankPlan:
    """What `rank` holds of a model.

    Raises `UnsupportedModelError` where it can't be cut into so many parts; the message has the numbers that it can.
    """
    if plan.model_type not in SHARDABLE_FAMILIES:
        raise UnsupportedModelError(
            f"models of the family {plan.model_type!r} can't be cut over several devices of one worker; start it"
            f" without --tensor-parallel, or use one of: {', '.join(SHARDABLE_FAMILIES)}"
        )
    return plan_any_family(config, plan, rank=rank, num_ranks=num_ranks)


def plan_any_family(config: PreTrainedConfig, plan: FamilyPlan, *, rank: int, num_ranks: int) -> RankPlan:
    """`plan_ranks` without the list of families that were tried; what it gives may be wrong for others."""
    assert 0 <= rank < num_ranks
    try:
        draft, layers = _cut(config, plan, rank, num_ranks)
    except (_CannotShardError, ProbeError) as exc:
        raise UnsupportedModelError(
            f"this {plan.model_type} model can't be cut over {num_ranks} devices of one worker: {exc}"
        ) from exc
    return RankPlan(
        rank=rank,
        num_ranks=num_ranks,
        shards=draft.shards,
        columns=frozenset(draft.columns),
        rows=frozenset(draft.rows),
        fused=draft.fused,
        joint_norms=tuple(draft.norms),
        layers=layers,
        embedding=plan.embedding,
        head=plan.head,
        vocabulary=tuple(b - a for a, b in (_even(plan.vocabulary, r, num_ranks) for r in range(num_ranks))),
    )


def apply_shapes(model: nn.Module, shards: dict[str, Shard]) -> None:
    """Give the parameters of a meta model the shapes that a rank holds; names that it lacks are left out."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in shards:
            path, _, leaf = name.rpartition(".")
            part = torch.empty(shards[name].shape(tuple(parameter.shape)), dtype=parameter.dtype, device="meta")
            setattr(model.get_submodule(path), leaf, nn.Parameter(part, requires_grad=False))


def patch_head_counts(model: nn.Module, plan: FamilyPlan, num_ranks: int, layers: LayerRange | None = None) -> None:
    """Tell the attention modules how many heads a rank has: some slice and reshape by that number.

    A module's config is the whole model's object; it gets one of its own.
    """
    for index in range(plan.num_layers) if layers is None else range(layers.start, layers.end):
        for attention in plan.probed.layers[index].attentions:
            module: Any = model.get_submodule(_join(f"{plan.layers}.{index}", attention.module))
            counts = dict.fromkeys(_QUERY_COUNTS, attention.query_heads // num_ranks)
            counts |= {name: max(1, attention.kv.heads // num_ranks) for name in _KEY_COUNTS}
            config = getattr(module, "config", None)
            if config is not None:
                module.config = config = copy.copy(config)
            for holder in (module, config):
                for name, count in counts.items():
                    if isinstance(vars(holder).get(name) if holder is not None else None, int):
                        setattr(holder, name, count)


def hook_joint_norm(
    module: nn.Module,
    norm: JointNorm,
    rank: int,
    num_ranks: int,
    *,
    gather: Callable[[torch.Tensor, int], torch.Tensor],
) -> None:
    """Let a norm see all heads: `gather(x, num_ranks)` puts the ranks' last dimensions one behind the other."""
    start, end = _even(norm.size, rank, num_ranks)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gather(args[0], num_ranks), *args[1:])

    def after(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output[..., start:end].contiguous()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _gathered_shape(x: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """What a gather gives, on the meta device; it depends on `x`."""
    return torch.cat([x] * num_ranks, dim=-1)


# --- one model's plan ----------------------------------------------------------------------------------------


def _cut(
    config: PreTrainedConfig, plan: FamilyPlan, rank: int, num_ranks: int
) -> tuple[_Draft, tuple[LayerFacts, ...]]:
    """Cut the model on the `meta` device and see whether it still works; gives the layers as they are then."""
    model = build_meta_model(config, torch.float32, attention=PROBE_NAME)
    fits = _count_that_fits(model, plan)
    if not fits(num_ranks):
        possible = [count for count in range(2, MAX_RANKS + 1) if fits(count)]
        heads = plan.probed.layers[0].attentions[0]
        raise _CannotShardError(
            f"its {heads.query_heads} query heads, {heads.kv.heads} KV heads and other sizes don't divide by"
            f" {num_ranks} ranks; "
            + (f"what does is {_one_of(possible)}" if possible else "no number of ranks would do")
        )
    draft = _draft(model, plan, rank, num_ranks)
    apply_shapes(model, draft.shards)
    patch_head_counts(model, plan, num_ranks)
    for norm in draft.norms:
        hook_joint_norm(model.get_submodule(norm.module), norm, rank, num_ranks, gather=_gathered_shape)
    with CONSTRUCTION:
        probed = probe(model, plan.layers)
    _check_heads(plan, probed.layers, num_ranks)
    if probed.hidden != plan.probed.hidden or probed.carried != plan.probed.carried:
        raise _CannotShardError("its layers hand on parts of heads, which each rank would have others of")
    return draft, probed.layers


def _draft(model: Any, plan: FamilyPlan, rank: int, num_ranks: int) -> _Draft:
    draft = _Draft(rank, num_ranks)
    style_of = _styles(model, model.get_submodule(plan.layers))
    for index, facts in enumerate(plan.probed.layers):
        prefix = f"{plan.layers}.{index}"
        layer = model.get_submodule(prefix)
        for name, module in layer.named_modules():
            path = _join(prefix, name)
            attention = _attention_of(facts, name)
            if isinstance(module, nn.Linear):
                _cut_linear(draft, path, module, style_of(path), attention)
            elif attention is not None and name.rpartition(".")[2] in {"q_norm", "k_norm"}:
                _cut_norm(draft, path, module, attention)
        for name, parameter in layer.named_parameters():
            path = _join(prefix, name)
            if path not in draft.shards and style_of(path) in _COLUMNS:  # a parameter of its own, such as sinks
                draft.shards[path] = Shard(0, (_even(parameter.shape[0], rank, num_ranks),))
    vocabulary = _even(plan.vocabulary, rank, num_ranks)
    for name in (plan.embedding, plan.head):
        for leaf, _ in model.get_submodule(name).named_parameters(recurse=False):
            draft.shards[f"{name}.{leaf}"] = Shard(0, (vocabulary,))
    if not draft.rows or not draft.columns:
        raise _CannotShardError("neither the family nor its layers' names say how they are cut")
    return draft


def _styles(model: Any, stack: nn.Module) -> Callable[[str], str]:
    """How a module or parameter is cut, by its name; empty for whole. Raises `_CannotShardError` for unknown ways."""
    config = model.base_model.config
    family: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    if any(parameter.dim() > 2 for layer in stack.children() for parameter in layer.parameters()):
        raise _CannotShardError("it has mixtures of experts, which DeepSpeed's AutoTP does not cut")
    unknown = sorted(set(family.values()) - _COLUMNS - _ROWS - _WHOLE - _EXPERTS)
    if unknown:
        raise _CannotShardError(f"its own plan cuts layers in a way that is not known here ({', '.join(unknown)})")
    patterns = [
        (re.compile(r"(?:^|\.)" + re.escape(pattern).replace(r"\*", r"[^.]+") + "$"), style)
        for pattern, style in family.items()
    ]

    def style_of(path: str) -> str:
        if not patterns:
            return _COMMON_STYLES.get(path.rpartition(".")[2], "")
        style = next((style for pattern, style in patterns if pattern.search(path)), "")
        return style if style in _COLUMNS | _ROWS else ""

    return style_of


def _cut_linear(draft: _Draft, path: str, module: nn.Linear, style: str, attention: AttentionFacts | None) -> None:
    rank, count = draft.rank, draft.num_ranks
    if not style:
        return
    if type(module) is not nn.Linear:
        raise _CannotShardError(f"{path} is no plain linear layer")
    if style in _ROWS:
        draft.rows.add(path)
        draft.shards[f"{path}.weight"] = Shard(1, (_even(module.in_features, rank, count),))
        return
    draft.columns.add(path)
    parts = _projections(path, module, attention)
    ranges: list[tuple[int, int]] = []
    start = 0
    for size, is_of_keys in parts:
        if is_of_keys and attention is not None and attention.kv.heads < count:
            head = rank * attention.kv.heads // count
            width = size // attention.kv.heads
            begin, end = head * width, (head + 1) * width
            draft.columns.discard(path)  # other ranks hold the same heads: a choice, not a division
        else:
            begin, end = _even(size, rank, count)
        ranges.append((start + begin, start + end))
        start += size
    if len(parts) > 1 and path in draft.columns:
        draft.fused[path] = tuple(size for size, _ in parts)
    shard = Shard(0, tuple(ranges))
    draft.shards[f"{path}.weight"] = shard
    if module.bias is not None:
        draft.shards[f"{path}.bias"] = shard


def _projections(path: str, module: nn.Linear, attention: AttentionFacts | None) -> list[tuple[int, bool]]:
    """The projections that one weight holds, and for each whether it makes K or V."""
    name = path.rpartition(".")[2]
    features = module.out_features
    if attention is None:
        return [(features // 2, False)] * 2 if "gate_up" in name else [(features, False)]
    kv = attention.kv
    keys, values = kv.heads * kv.key_dim, kv.heads * kv.value_dim
    queries = attention.query_heads * kv.key_dim
    if "qkv" in name and features == queries + keys + values:
        return [(queries, False), (keys, True), (values, True)]
    if name in {"k_proj", "v_proj"}:
        if features not in {keys, values}:
            raise _CannotShardError(f"{path} makes {features} features, which are not its KV heads'")
        return [(features, True)]
    return [(features, False)]


def _cut_norm(draft: _Draft, path: str, module: nn.Module, attention: AttentionFacts) -> None:
    """A norm over one head's features is every rank's; one with a weight for each head is cut with the heads."""
    weight = getattr(module, "weight", None)
    heads = attention.query_heads if path.endswith("q_norm") else attention.kv.heads
    if weight is None or weight.numel() == attention.kv.key_dim:
        return
    if weight.shape == (heads, attention.kv.key_dim):
        if heads < draft.num_ranks:
            chosen = draft.rank * heads // draft.num_ranks
            draft.shards[f"{path}.weight"] = Shard(0, ((chosen, chosen + 1),))
        else:
            draft.shards[f"{path}.weight"] = Shard(0, (_even(heads, draft.rank, draft.num_ranks),))
    elif weight.shape == (heads * attention.kv.key_dim,):
        if heads > 1:  # one head for all ranks: each has all of it
            draft.norms.append(JointNorm(module=path, size=weight.shape[0]))
    else:
        raise _CannotShardError(f"{path} norms something other than heads")


def _count_that_fits(model: Any, plan: FamilyPlan) -> Callable[[int], bool]:
    """Tells of a number of ranks whether heads and sizes divide by it."""
    style_of = _styles(model, model.get_submodule(plan.layers))
    even: set[int] = set()  # sizes that have to divide
    kv_heads: set[tuple[int, bool]] = set()  # and whether a norm spans them
    for index, facts in enumerate(plan.probed.layers):
        prefix = f"{plan.layers}.{index}"
        layer = model.get_submodule(prefix)
        for attention in facts.attentions:
            norm = dict(layer.named_modules()).get(_join(attention.module, "k_norm"))
            weight = getattr(norm, "weight", None)
            spans = weight is not None and weight.dim() == 1 and weight.numel() > attention.kv.key_dim
            kv_heads.add((attention.kv.heads, spans))
            even.add(attention.query_heads)
        for name, module in layer.named_modules():
            style = style_of(_join(prefix, name)) if isinstance(module, nn.Linear) else ""
            if style in _ROWS:
                even.add(module.in_features)
            elif style in _COLUMNS and _attention_of(facts, name) is None:
                even.update(size for size, _ in _projections(_join(prefix, name), module, None))

    def fits(count: int) -> bool:
        return (
            count <= plan.vocabulary
            and all(size % count == 0 for size in even)
            and all(
                heads % count == 0 or (count % heads == 0 and (heads == 1 or not spans)) for heads, spans in kv_heads
            )
        )

    return fits


def _check_heads(plan: FamilyPlan, layers: Sequence[LayerFacts], num_ranks: int) -> None:
    """The cut model must attend with its share of the heads, and be wired as the whole one otherwise."""
    for index, (whole, cut) in enumerate(zip(plan.probed.layers, layers, strict=True)):
        for a, b in zip(whole.attentions, cut.attentions, strict=True):
            is_share = b.query_heads * num_ranks == a.query_heads and b.kv.heads == max(1, a.kv.heads // num_ranks)
            if not is_share or (a.kv.key_dim, a.kv.value_dim) != (b.kv.key_dim, b.kv.value_dim):
                raise _CannotShardError(
                    f"a rank would attend in layer {index} with {b.query_heads} query heads and {b.kv.heads} KV heads"
                )


def _attention_of(facts: LayerFacts, name: str) -> AttentionFacts | None:
    """The attention that a module of a layer is a part of."""
    return next((a for a in facts.attentions if a.module and f"{name}.".startswith(f"{a.module}.")), None)


def _even(size: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """A rank's range of something divided as evenly as it can be; the first ranks get one more, as with AutoTP."""
    share, rest = divmod(size, num_ranks)
    start = rank * share + min(rank, rest)
    return start, start + share + (1 if rank < rest else 0)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path


def _one_of(counts: Sequence[int]) -> str:
    *others, last = [str(count) for count in counts]
    return f"{', '.join(others)} or {last}" if others else last
