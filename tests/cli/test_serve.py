"""`serve` before and around its model: what is refused, what is said, what the line to try is."""

import contextlib
import dataclasses
import json
import re
import shlex
import socket
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_text_engine import FakeTextEngine

from shardwright.api.app import create_app
from shardwright.api.keys import Keyring, read_key_file
from shardwright.api.schemas import ChatRequest, CompletionRequest, StreamOptions, StructuredOutputs
from shardwright.cli.serve import is_loopback, public_name, ready_line, watch
from shardwright.config import ServeConfig
from shardwright.engine import ServedModel
from shardwright.errors import ClusterError
from shardwright.runtime.model_files import check_model_name

MODEL = ServedModel(
    name="tiny", created=1, context_length=64, vocab_size=151, has_chat_template=True, has_tokenizer=True
)


@pytest.fixture
def no_start(monkeypatch):
    """Records the configs that a session would have been started with; it fails instead."""
    asked = []

    @contextlib.asynccontextmanager
    async def session_for(config, *, local_workers, options=()):
        asked.append(SimpleNamespace(config=config, local_workers=local_workers, options=list(options)))
        raise ClusterError("no session in this test")
        yield

    monkeypatch.setattr("shardwright.cli.serve.session_for", session_for)
    return asked


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--tool-style", "nonsense"), "tool_style is 'nonsense'; choose one of auto, none, hermes"),
        (("--port", "70000"), "port is 70000; it must be between 0 and 65535"),
        (("--max-waiting", "-1"), "max_waiting is -1; it must be between 0 and"),
        (("--request-timeout", "0"), "request_timeout_s is 0.0; it must be above 0"),
        (("--served-model-name", " "), "--served-model-name is empty"),
        (("--threads", "2"), "--threads is for --local-workers"),
        (("--api-key-file", "none.toml"), "none.toml: can't be read: No such file or directory"),
        (("--host", "256.0.0.1"), "host is '256.0.0.1'; it can't be resolved"),
    ],
)
def test_what_is_wrong_is_told_before_the_model_is_loaded(run_cli, no_start, argv, says):
    outcome = run_cli("serve", "--port", 0, *argv)
    assert outcome.code == 2
    assert says in outcome.err
    assert no_start == []


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(run_cli, no_start):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        outcome = run_cli("serve", "--port", port)
    assert outcome.code == 3
    assert outcome.err == (
        f"error: 127.0.0.1:{port} can't be listened on: Address already in use; choose another --port\n"
    )
    assert no_start == []


def test_flags_become_settings(run_cli, no_start):
    run_cli(
        "serve", "--port", 0, "--model", "m", "--local-workers", 2, "--threads", 1, "--max-waiting", 7,
        "--max-running", 3, "--token-budget", 64,
    )  # fmt: skip
    [asked] = no_start
    config = asked.config
    assert (config.model, config.max_waiting, config.max_running, config.token_budget) == ("m", 7, 3, 64)
    assert (asked.local_workers, asked.options) == (2, ["--threads", "1"])


def test_a_failed_start_frees_the_port_and_tells_its_reason(run_cli, no_start, free_port):
    for _ in range(2):
        outcome = run_cli("serve", "--port", free_port)
        assert (outcome.code, outcome.err) == (3, "error: no session in this test\n")


def test_a_server_that_is_open_to_everybody_says_so(run_cli, no_start, monkeypatch):
    assert "warning" not in run_cli("serve", "--port", 0).err
    monkeypatch.setattr("shardwright.cli.serve.is_loopback", lambda _: False)  # as if on a network's address
    assert "--api-key-file FILE asks for keys" in run_cli("serve", "--port", 0).err
    assert run_cli("api-key", "new", "--name", "a", "--file", "k.toml").code == 0
    assert "warning" not in run_cli("serve", "--port", 0, "--api-key-file", "k.toml").err


@pytest.mark.parametrize(
    ("host", "is_one"), [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("192.168.1.2", False), ("::", False)]
)
def test_only_loopback_addresses_are_private_to_this_machine(host, is_one):
    assert is_loopback(SimpleNamespace(getsockname=lambda: (host, 80))) is is_one


def test_serving_from_another_thread_than_the_main_one_only_lacks_signals(run_cli, no_start):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run_cli("serve", "--port", 0)))
    thread.start()
    thread.join()
    assert outcomes[0].code == 3


def body_of(line):
    words = shlex.split(line.partition(" - try: ")[2])
    assert words[0] == "curl"
    return words[1], words[2:-2], json.loads(words[-1])


