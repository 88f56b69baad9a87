"""The last stage's answers: rules and penalties over a sequence's life, scores of prompts, and what it refuses."""

import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import split_models as lab
import torch
from tiny_models import prompt_of
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shardwright.errors import CheckpointError, FrameError
from shardwright.model.sampling import uniform
from shardwright.model.vocabulary import encode_vocabulary
from shardwright.types import (
    GREEDY,
    NO_RULES,
    Grammar,
    GrammarKind,
    SamplingParams,
    SequenceSetup,
    SequenceSlice,
    StepInput,
    TokenRules,
)

END, START, PAD = 2, 1, 0
TOKENS = [b"<pad>", b"<s>", b"</s>", *(bytes([c]) for c in range(32, 127)), b"\n", b'{"', b'": ', b"true", b"12", b'"}']
BLOB = encode_vocabulary(TOKENS, special_ids=[PAD, START, END], end_id=END)  # the models' heads have 151 rows


@dataclass
class Served:
    """A sequence as a master would keep it."""

    seq_id: int
    prompt: list[int]
    sampling: SamplingParams
    rules: TokenRules
    most: int
    stops: frozenset[int] = frozenset({END})
    blocks: tuple[int, ...] = ()
    computed: int = 0
    has_setup: bool = False

    def __post_init__(self):
        self.tokens = list(self.prompt)

    @property
    def output(self):
        return self.tokens[len(self.prompt) :]

    @property
    def is_done(self):
        return len(self.output) == self.most or bool(self.output and self.output[-1] in self.stops)

    def next_slice(self, most):
        end = min(len(self.tokens), self.computed + most)
        samples = end == len(self.tokens)
        setup = None
        if samples and not self.has_setup and (self.rules or self.sampling.has_penalties):
            self.has_setup = True
            setup = SequenceSetup(
                num_prompt_tokens=len(self.prompt),
                tokens=tuple(self.tokens),
                rules=self.rules,
                stop_token_ids=self.stops,
            )
        part = SequenceSlice(
            seq_id=self.seq_id,
            start_position=self.computed,
            token_ids=tuple(self.tokens[self.computed : end]),
            block_table=self.blocks,
            sampling=self.sampling if samples else None,
            setup=setup,
        )
        self.computed = end
        return part

    def preempt(self):
        self.computed, self.has_setup = 0, False


def forward(split, *slices, dropped=()):
    """One step through all stages; the last one's output."""
    step = StepInput(epoch=1, step=1, slices=slices, dropped=dropped)
    tensors = {}
    for stage in split.stages:
        output = stage.forward(step, tensors)
        tensors = output.tensors
    return output


def serve(split, sequences, *, chunk=7, preempt_every=0):
    """Generate for all at once; from time to time one sequence loses its blocks and its memory."""
    room = split.num_blocks // len(sequences)
    for place, sequence in enumerate(sequences):
        sequence.blocks = tuple(range(place * room, (place + 1) * room))
    by_id = {sequence.seq_id: sequence for sequence in sequences}
    steps = 0
    dropped = ()
    while any(not sequence.is_done for sequence in sequences):
        running = [sequence for sequence in sequences if not sequence.is_done]
        steps += 1
        if preempt_every and steps % preempt_every == 0 and steps < 15 * preempt_every:  # else long ones never end
            lost = running[steps % len(running)]
            lost.preempt()
            dropped = (*dropped, lost.seq_id)
        for out in forward(split, *(s.next_slice(chunk) for s in running), dropped=dropped).tokens:
            by_id[out.seq_id].tokens.append(out.token_id)
        dropped = tuple(s.seq_id for s in running if s.is_done)
    forward(split, SequenceSlice(seq_id=-1, start_position=0, token_ids=(5,), block_table=(0,), sampling=None),
            dropped=dropped)  # fmt: skip
    assert len(split.stages[-1]._states) == 0
    return [sequence.output for sequence in sequences]


