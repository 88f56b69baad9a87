"""One request inside the master: its tokens, how far they are computed, and the blocks that hold their K and V."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from shardwright.core.block_pool import PrefixKey
from shardwright.types import (
    NO_RULES,
    BlockId,
    FinishReason,
    SamplingParams,
    SeqId,
    SequenceSetup,
    StopConditions,
    TokenId,
    TokenRules,
)


class SequenceStatus(enum.Enum):
    """Where a sequence is; it is in exactly one of these."""

    WAITING = "waiting"  # holds no block
    RUNNING = "running"  # may hold blocks, may be in a step
    FINISHED = "finished"  # its client has been told; a step in flight may still carry it


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A sequence's tokens (prompt, then output) and counters.

    Computed tokens catch up with known tokens: there is no prefill and no decode, only how many are missing.
    `num_computed_tokens` counts those whose step is back, `num_in_flight` those that the one step carries which
    the sequence may be in.
    """

    seq_id: SeqId
    tokens: list[TokenId]
    num_prompt_tokens: int
    sampling: SamplingParams
    stop: StopConditions
    rules: TokenRules = NO_RULES
    num_prompt_logprobs: int | None = None  # set: the client wants to know how likely its prompt's tokens are
    timeout_s: float | None = None  # from its submission to its last token
    has_setup: bool = field(init=False)  # the last stage has to know more of it than a row of logits
    max_tokens: int = 0  # prompt and output at which it ends by length; set when the limits are known
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    block_table: list[BlockId] = field(default_factory=list)
    num_registered_blocks: int = 0  # leading blocks of the table that the prefix cache knows
    prefix_node: int = 0  # the prefix cache's name for the content of those blocks
    num_cached_tokens: int | None = None  # reused at the first admission; None before it
    last_turn: int = 0  # rises with each step that carries it: who has waited longest has the lowest
    is_set_up: bool = False  # a step that is sent gave the last stage its setup, and none told it to forget that
    next_scored: int = 1  # the first position of the prompt whose score the client has not been given
    awaited: PrefixKey | None = None  # the block that another sequence was computing when this one asked for it
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.has_setup = self.sampling.has_penalties or bool(self.rules)

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.tokens)

    @property
    def num_missing_tokens(self) -> int:
        """Known tokens that no step has computed or is computing."""
        return len(self.tokens) - self.num_computed_tokens - self.num_in_flight

    @property
    def is_decode(self) -> bool:
        """Whether all but its last token are computed, so that its next step gives a token for one."""
        return len(self.tokens) - self.num_computed_tokens == 1

    @property
    def num_output_tokens(self) -> int:
        """Tokens that the client has been given."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def has_run(self) -> bool:
        """Whether it was admitted at least once."""
        return self.num_cached_tokens is not None

    @property
    def has_unscored(self) -> bool:
        """Whether the client still waits for scores of its prompt. Nothing is sampled before they are all there."""
        return self.num_prompt_logprobs is not None and self.next_scored < self.num_prompt_tokens

    @property
    def num_reusable_tokens(self) -> int:
        """How many leading tokens need not be computed if their K and V are there.

        The last known one has to be, or there would be no logits to go on from, and so has the one before the first
        position that lacks its score.
        """
        return self.next_scored - 1 if self.has_unscored else len(self.tokens) - 1

    def setup(self) -> SequenceSetup:
        """What the last stage has to know before it samples."""
        return SequenceSetup(
            num_prompt_tokens=self.num_prompt_tokens,
            tokens=tuple(self.tokens),
            rules=self.rules,
            stop_token_ids=self.stop.stop_token_ids,
        )

    def append(self, token_id: TokenId) -> FinishReason | None:
        """Add a sampled token and say whether it is the last one, and why."""
        self.tokens.append(token_id)
        if token_id in self.stop.stop_token_ids:
            return FinishReason.STOP
        if len(self.tokens) >= self.max_tokens:
            return FinishReason.LENGTH
        return None

    def forget_computed(self) -> None:
        """Back to the start: every token has to be computed again. The blocks must be given back already.

        What the client has been given stays given: tokens, and scores of its prompt.
        """
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.block_table = []
        self.num_registered_blocks = 0
        self.prefix_node = 0
        self.is_set_up = False
        self.awaited = None

    def check(self, block_size: int) -> None:
        """Assert what must hold between any two events."""
        assert self.num_computed_tokens >= 0, self
        assert self.num_in_flight >= 0, self
        assert self.num_computed_tokens + self.num_in_flight <= len(self.tokens), self
        assert self.num_prompt_tokens <= len(self.tokens), self
        if self.status is SequenceStatus.RUNNING:
            covered = len(self.block_table) * block_size
            assert self.num_computed_tokens + self.num_in_flight <= covered, self
            assert self.num_computed_tokens < len(self.tokens), self
            assert self.num_registered_blocks * block_size <= self.num_computed_tokens, self
        elif self.status is SequenceStatus.WAITING:
            assert not self.block_table, self
            assert self.num_computed_tokens == 0, self
            assert self.num_in_flight == 0, self
            assert not self.is_set_up, self
        assert self.has_setup or not self.is_set_up, self
        if self.has_unscored:
            assert self.num_output_tokens == 0, self
            assert self.num_computed_tokens < self.next_scored, self
