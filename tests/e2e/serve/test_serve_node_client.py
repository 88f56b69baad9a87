"""OpenAI's client for Node against the real server."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import BYTE_TOKENS

VERSION = "7.57.0"
CLIENT = Path(__file__).parent / "node" / "client.mjs"


@pytest.fixture
def node_client(tmp_path):
    """A folder with the client and OpenAI's package; skips where either can't be had."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    install = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--save-exact", f"openai@{VERSION}"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    if install.returncode:
        pytest.skip(f"npm can't install openai@{VERSION}: {install.stderr.strip().splitlines()[-1:]}")
    return Path(shutil.copy(CLIENT, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_node_client_chats_streams_calls_tools_and_reads_errors(server, node_client):
    bias = json.dumps({str(BYTE_TOKENS.index(blank)): -50 for blank in (b" ", b"\t", b"\n", b"\r")})
    done = subprocess.run(
        ["node", node_client.name, f"{server.url}/v1", "tiny", bias], cwd=node_client.parent, capture_output=True,
        text=True, check=False, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["models"] == ["tiny"]
    assert told["chat"]["text"]
    assert told["stream"]["text"] == told["chat"]["text"]
    assert told["stream"]["chunks"] > 2
    assert told["stream"]["finish"] in {"stop", "length"}
    for usage in (told["chat"]["usage"], told["stream"]["usage"]):
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert told["chat"]["usage"]["completion_tokens"] == told["stream"]["usage"]["completion_tokens"]
    for way in ("tools", "streamedTools"):
        assert told[way]["finish"] == "tool_calls"
        assert told[way]["calls"]
        for name, arguments in told[way]["calls"]:
            assert name == "weather"
            assert set(arguments) == {"city", "days"}
            assert arguments["city"] in {"Paris", "Rome"}
            assert arguments["days"] in {1, 2}
    assert told["json"] in ({"ok": True}, {"ok": False})
    assert told["error"] == {
        "kind": "BadRequestError", "status": 400, "param": "temperature", "type": "invalid_request_error",
    }  # fmt: skip
    assert server.becomes_idle()  # also the answer that the client left
