"""Finds a model by the name that a user gave: a bundled name, a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwright.errors import ModelNotFoundError
from shardwright.runtime.bundled import BUNDLED_MODELS, Progress, fetch_bundled

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on disk, with what its small files tell. `weights` are the GGUF file, or safetensors in one folder."""

    name: str  # as the user gave it
    model_type: str
    config_json: str
    weights: tuple[Path, ...]
    tokenizer: Path | None  # a folder with tokenizer files, a GGUF file, or none
    has_chat_template: bool  # as instruct models have
    vocab_size: int
    generation_config: dict[str, Any] = field(default_factory=dict)  # eos_token_id and the like; may be empty
    hub_repo: str = ""  # empty where the files are not from the hub
    hub_revision: str = ""


def resolve_model(name: str, *, cache_dir: Path, progress: Progress) -> ModelFiles:
    """Find the model's files, downloading them where they are not on this machine yet.

    Raises a `ModelError` that says what is wrong and what to do: nothing of that name, a hub that can't be reached, a
    gated model, files that are missing, of an unsafe format, or of a family that can't be split.
    """
    check_model_name(name)
    if name in BUNDLED_MODELS:
        return _from_gguf(name, fetch_bundled(BUNDLED_MODELS[name], cache_dir=cache_dir, progress=progress), cache_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(name, path)
    if path.is_file():
        return _from_gguf(name, path, cache_dir)
    return _from_hub(name, progress)


def check_model_name(name: str) -> None:
    """A first look that takes no time. Raises `ModelNotFoundError` for a name under which no model can be."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ModelNotFoundError(f"{name}: not a GGUF file; give a .gguf file, or the folder of a model")
    if name in BUNDLED_MODELS or path.exists() or (_HUB_ID.fullmatch(name) and path.suffix != ".gguf"):
        return
    raise ModelNotFoundError(
        f"{name}: no file or folder of that name is here, it is not a bundled model ({', '.join(BUNDLED_MODELS)}),"
        " and it is not a hub id (organisation/name)"
    )


def _from_hub(repo: str, progress: Progress) -> ModelFiles:
    from shardwright.runtime.hub import fetch_snapshot

    def check_config(config_json: str) -> None:
        from shardwright.model.family_config import read_config  # torch, only once the hub has answered

        read_config(config_json)

    snapshot = fetch_snapshot(repo, check_config=check_config, progress=progress)
    return _from_folder(repo, snapshot.folder, hub_repo=snapshot.repo, hub_revision=snapshot.revision)


def _from_folder(name: str, folder: Path, *, hub_repo: str = "", hub_revision: str = "") -> ModelFiles:
    from shardwright.model.checkpoint import read_config_json, weight_files
    from shardwright.model.family_config import read_config

    config_json = read_config_json(folder)
    config = read_config(config_json)
    has_tokenizer = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    templates = ("chat_template.jinja", "chat_template.json")
    has_template = any((folder / file).is_file() for file in templates) or bool(
        _read_optional(folder / "tokenizer_config.json").get("chat_template")
    )
    return ModelFiles(
        name=name,
        model_type=config.model_type,
        config_json=config_json,
        weights=tuple(weight_files(folder)),
        tokenizer=folder if has_tokenizer else None,
        has_chat_template=has_tokenizer and has_template,
        vocab_size=int(config.get_text_config().vocab_size),
        generation_config=_read_optional(folder / "generation_config.json"),
        hub_repo=hub_repo,
        hub_revision=hub_revision,
    )


def _from_gguf(name: str, path: Path, cache_dir: Path) -> ModelFiles:
    from shardwright.model.family_config import read_config
    from shardwright.model.gguf_file import gguf_config_json, read_gguf_header
    from shardwright.runtime.tokenizer_files import tokenizer_folder

    header = read_gguf_header(path)
    config_json = gguf_config_json(header)
    config = read_config(config_json)
    tokenizer: Path | None = None
    if "tokenizer.ggml.tokens" in header.array_lengths and "tokenizer.ggml.model" in header.metadata:
        header_bytes = min((tensor.offset for tensor in header.tensors), default=0)
        tokenizer = tokenizer_folder(path, header_bytes=header_bytes, cache_dir=cache_dir) or path
    end_keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    ends = list(dict.fromkeys(header.metadata[key] for key in end_keys if key in header.metadata))
    return ModelFiles(
        name=name,
        model_type=config.model_type,
        config_json=config_json,
        weights=(path,),
        tokenizer=tokenizer,
        has_chat_template=tokenizer is not None and bool(header.metadata.get("tokenizer.chat_template")),
        vocab_size=int(config.get_text_config().vocab_size),
        generation_config={"eos_token_id": ends} if ends else {},
    )


def _read_optional(path: Path) -> dict[str, Any]:
    """A JSON object that need not be there; what can't be read counts as not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
