"""Text out of a running model: stop strings, whole characters, several choices, scored prompts.

A request's events come from the master in one call for each step. They are turned into text right there, whether or
not anybody reads, so that a stop string ends its sequence at once; the reader finds the results in one mailbox for all
choices. No request has a task of its own.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Protocol, assert_never

from shardwright.engine import (
    ChoiceEnd,
    FinishEvent,
    GenerationEvent,
    GenerationRequest,
    PromptScored,
    PromptScoresEvent,
    RequestEvent,
    ScoredToken,
    ServedModel,
    TextCodec,
    TextDelta,
    TokenEvent,
)
from shardwright.errors import InvalidRequestError, PromptTooLongError
from shardwright.observation import Observatory
from shardwright.runtime.mailbox import Mailbox, MailReader
from shardwright.runtime.master import MasterEngine
from shardwright.runtime.stop_strings import StopFinder
from shardwright.types import (
    MAX_TOP_LOGPROBS,
    ClusterSnapshot,
    FinishReason,
    Grammar,
    SeqId,
    StopConditions,
    TokenId,
    TokenScore,
)

log = logging.getLogger(__name__)


class TextStream(Protocol):
    """Turns one answer's tokens into text, piece by piece."""

    def push(self, token: TokenId) -> str:
        """The text that this token completes."""
        ...

    def flush(self) -> str:
        """What is left when no more tokens come."""
        ...


