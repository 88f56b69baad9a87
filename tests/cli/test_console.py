"""Errors become one sentence and an exit code; nothing else about the command line's end surprises a shell."""

import asyncio
import signal
import subprocess
import sys
import time

import pytest

from shardwright.cli import aio
from shardwright.cli.console import CliState, guarded
from shardwright.errors import ClusterError, MismatchError, PlacementError, ProtocolError, ShardwrightError


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ShardwrightError("x"), 1),
        (PlacementError("x"), 2),
        (ClusterError("x"), 3),
        (ProtocolError("x"), 4),
        (MismatchError("x"), 5),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error, code, capsys):
    assert guarded(raising(error), CliState()) == code
    assert capsys.readouterr().err == "error: x\n"


def test_an_error_is_one_line_even_if_its_message_is_not(capsys):
    guarded(raising(ClusterError("first\n  second")), CliState())
    assert capsys.readouterr().err == "error: first second\n"


def test_debug_shows_the_traceback_before_the_sentence(capsys):
    guarded(raising(ClusterError("gone")), CliState(debug=True))
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("error: gone\n")


def test_what_a_task_group_wraps_is_unwrapped(capsys):
    group = ExceptionGroup("tasks", [ExceptionGroup("inner", [ClusterError("gone")])])
    assert guarded(raising(group), CliState()) == 3
    assert capsys.readouterr().err == "error: gone\n"


def test_a_bug_in_a_task_group_is_not_hidden_behind_an_error_of_ours():
    with pytest.raises(ExceptionGroup):
        guarded(raising(ExceptionGroup("tasks", [ClusterError("gone"), KeyError("bug")])), CliState())


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        guarded(raising(KeyError("bug")), CliState())


def test_ctrl_c_ends_with_130_and_a_word(capsys):
    assert guarded(raising(KeyboardInterrupt()), CliState()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_in_a_command_ends_like_ctrl_c_anywhere(run_cli, monkeypatch):
    async def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("shardwright.cli.plan._plan", interrupted)
    outcome = run_cli("plan", "--model", "x")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")


def test_a_reader_that_goes_away_ends_the_command_quietly():
    """As with `shardwright generate ... | head -1`."""
    code = (
        "import sys\n"
        "from shardwright.cli.console import CliState, guarded\n"
        "def run():\n"
        "    while True: print('line')\n"
        "sys.exit(guarded(run, CliState()))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


PROGRAM = """
import asyncio, sys
from shardwright.cli import aio
from shardwright.cli.console import CliState, guarded

async def serve():
    try:
        print("up", flush=True)
        await asyncio.sleep(60)
    finally:
        print("closed", flush=True)

def run():
    aio.run(FORM)
    return 0

try:
    code = guarded(run, CliState())
except SystemExit as exc:
    code = exc.code
sys.exit(code)
"""


@pytest.fixture
def start():
    processes = []

    def start_program(form):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.replace("FORM", form)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout.readline() == "up\n"
        return process

    yield start_program
    for process in processes:
        process.kill()
        process.communicate()


def test_commands_run_on_uvloop():
    async def kind():
        return type(asyncio.get_running_loop()).__module__

    assert aio.run(kind()) == "uvloop"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_what_is_open(start, number, code):
    process = start("serve()")
    process.send_signal(number)
    assert process.stdout.readline() == "closed\n"
    assert process.wait(timeout=30) == code


def test_a_worker_that_a_process_started_ends_when_its_input_closes(start):
    process = start("aio.until_stdin_closes(serve())")
    time.sleep(0.2)
    assert process.poll() is None
    process.stdin.close()
    assert process.stdout.readline() == "closed\n"
    assert process.wait(timeout=30) == 0
    process.stdin = None


def test_a_worker_that_fails_while_its_input_is_open_fails_as_usual():
    code = PROGRAM.replace("await asyncio.sleep(60)", "raise RuntimeError('bug')").replace(
        "FORM", "aio.until_stdin_closes(serve())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read() == "up\nclosed\n"
    assert process.wait(timeout=30) == 1
    assert "RuntimeError: bug" in process.stderr.read()
    process.communicate()
