"""The bytes behind a model's tokens, as one blob that travels with the weights. Knows no tokenizer and no tensors.

Grammars are matched byte by byte, so the last stage has to know what each token stands for. The blob is a header, then
the length of each token (16 bits), then the special ids (32 bits), then all tokens' bytes one after the other; numbers
are little-endian. 262,144 tokens of seven bytes take 2.4 MB.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from shardwright.errors import CheckpointError
from shardwright.types import TokenId

MAGIC = b"SHWVOCAB"
VERSION = 1
MAX_TOKENS = 1 << 22
MAX_TOKEN_BYTES = (1 << 16) - 1

_HEADER = struct.Struct("<8sIIIII")  # magic, version, tokens, special ids, end id, bytes of all tokens
_CRC = struct.Struct("<I")  # of all that precedes and follows it
_NO_END = (1 << 32) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What each token stands for, by id."""

    tokens: tuple[bytes, ...]  # a special token's bytes are its name; an id that stands for nothing has none
    special_ids: frozenset[TokenId]  # tokens that mean something to the model and no text to the reader
    end_id: TokenId | None  # the end of a text; None for a tokenizer that names none

    def first(self, count: int) -> Vocabulary:
        """The vocabulary of a model whose head has only `count` rows."""
        if count >= len(self.tokens):
            return self
        return Vocabulary(
            tokens=self.tokens[:count],
            special_ids=frozenset(i for i in self.special_ids if i < count),
            end_id=self.end_id if self.end_id is not None and self.end_id < count else None,
        )


def encode_vocabulary(tokens: Sequence[bytes], *, special_ids: Iterable[TokenId], end_id: TokenId | None) -> bytes:
    """The blob of these tokens. Raises `CheckpointError` where there can be none: too many, or ids off them."""
    special = sorted(set(special_ids))
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise CheckpointError(f"the tokenizer has {len(tokens)} tokens; between 1 and {MAX_TOKENS} can be sent")
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_BYTES:
        raise CheckpointError(f"the tokenizer has a token of {longest} bytes; at most {MAX_TOKEN_BYTES} can be sent")
    for name, token_id in [("special", i) for i in special] + ([] if end_id is None else [("end", end_id)]):
        if not 0 <= token_id < len(tokens):
            raise CheckpointError(f"the tokenizer's {name} token {token_id} is not one of its {len(tokens)} tokens")
    text = b"".join(tokens)
    body = _pack("H", list(map(len, tokens))) + _pack("I", special) + text
    end = _NO_END if end_id is None else end_id
    header = _HEADER.pack(MAGIC, VERSION, len(tokens), len(special), end, len(text))
    return header + _CRC.pack(zlib.crc32(body, zlib.crc32(header))) + body


def decode_vocabulary(blob: bytes | memoryview) -> Vocabulary:
    """The vocabulary in a blob. Raises `CheckpointError` for one that is damaged, or of another version."""
    blob = memoryview(blob).cast("B")
    if len(blob) < _HEADER.size + _CRC.size:
        raise CheckpointError(f"the vocabulary has {len(blob)} bytes; its header alone has {_HEADER.size + _CRC.size}")
    header = blob[: _HEADER.size]
    magic, version, num_tokens, num_special, end, text_bytes = _HEADER.unpack(header)
    if magic != MAGIC:
        raise CheckpointError("the vocabulary does not begin as one should; the tensor is something else")
    if version != VERSION:
        raise CheckpointError(f"the vocabulary has version {version}; this one reads {VERSION}: update the older side")
    body = blob[_HEADER.size + _CRC.size :]
    expected = 2 * num_tokens + 4 * num_special + text_bytes
    if not 0 < num_tokens <= MAX_TOKENS or len(body) != expected:
        raise CheckpointError(f"the vocabulary's {num_tokens} tokens need {expected} bytes, but it has {len(body)}")
    if (zlib.crc32(body, zlib.crc32(header)),) != _CRC.unpack_from(blob, _HEADER.size):
        raise CheckpointError("the vocabulary is damaged: its checksum differs")
    lengths = _unpack("H", body[: 2 * num_tokens])
    special = _unpack("I", body[2 * num_tokens : 2 * num_tokens + 4 * num_special])
    text = bytes(body[2 * num_tokens + 4 * num_special :])
    off = [i for i in (*special, *([] if end == _NO_END else [end])) if i >= num_tokens]
    if sum(lengths) != text_bytes or off:
        raise CheckpointError("the vocabulary contradicts itself: its lengths or its special ids don't fit its tokens")
    tokens = tuple(text[a:b] for a, b in pairwise(accumulate(lengths, initial=0)))
    return Vocabulary(tokens=tokens, special_ids=frozenset(special), end_id=None if end == _NO_END else end)


def _pack(kind: str, numbers: list[int]) -> bytes:
    packed = array(kind, numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack(kind: str, data: memoryview) -> list[int]:
    numbers = array(kind)
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
