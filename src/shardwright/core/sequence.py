"""One request inside the master: its tokens, how far they are computed, and the blocks that hold their K and V."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from shardwright.types import BlockId, FinishReason, SamplingParams, SeqId, StopConditions, TokenId


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
    max_tokens: int = 0  # prompt and output at which it ends by length; set when the limits are known
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    block_table: list[BlockId] = field(default_factory=list)
    num_registered_blocks: int = 0  # leading blocks of the table that the prefix cache knows
    prefix_node: int = 0  # the prefix cache's name for the content of those blocks
    num_cached_tokens: int | None = None  # reused at the first admission; None before it
    last_turn: int = 0  # rises with each step that carries it: who has waited longest has the lowest

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.tokens)

    @property
    def num_missing_tokens(self) -> int:
        """Known tokens that no step has computed or is computing."""
        return len(self.tokens) - self.num_computed_tokens - self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Tokens that the client has been given."""
        return len(self.tokens) - self.num_prompt_tokens

    def append(self, token_id: TokenId) -> FinishReason | None:
        """Add a sampled token and say whether it is the last one, and why."""
        self.tokens.append(token_id)
        if token_id in self.stop.stop_token_ids:
            return FinishReason.STOP
        if len(self.tokens) >= self.max_tokens:
            return FinishReason.LENGTH
        return None

    def forget_computed(self) -> None:
        """Back to the start: every token has to be computed again. The blocks must be given back already."""
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.block_table = []
        self.num_registered_blocks = 0
        self.prefix_node = 0

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
