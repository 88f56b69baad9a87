"""`serve` as a real process on two real workers: its answers, its end in every phase, and a cluster that fails."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import httpx
import openai
import psutil
import pytest
from real_processes import ROOT, eventually, write_registry

from shardwright.cli.app import main

ENDS_WITHIN_S = 10.0  # a second or two on a quiet machine
QUESTION = "Why is the sky blue?"


@contextlib.contextmanager
def client_of(server, **options):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, **options) as client:
        yield client


def seconds_until_end(run):
    began = time.monotonic()
    return run.wait(timeout_s=60.0), time.monotonic() - began


def test_the_answers_are_those_of_generate(server, tiny, tmp_path, capsys, monkeypatch):
    """Greedy text of chat and completions, whole and streamed, through two workers, equals `generate --json`."""
    monkeypatch.chdir(tmp_path)
    common = ["--model", str(tiny.folder), "--local-workers", "1", "--threads", "1", "--dtype", "float32", "--json",
              "--cache-dir", str(tmp_path / "cache"), "--max-new-tokens", "24"]  # fmt: skip
    answers = {}
    for kind in ("--chat", "--raw"):
        assert main(["generate", QUESTION, kind, *common]) == 0
        answers[kind] = json.loads(capsys.readouterr().out)
    with client_of(server) as client:
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24
        )
        assert chat.choices[0].message.content == answers["--chat"]["text"]
        assert chat.choices[0].finish_reason == answers["--chat"]["finish_reason"]
        assert chat.usage.completion_tokens == len(answers["--chat"]["token_ids"])
        assert chat.usage.prompt_tokens == len(answers["--chat"]["prompt_ids"])
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answers["--chat"]["text"]
        for prompt in (QUESTION, answers["--raw"]["prompt_ids"]):
            text = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=24)
            assert text.choices[0].text == answers["--raw"]["text"]


def test_the_request_to_try_works_as_it_is_printed(server):
    """In a shell, with curl where there is one."""
    line = server.run.wait_for(r"^Serving tiny on .* - try: (curl .*)$")[1]
    words = shlex.split(line)
    answer = httpx.post(words[1], content=words[-1], headers=dict([words[3].split(": ")]), timeout=60)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_chat_and_bench_talk_with_the_real_server(server, capsys, tmp_path):
    assert main(["chat", "--url", server.url, "--once", "-p", "max_tokens=5", "-p", "temperature=0", "hi"]) == 0
    assert capsys.readouterr().out
    for mode in ("chat", "completions"):
        code = main([
            "bench", "serve", "--url", server.url, "--mode", mode, "--requests", "6", "--concurrency", "3",
            "--input-tokens", "20,5", "--output-tokens", "6,2", "--shared-prefix", "32", "--json",
            "--id-range", "3,150",
        ])  # fmt: skip
        report = json.loads(capsys.readouterr().out)
        assert code == 0
        assert report["requests"] == {"sent": 6, "ok": 6, "failed": 0}
        assert report["tokens"]["counted_by"] == "server"
        assert report["tokens"]["short_answers"] == 0
    # Five of the six prompts find the prefix, which is two blocks, that the first brought along.
    assert report["tokens"]["prompt"] == pytest.approx(6 * (32 + 20), abs=6 * 5)
    assert report["tokens"]["cached"] >= 32


def test_a_client_that_goes_away_frees_everything(server, raw):
    """Before the first token, in the middle of a stream, and without streaming."""
    for stream, wait in ((True, 1), (True, 20000), (False, 1)):
        sock = raw(server.url, model="tiny", max_tokens=20000, ignore_eos=True, stream=stream, temperature=0)
        assert eventually(lambda: server.metrics()["sequences_running"] + server.metrics()["sequences_waiting"] > 0)
        if wait > 1:
            received = 0
            while received < wait:
                received += len(sock.recv(65536))
        sock.close()
        assert server.becomes_idle()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["^looking at", "^loading the stages", "^ready: 2 stages", "^Serving"])
def test_ctrl_c_ends_the_server_and_its_workers_in_every_phase(serve, moment):
    server = serve()
    server.run.wait_for(moment)
    server.run.send(signal.SIGINT)
    code, seconds = seconds_until_end(server.run)
    assert seconds < ENDS_WITHIN_S
    assert code in ((0,) if moment == "^Serving" else (130, 0))
    assert server.run.err.rstrip().endswith("server stopped" if code == 0 else "interrupted")
    assert "Traceback" not in server.run.err
    assert server.run.descendants() == []


@pytest.mark.slow
def test_sigterm_lets_running_answers_end(serve, tiny):
    """The answer that is under way comes whole; a new request is refused; then the process ends with 0."""
    server = serve()
    name = tiny.folder.name
    with client_of(server) as client:
        stream = client.completions.create(
            model=name, prompt="x", max_tokens=300, stream=True, temperature=0, extra_body={"ignore_eos": True}
        )
        first = next(stream)
        assert first.choices[0].finish_reason is None
        server.run.send(signal.SIGTERM)
        server.run.wait_for("^stopping when the running answers are over")
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
    code, seconds = seconds_until_end(server.run)
    assert code == 0
    assert seconds < ENDS_WITHIN_S
    assert server.run.descendants() == []


@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_cut_off_at_the_end(serve, tiny):
    server = serve("--shutdown-timeout", 0.5)
    with client_of(server) as client:
        stream = client.completions.create(
            model=tiny.folder.name, prompt="x", max_tokens=30000, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        server.run.send(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    code, seconds = seconds_until_end(server.run)
    assert code == 0
    assert seconds < ENDS_WITHIN_S
    assert server.run.descendants() == []


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(serve, raw, tiny):
    server = serve("--shutdown-timeout", 60)
    sock = raw(server.url, model=tiny.folder.name, max_tokens=30000, ignore_eos=True, stream=True)
    assert sock.recv(100)
    server.run.send(signal.SIGINT)
    server.run.wait_for("^stopping when")
    server.run.send(signal.SIGINT)
    code, seconds = seconds_until_end(server.run)
    assert code == 130
    assert seconds < 3.0
    assert eventually(lambda: server.run.descendants() == [])


@pytest.mark.slow
def test_workers_end_when_the_server_is_killed(serve):
    server = serve()
    assert server.url
    server.run.send(signal.SIGKILL)
    assert eventually(lambda: server.run.descendants() == [])


@pytest.mark.slow
def test_a_lost_worker_leaves_the_server_up_with_the_reason(serve, tiny):
    """Told not to recover: answers under way end with an error, new ones get 503, so does /ready; exit code 3."""
    server = serve("--no-recover")
    name = tiny.folder.name
    assert httpx.get(f"{server.url}/ready").status_code == 200
    with client_of(server) as client:
        stream = client.completions.create(
            model=name, prompt="x", max_tokens=30000, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        victim = max(server.run.descendants(), key=lambda process: process.pid)
        victim.kill()
        with pytest.raises(openai.APIError, match="local-"):
            list(stream)
        assert eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="local-") as caught:
            client.completions.create(model=name, prompt="x", max_tokens=3)
        assert caught.value.status_code == 503
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.metrics()["ready"] == 0
    server.run.wait_for("requests are answered with 503 from now on: .*local-")
    assert server.run.process.poll() is None
    server.run.send(signal.SIGTERM)
    code, seconds = seconds_until_end(server.run)
    assert code == 3
    assert re.search(r"^error: the cluster failed while it was serving: .*local-", server.run.err, re.MULTILINE)
    assert seconds < ENDS_WITHIN_S
    assert server.run.descendants() == []


@pytest.mark.slow
def test_registered_workers_serve_and_live_on(processes, serve, tiny, tmp_path):
    pairs = processes.workers(2, "--cache-dir", tmp_path / "worker-cache")
    registry = write_registry(tmp_path / "workers.json", [port for _, port in pairs])
    for _ in range(2):  # the workers are free again after the first
        server = serve("--registry", registry, local_workers=0)
        with client_of(server) as client:
            answer = client.completions.create(model=tiny.folder.name, prompt="x", max_tokens=3, temperature=0)
            assert answer.usage.completion_tokens >= 1
        server.run.send(signal.SIGTERM)
        assert seconds_until_end(server.run)[0] == 0
        assert [worker.process.poll() for worker, _ in pairs] == [None, None]


def test_a_taken_port_ends_it_before_a_worker_is_started(server, processes, tiny):
    port = server.url.rpartition(":")[2]
    run = processes.run("serve", "--model", tiny.folder, "--local-workers", 2, "--port", port)
    assert run.wait() == 3
    assert run.err == f"error: 127.0.0.1:{port} can't be listened on: Address already in use; choose another --port\n"


@pytest.mark.slow
def test_keys_are_asked_for_where_there_is_a_key_file(serve, processes, tiny, tmp_path):
    made = processes.run("api-key", "new", "--name", "anna", "--file", "keys.toml")
    assert made.wait() == 0
    server = serve("--api-key-file", tmp_path / "keys.toml")
    assert "Authorization: Bearer YOUR_KEY" in server.run.wait_for("^Serving .*")[0]
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    chat = processes.run(
        "chat", "--url", server.url, "--once", "-p", "max_tokens=2", "hi", SHARDWRIGHT_API_KEY=made.out.strip()
    )
    assert chat.wait() == 0, chat.err
    chat = processes.run("chat", "--url", server.url, "--once", "hi")
    assert chat.wait() == 3
    assert "the server refused (401): no API key" in chat.err


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / ".made-from-pyproject").exists(), reason="make venv was not run here")
def test_make_serve_serves_until_ctrl_c(tiny, tmp_path):
    """As a person starts it; make passes Ctrl-C on and nothing is left."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            ["make", "serve", f"MODEL={tiny.folder}", "PORT=0"], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            env={**environ, "OMP_NUM_THREADS": "1", "SHARDWRIGHT_CACHE_DIR": str(tmp_path / "cache"),
                 "SHARDWRIGHT_METRICS": str(tmp_path / "metrics.json")},
            start_new_session=True,
        )  # fmt: skip
    try:
        assert eventually(lambda: "Serving " in (tmp_path / "out").read_text(), timeout_s=90), (
            tmp_path / "out"
        ).read_text()
        url = re.search(r"on (http://\S+) - try", (tmp_path / "out").read_text())[1]
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) == 3
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
        assert psutil.wait_procs(started, timeout=ENDS_WITHIN_S)[1] == []
        assert "server stopped" in (tmp_path / "out").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_help_starts_quickly():
    """Nothing heavy is imported before a command needs it."""
    code = (
        "import sys; from shardwright.cli.app import app; "
        "print([m for m in ('torch', 'fastapi', 'httpx', 'prompt_toolkit', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
