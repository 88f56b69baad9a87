"""Where each tensor of a checkpoint lies: a view on safetensors or GGUF headers that never loads the model.

A checkpoint is a folder with `config.json` and safetensors (one file, or several with an index), or one GGUF file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from shardwright.errors import CheckpointError, ModelNotFoundError
from shardwright.model.gguf_file import gguf_config_json, read_gguf_header
from shardwright.types import TensorSpec

CheckpointFormat = Literal["safetensors", "gguf"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library has too
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor's raw bytes: `num_bytes` from `offset` (from the start of the file) in `path`.

    `dtype` is safetensors' tag or `GGML_<type>`; `shape` is the row-major shape of the values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int


class Checkpoint:
    """A model's weight files by their headers. Opened by `open_checkpoint`; holds no file open."""

    def __init__(
        self,
        *,
        format: CheckpointFormat,  # noqa: A002  the word that everyone uses for it
        config_json: str,
        tensors: Mapping[str, StoredTensor],
        files: tuple[Path, ...],
    ) -> None:
        self.format: CheckpointFormat = format
        self.config_json = config_json
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(dict(tensors))
        self.files = files

    @classmethod
    def open(cls, weights: Sequence[Path]) -> Checkpoint:
        """Open a model by its weight files: one GGUF file, or safetensors with their config (and index) beside them."""
        assert weights, "a model has at least one weight file"
        return open_checkpoint(weights[0] if weights[0].suffix == ".gguf" else weights[0].parent)

    @property
    def file_sizes(self) -> dict[Path, int]:
        """Bytes of each weight file."""
        return {path: path.stat().st_size for path in self.files}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes `offset` to `offset + length - 1` of one tensor, from disk; safe from several threads at once.

        Raises `CheckpointError` when the file can't be read or got shorter since it was opened.
        """
        tensor = self.tensors[name]
        assert 0 <= offset <= offset + length <= tensor.num_bytes, f"{name}: [{offset}, {offset + length})"
        buffer = bytearray(length)
        self._read_into(tensor, offset, memoryview(buffer))
        return bytes(buffer)

    def read_tensor(self, name: str) -> memoryview:
        """All bytes of one tensor."""
        tensor = self.tensors[name]
        view = memoryview(bytearray(tensor.num_bytes))
        self._read_into(tensor, 0, view)
        return view

    def _read_into(self, tensor: StoredTensor, offset: int, view: memoryview) -> None:
        done = 0
        try:
            with tensor.path.open("rb", buffering=0) as stream:
                stream.seek(tensor.offset + offset)
                while done < len(view):
                    count = stream.readinto(view[done:])
                    if not count:
                        break
                    done += count
        except OSError as exc:
            raise CheckpointError(f"{tensor.path}: can't be read: {exc.strerror}") from exc
        if done < len(view):
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name!r} ends {len(view) - done} bytes early;"
                " the file was changed while in use"
            )


class LocalTensors:
    """A checkpoint's tensors as `RawTensors`, for whoever has the files at hand. The specs carry no content hash."""

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        self._checkpoint = checkpoint
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(
                name=name,
                dtype=checkpoint.tensors[name].dtype,
                shape=checkpoint.tensors[name].shape,
                num_bytes=checkpoint.tensors[name].num_bytes,
                sha256="",
            )
            for name in names
        }

    def read(self, name: str) -> memoryview:
        """The tensor's raw bytes, read from disk now."""
        return self._checkpoint.read_tensor(name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a folder with safetensors, or of a GGUF file, and check them against the files.

    Raises `ModelNotFoundError` where config or weights are missing, `CheckpointError` for a file that is truncated,
    corrupt, incomplete or of a format that can run code.
    """
    if path.is_file():
        return _open_gguf(path)
    if not path.is_dir():
        raise ModelNotFoundError(f"{path}: there is no such file or folder")
    return _open_folder(path)


def open_weight_file(path: Path) -> Checkpoint:
    """Read the header of one file alone: a GGUF, or a part of a safetensors checkpoint (which has no config then).

    Tells them apart by content, since the hub's cache names files by hash. Raises `CheckpointError`.
    """
    try:
        with path.open("rb") as stream:
            is_gguf = stream.read(4) == b"GGUF"
    except OSError as exc:
        raise CheckpointError(f"{path}: can't be read: {exc.strerror}") from exc
    if is_gguf:
        return _open_gguf(path)
    return Checkpoint(format="safetensors", config_json="{}", tensors=_read_safetensors_header(path), files=(path,))


def _open_gguf(path: Path) -> Checkpoint:
    header = read_gguf_header(path)
    tensors = {
        tensor.name: StoredTensor(
            name=tensor.name,
            dtype=f"GGML_{tensor.type_name}",
            shape=tensor.shape,
            path=path,
            offset=tensor.offset,
            num_bytes=tensor.num_bytes,
        )
        for tensor in header.tensors
    }
    return Checkpoint(format="gguf", config_json=gguf_config_json(header), tensors=tensors, files=(path,))


def _open_folder(folder: Path) -> Checkpoint:
    config_json = read_config_json(folder)
    files = weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file, expected in files.items():
        found = _read_safetensors_header(file)
        for name in expected:
            if name not in found:
                raise CheckpointError(
                    f"{file}: tensor {name!r} is not in it, though {INDEX_FILE} says so;"
                    " download both from the same revision"
                )
        tensors |= {name: found[name] for name in expected} if expected else found
    return Checkpoint(format="safetensors", config_json=config_json, tensors=tensors, files=tuple(files))


def read_config_json(folder: Path) -> str:
    """The text of the folder's `config.json`, checked to be a JSON object with `model_type`."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{folder}: there is no config.json in it; give the folder of a Hugging Face model")
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: has no model_type; it is not the config of a transformers model")
    return path.read_text(encoding="utf-8")


def weight_files(folder: Path) -> dict[Path, tuple[str, ...]]:
    """The folder's safetensors files, each with the tensors that the index places there (none: all that it has)."""
    index = folder / INDEX_FILE
    if index.is_file():
        return _indexed_files(index)
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: ()}
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return {others[0]: ()}
    if others:
        raise CheckpointError(f"{folder}: several safetensors files and no {INDEX_FILE}; download the index too")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: its weights are pickled (.bin), which can run code when loaded;"
            " convert them to safetensors, or use a revision that has them"
        )
    raise ModelNotFoundError(f"{folder}: there are no safetensors in it; give a folder with config and weights")


