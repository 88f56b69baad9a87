"""The command `chat`: a conversation in the terminal with any OpenAI-compatible server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwright.cli import options
from shardwright.cli.console import harmless, one_sentence, say
from shardwright.errors import ConfigError, HttpServerError, ShardwrightError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

    from shardwright.cli.conversation import ChatServer, Conversation, Reply
    from shardwright.cli.openai_http import Chunk

HELP = """\
Enter sends; Alt+Enter, or a backslash at the line's end, begins a new line. Ctrl-C stops an answer, Ctrl-D ends.
/help                 this
/clear                forget what was said; the system message and the parameters stay
/system [TEXT]        show or set the system message; /system - removes it
/params [NAME=VALUE]  show or set what is sent with each request, such as temperature=0.7; NAME= removes it
/model [NAME]         show or choose the model
/retry                ask the last question again
/save FILE            write the conversation to a file, as JSON
/load FILE            go on with one that was saved
/exit                 end
//TEXT                send /TEXT as a message
"""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def add_commands(app: typer.Typer) -> None:
    """Put this module's command under the application."""
    app.command("chat")(chat)


def chat(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="The first question.")] = None,
    url: options.Url = options.DEFAULT_URL,
    model: options.ServedModel = None,
    api_key: options.ApiKey = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="The system message.")] = "",
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            "-p",
            metavar="NAME=VALUE",
            help="Sent with each request: temperature=0.7, seed=1, ... Repeatable.",
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="One question (the argument, or all of standard input), one answer, the end.")
    ] = False,
    stats: Annotated[
        bool | None,
        typer.Option(
            "--stats/--no-stats",
            help="Tokens, time to the first token and tokens/s after each answer. Default: in a terminal.",
            show_default=False,
        ),
    ] = None,
    timeout: options.RequestTimeout = 600.0,
    debug: options.Debug = False,
) -> None:
    """Talk with a model behind any OpenAI-compatible server.

    In a terminal, Enter sends, Alt+Enter begins a new line, Ctrl-C stops an answer and Ctrl-D ends; /help lists what
    else there is. Without one, each line of standard input is a question (a backslash at its end continues it on the
    next) and the answers go to standard output.

    [cyan]shardwright chat[/cyan]

    [cyan]shardwright chat --once "Why is the sky blue?"[/cyan]

    [cyan]shardwright chat --url http://192.168.1.10:8000/v1 -p temperature=0.7[/cyan]
    """
    from shardwright.cli.conversation import ChatServer, Conversation

    talk = Conversation(model=model or "", system=system)
    for assignment in param or ():
        talk.set_param(assignment)
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with ChatServer(url, api_key=api_key, timeout_s=timeout) as server:
        talk.model = talk.model or server.first_model()
        show = Show(stats=stats if stats is not None else in_terminal, in_terminal=sys.stdout.isatty())
        chatter = Chatter(server, talk, show, interactive=in_terminal and not once)
        if once:
            raise typer.Exit(chatter.once(prompt if prompt is not None else sys.stdin.read()))
        if in_terminal:
            say(harmless(f"{talk.model} at {server.url}; /help lists the commands, Ctrl-D ends"))
            chatter.in_terminal(prompt, _reader(make_session()))
            return
        raise typer.Exit(chatter.from_lines(prompt, sys.stdin))


@dataclass(slots=True, kw_only=True)
class Show:
    """Where and how answers are shown."""

    stats: bool
    in_terminal: bool
    thinking: bool = field(default=False, init=False)  # whether the last that was shown was the model's thinking
    line_is_open: bool = field(default=False, init=False)

    def chunk(self, chunk: Chunk) -> None:
        """Print what came; a model's thinking only for people, and set apart."""
        if chunk.reasoning and self.in_terminal:
            self._set_thinking(True)
            self._write(harmless(chunk.reasoning))
        if chunk.text:
            self._set_thinking(False)
            self._write(harmless(chunk.text))

    def end(self, reply: Reply | None) -> None:
        """End the answer's last line; None: it failed."""
        if self.thinking:
            self._write(PLAIN)
            self.thinking = False
        if self.line_is_open or (reply is not None and not reply.text):
            self._write("\n")
        if reply is not None and self.stats:
            line = harmless(reply.describe())
            say(f"{DIM}[{line}]{PLAIN}" if sys.stderr.isatty() else f"[{line}]")

    def _set_thinking(self, thinking: bool) -> None:
        if thinking != self.thinking:
            self._write(DIM if thinking else PLAIN + "\n\n")
            self.thinking = thinking

    def _write(self, text: str) -> None:
        self.line_is_open = not text.endswith("\n")  # first: Ctrl-C may come at any moment
        sys.stdout.write(text)
        sys.stdout.flush()


