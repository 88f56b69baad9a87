"""What the last stage remembers of sequences whose next token depends on more than one row of logits.

Those are sequences with penalties, which count earlier tokens, and with rules: biases, a least length, a grammar. A
sequence's `SequenceSetup` starts its memory, each token sampled for it is added, and a step's `dropped` ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from shardwright.errors import FrameError, InvalidRequestError
from shardwright.model.grammar import Bits, GrammarCompiler, GrammarMatcher
from shardwright.types import SeqId, SequenceSetup, SequenceSlice, TokenId

MAX_SEQUENCES = 65536

log = logging.getLogger(__name__)


class TokenCounts:
    """The different tokens of a sequence, and how often each is in its output."""

    def __init__(self, prompt: tuple[TokenId, ...]) -> None:
        known = np.unique(np.asarray(prompt, np.int64))
        self._size = len(known)
        self._slots: dict[TokenId, int] = {token: slot for slot, token in enumerate(known.tolist())}
        self._ids = np.resize(known, 2 * self._size + 64)
        self._counts = np.zeros(len(self._ids), np.float32)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens of prompt and output, each once."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` is in the output; 0 for those of the prompt alone."""
        return self._counts[: self._size]

    def add(self, token: TokenId) -> None:
        """Count a token of the output."""
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = self._size
            self._size += 1
            if self._size > len(self._ids):
                self._ids = np.resize(self._ids, 2 * self._size)
                self._counts = np.concatenate([self._counts, np.zeros(self._size + 1, np.float32)])
            self._ids[slot] = token
        self._counts[slot] += 1


class SequenceState:
    """One sequence's memory: what its tokens and rules mean for its next token."""

    def __init__(
        self, seq_id: SeqId, setup: SequenceSetup, *, vocabulary: int, counted: bool, matcher: GrammarMatcher | None
    ) -> None:
        rules = setup.rules
        self.counts = TokenCounts(setup.tokens[: setup.num_prompt_tokens]) if counted else None
        self.bias_ids = np.array([token for token, _ in rules.logit_bias], np.int64)
        self.bias_values = np.array([bias for _, bias in rules.logit_bias], np.float32)
        self.stop_ids = np.array(sorted(i for i in setup.stop_token_ids if 0 <= i < vocabulary), np.int64)
        self.num_tokens = setup.num_prompt_tokens
        self.last_token = setup.tokens[setup.num_prompt_tokens - 1]
        self._seq_id = seq_id
        self._num_new_tokens = 0
        self._min_new_tokens = rules.min_new_tokens
        self._matcher = matcher
        for token in setup.tokens[setup.num_prompt_tokens :]:
            self.add(token)

    @property
    def has_grammar(self) -> bool:
        """Whether `allow` limits the next token."""
        return self._matcher is not None

    @property
    def may_stop(self) -> bool:
        """Whether the output is as long as it has to be."""
        return self._num_new_tokens >= self._min_new_tokens

    @property
    def num_words(self) -> int:
        """Words of the set that `allow` writes."""
        assert self._matcher is not None
        return self._matcher.num_words

    def allow(self, bits: Bits) -> None:
        """Write the set of tokens that the grammar allows next into `bits` [num_words]."""
        assert self._matcher is not None
        had_trouble = self._matcher.trouble is not None
        self._matcher.allow(bits, may_stop=self.may_stop)
        self._tell(self._matcher, had_trouble=had_trouble)

    def add(self, token: TokenId) -> None:
        """Go on behind a token of the output."""
        self.num_tokens += 1
        self.last_token = token
        self._num_new_tokens += 1
        if self.counts is not None:
            self.counts.add(token)
        if self._matcher is not None:
            had_trouble = self._matcher.trouble is not None
            self._matcher.accept(token)
            self._tell(self._matcher, had_trouble=had_trouble)

    def _tell(self, matcher: GrammarMatcher, *, had_trouble: bool) -> None:
        """One sequence's grammar fails no step of others: its output ends there, and the worker's log says why."""
        if matcher.trouble is not None and not had_trouble:
            log.warning(
                "sequence %s can't follow its grammar behind token %s of its output and ends there: %s",
                self._seq_id,
                self._num_new_tokens,
                matcher.trouble,
            )


class SamplerStates:
    """The memories of all sequences that have one, for a model of `vocabulary` tokens."""

    def __init__(self, vocabulary: int, compiler: GrammarCompiler | None) -> None:
        self._vocabulary = vocabulary
        self._compiler = compiler
        self._states: dict[SeqId, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def forget(self, dropped: Iterable[SeqId]) -> None:
        """Drop the memories of these sequences; those without one are no error."""
        for seq_id in dropped:
            self._states.pop(seq_id, None)

    def find(self, part: SequenceSlice) -> SequenceState | None:
        """The memory of a sequence that samples at the end of this slice; None for one that needs none.

        A setup starts it anew. Raises `FrameError` where the slice and the memory contradict each other.
        """
        assert part.sampling is not None
        counted = part.sampling.has_penalties
        if part.setup is not None:
            state = self._start(part, part.setup, counted=counted)
        else:
            known = self._states.get(part.seq_id)
            if known is None:
                if counted:
                    raise FrameError(f"sequence {part.seq_id} has penalties, but came without its earlier tokens")
                return None
            state = known
            if counted and state.counts is None:
                raise FrameError(f"sequence {part.seq_id} has penalties now, but had none when it began")
        if state.num_tokens != part.context_length or state.last_token != part.token_ids[-1]:
            raise FrameError(
                f"sequence {part.seq_id} goes on behind token {part.token_ids[-1]} at {part.context_length - 1},"
                f" but its last one is token {state.last_token} at {state.num_tokens - 1}"
            )
        self._states[part.seq_id] = state
        return state

    def _start(self, part: SequenceSlice, setup: SequenceSetup, *, counted: bool) -> SequenceState:
        seq_id = part.seq_id
        if seq_id not in self._states and len(self._states) >= MAX_SEQUENCES:
            raise FrameError(f"sequence {seq_id} is one too many: {MAX_SEQUENCES} have penalties or rules already")
        if not 0 < setup.num_prompt_tokens <= len(setup.tokens):
            raise FrameError(
                f"sequence {seq_id} has a prompt of {setup.num_prompt_tokens} among {len(setup.tokens)} tokens"
            )
        named = (*setup.tokens, *(token for token, _ in setup.rules.logit_bias))
        if not 0 <= min(named) <= max(named) < self._vocabulary:
            raise FrameError(f"sequence {seq_id} names a token that is not one of {self._vocabulary}")
        return SequenceState(
            seq_id, setup, vocabulary=self._vocabulary, counted=counted, matcher=self._matcher(seq_id, setup)
        )

    def _matcher(self, seq_id: SeqId, setup: SequenceSetup) -> GrammarMatcher | None:
        grammar = setup.rules.grammar
        if grammar is None:
            return None
        if self._compiler is None:
            raise FrameError(f"sequence {seq_id} has a grammar, but this stage was given no vocabulary to follow it")
        try:
            return self._compiler.matcher(grammar, setup.stop_token_ids)
        except InvalidRequestError as exc:  # the master checks them before
            raise FrameError(f"sequence {seq_id}: {exc}") from exc
