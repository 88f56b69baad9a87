"""A checkpoint's headers: what they tell, and each way in which a file can be wrong."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardwright.errors import CheckpointError, ModelNotFoundError
from shardwright.model.checkpoint import Checkpoint, LocalTensors, open_checkpoint

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "c.scale": torch.tensor(2.5, dtype=torch.float16),
}


def write_folder(folder: Path, *, config: str = '{"model_type": "llama"}') -> Path:
    (folder / "config.json").write_text(config)
    return folder


@pytest.fixture
def single(tmp_path):
    save_file(TENSORS, write_folder(tmp_path) / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def indexed(tmp_path):
    write_folder(tmp_path)
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "model-00001-of-00002.safetensors")
    rest = {name: tensor for name, tensor in TENSORS.items() if name != "a.weight"}
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(rest, "model-00002-of-00002.safetensors")
    weight_map["a.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def write_raw(folder: Path, header: dict, data: bytes) -> Path:
    """A safetensors file with any header, true or not."""
    encoded = json.dumps(header).encode()
    path = write_folder(folder) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


@pytest.mark.parametrize("kind", ["single", "indexed"])
def test_every_tensor_is_found_with_its_bytes(kind, request):
    checkpoint = open_checkpoint(request.getfixturevalue(kind))
    assert checkpoint.format == "safetensors"
    assert set(checkpoint.tensors) == set(TENSORS)
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        stored = checkpoint.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        assert stored.num_bytes == tensor.nbytes
        expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert bytes(checkpoint.read_tensor(name)) == expected
        assert checkpoint.read(name, 1, stored.num_bytes - 1) == expected[1:]
    assert [checkpoint.tensors[name].dtype for name in TENSORS] == ["F32", "BF16", "F16"]
    assert set(checkpoint.file_sizes) == set(checkpoint.files)


def test_a_checkpoint_opens_by_its_weight_files_too(indexed):
    whole = open_checkpoint(indexed)
    assert Checkpoint.open(whole.files).tensors == whole.tensors
    assert whole.config_json == '{"model_type": "llama"}'


def test_local_tensors_give_the_bytes_of_the_names_asked_for(single):
    raw = LocalTensors(open_checkpoint(single), ["b.weight"])
    assert list(raw.specs) == ["b.weight"]
    assert raw.specs["b.weight"].shape == (2, 3)
    assert len(raw.read("b.weight")) == 12


def test_opening_reads_the_header_alone(tmp_path):
    """A file that claims a terabyte (sparse on disk) is opened without reading or mapping it."""
    size = 1 << 40
    path = write_raw(tmp_path, {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b"")
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + size)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.num_bytes == size
    assert checkpoint.read("w", size - 4, 4) == bytes(4)


def test_a_truncated_file_is_refused_with_the_missing_byte_count(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file is 5 bytes short .*: download it again"):
        open_checkpoint(single)


@pytest.mark.parametrize("keep", [0, 5, 8, 20])
def test_a_file_that_ends_inside_its_header_is_refused(single, keep):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"ends inside its header|not a safetensors file"):
        open_checkpoint(single)


def test_what_is_no_safetensors_file_is_refused(single):
    (single / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>an error page of some server</html>")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint(single)


def test_a_header_that_is_not_json_is_refused(single):
    (single / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"{{{{" + bytes(100))
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(single)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "has 8 bytes, but its shape"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}, "malformed"),
        ({"dtype": "F32", "shape": [2]}, "malformed"),
        ({"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}, "dtype 'Q7'"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "has -8 bytes"),
        ("F32", "malformed"),
    ],
)
def test_a_lying_header_entry_is_refused_by_name(tmp_path, entry, complaint):
    write_raw(tmp_path, {"w": entry}, bytes(8))
    with pytest.raises(CheckpointError, match=complaint) as caught:
        open_checkpoint(tmp_path)
    assert "'w'" in str(caught.value)


def test_overlapping_tensors_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [2]}
    header = {"v": entry | {"data_offsets": [0, 8]}, "w": entry | {"data_offsets": [4, 12]}}
    write_raw(tmp_path, header, bytes(12))
    with pytest.raises(CheckpointError, match="'v' and 'w' overlap"):
        open_checkpoint(tmp_path)


def test_a_file_that_the_index_names_must_be_there(indexed):
    (indexed / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: this file is missing"):
        open_checkpoint(indexed)


def test_a_tensor_that_the_index_names_must_be_in_its_file(indexed):
    save_file({"other": torch.zeros(2)}, indexed / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: tensor 'a\.weight' is not in it"):
        open_checkpoint(indexed)


def test_an_index_can_not_point_outside_of_its_folder(indexed):
    (indexed / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="not a file beside it"):
        open_checkpoint(indexed)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}'])
def test_a_broken_index_is_refused(indexed, content):
    (indexed / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(indexed)


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    (write_folder(tmp_path) / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="can run code when loaded"):
        open_checkpoint(tmp_path)


def test_missing_config_weights_and_paths_are_told_apart(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    write_folder(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no safetensors in it"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("config", ["not json", "[1]", '{"hidden_size": 8}'])
def test_a_config_that_names_no_family_is_refused(tmp_path, config):
    write_folder(tmp_path, config=config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_while_in_use_is_noticed(single):
    checkpoint = open_checkpoint(single)
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    last = max(checkpoint.tensors.values(), key=lambda t: t.offset)
    with pytest.raises(CheckpointError, match="ends 1 bytes early"):
        checkpoint.read_tensor(last.name)
