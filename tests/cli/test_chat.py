"""`chat` against a small server of the tests: what is sent, what is shown, and what survives."""

import asyncio
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from fake_openai_server import Answer, always, delta, fake_openai, in_turn, said, usage
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from shardwright.cli.chat import make_session
from shardwright.cli.conversation import ChatServer, Conversation, Reply
from shardwright.cli.openai_http import Usage
from shardwright.errors import ConfigError


def echo(path, body):
    """Answers with the last question in upper case, a word a piece."""
    return said(*re.findall(r"\S+\s*", body["messages"][-1]["content"].upper()))


@pytest.fixture
def server():
    with fake_openai(echo) as running:
        yield running


@pytest.fixture
def talk(run_cli, server, monkeypatch):
    """Runs `chat` on these lines of standard input."""

    def run(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run_cli("chat", "--url", server.url, *options)

    return run


def test_each_line_is_a_question_and_the_conversation_goes_along(talk, server):
    outcome = talk("one two", "three", options=["--system", "be short"])
    assert (outcome.code, outcome.out, outcome.err) == (0, "ONE TWO\nTHREE\n", "")
    assert server.bodies[1] == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": "one two"},
            {"role": "assistant", "content": "ONE TWO"},
            {"role": "user", "content": "three"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_parameters_model_and_key_are_sent(talk, server):
    talk("x", options=["-p", "temperature=0.5", "-p", 'stop=["a"]', "-p", "user=me", "--model", "m", "--api-key", "k"])
    body = server.bodies[0]
    assert (body["temperature"], body["stop"], body["user"], body["model"]) == (0.5, ["a"], "me", "m")
    assert server.headers[0]["authorization"] == "Bearer k"


def test_a_backslash_at_the_end_continues_the_question_on_the_next_line(talk, server):
    assert talk("a\\", "b", "", "c\\").out == "A\nB\nC\n"
    assert [body["messages"][-1]["content"] for body in server.bodies] == ["a\nb", "c"]


def test_once_takes_all_of_standard_input_or_the_argument(talk, server):
    assert talk("a", "b", options=["--once"]).out == "A\nB\n"
    assert talk("unused", options=["--once", "/not a command"]).out == "/NOT A COMMAND\n"
    assert [body["messages"][-1]["content"] for body in server.bodies] == ["a\nb\n", "/not a command"]
    outcome = talk("  ", options=["--once"])
    assert (outcome.code, outcome.err) == (
        2, "error: there is no question: neither an argument nor anything on standard input\n",
    )  # fmt: skip


def test_commands_change_what_is_sent_next(talk, server, tmp_path):
    outcome = talk(
        "first", "/system you are terse", "/params temperature=0.1", "/params seed=5", "/params seed=", "/model other",
        "second", "/clear", "//third", "/exit", "never asked",
    )  # fmt: skip
    assert outcome.out == "FIRST\nSECOND\n/THIRD\n"
    second, third = server.bodies[1:]
    assert second["messages"][0] == {"role": "system", "content": "you are terse"}
    assert len(second["messages"]) == 4
    assert (second["temperature"], second["model"]) == (0.1, "other")
    assert "seed" not in second
    assert [message["content"] for message in third["messages"]] == ["you are terse", "/third"]
    assert "parameters: temperature=0.1, seed=5\nparameters: temperature=0.1\nmodel: other\n" in outcome.err


def test_retry_takes_the_last_answer_back_and_asks_again(talk, server):
    assert talk("a", "b", "/retry").out == "A\nB\nB\n"
    assert [message["content"] for message in server.bodies[2]["messages"]] == ["a", "A", "b"]


def test_retry_after_a_failure_keeps_what_was_answered_before(talk, server):
    answers = [said("A"), Answer(status=500, body=b"{}"), said("B")]
    server.answer = in_turn(answers)
    outcome = talk("a", "b", "/retry")
    assert outcome.code == 3
    assert outcome.err == "error: the server refused (500): no reason given\n"
    assert [message["content"] for message in server.bodies[2]["messages"]] == ["a", "A", "b"]


def test_a_conversation_is_saved_and_gone_on_with(talk, server, tmp_path):
    outcome = talk("a", "/params top_p=0.5", "/save c.json", "b", "/save c.json", options=["--system", "s"])
    assert "saved to c.json\nsaved to c.json\n" in outcome.err
    saved = json.loads((tmp_path / "c.json").read_text())
    assert (saved["model"], saved["system"], saved["params"]) == ("tiny", "s", {"top_p": 0.5})
    assert [message["content"] for message in saved["messages"]] == ["a", "A", "b", "B"]
    outcome = talk("/load c.json", "c", "/retry", "/save c.json")
    assert [message["content"] for message in server.bodies[3]["messages"]] == ["s", "a", "A", "b", "B", "c"]
    assert server.bodies[3]["top_p"] == 0.5
    assert outcome.code == 2  # another run's file is not written over
    assert outcome.err.endswith("error: c.json is there already; choose another name\n")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nonsense", "there is no command /nonsense; /help lists them, and //nonsense sends it as a message"),
        ("/params nonsense", "'nonsense' sets nothing; write name=value, such as temperature=0.7"),
        ("/params stream=false", "stream can't be set here: the chat itself decides it"),
        ("/retry", "there is no question to ask again"),
        ("/save", "/save needs a file's name"),
        ("/save no/such/folder", "no/such/folder: can't be written: No such file or directory"),
        ("/load nothing.json", "nothing.json: can't be read: No such file or directory"),
    ],
)
def test_a_command_that_can_not_be_done_is_told_and_the_chat_goes_on(talk, server, line, says):
    outcome = talk(line, "x")
    assert (outcome.code, outcome.out, outcome.err) == (2, "X\n", f"error: {says}\n")