class Chatter:
    """Takes what the user says, line by line: commands are carried out, everything else is asked."""

    def __init__(self, server: ChatServer, talk: Conversation, show: Show, *, interactive: bool) -> None:
        """`interactive`: Ctrl-C is for the answer and not for the program."""
        self._interactive = interactive
        self._server = server
        self._talk = talk
        self._show = show
        self._saved: set[Path] = set()  # files of this conversation, which /save may write again
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: say(HELP.rstrip()),
            "clear": self._clear,
            "system": self._system,
            "params": self._params,
            "model": self._model,
            "retry": self._retry,
            "save": self._save,
            "load": self._load,
        }

    def once(self, question: str) -> int:
        """Ask one question; gives the exit code."""
        if not question.strip():
            raise ConfigError("there is no question: neither an argument nor anything on standard input")
        self._ask(question)
        return 0

    def from_lines(self, prompt: str | None, lines: Iterator[str]) -> int:
        """Take questions and commands from lines until they end; gives the first failure's exit code, or 0."""
        code = 0
        for text in _messages(prompt, lines):
            try:
                if not self.take(text):
                    break
            except ShardwrightError as exc:
                _tell_error(exc)
                code = code or exc.exit_code
        return code

    def in_terminal(self, prompt: str | None, read: Callable[[], str]) -> None:
        """Take questions and commands from a person until Ctrl-D; no error and no Ctrl-C ends it."""
        waiting = prompt
        while True:
            try:
                text = waiting if waiting is not None else read()
                waiting = None
                if not self.take(text):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                say("(Ctrl-D ends)")
            except ShardwrightError as exc:
                _tell_error(exc)

    def take(self, text: str) -> bool:
        """Do what was said; False: the end. Raises `ConfigError` or `HttpServerError`; the chat can go on."""
        text = text.strip()
        if text.startswith("/") and not text.startswith("//"):
            name, _, argument = text[1:].partition(" ")
            if name in ("exit", "quit"):
                return False
            if name not in self._commands:
                raise ConfigError(f"there is no command /{name}; /help lists them, and //{name} sends it as a message")
            self._commands[name](argument.strip())
        elif text:
            self._ask(text.removeprefix("/"))
        return True

    def _ask(self, question: str) -> None:
        try:
            reply = self._talk.ask(self._server, question, self._show.chunk)
        except HttpServerError:
            self._show.end(None)
            raise
        self._show.end(reply)
        if reply.interrupted and not self._interactive:
            raise KeyboardInterrupt

    def _clear(self, _: str) -> None:
        self._talk.clear()
        say("forgotten")

    def _system(self, text: str) -> None:
        if text:
            self._talk.system = "" if text == "-" else text
        say(harmless(f"system message: {self._talk.system or '(none)'}"))

    def _params(self, text: str) -> None:
        if text:
            self._talk.set_param(text)
        shown = ", ".join(f"{name}={value!r}" for name, value in self._talk.params.items())
        say(harmless(f"parameters: {shown or '(the server decides)'}"))

    def _model(self, name: str) -> None:
        if name:
            self._talk.model = name
        say(harmless(f"model: {self._talk.model}"))

    def _retry(self, _: str) -> None:
        question = self._talk.retry()
        if not question:
            raise ConfigError("there is no question to ask again")
        self._ask(question)

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        self._talk.save(path, overwrite=path in self._saved)
        self._saved.add(path)
        say(f"saved to {path}")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        self._talk.load(path)
        say(f"{len(self._talk.turns) // 2} questions and answers from {path}")


def make_session(*, input: Input | None = None, output: Output | None = None) -> PromptSession[str]:  # noqa: A002
    """The line editor: Enter sends unless the line ends in a backslash, Alt+Enter begins a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        multiline=True,
        key_bindings=keys,
        history=InMemoryHistory(),
        prompt_continuation="... ",
        input=input,
        output=output,
    )


def _reader(session: PromptSession[Any]) -> Callable[[], str]:
    return lambda: str(session.prompt("> "))


def _messages(prompt: str | None, lines: Iterator[str]) -> Iterator[str]:
    """The first question and then the lines, each joined with the next where it ends in a backslash."""
    if prompt is not None:
        yield prompt
    held = ""
    for line in lines:
        text = held + line.rstrip("\n")
        if text.endswith("\\"):
            held = text[:-1] + "\n"
            continue
        held = ""
        yield text
    if held:
        yield held


def _path(name: str, command: str) -> Path:
    if not name:
        raise ConfigError(f"{command} needs a file's name")
    return Path(name).expanduser()


def _tell_error(error: ShardwrightError) -> None:
    say(harmless(f"error: {one_sentence(error)}"))
