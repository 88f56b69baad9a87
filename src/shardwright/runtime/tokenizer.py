"""Text to token ids and back. Knows a model's tokenizer files and chat template; nothing of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardwright.errors import InvalidRequestError, ModelError
from shardwright.types import TokenId

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for half a character


class Tokenizer:
    """A model's own tokenizer, as `transformers` loads it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @classmethod
    def load(cls, *, folder: Path | None, gguf: Path | None) -> Tokenizer:
        """Load from a model folder or from a GGUF file's metadata. Raises `ModelError` when it can't be read."""
        from transformers import AutoTokenizer

        try:
            if gguf is not None:
                inner = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            else:
                inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as exc:
            raise ModelError(
                f"{gguf or folder}: the tokenizer can't be read ({exc}); "
                "give token ids with --prompt-ids, or add the model's tokenizer files"
            ) from exc
        return cls(inner)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was made for chat, as far as its files tell."""
        return bool(getattr(self._inner, "chat_template", None))

    @property
    def end_ids(self) -> frozenset[TokenId]:
        """The end-of-sequence ids that the tokenizer names."""
        end = self._inner.eos_token_id
        return frozenset() if end is None else frozenset([int(end)])

    def encode(self, text: str) -> tuple[TokenId, ...]:
        """Token ids of plain text, with the special tokens that the model expects at its start."""
        return tuple(int(token) for token in self._inner(text)["input_ids"])

    def encode_chat(self, message: str) -> tuple[TokenId, ...]:
        """Token ids of one user message through the chat template, ready for the answer.

        Raises `InvalidRequestError` for a model without a template, or where the template refuses the message.
        """
        if not self.has_chat_template:
            raise InvalidRequestError("this model has no chat template; use --raw")
        try:
            text = self._inner.apply_chat_template(
                [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
            )
        except Exception as exc:  # templates raise errors of their own kinds
            raise InvalidRequestError(f"the model's chat template refused the message: {exc}") from exc
        # The template writes the special tokens itself.
        return tuple(int(token) for token in self._inner(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: tuple[TokenId, ...] | list[TokenId]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=True))

    def stream(self) -> TokenStream:
        """A decoder for one answer that comes token by token."""
        return TokenStream(self)


class TokenStream:
    """Turns tokens into text piece by piece, never half a character.

    A token's text can depend on what stands before it (spaces, byte pieces of one character), so each new piece is
    the difference between decoding a short window with and without the new tokens; the window starts where the text
    was last whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[TokenId] = []
        self._start = 0  # the window's first token
        self._read = 0  # tokens whose text has been given out

    def push(self, token: TokenId) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        after = self._tokenizer.decode(self._tokens[self._start :])
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return after[len(before) :]

    def flush(self) -> str:
        """What is left when no more tokens come; an incomplete character is shown as the replacement character."""
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        after = self._tokenizer.decode(self._tokens[self._start :])
        self._start, self._read = self._read, len(self._tokens)
        return after[len(before) :]
