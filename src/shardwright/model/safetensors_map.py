"""Which safetensors tensors make which parameter: `transformers`' own renames and merges, one group at a time.

`transformers` converts checkpoints while it loads them: old names are renamed, a base model's names get the head
model's prefix, experts stored one by one are stacked. Source: `transformers.core_model_loading`
(`convert_and_load_state_dict_in_model`), whose parts are reused here for one group of tensors after another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from shardwright.errors import CheckpointError
from shardwright.model.outline import Outline
from shardwright.model.raw_tensors import RawTensors, fill_from_raw


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsGroup:
    """Checkpoint tensors that become `target` together. Without a converter, one tensor is the parameter as it is."""

    target: str  # with a converter that splits: the first of its parameters
    sources: tuple[str, ...]
    patterns: tuple[str, ...]  # of the converter: which of its inputs each source is
    converter: WeightConverter | None


def map_safetensors(outline: Outline, names: Iterable[str]) -> list[SafetensorsGroup]:
    """Group checkpoint names by the parameter that they make; names that make none are left out."""
    mapping = get_model_conversion_mapping(outline.model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = outline.model.base_model_prefix
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, outline.state)
        if target not in outline.state and name in outline.state:
            target, pattern = rename_source_key(name, [], [], prefix, outline.state)
        if target in outline.state:
            found.setdefault(target, []).append((name, pattern))
    groups = []
    for target, members in found.items():
        pattern = members[0][1]
        used = members if pattern is not None else members[:1]
        groups.append(
            SafetensorsGroup(
                target=target,
                sources=tuple(name for name, _ in used),
                patterns=tuple(pattern or "" for _, pattern in used),
                converter=by_pattern[pattern] if pattern is not None else None,
            )
        )
    return groups


def assemble_safetensors(
    group: SafetensorsGroup, raw: RawTensors, outline: Outline, device: torch.device
) -> dict[str, torch.Tensor]:
    """Read the group's tensors and make its parameters, on `device` and in the dtype that they are loaded in."""
    dtype = outline.dtypes[group.target]
    if group.converter is None:
        (name,) = group.sources
        return {group.target: _read(raw, name, dtype, device)}
    merged = _fill_merged(group, raw, outline, device)
    if merged is not None:
        return {group.target: merged}
    converter = copy.deepcopy(group.converter)
    for name, pattern in zip(group.sources, group.patterns, strict=True):
        converter.add_tensor(group.target, name, pattern, _read(raw, name, dtype, device))
    try:
        made = converter.convert(group.target, model=outline.model, config=outline.model.config)
    except (ValueError, RuntimeError, KeyError) as exc:
        raise CheckpointError(
            f"tensors {group.sources[0]!r} and {len(group.sources) - 1} more can't be made into {group.target!r}: {exc}"
        ) from exc
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _read(raw: RawTensors, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor = torch.empty(raw.specs[name].shape, dtype=dtype, device=device)
    fill_from_raw(tensor, raw, name)
    return tensor


def _fill_merged(
    group: SafetensorsGroup, raw: RawTensors, outline: Outline, device: torch.device
) -> torch.Tensor | None:
    """Experts stored one by one, written straight into their place in the stacked parameter.

    The same result as stacking each input and joining the stacks, without the copies of a whole layer's experts.
    None where the converter does anything else.
    """
    assert group.converter is not None
    operations = group.converter.operations
    kinds = [type(operation) for operation in operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or operations[0].dim != 0:
        return None
    if len(operations) == 2 and operations[1].dim != 1:
        return None
    members = {pattern: [] for pattern in group.converter.source_patterns}  # type: dict[str, list[str]]
    for name, pattern in zip(group.sources, group.patterns, strict=True):
        members[pattern].append(name)
    parts = list(members.values())
    shape = tuple(outline.state[group.target].shape)
    rows = [raw.specs[part[0]].shape[0] if part and raw.specs[part[0]].shape else 0 for part in parts]
    expected = {part_index: (count, *shape[2:]) for part_index, count in enumerate(rows)}
    fits = sum(rows) == shape[1] and all(
        len(part) == shape[0] and all(raw.specs[name].shape == expected[index] for name in part)
        for index, part in enumerate(parts)
    )
    if not fits:
        raise CheckpointError(
            f"parameter {group.target!r} has the shape {list(shape)}; the checkpoint's {len(group.sources)} tensors for"
            f" it ({group.sources[0]!r} has the shape {list(raw.specs[group.sources[0]].shape)}) don't make that"
        )
    merged = torch.empty(shape, dtype=outline.dtypes[group.target], device=device)
    for expert in range(shape[0]):
        start = 0
        for part, count in zip(parts, rows, strict=True):
            fill_from_raw(merged[expert, start : start + count], raw, part[expert])
            start += count
    return merged
