"""Reads tool calls out of a model's text, as it comes. Pure; one parser for each choice of an answer.

A call's markers never come out as content, and a call comes out in order: its name first, then its arguments in
pieces. What turns out to be no call of a tool that exists is given as content, as it was written. Only what a stream
has given already can't be taken back: a call whose arguments break off or go wrong in the middle stays a call with
these arguments, as OpenAI warns. A parser that is not `streaming` waits for a call's end and gives such a one as
content too.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from shardwright.api.tools import ToolStyle

MAX_HEAD_CHARS = 1024
"""A JSON object whose beginning names no tool within so many characters is no call."""


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; `index` counts the answer's calls from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which are JSON."""

    index: int
    text: str


Piece: TypeAlias = Content | CallStart | CallArguments


class _State(enum.Enum):
    START = enum.auto()  # nothing but space came yet
    TEXT = enum.auto()
    CALL = enum.auto()  # inside a call, before its arguments
    ARGUMENTS = enum.auto()
    END = enum.auto()  # behind the arguments
    PLAIN = enum.auto()  # no call can come any more


class ToolParser:
    """The parser of one choice."""

    def __init__(self, style: ToolStyle, names: Iterable[str], *, streaming: bool, several: bool = True) -> None:
        self._style = style
        self._names = frozenset(names)
        self._streaming = streaming
        self._several = several
        self._state = _State.START
        self._buffer = ""
        self._space = ""  # held back: it is dropped when a call follows
        self._scan = _JsonScan()
        self._num_scanned = 0  # characters of the buffer that the scan has seen
        self._may_have_head = True  # of the call that is being read
        self._closing_from = 0  # before here no closing marker can begin
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """Take more text; gives what it makes certain."""
        self._buffer += text
        return self._run(at_end=False)

    def finish(self) -> list[Piece]:
        """The text is over; gives the rest."""
        return self._run(at_end=True)

    def _run(self, *, at_end: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._advance(pieces, at_end=at_end):
            pass
        return pieces

    def _advance(self, pieces: list[Piece], *, at_end: bool) -> bool:
        """One transition; whether another may follow."""
        match self._state:
            case _State.PLAIN:
                self._give(pieces, self._buffer)
                self._buffer = ""
                return False
            case _State.START | _State.TEXT:
                return self._bare(at_end=at_end) if self._style.is_bare else self._text(pieces, at_end=at_end)
            case _State.CALL:
                return self._call(pieces, at_end=at_end)
            case _State.ARGUMENTS:
                return self._arguments(pieces)
            case _State.END:
                return self._end(at_end=at_end)

    def _give(self, pieces: list[Piece], text: str) -> None:
        if text:
            pieces.append(Content(text))

    # --- text before and between calls ---

    def _text(self, pieces: list[Piece], *, at_end: bool) -> bool:
        opening = self._style.opening
        found = self._buffer.find(opening)
        if found >= 0:
            self._content(pieces, self._buffer[:found])
            self._space = ""
            self._buffer = self._buffer[found + len(opening) :]
            self._begin_call()
            return True
        keep = 0 if at_end else _overlap(self._buffer, opening)
        self._content(pieces, self._buffer[: len(self._buffer) - keep])
        self._buffer = self._buffer[len(self._buffer) - keep :]
        if at_end and not self.num_calls:
            self._give(pieces, self._space)
            self._space = ""
        return False

    def _content(self, pieces: list[Piece], text: str) -> None:
        """Text is given without the space at its end, which comes with what follows unless that is a call."""
        text = self._space + text
        if self._state is _State.START and self.num_calls:
            text = text.lstrip()
        stripped = text.rstrip()
        self._space = text[len(stripped) :]
        if stripped:
            self._state = _State.TEXT
            self._give(pieces, stripped)

    # --- calls without markers ---

    def _bare(self, *, at_end: bool) -> bool:
        match = _BARE_PREFIX.match(self._buffer)
        assert match is not None, "the pattern matches the empty text"
        rest = self._buffer[match.end() :]
        if rest.startswith("{"):
            self._space = self._buffer[: match.end()]
            self._buffer = rest
            self._begin_call()
            return True
        if not at_end and _may_become_prefix(self._buffer):
            return False
        if self.num_calls and not rest:  # space, a fence's end or a separator behind the last call
            self._buffer = ""
            return False
        self._buffer = rest if self.num_calls else self._buffer.replace(_PYTHON_TAG, "", 1)
        self._state = _State.PLAIN
        return True

    # --- inside a call ---

    def _begin_call(self) -> None:
        self._scan = _JsonScan()
        self._num_scanned = self._closing_from = 0
        self._may_have_head = self._streaming and bool(self._style.arguments_key)
        self._state = _State.CALL

    def _call(self, pieces: list[Piece], *, at_end: bool) -> bool:
        if self._may_have_head and self._head(pieces):
            return True
        if self._style.is_bare:
            return self._bare_call(pieces, at_end=at_end)
        closing = self._style.closing
        found = self._find_closing()
        if found < 0 and not at_end:
            return False
        body, behind = (self._buffer, "") if found < 0 else (self._buffer[:found], self._buffer[found + len(closing) :])
        call = self._read(body)
        if call is None:
            self._give(pieces, self._space + self._style.opening + body + (closing if found >= 0 else ""))
            self._space = ""
            self._state = _State.TEXT
        else:
            self._whole(pieces, *call)
            self._state = _State.START if self._several else _State.END
        self._buffer = behind
        return bool(behind) or at_end

    def _find_closing(self) -> int:
        """Where the marker of the call's end begins, outside text; -1: not there yet."""
        closing, mark = self._style.closing, self._style.text_mark
        if self._style.arguments_key:
            # The marker may stand in a string of the arguments, and is none there.
            while (found := self._buffer.find(closing, self._closing_from)) >= 0:
                self._scan.feed(self._buffer[self._num_scanned : found])
                self._num_scanned = found
                if not self._scan.in_string:
                    return found
                self._closing_from = found + 1
            self._closing_from = max(self._closing_from, len(self._buffer) - len(closing) + 1)
            return -1
        while True:
            found = self._buffer.find(closing, self._closing_from)
            begin = self._buffer.find(mark, self._closing_from)
            if begin < 0 or 0 <= found < begin:
                return found
            end = self._buffer.find(mark, begin + len(mark))
            if end < 0:
                return -1
            self._closing_from = end + len(mark)

    def _head(self, pieces: list[Piece]) -> bool:
        """Whether the call's name is there and its arguments begin; then it is given and they follow."""
        head = match_head(self._buffer[: MAX_HEAD_CHARS + 1])
        if not isinstance(head, Head) or head.name not in self._names:
            self._may_have_head = head is NEED_MORE and len(self._buffer) <= MAX_HEAD_CHARS
            return False
        pieces.append(CallStart(self.num_calls, head.name))
        self.num_calls += 1
        self._space = ""
        self._buffer = self._buffer[head.length :]
        self._scan = _JsonScan()
        self._state = _State.ARGUMENTS
        return True

    def _bare_call(self, pieces: list[Piece], *, at_end: bool) -> bool:
        if not at_end:
            if not self._streaming or self._may_have_head:
                return False
            if self._may_be_unusual() and self._find_end() is None:
                return False
        end = self._find_end()
        call = None if end is None else self._read(self._buffer[:end])
        if call is None or end is None:
            self._buffer = self._buffer if self.num_calls else self._space.replace(_PYTHON_TAG, "") + self._buffer
            self._state = _State.PLAIN
            return True
        self._whole(pieces, *call)
        self._buffer = self._buffer[end:]
        self._state = _State.START if self._several else _State.END
        return True

    def _may_be_unusual(self) -> bool:
        """Whether it may be a call with the arguments before the name, or in a string: such a one is read whole."""
        beginning = self._buffer[:MAX_HEAD_CHARS]
        for parts in _UNUSUAL:
            found = _match_parts(beginning, parts)
            if found is NEED_MORE or (isinstance(found, Head) and found.name in self._names | {""}):
                return True
        return False

    def _find_end(self) -> int | None:
        """Behind the object at the buffer's beginning; None: not there yet. What was scanned is not scanned again."""
        if not self._scan.is_done:
            self._num_scanned += self._scan.feed(self._buffer[self._num_scanned :])
        return self._num_scanned if self._scan.is_done else None

    def _whole(self, pieces: list[Piece], name: str, arguments: str) -> None:
        pieces.extend((CallStart(self.num_calls, name), CallArguments(self.num_calls, arguments)))
        self.num_calls += 1
        self._space = ""

    def _read(self, body: str) -> tuple[str, str] | None:
        """The name and the arguments of a whole call; None when it is none."""
        if not self._style.arguments_key:
            return self._read_marked(body)
        call = _load(body)
        if not isinstance(call, dict):
            return None
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):  # some models write them as JSON in a string
            arguments = _load(arguments)
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return name, _dump(arguments)

    def _read_marked(self, body: str) -> tuple[str, str] | None:
        match = _MARKED_HEAD.match(body)
        if match is None or match[1] not in self._names:
            return None
        try:
            reader = _MarkedReader(body, match.end() - 1, self._style.text_mark)
            value = reader.value()
        except ValueError:
            return None
        return (match[1], _dump(value)) if not body[reader.position :].strip() else None

    # --- the arguments of a streamed call ---

    def _arguments(self, pieces: list[Piece]) -> bool:
        length = self._scan.feed(self._buffer)
        if length:
            pieces.append(CallArguments(self.num_calls - 1, self._buffer[:length]))
            self._buffer = self._buffer[length:]
        if self._scan.is_done:
            self._state = _State.END
            return True
        return False

    def _end(self, *, at_end: bool) -> bool:
        if not self._several:  # further calls were not wanted
            self._buffer = ""
            return False
        if self._style.is_bare:
            rest = self._buffer.lstrip()
            if not rest:
                self._buffer = ""
                return False
            self._buffer = rest.removeprefix("}")
            self._state = _State.START
            return True
        found = self._buffer.find(self._style.closing)
        if found < 0:
            self._buffer = "" if at_end else self._buffer
            return False
        self._buffer = self._buffer[found + len(self._style.closing) :]
        self._state = _State.START
        return True


