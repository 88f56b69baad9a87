"""What stands in a GGUF file's header: metadata, the place of each tensor, and the config that they amount to.

The header is parsed here, because `gguf.GGUFReader` makes an array object of every vocabulary entry (gigabytes and
tens of seconds for a quarter of a million tokens). The config is still `transformers`' own reading of it.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from shardwright.errors import CheckpointError, UnsupportedModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_KEPT_ARRAY = 4096  # longer arrays are vocabularies, merges and scores: only their length is kept
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 8
_UNREAD_SETTINGS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}  # sizes that transformers 5.23 does not take from the file and leaves at one model's values


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor's place. `shape` is row-major; `offset` counts from the start of the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """A GGUF file without its data. Arrays that were too long to keep stand in `array_lengths` alone."""

    path: Path
    version: int
    metadata: dict[str, Any]
    array_lengths: dict[str, int]
    kept_entries: bytes  # the metadata entries that were kept, as they stand in the file
    num_kept_entries: int
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """The family, in llama.cpp's words."""
        return str(self.metadata["general.architecture"])


class _Cursor:
    """Reads values one after another and knows what it means when the file ends too early."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def scalar(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        start = self.skip(layout.size)
        return layout.unpack_from(self.data, start)[0]

    def text(self) -> str:
        length = self.scalar("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def skip(self, length: int) -> int:
        start = self.position
        if length > len(self.data) - start:
            raise CheckpointError(
                f"{self.path}: the file ends inside its header ({len(self.data)} bytes); download it again"
            )
        self.position += length
        return start


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse the header and check every tensor's place against the file's size.

    Raises `CheckpointError` for what is not GGUF, for a truncated file and for tensors outside of it.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(4) != _MAGIC:
                raise CheckpointError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data))
    except OSError as exc:
        raise CheckpointError(f"{path}: can't be read: {exc.strerror}") from exc


def _parse(cursor: _Cursor) -> GgufHeader:
    cursor.skip(len(_MAGIC))
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise CheckpointError(f"{cursor.path}: GGUF version {version}; versions 2 and 3 (little-endian) can be read")
    num_tensors, num_entries = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    kept = bytearray()
    num_kept = 0
    for _ in range(num_entries):
        start = cursor.position
        key = cursor.text()
        kind = cursor.scalar("I")
        if kind == _ARRAY:
            lengths[key], values = _read_array(cursor)
            if values is None:
                continue
            metadata[key] = values
        else:
            metadata[key] = _read_value(cursor, kind)
        kept += cursor.data[start : cursor.position]
        num_kept += 1
    if not isinstance(metadata.get("general.architecture"), str):
        raise CheckpointError(f"{cursor.path}: the GGUF header has no general.architecture; this is not a model")
    entries = [_read_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{cursor.path}: general.alignment is {alignment!r}; it must be a positive number")
    data_start = -(-cursor.position // alignment) * alignment
    return GgufHeader(
        path=cursor.path,
        version=version,
        metadata=metadata,
        array_lengths=lengths,
        kept_entries=bytes(kept),
        num_kept_entries=num_kept,
        tensors=_place_tensors(cursor.path, entries, data_start, len(cursor.data)),
    )


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind not in _SCALARS:
        raise CheckpointError(f"{cursor.path}: metadata of unknown type {kind} at byte {cursor.position}")
    return cursor.scalar(_SCALARS[kind])


def _read_array(cursor: _Cursor) -> tuple[int, list[Any] | None]:
    """The array's length, and its values where there are few."""
    kind, length = cursor.scalar("I"), cursor.scalar("Q")
    if kind == _ARRAY:
        raise CheckpointError(f"{cursor.path}: metadata arrays of arrays can't be read (byte {cursor.position})")
    if length <= _MAX_KEPT_ARRAY:
        return length, [_read_value(cursor, kind) for _ in range(length)]
    if kind == _STRING:
        for _ in range(length):
            cursor.skip(cursor.scalar("Q"))
    elif kind in _SCALARS:
        cursor.skip(length * struct.calcsize("<" + _SCALARS[kind]))
    else:
        raise CheckpointError(f"{cursor.path}: metadata of unknown type {kind} at byte {cursor.position}")
    return length, None


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text()
    num_dimensions = cursor.scalar("I")
    if num_dimensions > _MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.path}: tensor {name!r} has {num_dimensions} dimensions; the header is corrupt")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dimensions))[::-1]  # ggml names the fastest dimension first
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _place_tensors(
    path: Path, entries: list[tuple[str, tuple[int, ...], int, int]], data_start: int, file_size: int
) -> tuple[GgufTensor, ...]:
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise CheckpointError(f"{path}: tensor {name!r} is there twice; the header is corrupt")
        num_bytes, type_name = _stored_size(path, name, shape, kind)
        tensors[name] = GgufTensor(
            name=name, type_name=type_name, shape=shape, offset=data_start + offset, num_bytes=num_bytes
        )
    end = 0
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < end:
            raise CheckpointError(f"{path}: tensor {tensor.name!r} overlaps the one before it; the header is corrupt")
        end = tensor.offset + tensor.num_bytes
    if end > file_size:
        raise CheckpointError(
            f"{path}: the file is {end - file_size} bytes short ({file_size} of {end}): download it again"
        )
    return tuple(tensors.values())