def reference_answer(model, asked):
    """`transformers`' whole model and processors, and an inversion of what they leave at the same random numbers."""
    p, rules = asked.sampling, asked.rules
    processors = LogitsProcessorList()
    if rules.min_new_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(len(asked.prompt), rules.min_new_tokens, list(asked.stops)))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(p.temperature)] if p.temperature else [])
    warpers += [TopKLogitsWarper(p.top_k)] if p.top_k else []
    warpers += [TopPLogitsWarper(p.top_p)] if p.top_p < 1.0 else []
    warpers += [MinPLogitsWarper(p.min_p)] if p.min_p else []
    tokens = list(asked.prompt)
    while len(tokens) < len(asked.prompt) + asked.most:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            scores = model(ids, use_cache=False).logits[:, -1].clone()
        for token, bias in rules.logit_bias:
            scores[0, token] += bias
        scores = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, scores)
        output = tokens[len(asked.prompt) :]
        for token in set(output):
            scores[0, token] -= output.count(token) * p.frequency_penalty + p.presence_penalty
        scores = processors(ids, scores)
        if p.temperature:
            probabilities = torch.softmax(warpers(ids, scores.double()), dim=-1)[0]
            ranked = p.top_k or p.top_p < 1.0 or p.min_p
            order = (
                probabilities.sort(descending=True, stable=True).indices if ranked else torch.arange(len(probabilities))
            )
            cumulated = torch.cumsum(probabilities[order], dim=0)
            place = int(torch.searchsorted(cumulated, uniform(p.seed, len(tokens)), right=True))
            tokens.append(int(order[place]))
        else:
            tokens.append(int(scores.argmax()))
        if tokens[-1] in asked.stops:
            break
    return tokens[len(asked.prompt) :]


def mixed_company():
    """Sequences of all kinds, of which none is alike."""
    warm = SamplingParams(temperature=1.2, top_k=60, top_p=0.95, min_p=0.01, seed=5)
    kinds = [
        (GREEDY, NO_RULES),
        (SamplingParams(repetition_penalty=1.4), NO_RULES),
        (SamplingParams(presence_penalty=1.5, frequency_penalty=0.7), NO_RULES),
        (replace(warm, repetition_penalty=1.1, frequency_penalty=-0.3), NO_RULES),
        (warm, TokenRules(logit_bias=((END, 6.0), (40, -100.0)), min_new_tokens=9)),
        (SamplingParams(temperature=0.8, seed=9), TokenRules(logit_bias=((END, 9.0),), min_new_tokens=4)),
        (SamplingParams(presence_penalty=-2.0), TokenRules(logit_bias=((77, 3.0), (78, 3.0)))),
        (warm, NO_RULES),
    ]
    return [
        Served(seq_id=20 + i, prompt=prompt_of(3 + 4 * i, i), sampling=sampling, rules=rules, most=14)
        for i, (sampling, rules) in enumerate(kinds)
    ]


@pytest.fixture(scope="module")
def whole(make_whole):
    return make_whole("llama")


@pytest.mark.parametrize("num_stages", [1, 3])
def test_all_kinds_of_sampling_together_give_what_transformers_processors_give_each_alone(whole, num_stages):
    """Batched, in chunks, preempted: the memory of the last stage is right at every token."""
    expected = [reference_answer(whole.model, asked) for asked in mixed_company()]
    split = lab.SplitModel(whole.folder, num_stages, num_blocks=160)
    assert serve(split, mixed_company()) == expected
    assert serve(split, mixed_company(), chunk=3, preempt_every=3) == expected
    assert [serve(split, [asked])[0] for asked in mixed_company()] == expected
    assert any(len(output) < 14 for output in expected)  # some end by themselves


SHAPE = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


def is_shape(text):
    value = json.loads(text)
    return list(value) == ["ok", "n"] and type(value["ok"]) is bool and 0 <= value["n"] <= 999


GRAMMARS = [
    (Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps(SHAPE)), is_shape),
    (Grammar(kind=GrammarKind.REGEX, source="[a-f]{2,9}-(yes|no)"), re.compile("[a-f]{2,9}-(yes|no)").fullmatch),
    (
        Grammar(kind=GrammarKind.LARK, source='start: "(" start ")" | /[0-9]{1,3}/'),
        re.compile(r"\(*\d{1,3}\)*").fullmatch,
    ),
    (Grammar(kind=GrammarKind.JSON_OBJECT), lambda text: isinstance(json.loads(text), dict)),
]


def guided_company():
    """Each grammar with each kind of sampling: a random model's wishes are as far from a grammar as can be."""
    closing = tuple(sorted((TOKENS.index(text), 4.0) for text in (b'"', b"}", b"]", b")", b'"}')))
    kinds = [
        (SamplingParams(temperature=1.5), {}),
        (SamplingParams(temperature=1.5, repetition_penalty=1.2, presence_penalty=0.3), {}),
        (SamplingParams(temperature=1.5, top_k=20, top_p=0.9), {"min_new_tokens": 6}),
        (GREEDY, {}),
    ]
    sequences = []
    for place, (grammar, _) in enumerate(GRAMMARS):
        for kind, (sampling, more) in enumerate(kinds):
            seed = 4 * place + kind
            rules = TokenRules(grammar=grammar, logit_bias=((END, 3.0), *closing), **more)
            seeded = replace(sampling, seed=seed)
            sequences.append(
                Served(seq_id=seed, prompt=prompt_of(4 + kind, seed), sampling=seeded, rules=rules, most=230)
            )
    return sequences


