"""Which GGUF tensors make which parameter, and their values: `transformers`' name map and layout reversals,
gguf-py's dequantisation, one tensor at a time.

Source: `transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint`, whose results these are bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from shardwright.errors import CheckpointError, UnsupportedModelError
from shardwright.model.outline import Outline
from shardwright.model.raw_tensors import RawTensors, read_checked

_CHUNK_VALUES = 4 * 1024 * 1024  # dequantised at once where rows can be taken apart; 16 MiB in float32

_ARCHITECTURES = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "minimax_m2": "minimax-m2",
    "mistral": "llama",
    "gpt_oss": "gpt-oss",
}  # model types whose GGUF files carry another name


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufGroup:
    """GGUF tensors that become the parameter `target` together."""

    target: str
    sources: tuple[str, ...]


class _Names:
    """As much of a model as `get_gguf_hf_weights_map` asks for: the names of the model and of its base model.

    On a whole model it walks down every module and builds the architecture's name table for each: seconds, for names
    that can't match.
    """

    def __init__(self, model: nn.Module, *, with_children: bool = True) -> None:
        self.config = model.config
        self._model = model
        self._with_children = with_children

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._model.state_dict()

    def named_children(self) -> list[tuple[str, _Names]]:
        if not self._with_children:
            return []
        children = self._model.named_children()
        return [(name, _Names(m, with_children=False)) for name, m in children if isinstance(m, PreTrainedModel)]


class GgufMap:
    """The names and layouts of one model's GGUF tensors."""

    def __init__(self, outline: Outline) -> None:
        config = outline.model.config
        self._outline = outline
        architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
        self._processor: TensorProcessor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(
            config=config.get_text_config().to_dict()
        )
        try:
            self._targets: dict[str, str] = get_gguf_hf_weights_map(_Names(outline.model), self._processor)
        except NotImplementedError as exc:
            raise UnsupportedModelError(
                f"GGUF files of the family {config.model_type!r} can't be read; use the model's safetensors"
            ) from exc

    def group(self, names: Iterable[str]) -> list[GgufGroup]:
        """Group GGUF names by the parameter that they make; names that make none are left out."""
        found: dict[str, list[str]] = {}
        for name in names:
            # merged experts are mapped without the suffix that their tensors carry
            target = self._targets.get(name) or self._targets.get(name.removesuffix(".weight"))
            if target in self._outline.state:
                found.setdefault(target, []).append(name)
        return [GgufGroup(target=target, sources=tuple(names)) for target, names in found.items()]

    def assemble(
        self, group: GgufGroup, raw: RawTensors, dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Dequantise the group's tensors and undo llama.cpp's changes of layout.

        Values are rounded to `dtype`, the model's, before the parameter's own dtype, as `from_pretrained` does.
        """
        final = self._outline.dtypes[group.target]
        shape = tuple(self._outline.state[group.target].shape)
        if len(group.sources) == 1 and self._keeps_rows(group.sources[0], raw.specs[group.sources[0]].shape):
            return {group.target: _dequantize_by_rows(raw, group.sources[0], dtype, final, device)}
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for name in group.sources:
            values = _dequantize(raw, name)
            processed = self._processor.process(
                weights=values, name=name, tensor_key_mapping=self._targets, parsed_parameters=parsed
            )
            if processed.name is not None:
                parsed["tensors"][group.target] = torch.from_numpy(np.array(processed.weights))
            del values, processed
        if set(parsed["tensors"]) != {group.target}:
            raise UnsupportedModelError(
                f"GGUF tensor {group.sources[0]!r} becomes {len(parsed['tensors'])} tensors that this family's model"
                " does not have; use the model's safetensors"
            )
        made = parsed["tensors"].pop(group.target)
        if tuple(made.shape) != shape:
            return {group.target: made}  # the caller names both shapes
        return {group.target: made.to(dtype).to(device=device, dtype=final)}

    def _keeps_rows(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a matrix's rows come out as they went in: then they can be dequantised a few at a time."""
        if len(shape) != 2:
            return False
        probe = np.arange(shape[0], dtype=np.float32).reshape(-1, 1) + 2
        parsed: dict[str, Any] = {"tensors": {}}
        try:
            seen = self._processor.process(
                weights=probe.copy(), name=name, tensor_key_mapping=self._targets, parsed_parameters=parsed
            )
        except (ValueError, IndexError):  # its layout depends on the columns
            return False
        made = next(iter(parsed["tensors"].values()), None)
        values = seen.weights if made is None else made.numpy()
        return values.shape == probe.shape and bool((values == probe).all())


def _dequantize(raw: RawTensors, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    data, ggml_type = _blocks(raw, name)
    return _values(name, data, ggml_type)


def _values(
    name: str, data: np.ndarray[Any, np.dtype[np.uint8]], ggml_type: gguf.GGMLQuantizationType
) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        return np.asarray(dequantize(data, ggml_type))
    except NotImplementedError as exc:
        raise UnsupportedModelError(
            f"tensor {name!r} is stored as {ggml_type.name}, which can't be read; use another quantisation of the model"
        ) from exc


def _dequantize_by_rows(
    raw: RawTensors, name: str, dtype: torch.dtype, final: torch.dtype, device: torch.device
) -> torch.Tensor:
    data, ggml_type = _blocks(raw, name)
    shape = raw.specs[name].shape
    target = torch.empty(shape, dtype=final, device=device)
    rows = max(1, _CHUNK_VALUES // max(1, shape[1]))
    for start in range(0, shape[0], rows):
        values = np.array(_values(name, data[start : start + rows], ggml_type))
        target[start : start + rows].copy_(torch.from_numpy(values).to(dtype))
    return target


def _blocks(raw: RawTensors, name: str) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], gguf.GGMLQuantizationType]:
    """The tensor's stored blocks as bytes: [rows, bytes of a row], or one axis more or less, as the tensor has."""
    spec = raw.specs[name]
    type_name = spec.dtype.removeprefix("GGML_")
    if type_name not in gguf.GGMLQuantizationType.__members__:
        raise CheckpointError(f"tensor {name!r} has the unknown GGUF type {type_name}")
    ggml_type = gguf.GGMLQuantizationType[type_name]
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    if not spec.shape or spec.shape[-1] % block_values:
        raise CheckpointError(f"tensor {name!r}: shape {list(spec.shape)} does not fit blocks of {block_values}")
    if math.prod(spec.shape) // block_values * block_bytes != spec.num_bytes:
        raise CheckpointError(f"tensor {name!r}: {spec.num_bytes} bytes for shape {list(spec.shape)} in {type_name}")
    shape = (*spec.shape[:-1], spec.shape[-1] // block_values * block_bytes)
    return np.frombuffer(read_checked(raw, name), dtype=np.uint8).reshape(shape), ggml_type