def test_the_line_to_try_is_a_request_that_the_model_can_answer():
    line = ready_line(MODEL, "http://127.0.0.1:8000", needs_key=False)
    assert line.startswith(
        "Serving tiny on http://127.0.0.1:8000 - try: curl http://127.0.0.1:8000/v1/chat/completions "
    )
    url, headers, body = body_of(line)
    assert headers == ["-H", "Content-Type: application/json"]
    assert body == {"model": "tiny", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    plain = ServedModel(
        name="it's", created=1, context_length=64, vocab_size=151, has_chat_template=False, has_tokenizer=True
    )
    url, headers, body = body_of(ready_line(plain, "http://0.0.0.0:8000", needs_key=True))
    assert url == "http://127.0.0.1:8000/v1/completions"
    assert headers[:2] == ["-H", "Authorization: Bearer YOUR_KEY"]
    assert body == {"model": "it's", "prompt": "The sky is"}
    bare = ServedModel(
        name="x", created=1, context_length=64, vocab_size=151, has_chat_template=False, has_tokenizer=False
    )
    url, _, body = body_of(ready_line(bare, "http://[::]:8000", needs_key=False))
    assert url == "http://[::1]:8000/v1/completions"
    assert body["prompt"] == [1, 2, 3]


def test_clients_see_no_paths(tmp_path, monkeypatch):
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "some" / "model")
    assert public_name(str(tmp_path / "some" / "model")) == "model"
    assert public_name(".") == "model"
    assert public_name("google/gemma-2b") == "google/gemma-2b"
    assert public_name("smollm2-135m") == "smollm2-135m"


async def test_a_failing_cluster_is_logged_once_and_so_is_its_return(monkeypatch, caplog):
    import asyncio

    monkeypatch.setattr("shardwright.cli.serve.FAILURE_CHECK_S", 0.01)
    engine = SimpleNamespace(failure="")
    watching = asyncio.create_task(watch(engine, recovers=False))
    for failure in ("", "worker1 is gone", ""):
        engine.failure = failure
        await asyncio.sleep(0.05)
    watching.cancel()
    assert [record.getMessage() for record in caplog.records] == [
        "requests are answered with 503 from now on: worker1 is gone; stop the server and start it again",
        "requests are answered again",
    ]


# --- api-key ---------------------------------------------------------------------------------------


def test_a_new_key_is_shown_with_its_lines_for_the_file(run_cli, tmp_path):
    outcome = run_cli("api-key", "new", "--name", "alice", "--max-concurrent", 4)
    key, _, lines = outcome.out.partition("\n\n")
    assert key.startswith("sw-")
    assert key not in lines
    (tmp_path / "keys.toml").write_text(lines)
    [entry] = read_key_file(tmp_path / "keys.toml")
    assert (entry.name, entry.max_concurrent, entry.tokens_per_minute) == ("alice", 4, 0)
    assert Keyring((entry,)).check(f"Bearer {key}").name == "alice"


def test_keys_are_added_to_a_file(run_cli, tmp_path):
    keys = [run_cli("api-key", "new", "--name", name, "-f", "k.toml").out.strip() for name in ("a", "b")]
    ring = Keyring(read_key_file(tmp_path / "k.toml"))
    assert [ring.check(f"Bearer {key}").name for key in keys] == ["a", "b"]
    outcome = run_cli("api-key", "new", "--name", "a", "-f", "k.toml")
    assert (outcome.code, outcome.out) == (2, "")
    assert "k.toml has a key of the name a already" in outcome.err
    assert len(tomllib.loads((tmp_path / "k.toml").read_text())["key"]) == 2


@pytest.mark.parametrize("argv", [("--name", "two words"), ("--name", ""), ("--name", "a", "-f", "no/such/folder")])
def test_a_key_that_can_not_be_kept_is_refused(run_cli, argv):
    outcome = run_cli("api-key", "new", *argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")


def test_the_default_model_of_make_serve_is_a_bundled_one():
    check_model_name("smollm2-135m")


# --- docs/api.md -----------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()

SETTINGS = DOCUMENT.partition("## Settings")[2].partition("## What happens")[0]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, StreamOptions, StructuredOutputs])
def test_the_document_names_every_field_of_a_request(kind):
    names = {field.alias or name for name, field in kind.model_fields.items()}
    assert sorted(name for name in names if f"`{name}`" not in DOCUMENT) == []


def test_the_document_names_every_setting_with_its_default():
    for field in dataclasses.fields(ServeConfig):
        assert f"`{field.name}`" in DOCUMENT
    for names, default in re.findall(r"^\| (`[\w`, ]+`) \| ([^|]+) \|", SETTINGS, re.MULTILINE):
        values = [getattr(ServeConfig(), name) for name in re.findall(r"\w+", names)]
        words = {"": "none", None: "none", False: "false"}
        shown = [
            words[value] if value in words else value if isinstance(value, str) else f"{value:.0f}" for value in values
        ]
        assert default == ", ".join(shown), names


def test_the_document_names_every_path():
    paths = set(create_app(FakeTextEngine(), ServeConfig()).openapi()["paths"])
    assert len(paths) >= 7
    assert [path for path in paths if path.replace("{model}", "NAME") not in DOCUMENT] == []