class StreamingCodec(TextCodec, Protocol):
    """A codec that decodes while tokens come."""

    def stream(self, *, keep_special: bool = ...) -> TextStream:
        """A decoder for one answer."""
        ...


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of several choices: the request's own for the first, so that n changes nothing about it.

    For choice i above 0 the first 8 bytes, little-endian, of BLAKE2b with a digest of 8 bytes over seed and i, each as
    8 bytes little-endian.
    """
    if choice == 0:
        return seed
    parts = seed.to_bytes(8, "little") + choice.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "little")


class SessionTextEngine:
    """Implements `engine.TextEngine` over a deployed master."""

    def __init__(
        self,
        engine: MasterEngine,
        *,
        model: ServedModel,
        codec: StreamingCodec | None,
        end_ids: frozenset[TokenId],
        grammar_check: Callable[[Grammar], None] | None,
    ) -> None:
        self._engine = engine
        self._model = model
        self._codec = codec
        self._end_ids = end_ids
        self._grammar_check = grammar_check
        self._token_bytes: dict[TokenId, bytes] = {}

    @property
    def model(self) -> ServedModel:
        """The model that answers."""
        return self._model

    @property
    def codec(self) -> StreamingCodec:
        """Its tokenizer. Raises `InvalidRequestError` for a model that has none."""
        if self._codec is None:
            raise InvalidRequestError(f"{self._model.name} has no tokenizer: prompts must be given as token ids")
        return self._codec

    def check_grammar(self, grammar: Grammar) -> None:
        """Raises `InvalidRequestError` with the reason when the grammar can't be followed.

        May take long for a large one: call it in a thread. `generate` does so for the request's own.
        """
        if self._grammar_check is None:
            raise InvalidRequestError(f"{self._model.name} has no tokenizer: its output can't be held to a grammar")
        self._grammar_check(grammar)

    def snapshot(self) -> ClusterSnapshot:
        """The cluster's state at this moment."""
        return self._engine.snapshot()

    def is_ready(self) -> bool:
        """Whether a real token went through the real pipeline lately."""
        return self._engine.is_ready()

    @property
    def observatory(self) -> Observatory:
        """What can be seen of the cluster, its steps and its requests."""
        return self._engine.observatory

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Start a request and give its events; they end after one `ChoiceEnd` for each choice.

        All choices are queued or none. Closing the iterator, cancelling the task that waits for it, or dropping it
        aborts what still runs, before the next step is made up.

        Raises before the first event: `InvalidRequestError`, `PromptTooLongError`, `QueueFullError`, `ClusterError`.
        """
        room = self._check(request)
        if request.rules.grammar is not None:
            await asyncio.to_thread(self.check_grammar, request.rules.grammar)
        max_new_tokens = room if request.max_new_tokens is None else request.max_new_tokens
        ends = request.stop_token_ids if request.ignore_eos else request.stop_token_ids | self._end_ids
        stop = StopConditions(max_new_tokens=max_new_tokens, stop_token_ids=ends)
        generation = _Generation(self._engine, self, request, stop)
        generation.start()
        return MailReader(generation.mailbox, generation.give_up)

    def stream(self, *, keep_special: bool) -> TextStream | None:
        """A decoder for one answer; None for a model without a tokenizer, whose answers are ids."""
        return None if self._codec is None else self._codec.stream(keep_special=keep_special)

    def scored(
        self, token_id: TokenId, logprob: float | None, top: tuple[tuple[TokenId, float], ...] = ()
    ) -> ScoredToken:
        """A token as clients see it."""
        likeliest = tuple((other, self._bytes(other), likelihood) for other, likelihood in top)
        return ScoredToken(token_id=token_id, data=self._bytes(token_id), logprob=logprob, top=likeliest)

    def _bytes(self, token_id: TokenId) -> bytes:
        data = self._token_bytes.get(token_id)
        if data is None:
            try:
                data = b"" if self._codec is None else self._codec.token_bytes(token_id)
            except InvalidRequestError:  # many models have more ids than their tokenizer has tokens
                data = b""
            self._token_bytes[token_id] = data  # as many as the vocabulary has at most
        return data

    def _check(self, request: GenerationRequest) -> int:
        """Refuse what can't be served; gives the tokens that the context has room for behind the prompt, at least 1."""
        size = self._model.vocab_size
        if not request.prompt:
            raise InvalidRequestError("the prompt is empty: it has no tokens")
        if min(request.prompt) < 0 or max(request.prompt) >= size:
            wrong = next(token for token in request.prompt if not 0 <= token < size)
            raise InvalidRequestError(f"prompt: token id {wrong} is outside the model's vocabulary of {size}")
        for what, tokens in (
            ("stop_token_ids", sorted(request.stop_token_ids)),
            ("logit_bias", [token for token, _ in request.rules.logit_bias]),
        ):
            for token in tokens:
                if not 0 <= token < size:
                    raise InvalidRequestError(f"{what}: token id {token} is outside the model's vocabulary of {size}")
        if request.num_choices < 1:
            raise InvalidRequestError(f"{request.num_choices} choices were asked for; at least 1 can be given")
        if request.stop_strings and self._codec is None:
            raise InvalidRequestError(
                f"{self._model.name} has no tokenizer: stop strings can't be found in its answers"
            )
        if not all(request.stop_strings):
            raise InvalidRequestError("a stop string is empty; it must have at least one character")
        if request.num_prompt_logprobs is not None and not 0 <= request.num_prompt_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequestError(
                f"{request.num_prompt_logprobs} alternatives for each of the prompt's tokens were asked for; "
                f"between 0 and {MAX_TOP_LOGPROBS} can be given"
            )
        if request.timeout_s is not None and not 0 < request.timeout_s < math.inf:
            raise InvalidRequestError(f"timeout_s is {request.timeout_s}; it must be above 0 seconds, and finite")
        limit = request.rules.min_new_tokens
        if request.max_new_tokens is not None and request.max_new_tokens < limit:
            raise InvalidRequestError(
                f"min_new_tokens is {limit} and max_new_tokens {request.max_new_tokens}: the least is above the most"
            )
        return self._room(len(request.prompt))

    def _room(self, num_prompt_tokens: int) -> int:
        snapshot = self._engine.snapshot()
        block_size = snapshot.stages[0].block_size if snapshot.stages else 0
        capacity = snapshot.num_blocks * block_size or self._model.context_length  # 0: no pipeline at the moment
        limit = min(self._model.context_length, capacity)
        if num_prompt_tokens > limit:
            raise PromptTooLongError(
                f"the prompt has {num_prompt_tokens} tokens; prompt and answer together may have {limit} here"
            )
        return max(1, limit - num_prompt_tokens)