def test_random_models_write_what_their_grammars_say_and_stop(make_whole):
    """Also under penalties, biases and a least length, batched as alone, cut or not, preempted or not."""
    whole = make_whole("qwen3", max_position_embeddings=512)
    split = lab.SplitModel(whole.folder, 2, num_blocks=16 * 64, vocabulary=BLOB)
    together = serve(split, guided_company())
    ended = 0
    for place, output in enumerate(together):
        text = b"".join(TOKENS[token] for token in output if token > END).decode()
        if output[-1] == END:
            ended += 1
            assert END not in output[:-1]
            assert GRAMMARS[place // 4][1](text), text
        assert max(output) < len(TOKENS)  # rows of the head that are no token are never chosen
    assert ended >= 13  # any JSON object may go on for longer than there is room
    assert serve(split, guided_company(), preempt_every=4) == together
    one = lab.SplitModel(whole.folder, 1, num_blocks=64, vocabulary=BLOB)
    for place in (0, 5, 10, 14):
        assert serve(one, [guided_company()[place]]) == [together[place]]


def test_a_least_length_holds_in_a_grammar_that_could_end_before(whole):
    split = lab.SplitModel(whole.folder, 1, vocabulary=BLOB)
    grammar = Grammar(kind=GrammarKind.REGEX, source="[a-z]+")
    for least in (0, 1, 2, 7):
        rules = TokenRules(grammar=grammar, logit_bias=((END, 100.0),), min_new_tokens=least)
        (output,) = serve(split, [Served(seq_id=1, prompt=[5, 6], sampling=GREEDY, rules=rules, most=20)])
        assert len(output) == max(least, 1) + 1
        assert output[-1] == END


def test_a_damaged_vocabulary_is_refused_when_the_stage_is_built(whole):
    with pytest.raises(CheckpointError, match="vocabulary"):
        lab.SplitModel(whole.folder, 1, vocabulary=BLOB[:-1])


def test_a_grammar_without_a_vocabulary_is_refused_by_name(whole):
    split = lab.SplitModel(whole.folder, 1)
    sequence = Served(seq_id=31, prompt=[5, 6], sampling=GREEDY, rules=TokenRules(grammar=GRAMMARS[0][0]), most=2)
    with pytest.raises(FrameError, match="sequence 31 has a grammar, but this stage was given no vocabulary"):
        serve(split, [sequence])


def scored_slices(prompt, chunk, *, num_top, blocks, seq_id=1, sampling=GREEDY):
    for start in range(0, len(prompt), chunk):
        end = min(start + chunk, len(prompt))
        yield SequenceSlice(
            seq_id=seq_id,
            start_position=start,
            token_ids=tuple(prompt[start:end]),
            block_table=blocks,
            sampling=sampling if end == len(prompt) else None,
            num_prompt_logprobs=num_top,
            next_token_id=prompt[end] if end < len(prompt) else None,
        )


@pytest.mark.parametrize("chunk", [1, 5, 8, 64])
@pytest.mark.parametrize(("family", "num_stages"), [("llama", 1), ("llama", 3), ("gemma2", 3)])
def test_a_prompts_scores_are_the_whole_models_log_probabilities(make_whole, family, num_stages, chunk):
    """In chunks, beside sequences that sample, that are scored too, and that do neither."""
    whole = make_whole(family)
    prompt, other = prompt_of(24, 3), prompt_of(30, 4)
    with torch.inference_mode():
        expected = torch.log_softmax(whole.model(torch.tensor([prompt])).logits[0].double(), dim=-1)
        other_scores = torch.log_softmax(whole.model(torch.tensor([other])).logits[0].double(), dim=-1)
    split = lab.SplitModel(whole.folder, num_stages)
    scores, beside = {}, {}
    blocks = tuple(range(6))
    for place, part in enumerate(scored_slices(prompt, chunk, num_top=3, blocks=blocks)):
        company = SequenceSlice(
            seq_id=2, start_position=place, token_ids=(other[place],), block_table=tuple(range(8, 16)),
            sampling=GREEDY if place % 2 else None, num_prompt_logprobs=0, next_token_id=other[place + 1],
        )  # fmt: skip
        silent = replace(company, seq_id=3, block_table=tuple(range(16, 24)), sampling=None, num_prompt_logprobs=None)
        output = forward(split, company, part, silent)
        assert [out.seq_id for out in output.tokens] == [2] * (place % 2) + [1] * (part.sampling is not None)
        for out in output.tokens:
            row = expected[-1] if out.seq_id == 1 else other_scores[place]
            assert out.token_id == int(row.argmax())
            assert out.logprob == pytest.approx(float(row.max()), abs=5e-5)
        for found in output.prompt_scores:
            into = scores if found.seq_id == 1 else beside
            into |= dict(enumerate(found.scores, start=found.first_position))
    assert sorted(scores) == list(range(1, len(prompt)))
    for position, found in scores.items():
        row = expected[position - 1]
        assert found.token_id == prompt[position]
        assert found.logprob == pytest.approx(float(row[prompt[position]]), abs=5e-5)
        ids = row.topk(3).indices.tolist()
        assert [token for token, _ in found.top] == ids
        assert [logprob for _, logprob in found.top] == pytest.approx(row[ids].tolist(), abs=5e-5)
    for position, found in beside.items():
        assert found.top == ()
        assert found.logprob == pytest.approx(float(other_scores[position - 1, other[position]]), abs=5e-5)


def test_a_step_that_only_scores_gives_scores_and_one_that_wants_nothing_ends_early(whole):
    split = lab.SplitModel(whole.folder, 2)
    heads = []
    split.stages[-1]._model.get_submodule("lm_head").register_forward_hook(lambda *_: heads.append(1))
    part = next(scored_slices([5, 6, 7, 8], 2, num_top=0, blocks=(0,)))
    output = forward(split, part)
    assert [len(found.scores) for found in output.prompt_scores] == [2]
    assert output.tokens == ()
    assert heads == [1]
    last = SequenceSlice(
        seq_id=1, start_position=3, token_ids=(8,), block_table=(0,), sampling=None, num_prompt_logprobs=5
    )
    assert forward(split, last).prompt_scores == ()  # nothing follows the prompt's last token
    assert forward(split, replace(last, num_prompt_logprobs=None)).prompt_scores == ()
    assert heads == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"next_token_id": 151}, "goes on with a token that is not one of 151"),
        ({"next_token_id": -1}, "goes on with a token"),
        ({"num_prompt_logprobs": 21}, "wants 21 likeliest"),
        ({"num_prompt_logprobs": -1}, "wants -1 likeliest"),
        ({"sampling": SamplingParams(frequency_penalty=0.1)}, "sequence 1 has penalties, but came without"),
        (
            {"setup": SequenceSetup(num_prompt_tokens=2, tokens=(5, 6), rules=NO_RULES, stop_token_ids=frozenset())},
            "needs none yet",
        ),
    ],
)
def test_slices_that_contradict_themselves_are_refused_before_anything_is_computed(whole, changes, message):
    split = lab.SplitModel(whole.folder, 1)
    part = replace(next(scored_slices([5, 6, 7], 2, num_top=0, blocks=(0,))), **changes)
    before = [cache.keys.clone() for cache in split.stages[0]._caches]
    with pytest.raises(FrameError, match=message):
        forward(split, part)
    for cache, keys in zip(split.stages[0]._caches, before, strict=True):
        assert torch.equal(cache.keys, keys)


def test_the_likeliest_tokens_come_with_the_token(whole):
    with torch.inference_mode():
        row = torch.log_softmax(whole.model(torch.tensor([[5, 9, 11]])).logits[0, -1].double(), dim=-1)
    split = lab.SplitModel(whole.folder, 3)
    part = SequenceSlice(
        seq_id=1, start_position=0, token_ids=(5, 9, 11), block_table=(0,),
        sampling=SamplingParams(temperature=3.0, seed=1, num_top_logprobs=20),
    )  # fmt: skip
    (out,) = forward(split, part).tokens
    assert [token for token, _ in out.top] == row.topk(20).indices.tolist()
    assert [logprob for _, logprob in out.top] == pytest.approx(row.topk(20).values.tolist(), abs=5e-5)
    assert out.logprob == pytest.approx(float(row[out.token_id]), abs=5e-5)
    assert np.isfinite(out.logprob)
