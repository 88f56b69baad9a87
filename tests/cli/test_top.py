"""`top` against a server with a cluster that can be set: what a frame shows, and what happens when nobody answers."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace

import pytest
from api_server import server_in_thread
from fake_observatory import FakeObservatory, example_view, example_worker
from fake_openai_server import Answer, always, fake_openai
from fake_text_engine import FakeTextEngine
from rich.console import Console

from shardwright.api.keys import new_key
from shardwright.cli import figures
from shardwright.cli.cluster_screen import Frame
from shardwright.cli.server_watch import Seen, ServerWatch
from shardwright.cli.top import frames
from shardwright.errors import HttpServerError
from shardwright.types import RankLoad


@pytest.fixture
def seen():
    return FakeObservatory()


@pytest.fixture
def server(seen):
    with server_in_thread(FakeTextEngine(observatory=seen)) as running:
        yield running


def drawn(seen, *, width=200, problem="", age_s=0.0):
    """A frame as text."""
    console = Console(width=width, force_terminal=False, color_system=None, file=io.StringIO())
    shown = Seen(view=seen.cluster, points=seen.history(), state_json=b"")
    console.print(Frame("http://127.0.0.1:8000", shown, problem=problem, age_s=age_s))
    return console.file.getvalue()


def test_once_prints_one_frame(run_cli, server):
    outcome = run_cli("top", "--url", server.url, "--once")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].split("  ") == [
        "fake/characters-1", "ready", "epoch 3", "8 layers on 2 workers", "up 1 h", server.url,
    ]  # fmt: skip
    assert re.split(r"\s{2,}", lines[2].strip()) == [
        "worker", "layers", "state", "device", "memory", "busy", "queue", "GPU", "link in",
    ]  # fmt: skip
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[3:5]]
    assert rows[0][:5] == ["rack-1", "0-3", "ready", "cpu", "AMD EPYC"]
    assert rows[0][5:7] == ["1.0/2.0 GiB", "50%"]
    assert rows[0][-4:] == ["1", "-", "0.4 ms", "-"]
    assert rows[1][0] == "desk x 2"
    assert rows[1][-4:] == ["0", "64% 17.6/23.4 GiB 61 °C 70 W", "0.4 ms", "62.5 KiB/s"]
    for figure in (
        "tokens/s 110.0", "prompt tokens/s 275.0", "first token 100 ms, p95 300 ms", "between tokens 20 ms, p95 50 ms",
        "KV blocks 40 of 100 (40%)", "prefix hits 25%", "running 3", "waiting 2 of 8", "steps in flight 1 of 2",
    ):  # fmt: skip
        assert figure in outcome.out
    assert lines[-1] == "errors so far: LinkLostError 1"


@pytest.mark.parametrize("width", [30, 40, 59, 60, 80, 100, 130, 150, 200])
def test_a_frame_fits_terminals_of_any_width(seen, width):
    text = drawn(seen, width=width, problem="no connection", age_s=75)
    assert max(len(line) for line in text.splitlines()) <= width
    for always_there in ("rack-1", "desk", "0-3", "4-7", "50%", "110.0", "KV blocks", "trying"):
        assert always_there in text


def test_a_worker_of_several_ranks_has_a_row_for_each_where_there_is_room(seen):
    wide = [re.split(r"\s{2,}", line.strip()) for line in drawn(seen).splitlines() if "  rank " in line]
    assert wide == [
        ["rank 0", "cuda:0", "NVIDIA L4", "17.6/23.4 GiB", "64% 17.6/23.4 GiB 61 °C 70 W"],
        ["rank 1", "cuda:1", "NVIDIA L4", "16.6/23.4 GiB", "60% 16.6/23.4 GiB"],
    ]
    middle = [re.split(r"\s{2,}", line.strip()) for line in drawn(seen, width=90).splitlines() if "  rank " in line]
    assert middle == [["rank 0", "cuda:0", "17.6/23.4 GiB"], ["rank 1", "cuda:1", "16.6/23.4 GiB"]]
    assert "rank " not in drawn(seen, width=69)
    assert "desk x 2" in drawn(seen, width=69)


def test_a_rank_on_a_cpu_tells_what_its_process_holds(seen):
    load = RankLoad(rank=1, device="\x1b[2Jcpu", device_name="", process_memory_bytes=1536 * 1024**2)
    seen.change_worker("rack-1", num_ranks=2, ranks=(replace(load, rank=0), load))
    text = drawn(seen, width=100)
    assert re.search(r"^rack-1 x 2 +0-3", text, re.MULTILINE)
    assert re.search(r"^  rank 1 .*cpu +1\.5 GiB", text, re.MULTILINE)
    assert "\x1b" not in text


@pytest.mark.parametrize(("waiting", "running", "words"), [(2, 3, "5 requests wait"), (1, 0, "1 request waits")])
def test_a_recovery_is_told_with_its_cause_and_who_waits_for_it(seen, waiting, running, words):
    cause = "worker desk was lost: no heartbeat for 1.0 s\x1b[2J"
    snapshot = replace(seen.cluster.snapshot, recovering_from=cause, num_waiting=waiting, num_running=running)
    seen.change_view(is_ready=False, snapshot=snapshot)
    text = drawn(seen)
    assert f"recovering: worker desk was lost: no heartbeat for 1.0 s\N{REPLACEMENT CHARACTER}[2J; {words}" in text
    assert "\x1b" not in text
    assert "recovering" in drawn(seen, width=30)
    seen.change_view(snapshot=replace(snapshot, recovering_from=""))
    assert "recovering" not in drawn(seen)


def test_a_lost_worker_and_a_cluster_without_a_pipeline_are_told_with_their_reasons(seen):
    seen.cluster = example_view((example_worker("rack-1", None, status="lost", reason="the link broke", report=None),))
    text = drawn(seen)
    assert "not ready" in text
    assert "no pipeline: worker rack-1 was lost: the link broke" in text
    assert "rack-1 is lost: the link broke" in text
    assert re.search(r"^rack-1 +- +lost", text, re.MULTILINE)


def test_a_worker_that_has_not_reported_lately_is_shown_as_silent(seen):
    seen.change_worker("desk", report_age_s=7.0)
    assert "silent 7 s" in drawn(seen)


def test_what_is_not_known_is_a_dash(seen):
    seen.points = []
    seen.change_view(links=(), num_errors=())
    seen.change_worker("desk", busy_ratio=None, report=None)
    text = drawn(seen)
    for figure in ("tokens/s -", "first token -", "between tokens -"):
        assert figure in text
    assert "errors" not in text


def test_percentiles_are_those_of_the_last_point_that_has_any(seen):
    seen.points.append(replace(seen.points[-1], ttft_p50_s=None, ttft_p95_s=None, output_tokens_per_s=0.0))
    text = drawn(seen)
    assert "first token 100 ms, p95 300 ms" in text
    assert "tokens/s 0.0" in text


def test_names_that_a_worker_gives_itself_can_not_steer_the_terminal(seen):
    seen.change_worker("desk", device_name="\x1b[2J[red]x[/red]\x07", reason="\x1b]0;title\x07")
    text = drawn(seen)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]x[/red]" in text


def test_frames_keep_what_was_seen_while_nobody_answers(seen):
    """And are new again as soon as somebody does."""
    first = Seen(view=seen.cluster, points=(), state_json=b"")
    answers = [HttpServerError("gone"), HttpServerError("still gone"), replace(first)]
    now = iter(range(100, 200, 10))

    class Scripted:
        url = "http://x"

        def look(self):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    made = frames(Scripted(), first, clock=lambda: float(next(now)))
    got = [next(made) for _ in range(4)]
    assert [frame.problem for frame in got] == ["", "gone", "still gone", ""]
    assert got[2].seen is first
    assert got[2].age_s > got[1].age_s > 0
    assert got[3].seen is not first
    assert got[3].age_s <= 10


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_the_address_is_the_servers_or_its_apis(server, path):
    with ServerWatch(server.url + path, api_key=None, timeout_s=5) as watch:
        assert watch.look().view.model_name == "fake/characters-1"


def test_only_the_last_minute_of_the_history_is_asked_for(server, seen):
    seen.points = [replace(seen.points[-1], at=seen.cluster.at - ago) for ago in (3600, 61, 59, 0)]
    with ServerWatch(server.url, api_key=None, timeout_s=5) as watch:
        assert [round(seen.cluster.at - point.at) for point in watch.look().points] == [59, 0]


def test_a_key_is_sent_and_its_lack_is_told_at_once(run_cli, tmp_path, monkeypatch):
    key, entry = new_key("anna", max_concurrent=0, tokens_per_minute=0)
    (tmp_path / "keys.toml").write_text(entry.to_toml())
    with server_in_thread(api_key_file=tmp_path / "keys.toml") as server:
        assert run_cli("top", "--once", "--url", server.url, "--api-key", key).code == 0
        for argv in (["top"], ["top", "--once"], ["status"]):
            outcome = run_cli(*argv, "--url", server.url)
            assert outcome.code == 3
            assert outcome.err == (
                "error: the server refused (401): no API key; send the header `Authorization: Bearer <key>`; give the "
                "key with --api-key or SHARDWRIGHT_API_KEY\n"
            )
        monkeypatch.setenv("SHARDWRIGHT_API_KEY", key)
        assert run_cli("top", "--once", "--url", server.url).code == 0


@pytest.mark.parametrize("argv", [["top"], ["top", "--once"], ["status"], ["status", "--json"]])
def test_nobody_there_is_one_sentence(run_cli, free_port, argv):
    outcome = run_cli(*argv, "--url", f"http://127.0.0.1:{free_port}")
    assert (outcome.code, outcome.out) == (3, "")
    assert re.fullmatch(r"error: http://127\.0\.0\.1:\d+: no connection \(.*\); is a server running.*\n", outcome.err)


@pytest.mark.parametrize("url", ["ftp://x", "nonsense", "http://", "http://x?y=1"])
def test_an_address_that_is_none_is_refused(run_cli, url):
    outcome = run_cli("status", "--url", url)
    assert outcome.code == 2
    assert "--url" in outcome.err


@pytest.mark.parametrize("body", [b'{"models": []}', b"<html>", b"[]", b'{"at": "\x1b[2Jnow"}'])
def test_an_answer_that_is_no_state_is_refused(run_cli, body):
    with fake_openai(always(Answer())) as other:
        other.models = Answer(body=body)
        outcome = run_cli("top", "--once", "--url", other.url)
    assert outcome.code == 3
    assert "/api/state is not what this version understands" in outcome.err
    assert "\x1b" not in outcome.err


def test_another_kind_of_server_is_told_from_ours(run_cli):
    with fake_openai(always(Answer())) as other:
        other.models = Answer(status=404, body=b"no")
        outcome = run_cli("top", "--once", "--url", other.url)
    assert outcome.code == 3
    assert "has no /api/state; is it the address of shardwright serve, and of this version?" in outcome.err


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (figures.seconds(0.00041), "0.4 ms"),
        (figures.seconds(0.0123), "12 ms"),
        (figures.seconds(0.9996), "1.0 s"),
        (figures.seconds(None), "-"),
        (figures.duration(0.2), "0 s"),
        (figures.duration(65), "1 min 5 s"),
        (figures.duration(3600), "1 h"),
        (figures.duration(2 * 86400 + 5 * 3600 + 59 * 60), "2 d 5 h"),
        (figures.duration(86405), "1 d"),
        (figures.size(1023), "1023 B"),
        (figures.size(1536), "1.5 KiB"),
        (figures.size(1023.99), "1.0 KiB"),
        (figures.size(150 * 1024**3), "150 GiB"),
        (figures.part_of(512 * 1024**2, 2 * 1024**3), "0.5/2.0 GiB"),
        (figures.part_of(None, 1), "-"),
        (figures.rate(None), "-"),
        (figures.ratio(0.123), "12%"),
    ],
)
def test_figures_are_short(shown, text):
    assert shown == text


# --- in a terminal ---------------------------------------------------------------------------------


def take_terminal():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A process in a pseudo-terminal of 100 columns."""

    def __init__(self, argv):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("SHARDWRIGHT", "COLUMNS"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardwright", *argv], stdin=slave, stdout=slave, stderr=slave,
            env={**environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}, start_new_session=True,
            preexec_fn=take_terminal,  # noqa: PLW1509  only the child can take a terminal, and this takes no lock
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def wait_for(self, pattern, *, after=0, timeout_s=30):
        """Read until the pattern comes after this many characters; gives where it ends."""
        deadline = time.monotonic() + timeout_s
        while not (match := re.compile(pattern).search(self.text, after)):
            assert time.monotonic() < deadline, f"{pattern!r} did not come: {self.text[-2000:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the process has closed its end
                    ended = f"it ended with {self.process.wait(10)}: {self.text[-2000:]!r}"
                    assert re.compile(pattern).search(self.text, after), ended
        return match.end()

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


def test_a_terminal_gets_its_screen_back_when_it_is_told_to_end(server):
    terminal = Terminal(["top", "--url", server.url])
    try:
        at = terminal.wait_for("rack-1")
        terminal.process.send_signal(signal.SIGTERM)
        terminal.wait_for(r"\x1b\[\?1049l", after=at)
        assert terminal.process.wait(10) == 128 + signal.SIGTERM
    finally:
        terminal.close()


def test_in_a_terminal_it_goes_on_over_a_restart_and_ctrl_c_ends_it(seen):
    with server_in_thread(FakeTextEngine(observatory=seen)) as server:
        port = server.port
        terminal = Terminal(["top", "--url", server.url, "--interval", "0.1", "--timeout", "30"])
        try:
            at = terminal.wait_for("rack-1")
            assert "\x1b[?1049h" in terminal.text
            seen.change_worker("rack-1", status="another-state")
            at = terminal.wait_for("another-state", after=at)
        except BaseException:
            terminal.close()
            raise
    try:
        at = terminal.wait_for("no answer for .*no connection", after=at)
        seen.change_worker("rack-1", status="third-state")
        with server_in_thread(FakeTextEngine(observatory=seen), port=port):
            at = terminal.wait_for("third-state", after=at)
            at = terminal.wait_for("third-state", after=at)
            os.write(terminal.master, b"\x03")
            terminal.wait_for(r"\x1b\[\?1049l", after=at)
            assert terminal.process.wait(10) == 0
            assert "Traceback" not in terminal.text
            assert "interrupted" not in terminal.text
    finally:
        terminal.close()
