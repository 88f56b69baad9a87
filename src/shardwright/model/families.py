"""Learns how a model family is built and cuts its model into stages. Knows modules and shapes; reads no weights.

The model classes are `transformers`' own, built on the `meta` device, where tensors have shapes and no content. Which
modules are the embedding, the layers and the head comes from the family's pipeline plan; what runs before and after
the layers, what each layer is given and what it asks of its attention is found out by one forward of the meta model
(`probe.py`), so that no family needs a line of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shardwright.errors import UnsupportedModelError
from shardwright.model.attention import ATTENTION_NAME
from shardwright.model.construction import CONSTRUCTION
from shardwright.model.family_config import quiet_transformers, read_config, unsupported_family
from shardwright.model.probe import PROBE_NAME, Probed, ProbeError, probe
from shardwright.model.skeleton import Absent, EmptyOutput, PassThrough
from shardwright.types import LayerRange, ModelCosts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyPlan:
    """Where a model's parts are and what they exchange. Module names are the whole model's."""

    model_type: str
    layers: str  # the list of layers
    embedding: str
    head: str
    num_layers: int
    vocabulary: int  # rows of the embedding
    probed: Probed


def plan_family(config: PreTrainedConfig) -> FamilyPlan:
    """Find out how this model is built. Raises `UnsupportedModelError` where it can't be cut between its layers."""
    return _plan(config, build_meta_model(config, torch.float32, attention=PROBE_NAME))


def slice_model(
    config: PreTrainedConfig,
    layers: LayerRange,
    *,
    is_first: bool,
    is_last: bool,
    dtype: torch.dtype = torch.float32,
    plan: FamilyPlan | None = None,
) -> nn.Module:
    """The whole model's class on the `meta` device with the parameters of one stage only, under their own names.

    Layers outside the range hand their input on; the embedding and what else runs before the layers is kept on the
    first stage, what runs after them on the last.
    """
    plan = plan or plan_family(config)
    if layers.end > plan.num_layers:
        raise UnsupportedModelError(f"layers {layers} are asked for, but this model has {plan.num_layers}")
    assert is_first == (layers.start == 0), f"the first stage starts at layer 0, not {layers.start}"
    assert is_last == (layers.end == plan.num_layers), f"the last stage ends with layer {plan.num_layers - 1}"
    model: nn.Module = build_meta_model(config, dtype, attention=ATTENTION_NAME)
    stack = model.get_submodule(plan.layers)
    assert isinstance(stack, nn.ModuleList)
    for index, layer in enumerate(stack):
        if index not in layers:
            stack[index] = PassThrough(layer, plan.probed.layers[index], is_end=index == plan.num_layers - 1)
    before = {} if is_first else plan.probed.before
    absent = {*plan.probed.unused, *(() if is_last else plan.probed.after)}
    for name in sorted({*before, *absent}, key=lambda n: (-n.count("."), n)):  # inner modules before outer ones
        module = model.get_submodule(name)
        _replace(model, name, EmptyOutput(module, before[name], dtype) if name in before else Absent(module))
    return model


def model_costs(config_json: str, *, name: str, dtype: str, plan: FamilyPlan | None = None) -> ModelCosts:
    """What the model's parts weigh in `dtype`. Allocates nothing: the model is never more than shapes."""
    config = read_config(config_json)
    plan = plan or plan_family(config)
    model = build_meta_model(config, DTYPES[dtype], attention=ATTENTION_NAME)
    stack = model.get_submodule(plan.layers)
    head = _bytes_of(model, plan.probed.after)
    embedding = _bytes_of(model, plan.probed.before)
    tied = model.get_submodule(plan.head).weight is model.get_submodule(plan.embedding).weight
    max_context = _max_context(config)
    return ModelCosts(
        name=name,
        hidden_size=int(plan.probed.hidden.size_per_token),
        layer_bytes=tuple(_bytes(layer) for layer in stack.children()),
        layer_kv_bytes_per_token=tuple(layer.kv_bytes_per_token(DTYPES[dtype]) for layer in plan.probed.layers),
        embedding_bytes=embedding,
        head_bytes=head,
        tied_embedding=tied,
        activation_bytes_per_token=plan.probed.hidden.size_per_token * DTYPES[dtype].itemsize,
        max_context=max_context,
        element_bytes=DTYPES[dtype].itemsize,
        context_costs=_context_costs(config, stack, plan, max_context),
        layer_kv_heads=tuple(min(each.kv.heads for each in layer.attentions) for layer in plan.probed.layers),
    )