class _Generation:
    """One request on its way: its sequences in the master, and the mailbox that its reader reads."""

    def __init__(
        self, engine: MasterEngine, texts: SessionTextEngine, request: GenerationRequest, stop: StopConditions
    ) -> None:
        self.mailbox: Mailbox[GenerationEvent] = Mailbox()
        self._engine = engine
        self._texts = texts
        self._request = request
        self._stop = stop
        self._choices: list[_Choice] = []
        self._num_open = request.num_choices
        self._scores: list[TokenScore] | None = None if request.num_prompt_logprobs is None else []
        self._before_scores: list[GenerationEvent] = []  # what came while the prompt was not scored to its end

    def start(self) -> None:
        """Queue every choice, or none: raises what the master raises."""
        request = self._request
        try:
            for index in range(request.num_choices):
                choice = _Choice(index, self._texts, request, self._stop, self._emit)
                choice.seq_id = self._engine.start(
                    request.prompt,
                    replace(request.sampling, seed=choice_seed(request.sampling.seed, index)),
                    self._stop,
                    functools.partial(self._take, choice),
                    rules=request.rules,
                    num_prompt_logprobs=request.num_prompt_logprobs if index == 0 else None,
                    timeout_s=request.timeout_s,
                )
                self._choices.append(choice)
        except BaseException:
            self.give_up()
            raise
        if self._scores is not None and len(request.prompt) == 1:
            self._give_scores()

    def give_up(self) -> None:
        """Nobody reads any more: abort what still runs."""
        self.mailbox.discard()
        for choice in self._choices:
            if not choice.is_over:
                choice.is_over = True
                self._engine.cancel(choice.seq_id)

    def _take(self, choice: _Choice, events: Sequence[RequestEvent]) -> None:
        try:
            for event in events:
                if not choice.is_over:
                    self._take_one(choice, event)
        except Exception as exc:  # the top of a callback: a bug here ends this request, not the others
            log.exception("request of sequence %d failed", choice.seq_id)
            self._fail(f"internal error: {exc!r}")

    def _take_one(self, choice: _Choice, event: RequestEvent) -> None:
        match event:
            case TokenEvent():
                if choice.add(event):
                    self._engine.cancel(choice.seq_id, has_all=True)  # its end comes as an event, with what was cached
            case PromptScoresEvent():
                assert self._scores is not None, "scores come only to whom asked for them"
                self._scores += event.scores
                if len(self._scores) == len(self._request.prompt) - 1:
                    self._give_scores()
            case FinishEvent():
                choice.finish(event)
                self._count_end()
            case _:
                assert_never(event)

    def _emit(self, event: GenerationEvent) -> None:
        if self._scores is None:
            self.mailbox.put(event)
        else:
            self._before_scores.append(event)

    def _give_scores(self) -> None:
        """The prompt is scored: tell, then all that had to wait for it."""
        assert self._scores is not None, "scores are given once"
        first = self._texts.scored(self._request.prompt[0], None)
        rest = (self._texts.scored(score.token_id, score.logprob, score.top) for score in self._scores)
        self.mailbox.put(PromptScored(tokens=(first, *rest)))
        self._release_waiting()

    def _release_waiting(self) -> None:
        self._scores = None
        waiting, self._before_scores = self._before_scores, []
        for event in waiting:
            self.mailbox.put(event)

    def _count_end(self) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            if self._scores is not None:  # the prompt's sequence failed before it was scored
                self._release_waiting()
            self.mailbox.close()

    def _fail(self, message: str) -> None:
        for choice in self._choices:
            if not choice.is_over:
                choice.is_over = True
                self._engine.cancel(choice.seq_id)
                self._emit(ChoiceEnd(choice=choice.index, reason=FinishReason.ERROR, message=message))
                self._count_end()


