"""Text to token ids and back. Knows a model's tokenizer files and chat template; nothing of requests."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from shardwright.errors import CheckpointError, InvalidRequestError, ModelError
from shardwright.model.vocabulary import encode_vocabulary
from shardwright.runtime.chat_template import ChatTemplate
from shardwright.runtime.token_bytes import TokenBytes
from shardwright.runtime.token_stream import Joining, TokenStream
from shardwright.runtime.tokenizer_files import FACTS_FILE, TOKENIZER_FILE, VOCABULARY_FILE, converted
from shardwright.types import TokenId

_MAX_IDS = 1 << 32  # the library counts them in 32 bits


class Tokenizer:
    """A model's own tokenizer: gives what `transformers` gives, token for token. An `engine.TextCodec`.

    All methods may be called from any thread. The few tokenizers that exist in Python only are run by `transformers`
    itself: they take its memory and have no `vocabulary`.
    """

    def __init__(
        self, backend: Backend, template: ChatTemplate, end_id: TokenId | None, *, vocabulary: bytes | None = None
    ) -> None:
        self._backend = backend
        self._template = template
        self._end_id = end_id
        self._vocabulary = vocabulary

    @classmethod
    def load(
        cls, *, folder: Path | None, gguf: Path | None, cache_dir: Path, stop: threading.Event | None = None
    ) -> Tokenizer:
        """Load from a model folder or from a GGUF file's metadata; the first time takes seconds and a process.

        What that process made is kept in `cache_dir`. Raises `ModelError` when the tokenizer can't be read, and
        `StoppedError` soon after `stop` is set.
        """
        source = gguf or folder
        assert source is not None, "a folder or a file"
        with converted(source, cache_dir=cache_dir, stop=stop) as ready:
            try:
                facts = json.loads((ready / FACTS_FILE).read_text(encoding="utf-8"))
                backend = _alone(ready, facts) if facts["alone"] else _whole(source, ready)
                template = ChatTemplate(facts["chat_template"], facts["special_tokens"])
                blob = ready / VOCABULARY_FILE  # making it takes a second and as much memory as the tokenizer
                return cls(backend, template, facts["end_id"], vocabulary=blob.read_bytes() if blob.is_file() else None)
            except ModelError:
                raise
            except Exception as exc:  # the tokenizers library raises plain exceptions
                raise ModelError(
                    f"{source}: the tokenizer can't be read ({exc}); give token ids with --prompt-ids, or remove "
                    f"{ready} so that it is made anew"
                ) from exc

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
        return frozenset() if self._end_id is None else frozenset([self._end_id])

    @property
    def special_ids(self) -> frozenset[TokenId]:
        """Tokens that mark something and are no text; `decode` leaves them out."""
        return self._backend.special_ids

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""
        return self._backend.vocab_size

    def encode(self, text: str, *, add_special: bool = True) -> tuple[TokenId, ...]:
        """Token ids of plain text, with the special tokens that the model expects around it unless told otherwise.

        Raises `InvalidRequestError` for text that is not Unicode.
        """
        try:
            return tuple(self._backend.encode(text, add_special=add_special))
        except (TypeError, UnicodeError) as exc:
            raise InvalidRequestError(f"the text can't be encoded: {exc}") from exc

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
        """Text of token ids; of special tokens their names with `keep_special`, else nothing.

        Ids that are no token give no text. Raises `InvalidRequestError` for negative ids and such.
        """
        try:
            text = self._backend.raw_decode([t for t in tokens if keep_special or t not in self._backend.special_ids])
        except (TypeError, OverflowError) as exc:
            raise InvalidRequestError(f"these are no token ids: {exc}") from exc
        return clean_up(text) if self._backend.cleans_up else text

    def stream(self, *, keep_special: bool = False) -> TokenStream:
        """A decoder for one answer that comes token by token."""
        return TokenStream(
            self._backend,
            skipped=frozenset() if keep_special else self._backend.special_ids,
            clean=clean_up if self._backend.cleans_up else None,
        )

    def token_bytes(self, token_id: TokenId) -> bytes:
        """The bytes that a token stands for inside a text; of a special token its name.

        Raises `InvalidRequestError` for an id that is no token.
        """
        name = self._backend.token_text(token_id) if 0 <= token_id < _MAX_IDS else None
        if name is None:
            raise InvalidRequestError(f"token id {token_id} is not in the tokenizer's vocabulary")
        return name.encode() if token_id in self._backend.special_ids else self._backend.raw_bytes(token_id)

    def token_bytes_table(self) -> list[bytes]:
        """`token_bytes` of every id below `vocab_size`; empty for ids that are no token."""
        backend, special = self._backend, self._backend.special_ids
        table = []
        for token_id in range(backend.vocab_size):
            name = backend.token_text(token_id)
            if name is None:
                table.append(b"")
            else:
                table.append(name.encode() if token_id in special else backend.raw_bytes(token_id))
        return table

    def vocabulary(self) -> bytes:
        """The blob of all tokens' bytes that a last stage follows grammars with; see `model/vocabulary.py`.

        Empty for a tokenizer whose tokens' bytes are not known for certain, or too many or too long for a blob: then
        there are no grammars.
        """
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        return self._vocabulary

    def _make_vocabulary(self) -> bytes:
        if not self._backend.has_exact_bytes:
            return b""
        try:
            return encode_vocabulary(self.token_bytes_table(), special_ids=self.special_ids, end_id=self._end_id)
        except CheckpointError:
            return b""


def clean_up(text: str) -> str:
    """`text` without the spaces before punctuation that some tokenizers put there when they decode."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    return str(PreTrainedTokenizerBase.clean_up_tokenization(None, text))


