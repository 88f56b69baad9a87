"""Fills a sliced model on the meta device with its weights, one tensor or merged group at a time.

Names, renames, merges, dtypes and ties are those of `transformers`' `from_pretrained`: the parameters of all stages
together are the whole model's, bit for bit. Peak memory is the stage plus one tensor (or one layer's experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from shardwright.errors import CheckpointError
from shardwright.model.buffers import fill_computed_tensors
from shardwright.model.gguf_map import GgufGroup, GgufMap
from shardwright.model.outline import Outline, draw_outline
from shardwright.model.raw_tensors import RawTensors
from shardwright.model.safetensors_map import SafetensorsGroup, assemble_safetensors, map_safetensors
from shardwright.model.shards import Shard, read_shard

Group: TypeAlias = SafetensorsGroup | GgufGroup


def stage_tensor_names(
    model: nn.Module,
    config: Any,
    names: Iterable[str],
    checkpoint_format: Literal["safetensors", "gguf"],
) -> list[str]:
    """Of all the checkpoint's tensors, those that the sliced (meta) `model` needs, in the order it takes them.

    `config` is the whole model's. Raises `CheckpointError` when the checkpoint lacks something that `model` needs.
    """
    outline = draw_outline(model, config, torch.float32)
    groups = _map_names(outline, names, checkpoint_format)
    plan = _plan(model, outline, groups)
    return list(dict.fromkeys(name for group in plan.groups for name in group.sources))


def load_weights(
    model: nn.Module,
    config: Any,
    raw: RawTensors,
    *,
    dtype: torch.dtype,
    device: torch.device,
    finish: Callable[[str], None],
    progress: Callable[[int], None],
    shards: Mapping[str, Shard] | None = None,
) -> None:
    """Fill the sliced meta `model` from `raw`; parameters go to `device` directly.

    `config` is the whole model's. `shards` are the parameters of which `model` holds a part, by name; of them only
    that part is read, unless they have to be made of several tensors first.
    `finish(module_name)` is called as soon as a module has all parameters of its own;
    it may replace the module. `progress(num_bytes)` tells how many bytes of `raw` have been used so far.
    Raises `CheckpointError` for what is missing or has the wrong shape.
    """
    checkpoint_format: Literal["safetensors", "gguf"] = (
        "gguf" if any(spec.dtype.startswith("GGML_") for spec in raw.specs.values()) else "safetensors"
    )
    outline = draw_outline(model, config, dtype)
    gguf_map = GgufMap(outline) if checkpoint_format == "gguf" else None
    plan = _plan(model, outline, _map_names(outline, raw.specs, checkpoint_format, gguf_map))
    fill_computed_tensors(model, outline, device, plan.computed)
    filler = _Filler(model, plan, finish)
    num_bytes = 0
    shards = shards or {}
    for group in plan.groups:
        _check_shape(group, raw, outline)
        if isinstance(group, SafetensorsGroup) and group.converter is None and group.target in shards:
            (source,) = group.sources
            part = read_shard(raw, source, shards[group.target], dtype=outline.dtypes[group.target], device=device)
            filler.put(group.target, part)
            num_bytes += raw.specs[source].num_bytes
            progress(num_bytes)
            continue
        if isinstance(group, GgufGroup):
            assert gguf_map is not None
            made = gguf_map.assemble(group, raw, dtype, device)
        else:
            made = assemble_safetensors(group, raw, outline, device)
        while made:  # dropping each, so that the next group finds the memory free
            name = next(iter(made))
            _check_made(name, made[name], group, outline)
            whole = made.pop(name)
            filler.put(name, shards[name].cut(whole) if name in shards else whole)
        num_bytes += sum(raw.specs[name].num_bytes for name in group.sources)
        progress(num_bytes)
    filler.check_complete()


class _Plan:
    """What a stage takes from the checkpoint: groups in order, and for each tensor made, where it goes."""

    def __init__(
        self,
        *,
        groups: list[Group],
        destinations: Mapping[str, list[str]],
        computed: list[str],
        tied: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.groups = groups
        self.destinations = destinations  # whole-model parameter -> the stage's parameters that get its values
        self.computed = computed  # what the checkpoint lacks and the family computes
        self.tied = tied


def _map_names(
    outline: Outline, names: Iterable[str], checkpoint_format: str, gguf_map: GgufMap | None = None
) -> list[Group]:
    if checkpoint_format == "gguf":
        return list((gguf_map or GgufMap(outline)).group(names))
    return list(map_safetensors(outline, names))


def _targets(group: Group) -> tuple[str, ...]:
    """All parameters that a group makes."""
    if isinstance(group, GgufGroup) or group.converter is None or len(group.converter.target_patterns) == 1:
        return (group.target,)
    first, *others = group.converter.target_patterns
    return (group.target, *(group.target.replace(first, other, 1) for other in others))


def _plan(model: nn.Module, outline: Outline, groups: list[Group]) -> _Plan:
    """Choose the groups that the stage needs. Raises `CheckpointError` for parameters that nothing makes."""
    order = {name: index for index, name in enumerate(model.state_dict())}
    made = {target for group in groups for target in _targets(group)}
    tied = _tied_names(outline)
    destinations: dict[str, list[str]] = {}
    computed: list[str] = []
    missing: list[str] = []
    for name in order:
        origin = next((n for n in (name, *tied.get(name, ())) if n in made), None)
        if origin is not None:
            destinations.setdefault(origin, []).append(name)
        elif outline.ignored_when_missing is not None and outline.ignored_when_missing.search(name):
            computed.append(name)
        else:
            missing.append(name)
    if missing:
        shape = list(outline.state[missing[0]].shape) if missing[0] in outline.state else "unknown"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the checkpoint lacks tensor {missing[0]!r} (shape {shape}){more}; it belongs to another model"
            " or is incomplete"
        )
    needed = [group for group in groups if any(target in destinations for target in _targets(group))]
    needed.sort(key=lambda g: min(order[d] for t in _targets(g) for d in destinations.get(t, ())))
    return _Plan(groups=needed, destinations=destinations, computed=computed, tied=tied)


def _tied_names(outline: Outline) -> dict[str, tuple[str, ...]]:
    """For each tied parameter all that share its values, in the order in which they are looked for."""
    families: dict[str, list[str]] = {}
    for target, source in outline.ties.items():
        families.setdefault(source, [source]).append(target)
    return {name: tuple(family) for family in families.values() for name in family}


def _check_shape(group: Group, raw: RawTensors, outline: Outline) -> None:
    """Compare shapes before anything is allocated, where one tensor is the parameter as it is."""
    if isinstance(group, GgufGroup) or group.converter is not None:
        return
    stored, expected = raw.specs[group.sources[0]].shape, tuple(outline.state[group.target].shape)
    if stored != expected:
        raise _shape_error(group, stored, expected)


def _check_made(name: str, tensor: torch.Tensor, group: Group, outline: Outline) -> None:
    expected = tuple(outline.state[name].shape) if name in outline.state else ()
    if tuple(tensor.shape) != expected:
        raise _shape_error(group, tuple(tensor.shape), expected)


def _shape_error(group: Group, stored: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"tensor {group.sources[0]!r} has the shape {list(stored)}, but the model's {group.target!r} has"
        f" {list(expected)}: config and weights are of different models"
    )


class _Filler:
    """Puts tensors in their places and tells when a module is complete."""

    def __init__(self, model: nn.Module, plan: _Plan, finish: Callable[[str], None]) -> None:
        self._model = model
        self._destinations = plan.destinations
        self._tied = plan.tied
        self._shared: dict[str, nn.Parameter] = {}  # loaded ones that a parameter still to come may equal
        self._finish = finish
        self._open: dict[str, set[str]] = {}  # module -> its tensors that are still to come
        for name in model.state_dict():
            if name not in plan.computed:
                path, _, leaf = name.rpartition(".")
                self._open.setdefault(path, set()).add(leaf)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Give a whole-model parameter's values to the stage's parameters that want them."""
        twins = [other for other in self._tied.get(name, ()) if other != name and other in self._destinations]
        parameter = self._equal_twin(twins, tensor)
        if parameter is None:
            parameter = nn.Parameter(tensor, requires_grad=False)
        if twins:
            self._shared[name] = parameter
        for destination in self._destinations.get(name, ()):
            path, _, leaf = destination.rpartition(".")
            module = self._model.get_submodule(path)
            if leaf in module._buffers:  # noqa: SLF001  torch has no public question for this
                setattr(module, leaf, tensor)
            else:
                setattr(module, leaf, parameter)
            self._open[path].discard(leaf)
        for destination in self._destinations.get(name, ()):
            path = destination.rpartition(".")[0]
            if not self._open.get(path, {""}):
                del self._open[path]
                self._finish(path)

    def _equal_twin(self, twins: list[str], tensor: torch.Tensor) -> nn.Parameter | None:
        """The parameter that this one is tied to, where the checkpoint holds both with the same values."""
        loaded = (self._shared[name] for name in twins if name in self._shared)
        return next((twin for twin in loaded if torch.equal(twin, tensor)), None)

    def check_complete(self) -> None:
        """Everything has its values; anything else is a bug here."""
        assert not self._open, f"never filled: {self._open}"
