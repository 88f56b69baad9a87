"""A stage without a model: its KV slots hold what stands at each position, and its answers are hashes of what it reads.

As with real keys and values, what a position's slot holds depends on the token and on everything before it. Every
stage writes the step's positions into its own slots and reads the whole context back through the block table. The
first stage's hash travels on; a later stage that reads anything else spoils it. So the last stage's answer is right
exactly when every stage held the whole sequence, each position at its place.
"""

from shardwright.types import SamplingParams, StepInput, TokenOut

VOCABULARY = 61
SPOILT = -1
EMPTY = -1


def extend(context: list[int], token: int) -> None:
    """Append what the next position's slot holds."""
    context.append(hash((context[-1] if context else 0, len(context), token)))


def next_token(context: list[int], sampling: SamplingParams) -> int:
    """The token that the "model" gives after this context: a pure function of all of it."""
    return hash((sampling.seed, *context)) % VOCABULARY


def expected_answer(prompt: tuple[int, ...], sampling: SamplingParams, count: int, stop: frozenset[int]) -> list[int]:
    """What a whole model would answer: at most `count` tokens, up to and with the first stop token."""
    context: list[int] = []
    for token in prompt:
        extend(context, token)
    answer: list[int] = []
    while len(answer) < count and not (answer and answer[-1] in stop):
        answer.append(next_token(context, sampling))
        extend(context, answer[-1])
    return answer


class FakeStage:
    """One stage's slots."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._slots = [EMPTY] * (num_blocks * block_size)

    def compute(self, step: StepInput, activation: tuple[int, ...]) -> tuple[int, ...]:
        """One number for each slice: the token that would follow, or `SPOILT`. The first stage gets no activation."""
        size = self._block_size
        slots = self._slots
        answers = []
        for index, part in enumerate(step.slices):
            context: list[int] = []
            for block in part.block_table:
                context += slots[block * size : block * size + size]
            del context[part.start_position :]
            for token in part.token_ids:
                extend(context, token)
            for position in range(part.start_position, part.context_length):
                slots[part.block_table[position // size] * size + position % size] = context[position]
            answer = next_token(context, part.sampling or SamplingParams())
            if activation and activation[index] != answer:
                answer = SPOILT
            answers.append(answer)
        return tuple(answers)


def sampled(step: StepInput, activation: tuple[int, ...]) -> tuple[TokenOut, ...]:
    """The last stage's tokens: one for each slice that asks for one."""
    return tuple(
        TokenOut(seq_id=part.seq_id, token_id=answer, logprob=-0.5)
        for part, answer in zip(step.slices, activation, strict=True)
        if part.sampling is not None
    )
