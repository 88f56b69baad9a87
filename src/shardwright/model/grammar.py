"""Says which tokens a grammar allows next. Knows bytes, tokens and `llguidance`; nothing of logits and of torch.

The master checks a grammar here before it takes a request, the last stage follows it here, both with the same
vocabulary and the same limits: what was accepted compiles.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import llguidance
import numpy as np
from numpy.typing import NDArray

from shardwright.errors import InvalidRequestError
from shardwright.model.vocabulary import Vocabulary
from shardwright.types import Grammar, GrammarKind, TokenId

Bits: TypeAlias = NDArray[np.uint32]
"""A set of tokens: bit i % 32 of word i // 32 stands for token i."""

MAX_COMPILED = 32

_WHITESPACE = r"[ ]|\n[ ]{0,24}"
"""Between JSON's tokens, at most once at each place: one space, or a new line with its indentation.

That is what models write, compact or indented. The library's default takes any number of blanks, in which small
models lose themselves until their tokens are used up.
"""

_OPTIONS = '%llguidance {"no_forcing": true}'
"""Text that the grammar leaves no choice about is still tokenised as the model likes best.

Forcing needs the model's own tokeniser, which the last stage does not have: with another one's tokens the model would
read its own text as it has never seen it.
"""

_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=1000,  # about 4 for each optional property that may come next; 10 to 25 ms a token
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 14 ms a token
    step_max_items=50_000,  # about 3 ms a token
    max_lexer_states=50_000,  # 1 to 2 KB each, for each sequence that follows the grammar
    max_grammar_size=100_000,
    verbose_errors=False,
)

_TRIED_TOKENS = 4
_NO_TOKEN = "NoExtensionBias"  # the library's word for a grammar that allows no token  # noqa: S105
_MAX_REASON = 1000  # characters; the library's can quote a whole source

_RULE_OPTION = re.compile(r"^[ \t]*[!?]?[a-z_][\w-]*[ \t]*\[[^\]\n]*\b(temperature|stop)[ \t]*=", re.MULTILINE)
_SOURCE_LINES = re.compile(r"\n[ ]*\d+ \| .*", re.DOTALL)
_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: |invalid regex .*? \(in regex\): )?", re.DOTALL)


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and remembers the last ones. Threads may share it."""

    def __init__(self, vocabulary: Vocabulary, *, max_compiled: int = MAX_COMPILED) -> None:
        self._vocabulary = vocabulary
        self._max_compiled = max_compiled
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Raise `InvalidRequestError` for a grammar that can't be followed, with the library's reason.

        Those are sources with mistakes in them, keywords that it does not know, special tokens that the model lacks,
        grammars that nothing matches, and those that would take too long or too much memory. The first call takes
        about a second for a large vocabulary, others as long as the grammar takes to compile.
        """
        self._compile(grammar)

    def matcher(self, grammar: Grammar, stop_token_ids: Iterable[TokenId]) -> GrammarMatcher:
        """A matcher at the grammar's start. Its end allows the stop tokens, or the text's end if there are none."""
        end_id = self._vocabulary.end_id
        compiled = self._compile(grammar)
        assert end_id is not None  # without one nothing compiles
        num_tokens = len(self._vocabulary.tokens)
        return GrammarMatcher(
            compiled.deep_copy(),
            num_tokens=num_tokens,
            stop_ids=sorted(i for i in set(stop_token_ids) if 0 <= i < num_tokens) or [end_id],
            special_ids=self._vocabulary.special_ids,
            end_id=end_id,
        )

    def _compile(self, grammar: Grammar) -> Any:
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return compiled
            compiled = self._compile_anew(grammar)
            self._compiled[grammar] = compiled
            if len(self._compiled) > self._max_compiled:
                self._compiled.popitem(last=False)
            return compiled

    def _compile_anew(self, grammar: Grammar) -> Any:
        if self._vocabulary.end_id is None:
            raise InvalidRequestError(
                "this model's tokenizer names no token for the end of a text, so no grammar could end with it"
            )
        if self._tokenizer is None:
            self._tokenizer = _make_tokenizer(self._vocabulary)
        compiled = llguidance.LLMatcher(self._tokenizer, _lark(grammar), log_level=0, limits=_LIMITS)
        if not compiled.is_error():
            compiled.compute_bitmask()  # also the first work of each copy, done once
        for tried in (compiled, _after_some_tokens(compiled)):
            # Behind the start, a token that leads nowhere says little: a model may well take another.
            if tried.is_error() and (tried is compiled or not tried.get_error().startswith(_NO_TOKEN)):
                raise InvalidRequestError(f"the {grammar.kind.value} can't be used: {_reason(tried, grammar)}")
        return compiled


class GrammarMatcher:
    """Follows one sequence's output through its grammar.

    `trouble` says why it can't any more, for a grammar too complex for the output that it met, or for one that leaves
    no token that the model has; from then on only the stop tokens are allowed.
    """

    def __init__(
        self,
        inner: Any,
        *,
        num_tokens: int,
        stop_ids: Sequence[TokenId],
        special_ids: frozenset[TokenId],
        end_id: TokenId,
    ) -> None:
        self.trouble: str | None = None
        self._inner = inner
        self._num_words = (num_tokens + 31) // 32
        self._stops = frozenset(stop_ids)
        self._stop_bits = _bits(stop_ids, self._num_words)
        # A stop token that is plain text would end the output wherever the grammar allows that text; a special one
        # that the grammar itself asks for is meant.
        hidden = {i for i in (*stop_ids, end_id) if i not in special_ids or i == end_id}
        self._not_hidden = ~_bits(sorted(hidden), self._num_words)
        self._ended = False

    @property
    def num_words(self) -> int:
        """Words of a set of the vocabulary's tokens."""
        return self._num_words

    def allow(self, bits: Bits, *, may_stop: bool = True) -> None:
        """Write the set of tokens that may come next into `bits` [num_words].

        It is never empty. Without `may_stop` stop tokens are in it only where the grammar allows nothing else.
        """
        if self._ended or self.trouble is not None:
            bits[:] = self._stop_bits
            return
        if self._inner.is_stopped() and not self._inner.is_error():  # matched, and no byte can follow
            bits[:] = self._stop_bits
            return
        self._inner.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._inner.is_error():
            self._give_up(bits, _first_line(self._inner.get_error()))
            return
        bits &= self._not_hidden
        complete = self._inner.is_accepting()
        if complete and (may_stop or not bits.any()):
            bits |= self._stop_bits
        elif not may_stop and (bits & ~self._stop_bits).any():
            bits &= ~self._stop_bits
        if not bits.any():
            self._give_up(bits, "it allows no token that the model has")

    def accept(self, token: TokenId) -> None:
        """Go on behind this token of the output."""
        if self._ended or self.trouble is not None:
            return
        if token in self._stops and (self._inner.is_stopped() or self._inner.is_accepting()):
            self._ended = True
            return
        if not self._inner.consume_token(token):
            self.trouble = _first_line(self._inner.get_error()) or f"it does not allow token {token}"

    def _give_up(self, bits: Bits, reason: str) -> None:
        self.trouble = reason
        bits[:] = self._stop_bits


class _Tokens:
    """The vocabulary as `LLTokenizer` takes it (its `TokenizerWrapper`)."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.eos_token_id = vocabulary.end_id
        self.special_token_ids = sorted(vocabulary.special_ids)
        self.tokenizer: Any = None

    def __call__(self, text: str) -> list[TokenId]:
        """Asked for a grammar that wants text forced all the same: the longest tokens first."""
        return list(self.tokenizer.greedy_tokenize(text))


def _make_tokenizer(vocabulary: Vocabulary) -> Any:
    tokens = _Tokens(vocabulary)
    tokens.tokenizer = llguidance.LLTokenizer(tokens)
    return tokens.tokenizer


def _lark(grammar: Grammar) -> str:
    """The grammar in llguidance's dialect of Lark. Raises `InvalidRequestError`."""
    match grammar.kind:
        case GrammarKind.LARK:
            option = _RULE_OPTION.search(grammar.source)
            if option is not None:
                raise InvalidRequestError(
                    f"the lark can't be used: rule option {option[1]!r} is not supported;"
                    " set the request's temperature, and use 'suffix' or 'lazy' instead of 'stop'"
                )
            return f"{grammar.source}\n{_OPTIONS}"
        case GrammarKind.REGEX:
            regex = llguidance.regex_to_lark(grammar.source, "")  # \d and \w take all of Unicode's, as Python's do
            return f"start: /{regex or '(?:)'}/\n{_OPTIONS}"
        case GrammarKind.JSON_OBJECT:
            schema: Any = {"type": "object"}
        case GrammarKind.JSON_SCHEMA:
            schema = _schema(grammar.source)
    return f"start: %json {json.dumps(_with_whitespace(schema))}\n{_OPTIONS}"


def _schema(source: str) -> dict[str, Any]:
    try:
        schema = json.loads(source)
        json.dumps(schema)  # a little deeper than its source, where nesting is as deep as it may be
    except (ValueError, RecursionError) as exc:
        raise InvalidRequestError(f"the json_schema can't be used: it is not JSON ({exc})") from exc
    if schema is True:
        return {}
    if not isinstance(schema, dict) or not isinstance(schema.get("x-guidance", {}), dict):
        raise InvalidRequestError("the json_schema can't be used: it is not a JSON object")
    return schema


def _with_whitespace(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with our whitespace, unless it chooses its own in the library's `x-guidance`."""
    options = schema.get("x-guidance", {})
    if "whitespace_pattern" in options or "whitespace_flexible" in options:
        return schema
    return {**schema, "x-guidance": {**options, "whitespace_pattern": _WHITESPACE}}


def _after_some_tokens(compiled: Any) -> Any:
    """The grammar behind a few of its tokens: what is too large often shows behind the first bracket."""
    tried = compiled.deep_copy()
    for _ in range(_TRIED_TOKENS):
        if tried.is_error() or tried.is_stopped():
            break
        allowed = np.unpackbits(np.frombuffer(tried.compute_bitmask(), np.uint8), bitorder="little")
        tried.consume_token(int(allowed.argmax()))
    return tried


def _reason(compiled: Any, grammar: Grammar) -> str:
    """The library's message, without what the user has not written, and not endless."""
    message = str(compiled.get_error()).replace("<non-verbose/>", "").strip()
    if message == _NO_TOKEN:
        return "nothing that the model can write matches it"
    if grammar.kind is GrammarKind.LARK:
        message = "\n".join(line for line in message.splitlines() if not line.endswith(_OPTIONS))
    else:
        message = _PLACE.sub("", _SOURCE_LINES.sub("", message)).strip()
    half = _MAX_REASON // 2
    return message if len(message) <= _MAX_REASON else f"{message[:half]} ... {message[-half:]}"


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]


def _bits(ids: Sequence[TokenId], num_words: int) -> Bits:
    bits = np.zeros(num_words, np.uint32)
    for token_id in ids:
        bits[token_id // 32] |= np.uint32(1 << token_id % 32)
    return bits
