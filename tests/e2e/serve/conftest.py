"""What the tests of real servers share: a tiny model that can chat, and a server process on it."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import httpx
import pytest
from real_processes import Processes, Running, eventually, processes_in
from tiny_models import Whole, save_whole
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ENDS_WITHIN_S = 10.0  # a second or two on a quiet machine
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}Use <tool_call>.{% endif %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # a character for each byte
BYTE_TOKENS = [
    *(text.encode() for text in SPECIALS),
    *(decoders.ByteLevel().decode([text]).encode("utf-8", "replace") for text in ALPHABET),
]


def save_chat_model(folder: Path) -> Whole:
    """A tiny model of bytes, whose template knows tools. Token n is `BYTE_TOKENS[n]`, as far as that is text."""
    vocabulary = {text: n for n, text in enumerate([*SPECIALS, *ALPHABET])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    whole = save_whole("llama", folder, vocab_size=len(vocabulary), max_position_embeddings=32768, rope_parameters=None)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIALS[2], pad_token=SPECIALS[0], chat_template=TEMPLATE
    ).save_pretrained(folder)
    return whole


@pytest.fixture(scope="package")
def tiny(tmp_path_factory) -> Whole:
    """A model of five layers with a tokenizer of bytes, a chat template and a long context."""
    return save_chat_model(tmp_path_factory.mktemp("tiny_chat"))


@pytest.fixture
def processes(tmp_path):
    """Starts processes in the test's folder."""
    with processes_in(tmp_path) as started:
        yield started


class Server:
    """`shardwright serve` as a process."""

    def __init__(self, processes: Processes, model: Path, *options: object, local_workers: int = 2) -> None:
        self.cache = processes.folder / "cache"
        self.run: Running = processes.run(
            "serve", "--model", model, "--port", 0, "--cache-dir", self.cache, "--dtype", "float32",
            *(("--local-workers", local_workers, "--threads", 1) if local_workers else ()), *options,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """Where it serves, once it does."""
        return self.run.wait_for(r"^Serving .* on (http://127\.0\.0\.1:\d+) - try: ")[1]

    def metrics(self) -> dict[str, float]:
        """Its figures by name; those with labels by name and labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30.0).raise_for_status().text
        return {name: float(value) for name, value in re.findall(r"^shardwright_(\S+) (\S+)$", text, re.MULTILINE)}

    def becomes_idle(self, *, timeout_s: float = 20.0) -> bool:
        """Whether no sequence lives and no block is held, soon."""
        names = ("sequences_waiting", "sequences_running", "kv_blocks_used", "steps_in_flight")
        return eventually(lambda: not any(self.metrics()[name] for name in names), timeout_s=timeout_s)


@pytest.fixture
def serve(processes, tiny):
    """Starts servers that end with the test."""

    def start(*options, **how):
        return Server(processes, tiny.folder, *options, **how)

    return start


@pytest.fixture(scope="package")
def serve_in(tiny):
    """Starts servers that end with the processes that they are started among."""

    def start(processes, *options, **how):
        return Server(processes, tiny.folder, *options, **how)

    return start


@pytest.fixture(scope="package")
def byte_ids() -> dict[bytes, int]:
    """The tiny model's token ids by what they stand for."""
    plain = [byte for byte in range(256) if chr(byte) in ALPHABET]
    others = (byte for byte in range(256) if byte not in plain)
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
    stands_for = [*(text.encode() for text in SPECIALS), *(bytes([byte_of[char]]) for char in ALPHABET)]
    return {text: n for n, text in enumerate(stands_for)}


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny):
    """One server for a module's tests."""
    with processes_in(tmp_path_factory.mktemp("served")) as started:
        running = Server(started, tiny.folder, "--served-model-name", "tiny")
        assert running.url
        yield running


@pytest.fixture
def raw():
    """Sends a chat request on a bare socket, so that a test can go away whenever it likes."""
    opened = []

    def begin(url, **fields):
        host, port = re.fullmatch(r"http://([\d.]+):(\d+)", url).groups()
        body = json.dumps({"messages": [{"role": "user", "content": "hello"}], **fields}).encode()
        sock = socket.create_connection((host, int(port)), timeout=60)
        opened.append(sock)
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        return sock

    yield begin
    for sock in opened:
        sock.close()
