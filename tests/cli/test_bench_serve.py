"""`bench serve` against a small server of the tests."""

import json
import signal
import subprocess
import sys

import pytest
from fake_openai_server import Answer, always, delta, fake_openai, said, usage


def text(piece, finish=None):
    """An event of a streamed text completion."""
    return {"choices": [{"index": 0, "text": piece, "finish_reason": finish}]}


@pytest.fixture
def server():
    with fake_openai(always(said("a", "b", "c"))) as running:
        yield running


@pytest.fixture
def bench(run_cli, server):
    def run(*argv):
        return run_cli("bench", "serve", "--url", server.url, *argv)

    return run


def test_a_run_reports_what_was_asked_and_what_came(bench, server):
    outcome = bench("--requests", 12, "--concurrency", 3, "--output-tokens", 3, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert (report["model"], report["mode"], report["concurrency"]) == ("tiny", "chat", 3)
    assert report["requests"] == {"sent": 12, "ok": 12, "failed": 0}
    assert report["tokens"] == {"prompt": 84, "cached": 0, "output": 36, "counted_by": "server", "short_answers": 0}
    assert report["inter_token_s"]["count"] == 24
    assert report["ttft_s"]["p50"] <= report["end_to_end_s"]["p50"]
    assert outcome.err == ""
    assert len(server.bodies) == 13  # one to warm up
    assert server.bodies[1]["messages"][0]["content"] != server.bodies[0]["messages"][0]["content"]
    assert {key: server.bodies[1][key] for key in ("max_tokens", "temperature", "stream", "ignore_eos")} == {
        "max_tokens": 3, "temperature": 0.0, "stream": True, "ignore_eos": True,
    }  # fmt: skip


def test_so_many_requests_are_under_way_at_once_and_no_more(bench, server):
    server.answer = always(said("a", "b", delay_s=0.02))
    bench("--requests", 20, "--concurrency", 5)
    assert server.most_at_once == 5
    assert server.num_connections <= 6  # used again, so that no request pays for a new one


def test_with_a_rate_requests_are_sent_whatever_comes_back(bench, server):
    server.answer = always(said("a", delay_s=0.1))
    outcome = bench("--requests", 20, "--rate", 400, "--json")
    report = json.loads(outcome.out)
    assert (report["concurrency"], report["workload"]["rate"]) == (None, 400)
    assert report["requests"]["ok"] == 20
    assert server.most_at_once > 10


def test_the_same_seed_asks_the_same(bench, server):
    for seed in (1, 1, 2):
        bench("--requests", 3, "--concurrency", 1, "--seed", seed, "--warmup", 0)
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert asked[:3] == asked[3:6] != asked[6:]


def test_completions_are_asked_with_token_ids_of_exact_number(bench, server):
    """A text completion's piece may have no text of its own, and counts all the same."""
    server.answer = always(Answer([text("a"), text(""), text("", "length"), usage(4, 2)]))
    outcome = bench(
        "--mode", "completions", "--requests", 2, "--input-tokens", 4, "--id-range", "5,9", "--shared-prefix", 2,
        "--no-ignore-eos", "--json",
    )  # fmt: skip
    report = json.loads(outcome.out)
    assert report["inter_token_s"]["count"] == 2
    for body in server.bodies:
        assert len(body["prompt"]) == 6
        assert set(body["prompt"]) <= {5, 6, 7, 8}
        assert "ignore_eos" not in body
    assert server.bodies[1]["prompt"][:2] == server.bodies[2]["prompt"][:2]


def test_errors_are_counted_by_kind_and_the_rest_is_measured(bench, server):
    bad = [
        Answer(status=429, body=b'{"error": {"message": "full"}}'),
        Answer([delta("a")], done=False),
        Answer([delta("a"), {"error": {"message": "gone"}}]),
        Answer([delta("a")], lose=True, done=False),
        Answer([delta(finish="stop"), usage(1, 0)]),
        Answer(body=b"{}", headers={"Content-Type": "application/json"}),
        Answer(status=429, body=b"{}"),
    ]
    left = iter([said("a"), *bad])
    server.answer = lambda _path, _body: next(left, said("a", "b"))
    report = json.loads(bench("--requests", 10, "--concurrency", 1, "--json").out)
    assert report["requests"] == {"sent": 10, "ok": 3, "failed": 7}
    assert {kind: each["count"] for kind, each in report["errors"].items()} == {
        "HTTP 429": 2, "broken off": 1, "error in the stream": 1, "connection broke": 1, "empty answer": 1,
        "no stream": 1,
    }  # fmt: skip
    assert report["errors"]["HTTP 429"]["example"] == "the server refused (429): full"


def test_when_nothing_succeeds_the_exit_code_is_3(bench, server):
    server.answer = always(Answer(status=500, body=b'{"error": {"message": "\\u001b[2Jno"}}'))
    outcome = bench("--requests", 4, "--warmup", 0)
    assert outcome.code == 3
    assert (
        outcome.err
        == "error: no request succeeded; HTTP 500: the server refused (500): \N{REPLACEMENT CHARACTER}[2Jno\n"
    )
    assert "\x1b" not in outcome.out
    report = json.loads(bench("--requests", 4, "--warmup", 0, "--json").out)
    assert report["requests"]["ok"] == 0


def test_a_warm_up_that_fails_ends_it_before_anything_is_measured(bench, server):
    server.answer = always(Answer(status=400, body=b'{"error": {"message": "ignore_eos: unknown field"}}'))
    outcome = bench()
    assert outcome.code == 3
    assert outcome.err == (
        "error: the first request failed: the server refused (400): ignore_eos: unknown field; try --no-ignore-eos\n"
    )
    assert len(server.bodies) == 1


def test_no_server_is_one_sentence(run_cli, free_port):
    outcome = run_cli("bench", "serve", "--url", f"http://127.0.0.1:{free_port}")
    assert outcome.code == 3
    assert "is a server running there? (shardwright serve)" in outcome.err
    assert outcome.err.count("\n") == 1


def test_people_get_tables(bench):
    outcome = bench("--requests", 2)
    assert "time to first token" in outcome.out
    assert "2 of 2" in outcome.out
    assert "2 requests, 8 at once, seed 0" in outcome.out


def test_a_picture_is_drawn(bench, tmp_path):
    outcome = bench("--requests", 3, "--plot", "out.png")
    assert outcome.code == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_picture_that_can_not_be_drawn_is_told_before_anything_is_measured(bench, server, monkeypatch):
    assert "name a file that ends in .png" in bench("--plot", "out.pdf").err
    assert "there is no folder nowhere" in bench("--plot", "nowhere/out.png").err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = bench("--plot", "out.png")
    assert outcome.code == 2
    assert outcome.err == (
        "error: --plot needs matplotlib, which is not installed; pip install 'shardwright[plot]' brings it\n"
    )
    assert server.bodies == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--rate", "1", "--concurrency", "1"), "--rate and --concurrency were given"),
        (("--rate", "0"), "--rate is 0.0; it must be above 0 requests a second"),
        (("--input-tokens", "3,3"), "must be at least 1 everywhere"),
        (("--output-tokens", "x"), "--output-tokens is 'x'; give tokens as MEAN"),
        (("--mode", "completions", "--id-range", "9,3"), "--id-range is '9,3'"),
        (("--url", "ftp://x"), "--url is 'ftp://x'; give the API's address"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bench, server, argv, says):
    outcome = bench(*argv)
    assert outcome.code == 2
    assert says in outcome.err
    assert server.bodies == []


def test_ctrl_c_ends_a_run_at_once(server, tmp_path):
    server.answer = always(said("a", "b", hold_after=2))
    process = subprocess.Popen(
        [sys.executable, "-m", "shardwright", "bench", "serve", "--url", server.url, "--warmup", "0"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert server.held.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert server.broken.wait(30)
