"""Where prompts come from: the command line, a file, standard input, or token ids; read before anything starts."""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from shardwright.errors import ConfigError, InvalidRequestError
from shardwright.types import TokenId


class Split(enum.Enum):
    """What separates the prompts of a file or of standard input."""

    LINE = "line"  # each line that is not blank
    BLANK = "blank"  # blank lines; a prompt may have several lines
    NONE = "none"  # nothing: all of it is one prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: text, or token ids that need no tokenizer."""

    text: str = ""
    token_ids: tuple[TokenId, ...] | None = None

    @property
    def title(self) -> str:
        """The prompt in a few words, for a heading."""
        text = " ".join(self.text.split()) if self.token_ids is None else ",".join(map(str, self.token_ids))
        return text if len(text) <= 60 else text[:57] + "..."


def read_prompts(
    *, argument: str | None, file: Path | None, ids: Sequence[str], split: Split, stdin: TextIO | None = None
) -> list[Prompt]:
    """All prompts of the one source that was named; standard input if it is not a terminal and no other was.

    Raises `ConfigError` for none or several sources and `InvalidRequestError` for an empty or malformed prompt.
    """
    stdin = stdin or sys.stdin
    named = [
        name
        for name, given in (("a prompt", argument is not None), ("--file", file is not None), ("--prompt-ids", ids))
        if given
    ]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} were given; prompts come from one of them at a time")
    if ids:
        return [Prompt(token_ids=parse_ids(text)) for text in ids]
    if file is not None:
        return _split(_read_file(file), split, str(file))
    if argument is not None and argument != "-":
        if not argument.strip():
            raise InvalidRequestError("the prompt is empty; give it some text")
        return [Prompt(text=argument)]
    if argument is None and stdin.isatty():
        raise ConfigError('no prompt was given; write it after the command, as in: shardwright generate "Hello"')
    try:
        text = stdin.read()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"standard input is not text in {exc.encoding}") from exc
    return _split(text, split, "standard input")


def parse_ids(text: str) -> tuple[TokenId, ...]:
    """Token ids from `5,17,3`. Raises `InvalidRequestError` naming the part that is none."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise InvalidRequestError(f"--prompt-ids {text!r}: {part!r} is not a token id; write them as in 5,17,3")
    return tuple(int(part) for part in parts)


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{file}: not text in UTF-8") from exc
    except OSError as exc:
        raise ConfigError(f"{file}: can't be read: {exc.strerror}") from exc


def _split(text: str, split: Split, source: str) -> list[Prompt]:
    if split is Split.LINE:
        parts = text.splitlines()
    elif split is Split.BLANK:
        parts = _paragraphs(text)
    else:
        parts = [text]
    prompts = [Prompt(text=part.strip()) for part in parts if part.strip()]
    if not prompts:
        raise InvalidRequestError(f"{source} holds no prompt")
    return prompts


def _paragraphs(text: str) -> list[str]:
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs]
