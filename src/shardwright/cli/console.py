"""How the command line speaks: answers on standard output, everything else on standard error, errors in a sentence."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import typer
from rich.console import Console

from shardwright.errors import ShardwrightError

INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended
BROKEN_PIPE = 141  # the same for one whose reader went away

# All but tab and newline: C0 with escape, C1 with its one-byte control sequences, and halves of characters.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(slots=True, kw_only=True)
class CliState:
    """What `--debug` on any command tells `main`."""

    debug: bool = False


def stderr_console() -> Console:
    """For progress, tables and warnings: nothing there is ever part of an answer."""
    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """For what a command was asked to show."""
    return Console(highlight=False)


def say(message: str) -> None:
    """Print a line on standard error, markup and wrapping off."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a warning: the command goes on."""
    say(f"warning: {message}")


def harmless(text: str) -> str:
    """Text of a model or a server as it may be shown in a terminal: it can't steer it, only fill it."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def one_sentence(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def run_app(app: typer.Typer, argv: Sequence[str] | None, *, prog_name: str) -> int:
    """Run a typer application on `argv` (None: the process's own); gives the exit code."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    state = CliState()

    def run() -> int:
        try:
            app(args=argv, prog_name=prog_name, obj=state)
        except SystemExit as exc:
            if exc.code == INTERRUPTED:  # typer's answer to Ctrl-C
                raise KeyboardInterrupt from exc
            return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        return 0

    return guarded(run, state)


def guarded(run: Callable[[], int], state: CliState) -> int:
    """Run a command and turn what it raises into an exit code.

    A `ShardwrightError` becomes one sentence and its class's exit code; Ctrl-C ends quietly with 130; a reader
    that went away (`| head`) ends quietly with 141. Anything else is a bug here and keeps its traceback.
    """
    try:
        code = run()
        sys.stdout.flush()
    except ShardwrightError as exc:
        if state.debug:
            traceback.print_exception(exc)
        say(f"error: {one_sentence(exc)}")
        return exc.exit_code
    except KeyboardInterrupt:
        if state.debug:
            traceback.print_exc()
        say("\ninterrupted" if sys.stderr.isatty() else "interrupted")  # the terminal's ^C ends no line
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return BROKEN_PIPE
    except ExceptionGroup as exc:
        return _answer_group(exc, state)
    return code


def leave(code: int) -> NoReturn:
    """End the process now.

    Everything was closed by then. What the interpreter would still do is wait for threads that can't be stopped
    (one that builds a model, say) and take modules like torch apart, which takes up to a second for each process.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _answer_group(group: ExceptionGroup[Exception], state: CliState) -> int:
    """Task groups wrap what their tasks raised; when all of it is ours, the first is what the user needs to read."""
    errors = list(_leaves(group))
    if any(isinstance(error, BrokenPipeError) for error in errors):
        _silence_stdout()
        return BROKEN_PIPE
    if not all(isinstance(error, ShardwrightError) for error in errors):
        raise group
    first = errors[0]
    assert isinstance(first, ShardwrightError)
    if state.debug:
        traceback.print_exception(group)
    say(f"error: {one_sentence(first)}")
    return first.exit_code


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves


def _silence_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's exit does not fail on the closed pipe again."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
