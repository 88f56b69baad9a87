"""A stage without a model: its KV slots hold what stands at each position, and its answers are hashes of what it reads.

As with real keys and values, what a position's slot holds depends on the token and on everything before it. Every
stage writes the step's positions into its own slots and reads the whole context back through the block table. The
first stage's hash travels on; a later stage that reads anything else spoils it. So the last stage's answer is right
exactly when every stage held the whole sequence, each position at its place.

The last stage keeps what it was told of sequences with penalties or rules, counts their tokens on by itself, as the
real one must, and hashes them into what it picks: a setup that is stale, missing or doubled becomes a wrong token.
"""

from dataclasses import dataclass

from shardwright.core.events import Submit
from shardwright.types import (
    GREEDY,
    NO_RULES,
    PromptScores,
    SamplingParams,
    SequenceSlice,
    StepInput,
    TokenOut,
    TokenRules,
    TokenScore,
)

VOCABULARY = 61
SPOILT = -1
EMPTY = -1


def extend(context: list[int], token: int) -> None:
    """Append what the next position's slot holds."""
    context.append(hash((context[-1] if context else 0, len(context), token)))


def next_token(context: list[int], sampling: SamplingParams) -> int:
    """The token that the "model" gives after this context: a pure function of all of it."""
    return hash((sampling.seed, *context)) % VOCABULARY


def likeliest(node: int, count: int) -> tuple[tuple[int, float], ...]:
    """The best tokens after a context whose last slot holds `node`."""
    return tuple((hash((node, rank)) % VOCABULARY, -0.25 * rank) for rank in range(count))


def score(node: int, token: int, num_top: int) -> TokenScore:
    """How likely a prompt's token is after a context whose last slot holds `node`."""
    return TokenScore(token_id=token, logprob=-0.125 * (hash((node, token)) % 100), top=likeliest(node, num_top))


@dataclass(slots=True)
class HeldState:
    """What the last stage keeps of one sequence."""

    tokens: list[int]
    num_prompt_tokens: int
    rules: TokenRules
    stop: frozenset[int]

    def choose(self, token: int) -> int:
        """What becomes of the model's token under rules and penalties: it depends on all that is kept."""
        token = hash((token, self.num_prompt_tokens, self.rules.logit_bias, *self.tokens)) % VOCABULARY
        if len(self.tokens) - self.num_prompt_tokens < self.rules.min_new_tokens:
            while token in self.stop:
                token = (token + 1) % VOCABULARY
        self.tokens.append(token)
        return token


def expected_answer(submit: Submit) -> list[int]:
    """What a whole model would answer: tokens up to the most, or up to and with the first stop token."""
    context: list[int] = []
    for token in submit.prompt:
        extend(context, token)
    stop = submit.stop.stop_token_ids
    held = HeldState(list(submit.prompt), len(submit.prompt), submit.rules, stop)
    has_state = submit.sampling.has_penalties or submit.rules
    answer: list[int] = []
    while len(answer) < submit.stop.max_new_tokens and not (answer and answer[-1] in stop):
        token = next_token(context, submit.sampling)
        answer.append(held.choose(token) if has_state else token)
        extend(context, answer[-1])
    return answer


def expected_scores(submit: Submit) -> list[TokenScore]:
    """What a whole model would say of the prompt's tokens, from the second on."""
    if submit.num_prompt_logprobs is None:
        return []
    context: list[int] = []
    scores = []
    for token in submit.prompt:
        if context:
            scores.append(score(context[-1], token, submit.num_prompt_logprobs))
        extend(context, token)
    return scores


class FakeStage:
    """One stage's slots, and on the last one what it keeps of sequences."""

    def __init__(self, num_blocks: int, block_size: int, *, max_running: int = 1) -> None:
        self._block_size = block_size
        self._slots = [EMPTY] * (num_blocks * block_size)
        self._max_running = max_running
        self._held: dict[int, HeldState] = {}
        self._contexts: list[list[int]] = []  # of the step that was computed last

    def compute(self, step: StepInput, activation: tuple[int, ...]) -> tuple[int, ...]:
        """One number for each slice: the token that would follow, or `SPOILT`. The first stage gets no activation."""
        size = self._block_size
        slots = self._slots
        answers = []
        self._contexts = []
        for index, part in enumerate(step.slices):
            context: list[int] = []
            for block in part.block_table:
                context += slots[block * size : block * size + size]
            del context[part.start_position :]
            for token in part.token_ids:
                extend(context, token)
            for position in range(part.start_position, part.context_length):
                slots[part.block_table[position // size] * size + position % size] = context[position]
            answer = next_token(context, part.sampling or GREEDY)
            if activation and activation[index] != answer:
                answer = SPOILT
            answers.append(answer)
            self._contexts.append(context)
        return tuple(answers)

    def sample(
        self, step: StepInput, activation: tuple[int, ...]
    ) -> tuple[tuple[TokenOut, ...], tuple[PromptScores, ...]]:
        """The last stage's answer to the step that it computed just now."""
        for seq_id in step.dropped:
            assert seq_id in self._held, f"step {step.step} drops sequence {seq_id}, of which nothing is kept"
            del self._held[seq_id]
        tokens = []
        scores = []
        for part, answer, context in zip(step.slices, activation, self._contexts, strict=True):
            if part.num_prompt_logprobs is not None:
                scores.append(self._score(part, answer, context))
            if part.sampling is None:
                assert part.setup is None, f"{part} does not sample"
                continue
            token = self._choose(part, answer)
            top = likeliest(context[-1], part.sampling.num_top_logprobs)
            tokens.append(TokenOut(seq_id=part.seq_id, token_id=token, logprob=-0.5, top=top))
        assert len(self._held) <= self._max_running, f"step {step.step}: sequences {list(self._held)} are kept"
        return tuple(tokens), tuple(scores)

    def _choose(self, part: SequenceSlice, answer: int) -> int:
        seq_id = part.seq_id
        setup = part.setup
        if setup is not None:
            assert seq_id not in self._held, f"sequence {seq_id} is set up twice"
            assert part.sampling.has_penalties or setup.rules != NO_RULES, f"sequence {seq_id} needs no setup"
            self._held[seq_id] = HeldState(
                list(setup.tokens), setup.num_prompt_tokens, setup.rules, setup.stop_token_ids
            )
        held = self._held.get(seq_id)
        if held is None:
            assert not part.sampling.has_penalties, f"sequence {seq_id} has penalties and no setup"
            return answer
        known = tuple(held.tokens[part.start_position :])
        assert known == part.token_ids, f"sequence {seq_id}: {part.token_ids} come where {known} are kept"
        token = held.choose(answer)
        return token if answer != SPOILT else SPOILT

    def _score(self, part: SequenceSlice, answer: int, context: list[int]) -> PromptScores:
        following = [*part.token_ids[1:], *(() if part.next_token_id is None else (part.next_token_id,))]
        assert following, f"{part} asks for scores of no token"
        first = part.start_position
        scores = [
            score(context[first + index] if answer != SPOILT else SPOILT, token, part.num_prompt_logprobs)
            for index, token in enumerate(following)
        ]
        return PromptScores(seq_id=part.seq_id, first_position=first + 1, scores=tuple(scores))