def parse_answer(
    style: ToolStyle, names: Iterable[str], text: str, *, several: bool
) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls, with their arguments, of a whole answer."""
    parser = ToolParser(style, names, streaming=False, several=several)
    content, calls = "", list[tuple[str, str]]()
    for piece in [*parser.feed(text), *parser.finish()]:
        match piece:
            case Content():
                content += piece.text
            case CallStart():
                calls.append((piece.name, ""))
            case CallArguments():
                calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return content, calls


# --- pieces of text ----------------------------------------------------------------------------------

_PYTHON_TAG = "<|python_tag|>"
_FENCES = ("```json", "```tool_code", "```tool_call", "```")
_BARE_PREFIX = re.compile(r"(?:[\s;,]|<\|python_tag\|>|```(?:json|tool_code|tool_call)?)*")


def _may_become_prefix(text: str) -> bool:
    match = _BARE_PREFIX.match(text)
    assert match is not None
    rest = text[match.end() :]
    if not rest:
        return True
    last = text.rfind("```")
    tail = text[last:] if 0 <= last < match.end() and match.end() - last <= 3 else rest
    return any(word.startswith(tail) for word in (_PYTHON_TAG, *_FENCES))


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` may be the beginning of `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[len(text) - length :]):
            return length
    return 0


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _load(text: str) -> Any:
    """The value of a JSON text; None for what is none, or can't be passed on as JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# --- JSON in pieces ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a call that is JSON, up to its arguments."""

    name: str
    length: int