@pytest.mark.parametrize("content", ["", "[]", '{"system":"","params":{},"messages":[{"role":"user","content":"a"}]}',
                                     '{"system":"","params":{"model":"x"},"messages":[]}'])  # fmt: skip
def test_only_saved_conversations_are_loaded(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    conversation = Conversation(
        model="m", turns=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    with pytest.raises(ConfigError, match="not a conversation that /save wrote"):
        conversation.load(tmp_path / "x.json")
    assert len(conversation.turns) == 2


def test_help_names_every_command(talk, server):
    shown = talk("/help").err
    for name in ("clear", "system", "params", "model", "retry", "save", "load", "exit"):
        assert f"\n/{name}" in shown


def test_answers_come_whole_however_the_network_cuts_them(talk, server):
    server.answer = always(said("snow\N{SNOWMAN}", "man\n", "é\N{GRINNING FACE}", newline="\r\n", cut_every=1))
    assert talk("x").out == "snow\N{SNOWMAN}man\né\N{GRINNING FACE}\n"


def test_model_and_server_text_never_steer_the_terminal(talk, server):
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\x08\r\ud800"
    answers = [
        said("a" + evil, evil + "b", ascii=True),
        Answer(status=400, body=json.dumps({"error": {"message": evil}}).encode()),
        Answer([delta("x"), {"error": {"message": evil}}], ascii=True),
        Answer([delta("y"), delta(finish=evil)], ascii=True),
        Answer([evil]),
    ]  # fmt: skip
    server.answer = in_turn(answers)
    server.models = Answer(body=json.dumps({"data": [{"id": evil}]}).encode())
    outcome = talk("1", "2", "3", "4", "5", "/model", options=["--stats"])
    assert re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", outcome.out + outcome.err) == []
    shown = "?]0;title??[2J?31m??".replace("?", "\N{REPLACEMENT CHARACTER}")
    assert outcome.out == f"a{shown}{shown}b\nx\ny\n"


def test_stats_are_the_servers_count_and_this_sides_clock(talk, server):
    answers = [said("a", "b", "c", delay_s=0.02), Answer([delta("a"), delta("b", "length")]), Answer([delta()])]
    server.answer = in_turn(answers)
    first, second, third = talk("1", "2", "3", options=["--stats"]).err.splitlines()
    assert re.fullmatch(r"\[3 tokens, first after 0\.\d\d s, \d+\.\d tokens/s\]", first)
    assert re.match(r"\[2 pieces, first after .*, cut at the token limit\]", second)
    assert third == "[the answer is empty]"


def test_the_line_of_an_answer_says_what_is_known():
    reply = Reply(text="x", asked_s=1.0, first_s=1.5, last_s=3.5, num_pieces=4, finish_reason="stop")
    assert reply.describe() == "4 pieces, first after 0.50 s, 1.5 pieces/s"
    reply.usage = Usage(num_prompt=20, num_output=11, num_cached=16)
    assert reply.describe() == "11 tokens, first after 0.50 s, 5.0 tokens/s, 16 of 20 prompt tokens from the cache"
    reply.interrupted = True
    assert reply.describe().endswith(", stopped")
    assert Reply(interrupted=True).describe() == "stopped before the first token"


def test_a_server_that_knows_no_stream_options_is_asked_without(talk, server):
    def strict(path, body):
        if "stream_options" in body:
            return Answer(status=400, body=b'{"error": {"message": "unknown field: stream_options"}}')
        return echo(path, body)

    server.answer = strict
    assert talk("a", "b").out == "A\nB\n"
    assert ["stream_options" in body for body in server.bodies] == [True, False, False]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer([delta("a")], done=False), "the server broke off before the answer's end"),
        (Answer([delta("a")], lose=True, done=False), "the connection broke: peer closed connection"),
        (Answer(body=b"{}", headers={"Content-Type": "application/json"}), "answered with application/json instead of"),
        (Answer(status=401, body=b'{"error": {"message": "no key"}}'), "the server refused (401): no key; give"),
        (Answer(status=429, body=b"slow", headers={"Retry-After": "3"}), "refused (429): slow; try again in 3 s"),
        (Answer(status=307, body=b"", headers={"Location": "http://x/"}), "the server refused (307): no reason given"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_sentence_and_exit_code_3(talk, server, answer, says):
    server.answer = always(answer)
    outcome = talk("x", options=["--once"])
    assert outcome.code == 3
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert says in outcome.err


def test_an_answer_without_an_end_mark_but_with_a_reason_is_whole(talk, server):
    server.answer = always(Answer([delta("a"), delta(finish="stop"), usage(1, 1)], done=False))
    assert talk("x").out == "a\n"


def test_a_silent_server_is_given_up(talk, server):
    server.answer = always(Answer([delta("a"), delta("b")], delay_s=5.0))
    outcome = talk("x", options=["--timeout", "0.3"])
    assert outcome.code == 3
    assert "the server sent nothing for 0 s" in outcome.err


def test_no_server_is_told_before_anything_is_asked(run_cli, free_port):
    outcome = run_cli("chat", "--url", f"http://127.0.0.1:{free_port}", "hello")
    assert outcome.code == 3
    assert "is a server running there? (shardwright serve)" in outcome.err


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (Answer(body=b'{"data": []}'), "does not say which models it has; name one with --model"),
        (Answer(body=b'{"data": 3}'), "does not say which models it has; name one with --model"),
        (Answer(body=b"<html>"), "is no JSON; is this an OpenAI-compatible server?"),
        (Answer(status=404, body=b"{}"), "the server refused (404): no reason given; is http://"),
    ],
)
def test_a_server_without_a_list_of_models_needs_the_models_name(talk, server, models, says):
    server.models = models
    outcome = talk("x")
    assert outcome.code == 3
    assert says in outcome.err
    assert talk("x", options=["--model", "m"]).out == "X\n"


