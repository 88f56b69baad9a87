"""Tokens to text while they come: whole characters only, and all together exactly what decoding them at once gives."""

from __future__ import annotations

import codecs
import enum
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from shardwright.types import TokenId

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for half a character


class Joining(enum.Enum):
    """How a decoder makes one text of tokens: what decides which part of it is final."""

    BYTES = "bytes"  # every token is bytes, and the text is theirs
    BYTE_RUNS = "byte_runs"  # tokens are text, but runs of byte tokens are one text or none
    TEXT = "text"  # tokens are text


class Decoding(Protocol):
    """What a stream needs to know of a tokenizer."""

    @property
    def joining(self) -> Joining:
        """How tokens become one text."""
        ...

    def token_text(self, token: TokenId) -> str | None:
        """The token as the vocabulary has it; None for an id that stands for no token."""
        ...

    def raw_bytes(self, token: TokenId) -> bytes:
        """The bytes of a token, where every token is bytes."""
        ...

    def raw_decode(self, tokens: Sequence[TokenId]) -> str:
        """Text of tokens, special ones too, without cleaning."""
        ...


class TokenStream:
    """Turns tokens into text piece by piece."""

    def __init__(
        self, decoding: Decoding, *, skipped: frozenset[TokenId], clean: Callable[[str], str] | None = None
    ) -> None:
        self._skipped = skipped
        self._pieces = _ByteStream(decoding) if decoding.joining is Joining.BYTES else _WindowStream(decoding)
        self._cleaner = _Cleaner(clean) if clean is not None else None

    def push(self, token: TokenId) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token in self._skipped:
            return ""
        text = self._pieces.push(token)
        return self._cleaner.push(text) if self._cleaner is not None else text

    def flush(self) -> str:
        """What is left when no more tokens come; an incomplete character is shown as the replacement character."""
        text = self._pieces.flush()
        return self._cleaner.push(text) + self._cleaner.flush() if self._cleaner is not None else text


class _ByteStream:
    """Tokens are bytes: text is what an incremental UTF-8 decoder makes of them."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: TokenId) -> str:
        return self._decoder.decode(self._decoding.raw_bytes(token))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # as `tokenizers` takes them
_LONGEST_HOLD = 4  # bytes of a character


class _WindowStream:
    """Tokens are text that depends on the tokens before: spaces at the start, suffixes of words, runs of bytes.

    Each piece is the difference between decoding a window of tokens with and without the new ones. The window begins
    with tokens whose own text is not empty, so that what a decoder does to the first token of a text happens to those.
    """

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._window: list[TokenId] = []
        self._shown = ""  # the window's text that has been given out
        self._held = 0  # tokens at the window's end whose text may yet change

    def push(self, token: TokenId) -> str:
        name = self._decoding.token_text(token)
        if name is None:
            return ""
        self._window.append(token)
        if self._decoding.joining is Joining.BYTE_RUNS and _BYTE_TOKEN.fullmatch(name):
            self._held += 1
            return ""  # the run's text is known when it has ended
        text = self._decoding.raw_decode(self._window)
        if self._decoding.joining is Joining.TEXT and self._held < _LONGEST_HOLD and not self._is_final(text, name):
            self._held += 1
            return ""
        return self._give(text)

    def flush(self) -> str:
        return self._give(self._decoding.raw_decode(self._window))

    def _is_final(self, text: str, name: str) -> bool:
        return text.startswith(self._shown) and (not text.endswith(REPLACEMENT) or REPLACEMENT in name)

    def _give(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._held = 0
        count = 1
        while count < len(self._window):
            shown = self._decoding.raw_decode(self._window[-count:])
            if shown:
                self._window, text = self._window[-count:], shown
                break
            count *= 2
        self._shown = text
        return piece


class _Cleaner:
    """Cleans text whose spaces a tokenizer put there, piece by piece.

    Cleaning looks at a few characters around a space. Nothing straddles a space after two letters or digits, so all
    before the last such space is final.
    """

    _CUT = re.compile(r"[^\W_]{2}(?= )")

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean = clean
        self._held = ""

    def push(self, text: str) -> str:
        start = max(0, len(self._held) - 3)
        self._held += text
        cut = max((match.end() for match in self._CUT.finditer(self._held, start)), default=0)
        final, self._held = self._held[:cut], self._held[cut:]
        return self._clean(final)

    def flush(self) -> str:
        final, self._held = self._held, ""
        return self._clean(final)
