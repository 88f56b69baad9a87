"""What a token's name in the vocabulary stands for, as bytes. Knows the decoders of the `tokenizers` library.

Three families write text into their vocabularies in their own way: byte-level BPE gives each byte a visible character,
sentencepiece writes spaces as a bar and rare bytes as `<0xNN>`, WordPiece marks the tokens that go on a word.
"""

from __future__ import annotations

import json
import re
from typing import Any

from shardwright.runtime.token_stream import Joining

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR = "x"  # stands before a token whose text inside a text is asked for
_KNOWN = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece", "BPEDecoder"})


class TokenBytes:
    """The bytes of tokens under one decoder; None is a tokenizer's without one: it puts spaces between tokens."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        steps = [] if decoder is None else _steps(json.loads(decoder.__getstate__()))
        types = [step["type"] for step in steps]
        self._suffix = next((step["suffix"] for step in steps if step["type"] == "BPEDecoder"), "")
        self.is_exact = all(name in _KNOWN for name in types) and ("ByteLevel" not in types or len(types) == 1)
        if types == ["ByteLevel"]:
            self.joining = Joining.BYTES
        else:
            self.joining = Joining.BYTE_RUNS if "ByteFallback" in types else Joining.TEXT

    def of(self, name: str) -> bytes:
        """The bytes of a token inside a text; at its start some decoders leave a space out."""
        if self.joining is Joining.BYTES:
            try:
                return bytes(map(_BYTE_OF_CHARACTER.__getitem__, name))
            except KeyError:  # an added token: plain text
                return name.encode()
        if self.joining is Joining.BYTE_RUNS and (match := BYTE_TOKEN.fullmatch(name)):
            return bytes.fromhex(match[1])
        if self._decoder is None:
            return f" {name}".encode()
        if self._suffix:
            return name.replace(self._suffix, " ").encode()
        text: str = self._decoder.decode([_ANCHOR, name])
        return text.removeprefix(_ANCHOR).encode()


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


def _byte_characters() -> dict[str, int]:
    """The character of each byte in byte-level vocabularies.

    Printable bytes of Latin-1 are themselves, the others follow from U+0100 on. Source:
    https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()