# --- in a terminal ---------------------------------------------------------------------------------


def typed(keys):
    """What the line editor gives for these key presses."""
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        session = make_session(input=pipe, output=DummyOutput())
        return asyncio.run(session.prompt_async("> "))


def test_enter_sends_and_a_backslash_or_alt_enter_begins_a_new_line():
    assert typed("hello\r") == "hello"
    assert typed("one\\\rtwo\r") == "one\ntwo"
    assert typed("one\x1b\rtwo\r") == "one\ntwo"
    assert typed("\x1b[200~pasted\nlines\x1b[201~\r") == "pasted\nlines"


def take_terminal():
    """Make standard input the terminal that Ctrl-C comes from."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """`shardwright chat` in a terminal of its own."""

    def __init__(self, *argv, cwd):
        self.master, slave = pty.openpty()
        environ = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardwright", "chat", *argv], stdin=slave, stdout=slave, stderr=slave, cwd=cwd,
            env=environ, start_new_session=True,
            preexec_fn=take_terminal,  # noqa: PLW1509  only the child can take a terminal, and this takes no lock
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def wait_for(self, pattern):
        deadline = time.monotonic() + 30
        while not re.search(pattern, self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert re.search(pattern, self.shown), self.shown
        self.shown = self.shown[re.search(pattern, self.shown).end() :]

    def wait_for_prompt(self):
        self.wait_for(r"\x1b\[0m>.*\x1b\[\?25h")

    def type(self, keys):
        os.write(self.master, keys.encode())

    def end(self):
        return self.process.wait(30)

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(server, tmp_path):
    opened = Terminal("--url", server.url, cwd=tmp_path)
    yield opened
    opened.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, server):
    """The server sees the connection go; what had come stays in the conversation; Ctrl-D ends."""
    answers = [said("Hel", "lo", " there", hold_after=3), said("fine")]
    server.answer = in_turn(answers)
    terminal.wait_for("tiny at http.*Ctrl-D ends")
    terminal.wait_for_prompt()
    terminal.type("hi\r")
    terminal.wait_for("Hello")
    assert server.held.wait(30)
    terminal.type("\x03")
    terminal.wait_for(r"\[2 pieces, first after .*, stopped\]")
    assert server.broken.wait(30)
    terminal.wait_for_prompt()
    terminal.type("\x03")
    terminal.wait_for(r"\(Ctrl-D ends\)")
    terminal.type("more\r")
    terminal.wait_for("fine")
    terminal.wait_for(r"\[1 token, first after")
    terminal.wait_for_prompt()
    terminal.type("\x04")
    assert terminal.end() == 0
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["hi", "Hello", "more"]


def test_ctrl_c_before_the_first_token_leaves_nothing_in_the_conversation(terminal, server):
    answers = [said("never", hold_after=0), said("fine")]
    server.answer = in_turn(answers)
    terminal.wait_for_prompt()
    terminal.type("one\r")
    assert server.held.wait(30)
    time.sleep(0.1)
    terminal.type("\x03")
    terminal.wait_for(r"\[stopped before the first token\]")
    assert server.broken.wait(30)
    terminal.type("/retry\r")
    terminal.wait_for("fine")
    terminal.wait_for_prompt()
    terminal.type("/exit\r")
    assert terminal.end() == 0
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["one"]


def test_thinking_is_shown_apart_and_not_remembered(terminal, server):
    answers = [Answer([delta(reasoning_content="hm\x1b"), delta("yes"), delta(finish="stop")]), said("ok")]
    server.answer = in_turn(answers)
    terminal.wait_for_prompt()
    terminal.type("q\r")
    terminal.wait_for("\x1b\\[2mhm\N{REPLACEMENT CHARACTER}\x1b\\[0m\r\n\r\nyes")
    terminal.wait_for_prompt()
    terminal.type("r\r")
    terminal.wait_for("ok")
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["q", "yes", "r"]


def test_without_a_terminal_ctrl_c_ends_the_program(server, tmp_path):
    server.answer = always(said("Hel", "lo", hold_after=2))
    process = subprocess.Popen(
        [sys.executable, "-m", "shardwright", "chat", "--url", server.url, "--once", "hi"], cwd=tmp_path,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert server.held.wait(60)
        assert process.stdout.read(3) == "Hel"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert (out, err) == ("\n", "interrupted\n")
    assert server.broken.wait(30)


def test_closing_the_stream_ends_the_request(server):
    server.answer = always(said("a", "b", hold_after=2))
    with ChatServer(server.url, api_key=None, timeout_s=30.0) as client:
        stream = client.stream({"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True})
        assert [next(stream).text, next(stream).text] == ["", "a"]
        stream.close()
        assert server.broken.wait(30)
