"""Text to token ids and back. Knows a model's tokenizer files and chat template; nothing of requests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from shardwright.errors import InvalidRequestError, ModelError
from shardwright.runtime.chat_template import ChatTemplate
from shardwright.runtime.token_stream import Joining, TokenStream
from shardwright.types import TokenId


class Tokenizer:
    """A model's own tokenizer. Gives what `transformers` would; an `engine.TextCodec`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._backend = inner.backend_tokenizer
        self._template = ChatTemplate(inner.chat_template, inner.special_tokens_map)

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
        return bool(self._template)

    @property
    def chat_template(self) -> str:
        """The source of the template that a conversation with tools goes through; empty for a model without."""
        return self._template.source(with_tools=True)

    @property
    def end_ids(self) -> frozenset[TokenId]:
        """The end-of-sequence ids that the tokenizer names."""
        end = self._inner.eos_token_id
        return frozenset() if end is None else frozenset([int(end)])

    @cached_property
    def special_ids(self) -> frozenset[TokenId]:
        """Tokens that mark something and are no text; `decode` leaves them out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""
        return 1 + max(self._backend.get_vocab().values(), default=-1)

    def encode(self, text: str, *, add_special: bool = True) -> tuple[TokenId, ...]:
        """Token ids of plain text, with the special tokens that the model expects at its start."""
        return tuple(self._inner(text, add_special_tokens=add_special)["input_ids"])

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        continue_last: bool = False,
    ) -> tuple[TokenId, ...]:
        """Token ids of a conversation through the chat template, ready for the answer.

        `messages` and `tools` are in OpenAI's form; `options` are further variables of the template. With
        `continue_last` the last message is an answer to be gone on with. Raises `InvalidRequestError` for a model
        without a template, and where the template refuses the messages.
        """
        text = self._template.render(messages, tools=tools, options=options, continue_last=continue_last)
        return self.encode(text, add_special=False)  # the template writes the special tokens itself

    def decode(self, tokens: Sequence[TokenId], *, keep_special: bool = False) -> str:
        """Text of token ids; of special tokens their names with `keep_special`, else nothing."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=not keep_special))

    def stream(self, *, keep_special: bool = False) -> TokenStream:
        """A decoder for one answer that comes token by token."""
        return TokenStream(self, skipped=frozenset() if keep_special else self.special_ids)

    def token_bytes(self, token_id: TokenId) -> bytes:
        """The bytes that a token stands for inside a text; of a special token its name.

        Raises `InvalidRequestError` for an id that is no token.
        """
        text = self.token_text(token_id)
        if text is None:
            raise InvalidRequestError(f"token id {token_id} is not in the tokenizer's vocabulary")
        return text.encode() if token_id in self.special_ids else self.raw_bytes(token_id)

    def token_bytes_table(self) -> list[bytes]:
        """`token_bytes` of every id below `vocab_size`; empty for ids that are no token."""
        return [
            b"" if self.token_text(token_id) is None else self.token_bytes(token_id)
            for token_id in range(self.vocab_size)
        ]

    @property
    def joining(self) -> Joining:
        """How tokens become one text."""
        return Joining.TEXT

    def token_text(self, token: TokenId) -> str | None:
        """The token as the vocabulary has it; None for an id that stands for no token."""
        text = self._backend.id_to_token(token)
        return None if text is None else str(text)

    def raw_bytes(self, token: TokenId) -> bytes:
        """The bytes of a token that is not special."""
        text = self.token_text(token) or ""
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            return bytes.fromhex(text[3:5])
        return self.raw_decode([token]).encode()

    def raw_decode(self, tokens: Sequence[TokenId]) -> str:
        """Text of tokens, special ones too, without cleaning."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=False))