class _Choice:
    """One answer: tokens in, text and tokens out, each token with the delta in which its last character is shown.

    Counted are the tokens that were sampled up to the answer's end, an end token and the one that completed a stop
    string among them. Neither an end token nor text behind the answer's end is shown.
    """

    def __init__(
        self,
        index: int,
        texts: SessionTextEngine,
        request: GenerationRequest,
        stop: StopConditions,
        emit: Callable[[GenerationEvent], None],
    ) -> None:
        self.index = index
        self.seq_id: SeqId = 0
        self.is_over = False
        self._texts = texts
        self._request = request
        self._ends = stop.stop_token_ids
        self._emit = emit
        self._stream = texts.stream(keep_special=request.keep_special)
        self._finder = StopFinder(request.stop_strings) if request.stop_strings else None
        self._num_tokens = 0
        self._matched: str | TokenId | None = None
        self._has_stopped = False
        self._unread: list[ScoredToken] = []  # their text is not complete
        self._unshown: deque[tuple[int, int, ScoredToken]] = deque()  # with their text's first character and its end
        self._num_read = 0  # characters of text so far
        self._num_shown = 0  # of them, those that were given out

    def add(self, event: TokenEvent) -> bool:
        """Take a token; whether a stop string was found with it. Tokens behind one are dropped."""
        if self._has_stopped:
            return False
        self._num_tokens += 1
        if event.token_id in self._ends:
            self._has_stopped = True
            self._matched = event.token_id if event.token_id in self._request.stop_token_ids else None
            return False  # the master ends the sequence by itself
        token = self._texts.scored(event.token_id, event.logprob, event.top)
        if self._stream is None:
            self._emit(TextDelta(choice=self.index, text="", tokens=(token,)))
            return False
        self._unread.append(token)
        text = self._stream.push(event.token_id)
        if text:
            self._read(text)
        return self._has_stopped

    def finish(self, event: FinishEvent) -> None:
        """The sequence is over: give what is left, and the end."""
        self.is_over = True
        if self._stream is not None and not isinstance(self._matched, str):
            self._read_rest(self._stream)
        reason, message = event.reason, event.message
        if self._has_stopped:
            reason, message = FinishReason.STOP, ""
        elif not message and reason is not FinishReason.LENGTH:
            message = f"the request ended after {self._num_tokens} tokens: {reason.value}"
        self._emit(
            ChoiceEnd(
                choice=self.index,
                reason=reason,
                message=message,
                matched_stop=self._matched,
                num_output_tokens=self._num_tokens,
                num_cached_tokens=event.num_cached_tokens,
            )
        )

    def _read(self, text: str) -> None:
        """More text: look for stop strings in it and show what can be shown.

        As with end tokens, a stop string counts only once the answer has its least number of tokens.
        """
        start = self._num_read
        self._num_read += len(text)
        self._unshown.extend((start, self._num_read, token) for token in self._unread)
        self._unread.clear()
        if self._finder is None or self._num_tokens < self._request.rules.min_new_tokens:
            self._show(text)
            return
        text, stop = self._finder.push(text)
        if stop is None:
            self._show(text)
            return
        self._has_stopped = True
        self._matched = stop
        end = self._num_shown + len(text) + (len(stop) if self._request.include_stop else 0)
        # A token that has a part of its text on this side belongs to the answer.
        self._unshown = deque((first, min(last, end), token) for first, last, token in self._unshown if first < end)
        self._show(text + stop if self._request.include_stop else text)

    def _read_rest(self, stream: TextStream) -> None:
        rest = stream.flush()
        if rest:
            self._read(rest)
        if isinstance(self._matched, str):
            return
        self._unshown.extend((self._num_read, self._num_read, token) for token in self._unread)
        self._unread.clear()
        self._show(self._finder.flush() if self._finder is not None else "")

    def _show(self, text: str) -> None:
        self._num_shown += len(text)
        tokens: list[ScoredToken] = []
        while self._unshown and self._unshown[0][1] <= self._num_shown:
            tokens.append(self._unshown.popleft()[2])
        if text or tokens:
            self._emit(TextDelta(choice=self.index, text=text, tokens=tuple(tokens)))