def _context_costs(
    config: PreTrainedConfig, stack: nn.Module, plan: FamilyPlan, max_context: int
) -> tuple[tuple[int, float], ...]:
    """Operations of a token for each position that it attends to, over those of its matrix products, by window."""
    text = config.get_text_config()
    experts = int(getattr(text, "num_experts", 0) or getattr(text, "num_local_experts", 0) or 0)
    used = int(getattr(text, "num_experts_per_tok", 0) or experts)
    linear = 0.0
    for weight in stack.parameters():
        if weight.dim() < 2:
            continue
        is_of_experts = weight.dim() == 3 and experts > 0 and weight.shape[0] == experts
        linear += 2 * weight.numel() * (used / experts if is_of_experts else 1)
    by_window: dict[int, int] = {}
    for layer in plan.probed.layers:
        for attention in layer.attentions:
            window = min(attention.window or max_context, max_context)
            by_window[window] = by_window.get(window, 0) + attention.operations_per_position
    return tuple((window, operations / linear) for window, operations in sorted(by_window.items()))


def _max_context(config: PreTrainedConfig) -> int:
    """Positions that the model can be served for.

    Rotary frequencies of the types `longrope` and `dynamic` change for every token of a batch as soon as one sequence
    passes the length that the model was first trained for; up to there they are constant, and only there is a
    sequence's answer its own.
    """
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", 0) or 0) or 1 << 20
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope" or "dynamic" in str(rope.get("rope_type")):
            limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit


def build_meta_model(config: PreTrainedConfig, dtype: torch.dtype, *, attention: str) -> Any:
    """The family's causal language model on the `meta` device. `config` is copied, not changed."""
    model_type = config.model_type
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise unsupported_family(model_type, "it is not a causal language model")
    config = copy.deepcopy(config)
    config.use_cache = False
    for flag in ("output_router_logits", "output_hidden_states", "output_attentions"):
        if getattr(config, flag, False):
            setattr(config, flag, False)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (ImportError, ArithmeticError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as exc:
        raise unsupported_family(model_type, f"its model can't be built: {exc}") from exc
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model


def _plan(config: PreTrainedConfig, model: Any) -> FamilyPlan:
    model_type = config.model_type
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise unsupported_family(model_type, "it has no token embedding or no output head")
    layers = _find_layers(model, model_type)
    try:
        with CONSTRUCTION:
            probed = probe(model, layers)
    except ProbeError as exc:
        raise unsupported_family(model_type, str(exc)) from exc
    if names[id(embedding)] not in probed.before or names[id(head)] not in probed.after:
        raise unsupported_family(model_type, "its embedding or its head is not where the layers begin and end")
    return FamilyPlan(
        model_type=model_type,
        layers=layers,
        embedding=names[id(embedding)],
        head=names[id(head)],
        num_layers=len(probed.layers),
        vocabulary=int(embedding.weight.shape[0]),
        probed=probed,
    )


def _find_layers(model: Any, model_type: str) -> str:
    """The path of the layer list: from the family's pipeline plan, else the one list as long as the model is deep."""
    plan: dict[str, Any] = getattr(model.base_model.config, "base_model_pp_plan", None) or {}
    base: str = f"{model.base_model_prefix}." if model.base_model is not model else ""
    lists: dict[str, nn.ModuleList] = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    planned: list[str] = [base + name for name in plan if base + name in lists]
    if len(planned) == 1:
        return planned[0]
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    fitting: list[str] = [
        name for name, m in lists.items() if len(m) == depth and not any(name.startswith(f"{o}.") for o in lists)
    ]
    if len(fitting) != 1:
        raise unsupported_family(model_type, "its layers are not one list")
    return fitting[0]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters()) + sum(
        b.nbytes for n, b in module.named_buffers() if n.rpartition(".")[2] not in _transient(module, n)
    )


def _transient(module: nn.Module, name: str) -> set[str]:
    """Names of the buffers that no checkpoint holds, in the module that owns `name`."""
    return module.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set  # noqa: SLF001


def _bytes_of(model: nn.Module, names: Any) -> int:
    return sum(p.nbytes for name in names for p in model.get_submodule(name).parameters(recurse=False))