class Backend(Protocol):
    """The part of a tokenizer that knows its vocabulary. Also a `token_stream.Decoding`."""

    cleans_up: bool  # whether decoded text goes through `clean_up`
    has_exact_bytes: bool

    @property
    def joining(self) -> Joining:
        """How tokens become one text."""
        ...

    @property
    def special_ids(self) -> frozenset[TokenId]:
        """Tokens that are no text."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""
        ...

    def encode(self, text: str, *, add_special: bool) -> list[TokenId]:
        """Token ids of text."""
        ...

    def token_text(self, token: TokenId) -> str | None:
        """The token as the vocabulary has it; None for an id that stands for no token."""
        ...

    def raw_bytes(self, token: TokenId) -> bytes:
        """The bytes of a token that is not special, inside a text."""
        ...

    def raw_decode(self, tokens: Sequence[TokenId]) -> str:
        """Text of tokens, special ones too, without cleaning."""
        ...


def _alone(ready: Path, facts: Mapping[str, Any]) -> Backend:
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(ready / TOKENIZER_FILE))
    library.encode_special_tokens = bool(facts["splits_special_tokens"])
    _trim_heap()  # reading leaves more behind than the tokenizer takes
    return LibraryBackend(library, cleans_up=bool(facts["cleans_up"]))


def _whole(source: Path, ready: Path) -> Backend:
    from transformers import AutoTokenizer

    folder = source if source.is_dir() else ready
    return WholeBackend(AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))


def _trim_heap() -> None:
    """Give freed memory back to the system where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class LibraryBackend:
    """A tokenizer that the `tokenizers` library reads alone."""

    def __init__(self, library: Any, *, cleans_up: bool) -> None:
        self.cleans_up = cleans_up
        self._library = library
        self._bytes = TokenBytes(library.decoder)
        self.joining = self._bytes.joining
        self.has_exact_bytes = self._bytes.is_exact
        added = library.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""
        return 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, add_special: bool) -> list[TokenId]:
        """Token ids of text."""
        ids: list[TokenId] = self._library.encode(text, add_special_tokens=add_special).ids
        return ids

    def token_text(self, token: TokenId) -> str | None:
        """The token as the vocabulary has it; None for an id that stands for no token."""
        text: str | None = self._library.id_to_token(token)
        return text

    def raw_bytes(self, token: TokenId) -> bytes:
        """The bytes of a token that is not special, inside a text."""
        text = self._library.id_to_token(token)
        return b"" if text is None else self._bytes.of(text)

    def raw_decode(self, tokens: Sequence[TokenId]) -> str:
        """Text of tokens, special ones too, without cleaning."""
        text: str = self._library.decode(list(tokens), skip_special_tokens=False)
        return text


class WholeBackend:
    """A tokenizer that only `transformers` can run."""

    joining = Joining.TEXT
    has_exact_bytes = False

    def __init__(self, inner: Any) -> None:
        self.cleans_up = False  # it does so itself
        self._inner = inner
        self.special_ids = frozenset(int(token_id) for token_id in inner.all_special_ids if token_id is not None)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token."""
        return 1 + max(self._inner.get_vocab().values(), default=-1)

    def encode(self, text: str, *, add_special: bool) -> list[TokenId]:
        """Token ids of text."""
        return [int(token) for token in self._inner(text, add_special_tokens=add_special)["input_ids"]]

    def token_text(self, token: TokenId) -> str | None:
        """The token as the vocabulary has it; None for an id that stands for no token."""
        if not 0 <= token < self.vocab_size:
            return None
        text = self._inner.convert_ids_to_tokens(token)
        return None if text is None else str(text)

    def raw_bytes(self, token: TokenId) -> bytes:
        """The bytes of a token that is not special, as it is decoded by itself."""
        return self.raw_decode([token]).encode()

    def raw_decode(self, tokens: Sequence[TokenId]) -> str:
        """Text of tokens, special ones too."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=False))
