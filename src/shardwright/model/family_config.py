"""Reads a model's config, as far as that takes no model classes: they cost 1.5 s and 100 MB more to import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from shardwright.errors import CheckpointError, UnsupportedModelError
from shardwright.model.construction import CONSTRUCTION
from shardwright.model.supported import SPLITTABLE_FAMILIES


def read_config(config_json: str) -> PreTrainedConfig:
    """The config of a family that `transformers` itself implements; code that comes with a model is never run.

    Raises `CheckpointError` if this is no model config, `UnsupportedModelError` if the family is not known.
    """
    try:
        fields = json.loads(config_json)
    except json.JSONDecodeError as exc:
        raise CheckpointError(f"the model's config is not JSON: {exc}") from exc
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise CheckpointError("the model's config names no model_type, so its family is unknown")
    model_type = fields.pop("model_type")
    if fields.pop("quantization_config", None):
        raise unsupported_family(model_type, "its weights are quantised in a way that only its own loader reads")
    fields.pop("auto_map", None)  # names code that comes with the model
    if model_type not in CONFIG_MAPPING:
        raise unsupported_family(model_type, "this version of transformers does not have it")
    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"the config of this {model_type} model is wrong: {' '.join(str(exc).split())}") from exc
    return config


def unsupported_family(model_type: str, reason: str) -> UnsupportedModelError:
    """The error for a family that can't be cut, with those that can."""
    known = ", ".join(SPLITTABLE_FAMILIES)
    return UnsupportedModelError(
        f"models of the family {model_type!r} can't be cut into stages: {reason}. Use one of: {known}"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep `transformers`' advice about configs off the terminal; one thread at a time, since it is the process's."""
    with CONSTRUCTION:
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
