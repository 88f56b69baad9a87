"""A small vocabulary of bytes, pieces of JSON and special tokens, for tests of grammars."""

from __future__ import annotations

from shardwright.model.vocabulary import Vocabulary

BYTES = tuple(bytes([i]) for i in range(256))
PIECES = (
    b'{"',
    b'":',
    b'": ',
    b'","',
    b'"}',
    b"}}",
    b"name",
    b"true",
    b"false",
    b"null",
    b"  ",
    b"\n    ",
    b"12",
    b"ab",
)
END, TOOL, OTHER_END = 300, 301, 302
TOKENS = (*BYTES, *PIECES, *(b"" for _ in range(270, 300)), b"</s>", b"<|tool|>", b"<|end|>")

VOCABULARY = Vocabulary(tokens=TOKENS, special_ids=frozenset({END, TOOL, OTHER_END}), end_id=END)


def text_of(tokens: list[int]) -> str:
    """The text that the tokens stand for, special ones left out."""
    return b"".join(TOKENS[token] for token in tokens if token not in VOCABULARY.special_ids).decode()