def _indexed_files(index: Path) -> dict[Path, tuple[str, ...]]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; download it again")
    names: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {name!r} is said to be in {file!r}, which is not a file beside it")
        names.setdefault(index.parent / file, []).append(name)
    for path in names:
        if not path.is_file():
            raise CheckpointError(f"{path}: this file is missing, and {index.name} needs it; download it")
    return {path: tuple(tensors) for path, tensors in sorted(names.items())}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"{path}: can't be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise CheckpointError(f"{path}: not valid JSON ({exc}); download it again") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


def _read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Parse and check one file's header (format: https://github.com/huggingface/safetensors#format)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < length <= _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: not a safetensors file (its header would be {length} bytes long)")
            if 8 + length > size:
                raise CheckpointError(
                    f"{path}: the file ends inside its header, at least {8 + length - size} bytes short:"
                    " download it again"
                )
            raw = stream.read(length)
    except OSError as exc:
        raise CheckpointError(f"{path}: can't be read: {exc.strerror}") from exc
    try:
        header = json.loads(raw)
    except ValueError as exc:
        raise CheckpointError(f"{path}: the header is not valid JSON; download it again") from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; download it again")
    header.pop("__metadata__", None)
    tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_places(path, tensors.values(), 8 + length, size)
    return tensors


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sane = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) and isinstance(dtype, str)
    except (KeyError, TypeError, ValueError):
        sane = False
    if not sane:
        raise CheckpointError(f"{path}: the header's entry for {name!r} is malformed; download it again")
    if dtype not in _BITS:
        raise CheckpointError(f"{path}: tensor {name!r} has the dtype {dtype!r}, which can't be read")
    expected = math.prod(shape) * _BITS[dtype] // 8
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r} has {end - begin} bytes, but its shape {list(shape)} in {dtype} takes {expected}"
        )
    return StoredTensor(name=name, dtype=dtype, shape=shape, path=path, offset=data_start + begin, num_bytes=expected)


def _check_places(path: Path, tensors: Iterable[StoredTensor], data_start: int, file_size: int) -> None:
    end, previous = data_start, ""
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset < end:
            raise CheckpointError(f"{path}: tensors {previous!r} and {tensor.name!r} overlap; the header is corrupt")
        end, previous = tensor.offset + tensor.num_bytes, tensor.name
    if end > file_size:
        raise CheckpointError(
            f"{path}: the file is {end - file_size} bytes short ({file_size} of {end}): download it again"
        )