class _NeedMore(enum.Enum):
    TOKEN = enum.auto()


NEED_MORE = _NeedMore.TOKEN
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"')
_HEADS = tuple(
    ("{", *kind, '"name"', ":", None, ",", key, ":", "{")
    for kind in ((), ('"type"', ":", '"function"', ","))
    for key in ('"arguments"', '"parameters"')
)
_UNUSUAL: tuple[tuple[str | None, ...], ...] = tuple(
    parts
    for key in ('"arguments"', '"parameters"')
    for parts in (("{", key, ":"), ("{", '"name"', ":", None, ",", key, ":", '"'))
)


def match_head(text: str) -> Head | _NeedMore | None:
    """The head at the beginning of `text`; `NEED_MORE` while it may become one, None when it can't."""
    is_open = False
    for parts in _HEADS:
        found = _match_parts(text, parts)
        if isinstance(found, Head):
            return found
        is_open = is_open or found is NEED_MORE
    return NEED_MORE if is_open else None


def _match_parts(text: str, parts: tuple[str | None, ...]) -> Head | _NeedMore | None:
    position, name = 0, ""
    for part in parts:
        space = _SPACE.match(text, position)
        assert space is not None, "the pattern matches the empty text"
        position = space.end()
        if position == len(text):
            return NEED_MORE
        if part is None:
            string = _STRING.match(text, position)
            if string is None:
                return NEED_MORE if text[position] == '"' else None
            try:
                name = json.loads(string[0])
            except ValueError:
                return None
            position = string.end()
        elif text.startswith(part, position):
            position += len(part)
        elif part.startswith(text[position:]):
            return NEED_MORE
        else:
            return None
    return Head(name, position - 1)  # the arguments' brace belongs to them