def _stored_size(path: Path, name: str, shape: tuple[int, ...], kind: int) -> tuple[int, str]:
    try:
        ggml_type = gguf.GGMLQuantizationType(kind)
    except ValueError as exc:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown type {kind}") from exc
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    row = shape[-1] if shape else 1
    if row % block_elements:
        raise CheckpointError(
            f"{path}: tensor {name!r} has rows of {row} values; {ggml_type.name} stores blocks of {block_elements}"
        )
    return math.prod(shape) // block_elements * block_bytes, ggml_type.name


def gguf_config_json(header: GgufHeader) -> str:
    """The model's config as JSON with `model_type`, the one that `transformers` derives from this file.

    Raises `UnsupportedModelError` for an architecture that `transformers` can't read from GGUF.
    """
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS  # noqa: PLC0415  a second of import, for GGUF alone
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: PLC0415  same

    if header.architecture in GGUF_CONFIG_ARCHS:
        raise UnsupportedModelError(
            f"{header.path}: GGUF files of the family {header.architecture!r} can't be split; use its safetensors"
        )
    with tempfile.TemporaryDirectory(prefix="shardwright-") as folder:
        slim = Path(folder) / "header.gguf"
        slim.write_bytes(_slim_copy(header))
        try:
            config: dict[str, Any] = dict(load_gguf_checkpoint(str(slim))["config"])
        except (ValueError, KeyError) as exc:
            raise UnsupportedModelError(
                f"{header.path}: transformers can't read GGUF files of the family {header.architecture!r};"
                " use the model's safetensors"
            ) from exc
    config.pop("_model_name_or_path", None)
    if "tokenizer.ggml.tokens" in header.array_lengths:
        config.setdefault("vocab_size", header.array_lengths["tokenizer.ggml.tokens"])
    for key, setting in _UNREAD_SETTINGS.items():
        value = header.metadata.get(f"{header.architecture}.{key}")
        if value is not None:
            config.setdefault(setting, value)
    return json.dumps(config, sort_keys=True)


def _slim_copy(header: GgufHeader) -> bytes:
    """The same header without long arrays, and with one number as each tensor's data.

    `transformers` reads a config through `GGUFReader`, which is slow and large on vocabularies; the config depends
    on the short entries and on the tensors' names only.
    """
    entries, num_entries = header.kept_entries, header.num_kept_entries
    size_key = f"{header.architecture}.vocab_size"
    tokens = header.array_lengths.get("tokenizer.ggml.tokens")
    if tokens is not None and size_key not in header.metadata:
        entries += _text(size_key) + struct.pack("<II", 4, tokens)
        num_entries += 1
    tensors = b"".join(_text(tensor.name) + struct.pack("<IQIQ", 1, 1, 0, 0) for tensor in header.tensors)
    start = _MAGIC + struct.pack("<IQQ", header.version, len(header.tensors), num_entries)
    content = start + entries + tensors
    alignment = header.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    return content + bytes(-len(content) % alignment) + struct.pack("<f", 0.0)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded
