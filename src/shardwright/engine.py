"""The engine as its users see it. All that the API may know of the master.

`Engine` takes token ids and gives token ids; `TextEngine` wraps it with the model's tokenizer and gives text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from shardwright.observation import Observatory
from shardwright.types import (
    GREEDY,
    NO_RULES,
    ClusterSnapshot,
    FinishReason,
    Grammar,
    SamplingParams,
    SeqId,
    StopConditions,
    TokenId,
    TokenRules,
    TokenScore,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One more token of a request, in order, never twice. `index` counts the new tokens from 0."""

    seq_id: SeqId
    index: int
    token_id: TokenId
    logprob: float
    top: tuple[tuple[TokenId, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScoresEvent:
    """Scores of the next tokens of the prompt, from its second one on; all come before the first `TokenEvent`."""

    seq_id: SeqId
    scores: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishEvent:
    """The end of a request; exactly one, and nothing after it. `message` says what went wrong on an error."""

    seq_id: SeqId
    reason: FinishReason
    message: str = ""
    num_cached_tokens: int = 0


RequestEvent: TypeAlias = TokenEvent | PromptScoresEvent | FinishEvent


class Engine(Protocol):
    """A running model that takes prompts as token ids."""

    async def submit(
        self,
        prompt: tuple[TokenId, ...],
        sampling: SamplingParams,
        stop: StopConditions,
        *,
        rules: TokenRules = ...,
        num_prompt_logprobs: int | None = None,
        timeout_s: float | None = None,
    ) -> tuple[SeqId, AsyncIterator[RequestEvent]]:
        """Queue a prompt; the iterator gives its tokens as they come and ends after a `FinishEvent`.

        Raises `QueueFullError` when too many requests wait, `ClusterError` when there is no pipeline.
        """
        ...

    async def abort(self, seq_id: SeqId) -> None:
        """Stop a request; its iterator ends with `FinishReason.ABORT`. Unknown or finished ids are ignored."""
        ...

    def snapshot(self) -> ClusterSnapshot:
        """The cluster's state at this moment."""
        ...

    def is_ready(self) -> bool:
        """Whether a real token went through the real pipeline lately: a request's, or the master's own when idle."""
        ...

    async def close(self) -> None:
        """Release the workers and end every open request. Safe to call twice."""
        ...


# --- text ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What clients may know of the model that answers."""

    name: str
    created: int  # seconds since 1970: when it became ready
    context_length: int  # most tokens of prompt and output together
    vocab_size: int
    has_chat_template: bool
    has_tokenizer: bool
    chat_template: str = ""  # its source: tells which style of tool calls the model was trained on


class TextCodec(Protocol):
    """The model's tokenizer and chat template. All methods raise `InvalidRequestError` for what they can't take."""

    def encode(self, text: str) -> tuple[TokenId, ...]:
        """Token ids of plain text, with the special tokens that the model expects at its start."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        continue_last: bool = False,
    ) -> tuple[TokenId, ...]:
        """Token ids of a conversation through the chat template, ready for the answer.

        `messages` and `tools` are in OpenAI's form (tool calls' arguments as objects); `options` are further
        variables of the template. With `continue_last` the last message is an answer to be gone on with.
        """
        ...

    def decode(self, tokens: Sequence[TokenId], *, keep_special: bool = False) -> str:
        """Text of token ids; of special tokens their names with `keep_special`, else nothing."""
        ...

    def token_bytes(self, token_id: TokenId) -> bytes:
        """The bytes that a token stands for by itself; of a special token its name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt and how to go on from it, `num_choices` times."""

    prompt: tuple[TokenId, ...]
    max_new_tokens: int | None = None  # None: as many as the context has room for
    sampling: SamplingParams = GREEDY
    rules: TokenRules = NO_RULES
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: frozenset[TokenId] = frozenset()  # beside the model's own ends
    ignore_eos: bool = False
    include_stop: bool = False  # whether a stop string that was found belongs to the text
    keep_special: bool = False  # whether the text shows special tokens (tool-call markers may be such)
    num_choices: int = 1  # choice i is sampled with a seed made from the request's seed and i
    num_prompt_logprobs: int | None = None  # set: score the prompt's tokens, with so many alternatives each
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken:
    """A token with its bytes and how likely it was; a prompt's first token has no `logprob`: nothing precedes it."""

    token_id: TokenId
    data: bytes
    logprob: float | None
    top: tuple[tuple[TokenId, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScored:
    """All tokens of the prompt, scored; once for a request that asked for it, before any text."""

    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """More text of one choice: whole characters, nothing that may yet turn out to begin a stop string.

    `tokens` are those whose text is complete with this delta; the text may be empty (a special token).
    """

    choice: int
    text: str
    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceEnd:
    """The end of one choice; exactly one for each. ERROR, ABORT and DEADLINE come with a message."""

    choice: int
    reason: FinishReason
    message: str = ""
    matched_stop: str | TokenId | None = None  # the stop string, or the stop token that the client asked for
    num_output_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt


GenerationEvent: TypeAlias = PromptScored | TextDelta | ChoiceEnd


class TextEngine(Protocol):
    """A running model that takes token ids or text and gives text: what the API serves."""

    @property
    def model(self) -> ServedModel:
        """The model that answers."""
        ...

    @property
    def codec(self) -> TextCodec:
        """Its tokenizer. Raises `InvalidRequestError` for a model that has none."""
        ...

    def check_grammar(self, grammar: Grammar) -> None:
        """Raises `InvalidRequestError` with the reason when the grammar can't be followed."""
        ...

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Start a request and give its events; they end after one `ChoiceEnd` for each choice.

        Raises before the first event: `InvalidRequestError`, `PromptTooLongError`, `QueueFullError`, `ClusterError`.
        Closing the iterator (`aclose`) aborts what still runs, within one step.
        """
        ...

    def snapshot(self) -> ClusterSnapshot:
        """The cluster's state at this moment."""
        ...

    def is_ready(self) -> bool:
        """Whether a real token went through the real pipeline lately."""
        ...

    @property
    def observatory(self) -> Observatory:
        """What can be seen of the cluster, its steps and its requests."""
        ...