class _JsonScan:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.is_done = False

    def feed(self, text: str) -> int:
        """Take more text; how many of its characters belong to the object."""
        for position, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_done = True
                    return position + 1
        return len(text)

    @property
    def in_string(self) -> bool:
        """Whether the text so far ends inside a string."""
        return self._in_string


# --- call:name{key:value} ----------------------------------------------------------------------------

_MARKED_HEAD = re.compile(r"\s*call:([^{\s]+)\{")
_MARKED_KEY = re.compile(r"\s*([^:{}\[\],]+?)\s*:")
_MARKED_BARE = re.compile(r"[^,}\]]*")
MAX_MARKED_DEPTH = 64


class _MarkedReader:
    """Reads one value; raises `ValueError` for what is none."""

    def __init__(self, text: str, position: int, mark: str) -> None:
        self._text = text
        self._mark = mark
        self._depth = 0
        self.position = position

    def value(self) -> Any:
        """The value that begins here."""
        self._skip()
        if self._text.startswith(self._mark, self.position):
            return self._marked_text(self._mark)
        if self._text.startswith("{", self.position):
            return self._nested(self._object)
        if self._text.startswith("[", self.position):
            return self._nested(self._array)
        match = _MARKED_BARE.match(self._text, self.position)
        assert match is not None, "the pattern matches the empty text"
        self.position = match.end()
        word = match[0].strip()
        if not word:
            raise ValueError("no value")
        try:
            return json.loads(word, parse_constant=_refuse)
        except ValueError:
            return word  # text without its marks

    def _nested(self, read: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_MARKED_DEPTH:
            raise ValueError("nested too deep")
        self.position += 1
        value = read()
        self._depth -= 1
        return value

    def _skip(self) -> None:
        while self.position < len(self._text) and self._text[self.position].isspace():
            self.position += 1

    def _marked_text(self, mark: str) -> str:
        begin = self.position + len(mark)
        end = self._text.index(mark, begin)
        self.position = end + len(mark)
        return self._text[begin:end]

    def _next(self, closing: str) -> bool:
        """Whether another item follows; steps over what parts them or ends them."""
        self._skip()
        char = self._text[self.position : self.position + 1]
        if char not in {",", closing}:
            raise ValueError(f"neither , nor {closing}")
        self.position += 1
        return char == ","

    def _object(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._skip()
        if self._text.startswith("}", self.position):
            self.position += 1
            return found
        while True:
            self._skip()
            if self._text.startswith(self._mark, self.position):
                key = self._marked_text(self._mark)
                self._skip()
                if not self._text.startswith(":", self.position):
                    raise ValueError("no : behind a key")
                self.position += 1
            else:
                match = _MARKED_KEY.match(self._text, self.position)
                if match is None:
                    raise ValueError("no key")
                key, self.position = match[1], match.end()
            found[key] = self.value()
            if not self._next("}"):
                return found

    def _array(self) -> list[Any]:
        found: list[Any] = []
        self._skip()
        if self._text.startswith("]", self.position):
            self.position += 1
            return found
        while True:
            found.append(self.value())
            if not self._next("]"):
                return found
