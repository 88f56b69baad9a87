"""Text as the API gets it, through the real pipeline: each request's is what the whole model gives for it alone."""

import asyncio
import contextlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_whole
from tiny_tokenizers import MAKERS
from transformers import AutoTokenizer

from shardwright.engine import ChoiceEnd, GenerationRequest, PromptScored, TextDelta
from shardwright.errors import InvalidRequestError, PromptTooLongError, QueueFullError
from shardwright.model.sampling import sample
from shardwright.runtime.text_engine import choice_seed
from shardwright.types import FinishReason, Grammar, GrammarKind, SamplingParams, TokenRules

FAMILIES = {"llama": "byte-level", "gemma3_text": "gemma's way"}  # with their tokenizers
END = 2  # of both
UNKNOWN = 3  # ids of the model that stand for no token


@dataclass(frozen=True)
class Model:
    """A whole model with a tokenizer."""

    model: object
    tokenizer: object
    folder: Path

    @property
    def vocab_size(self):
        return self.model.config.vocab_size


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Makes a tiny model with a tokenizer, once for each family."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(f"serving_{family}")
            MAKERS[FAMILIES[family]](folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            assert tokenizer.eos_token_id == END
            whole = save_whole(family, folder, vocab_size=len(tokenizer) + UNKNOWN, eos_token_id=END)
            made[family] = Model(model=whole.model, tokenizer=tokenizer, folder=folder)
        return made[family]

    return make


@pytest.fixture
def llama(make_model):
    return make_model("llama")


def prompt_of(length, seed):
    """Random tokens, none of them special."""
    return tuple(np.random.default_rng(seed).integers(3, 300, size=length).tolist())


# --- what the whole model says -----------------------------------------------------------------------


def generate(whole, prompt, max_new_tokens, *, ends=(END,), **options):
    """`transformers`' own greedy answer, the end token with it."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = whole.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
            **options,
        )
    return out[0, len(prompt) :].tolist()


def logits_of(whole, tokens):
    """Logits behind each token of a text, [tokens, vocabulary], without any cache."""
    with torch.inference_mode():
        return whole.model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


def walk(whole, prompt, max_new_tokens, choose):
    """Token by token: `choose` gets the logits, the output so far and the position of the next token."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(int(choose(logits_of(whole, tokens)[-1], tokens[len(prompt) :], len(tokens))))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :]


# --- what the engine says ----------------------------------------------------------------------------


@dataclass
class Reply:
    """All that came of one choice."""

    text: str = ""
    tokens: list = field(default_factory=list)
    end: ChoiceEnd | None = None

    @property
    def ids(self):
        return [token.token_id for token in self.tokens]


async def read(reader, *, stop_after=None):
    """Follow a request, all its choices; give up after so many deltas."""
    replies = {}
    num_deltas = 0
    async for event in reader:
        if isinstance(event, TextDelta):
            reply = replies.setdefault(event.choice, Reply())
            assert reply.end is None, "nothing comes after a choice's end"
            reply.text += event.text
            reply.tokens += event.tokens
            num_deltas += 1
            if num_deltas == stop_after:
                await reader.aclose()
        elif isinstance(event, ChoiceEnd):
            reply = replies.setdefault(event.choice, Reply())
            assert reply.end is None, "one end a choice"
            reply.end = event
    return replies


async def ask(session, request):
    """The reply of a request with one choice."""
    async with asyncio.timeout(60):
        return (await read(await session.text_engine.generate(request)))[0]


async def ask_all(session, requests):
    """All at once."""
    return await asyncio.gather(*(ask(session, request) for request in requests))


def shown(whole, tokens, *, ends=(END,)):
    """What a client sees of these tokens: no end token, the tokenizer's own text."""
    kept = tokens[:-1] if tokens and tokens[-1] in ends else tokens
    return kept, whole.tokenizer.decode(kept, skip_special_tokens=True)


async def all_blocks_free(session):
    async with asyncio.timeout(10):
        while (now := session.engine.snapshot()).num_free_blocks != now.num_blocks:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)
    assert (now.num_running, now.num_waiting) == (0, 0)


# --- whatever runs together --------------------------------------------------------------------------


def random_mix(rng):
    """Requests with their moments and aborts: some prompts begin alike, some are the same, some are long."""
    stem = prompt_of(rng.integers(8, 24), rng.integers(1 << 30))
    mix = []
    for _ in range(rng.integers(7, 11)):
        own = prompt_of(rng.integers(1, 20), rng.integers(1 << 30))
        request = GenerationRequest(
            prompt=(own, stem + own, stem)[rng.integers(3)],
            max_new_tokens=int(rng.integers(1, 24)),
            ignore_eos=bool(rng.random() < 0.3),
            num_choices=int(rng.choice([1, 1, 1, 2, 3])),
        )
        stop_after = (None, None, None, 0, 1, 5)[rng.integers(6)]
        mix.append((request, rng.random() * 0.3, stop_after))
    return mix


def outgrowing():
    """Requests of one moment whose prompts fit in 96 tokens together and whose answers do not."""
    return [
        (GenerationRequest(prompt=prompt_of(20, 900 + i), max_new_tokens=30, ignore_eos=True), 0.0, None)
        for i in range(3)
    ]


MIXES = {
    "room for all": {"kv_tokens": 2048, "steps_in_flight": 2},
    "few blocks": {"kv_tokens": 96, "token_budget": 13, "steps_in_flight": 2},
    "few blocks, no prefix cache": {"kv_tokens": 96, "token_budget": 13, "prefix_cache": False},
    "small queue": {"kv_tokens": 512, "max_running": 3, "token_budget": 24, "steps_in_flight": 3},
}


@pytest.mark.parametrize("settings", MIXES)
@pytest.mark.parametrize("family", FAMILIES)
async def test_each_greedy_text_is_what_it_is_alone_whatever_runs_beside_it(family, settings, make_model, open_split):
    whole = make_model(family)
    rng = np.random.default_rng([len(family), *settings.encode()])
    preemptions = 0
    async with open_split(whole.folder, 2, **MIXES[settings]) as session:

        async def run(request, delay_s, stop_after):
            await asyncio.sleep(delay_s)
            reader = await session.text_engine.generate(request)
            if stop_after == 0:
                await reader.aclose()
            return await read(reader, stop_after=stop_after)

        for _ in range(2):
            mix = random_mix(rng)
            if "few blocks" in settings:
                mix += outgrowing()
            async with asyncio.timeout(60):
                outcomes = await asyncio.gather(*(run(*entry) for entry in mix))
            for (request, _, stop_after), replies in zip(mix, outcomes, strict=True):
                ends = () if request.ignore_eos else (END,)
                expected = generate(whole, request.prompt, request.max_new_tokens, ends=ends)
                ids, text = shown(whole, expected, ends=ends)
                for reply in replies.values():
                    if reply.end is None:
                        assert stop_after is not None
                        assert reply.ids == ids[: len(reply.ids)]
                        assert text.startswith(reply.text)
                        continue
                    assert (reply.ids, reply.text) == (ids, text)
                    assert reply.end.num_output_tokens == len(expected)
                if stop_after is None:
                    assert sorted(replies) == list(range(request.num_choices))
            await all_blocks_free(session)
        preemptions = session.engine.snapshot().total_preemptions
    assert (preemptions > 0) == ("few blocks" in settings)


# --- sampling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["room for all", "few blocks"])
@pytest.mark.parametrize("penalty", [1.3, 0.8])
async def test_repetition_penalties_are_those_of_transformers(penalty, settings, llama, open_split):
    prompts = [prompt_of(5 + 6 * i, 10 + i) for i in range(5)]
    requests = [
        GenerationRequest(prompt=prompt, max_new_tokens=24, sampling=SamplingParams(repetition_penalty=penalty))
        for prompt in prompts
    ]
    async with open_split(llama.folder, 2, **MIXES[settings]) as session:
        replies = await ask_all(session, [*requests, GenerationRequest(prompt=prompts[0], max_new_tokens=24)])
    expected = [generate(llama, prompt, 24, repetition_penalty=penalty) for prompt in prompts]
    assert [reply.ids for reply in replies[:-1]] == [shown(llama, tokens)[0] for tokens in expected]
    assert replies[-1].ids == shown(llama, generate(llama, prompts[0], 24))[0]
    assert replies[0].ids != replies[-1].ids, "the penalty changes the answer"


@pytest.mark.parametrize("settings", ["room for all", "few blocks"])
async def test_presence_and_frequency_penalties_count_the_output_alone(settings, llama, open_split):
    sampling = SamplingParams(presence_penalty=1.1, frequency_penalty=0.7)

    def choose(logits, output, _):
        counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=len(logits))
        return (logits - 0.7 * counts - 1.1 * (counts > 0)).argmax()

    prompts = [prompt_of(5 + 6 * i, 20 + i) for i in range(4)]
    requests = [GenerationRequest(prompt=prompt, max_new_tokens=20, sampling=sampling) for prompt in prompts]
    async with open_split(llama.folder, 2, **MIXES[settings]) as session:
        replies = await ask_all(session, requests)
    assert [reply.ids for reply in replies] == [shown(llama, walk(llama, p, 20, choose))[0] for p in prompts]


async def test_a_logit_bias_moves_the_choice_and_stop_tokens_wait_for_the_least_number(llama, open_split):
    prompt = prompt_of(9, 30)
    plain = generate(llama, prompt, 8, ends=())
    banned = replace(
        GenerationRequest(prompt=prompt, max_new_tokens=8, ignore_eos=True),
        rules=TokenRules(logit_bias=((plain[0], -100.0),)),
    )
    to_end = TokenRules(logit_bias=((END, 100.0),))

    def choose(logits, output, _):
        logits = logits.clone()
        logits[plain[0]] -= 100.0
        return logits.argmax()

    async with open_split(llama.folder, 2) as session:
        bent, at_once, later = await ask_all(
            session,
            [
                banned,
                GenerationRequest(prompt=prompt, max_new_tokens=8, rules=to_end),
                GenerationRequest(prompt=prompt, max_new_tokens=8, rules=replace(to_end, min_new_tokens=5)),
            ],
        )
    assert bent.ids == walk(llama, prompt, 8, choose)
    assert (at_once.ids, at_once.end.num_output_tokens) == ([], 1)
    assert (later.end.num_output_tokens, later.end.reason) == (6, FinishReason.STOP)


@pytest.mark.parametrize("settings", ["room for all", "few blocks"])
async def test_a_seeds_text_is_the_same_alone_and_in_company_for_every_choice(settings, llama, open_split):
    sampling = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=5)
    request = GenerationRequest(prompt=prompt_of(13, 40), max_new_tokens=14, sampling=sampling, num_choices=3)
    company = [
        GenerationRequest(prompt=prompt_of(3 + 5 * i, 50 + i), max_new_tokens=20, sampling=replace(sampling, seed=i))
        for i in range(4)
    ]
    async with open_split(llama.folder, 2, **MIXES[settings]) as session:
        alone = await read(await session.text_engine.generate(request))
        both = await asyncio.gather(
            *(ask(session, other) for other in company), read_all(session, request), *(ask(session, c) for c in company)
        )
    expected = []
    for choice in range(3):
        params = replace(sampling, seed=choice_seed(5, choice))

        def choose(logits, _, position, params=params):
            return sample(logits[None], [params], [position])[0].token_id

        expected.append(shown(llama, walk(llama, request.prompt, 14, choose)))
    assert [(alone[i].ids, alone[i].text) for i in range(3)] == expected
    assert [(both[4][i].ids, both[4][i].text) for i in range(3)] == expected
    assert len({text for _, text in expected}) == 3


async def read_all(session, request):
    return await read(await session.text_engine.generate(request))


async def test_likelihoods_are_those_of_the_unmodified_logits(llama, open_split):
    prompt = prompt_of(11, 60)
    sampling = SamplingParams(temperature=0.7, repetition_penalty=1.2, num_top_logprobs=4, seed=3)
    async with open_split(llama.folder, 2) as session:
        reply = await ask(session, GenerationRequest(prompt=prompt, max_new_tokens=10, sampling=sampling))
    logprobs = logits_of(llama, [*prompt, *reply.ids]).log_softmax(-1)[len(prompt) - 1 :]
    for row, token in zip(logprobs, reply.tokens, strict=False):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
        best = row.topk(4)
        assert [other for other, _, _ in token.top] == best.indices.tolist()
        assert [likelihood for _, _, likelihood in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


# --- choices and prefixes ----------------------------------------------------------------------------


async def test_the_prompt_of_several_choices_is_computed_once(llama, open_split):
    prompt = prompt_of(41, 70)
    request = GenerationRequest(prompt=prompt, max_new_tokens=6, ignore_eos=True, num_choices=3)
    async with open_split(llama.folder, 2, token_budget=16, steps_in_flight=2) as session:
        replies = await read_all(session, request)
    expected = generate(llama, prompt, 6, ends=())
    assert [replies[i].ids for i in range(3)] == [expected] * 3
    # whole blocks of 4, and at least one token is computed to get logits
    assert [replies[i].end.num_cached_tokens for i in range(3)] == [0, 40, 40]


# --- stop strings ------------------------------------------------------------------------------------


async def test_stop_strings_end_the_text_wherever_tokens_end(llama, open_split):
    """Each piece of the text is tried as a stop string, inside tokens and across them."""
    prompt = prompt_of(9, 80)
    plain = generate(llama, prompt, 30, ends=())
    text = llama.tokenizer.decode(plain, skip_special_tokens=True)
    stops = sorted({text[start : start + length] for start in range(0, len(text) - 4, 5) for length in (1, 2, 4)})
    requests = [
        GenerationRequest(prompt=prompt, max_new_tokens=30, ignore_eos=True, stop_strings=(stop, "never there"))
        for stop in stops
    ]
    async with open_split(llama.folder, 2, kv_tokens=4096) as session:
        replies = await ask_all(session, requests)
        whole = await ask(session, replace(requests[0], stop_strings=("never there",)))
        await all_blocks_free(session)
    assert whole.text == text
    for stop, reply in zip(stops, replies, strict=True):
        assert reply.text == text[: text.find(stop)]
        assert (reply.end.reason, reply.end.matched_stop) == (FinishReason.STOP, stop)


# --- grammars ----------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("settings", ["room for all", "few blocks"])
async def test_a_json_schema_is_kept_by_a_model_that_writes_noise(settings, llama, open_split):
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps(SCHEMA))
    prompts = [prompt_of(7 + i, 90 + i) for i in range(3)]
    # No backslash: what a random model escapes is not what this test is about.
    request = GenerationRequest(
        prompt=prompts[0],
        max_new_tokens=80,
        sampling=SamplingParams(temperature=1.0, seed=2),
        rules=TokenRules(grammar=grammar),
    )
    requests = [replace(request, prompt=prompt) for prompt in prompts]
    free = [GenerationRequest(prompt=prompt_of(12, i), max_new_tokens=25) for i in range(3)]
    async with open_split(llama.folder, 2, **MIXES[settings]) as session:
        alone = [await ask(session, request) for request in requests]
        together = await ask_all(session, [*requests, *free])
    for reply in alone:
        answer = json.loads(reply.text)
        assert set(answer) == {"name", "size"}
        assert 0 <= answer["size"] <= 99
        assert len(answer["name"]) <= 5
        assert reply.end.reason is FinishReason.STOP
    assert [reply.text for reply in together[:3]] == [reply.text for reply in alone]
    assert [r.ids for r in together[3:]] == [shown(llama, generate(llama, r.prompt, 25))[0] for r in free]


async def test_a_grammar_that_can_not_be_followed_is_refused_before_it_starts(llama, open_split):
    bad = Grammar(kind=GrammarKind.REGEX, source="(")
    async with open_split(llama.folder, 1) as session:
        with pytest.raises(InvalidRequestError, match="regex"):
            await session.text_engine.generate(
                GenerationRequest(prompt=(5,), max_new_tokens=3, rules=TokenRules(grammar=bad))
            )


# --- scored prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"token_budget": 7}, {"kv_tokens": 96, "token_budget": 11}])
async def test_a_prompts_scores_are_the_whole_models(settings, llama, open_split):
    """Also where a prefix of it was computed before, and beside others."""
    prompt = prompt_of(37, 100)
    request = GenerationRequest(prompt=prompt, max_new_tokens=4, num_prompt_logprobs=3, ignore_eos=True)
    async with open_split(llama.folder, 2, **settings) as session:
        first = await ask(session, replace(request, num_prompt_logprobs=None))
        readers = [await session.text_engine.generate(request) for _ in range(2)]
        beside = ask_all(session, [GenerationRequest(prompt=prompt_of(20, i), max_new_tokens=20) for i in range(2)])
        outcomes = await asyncio.gather(*(collect(reader) for reader in readers), beside)
    rows = logits_of(llama, prompt).log_softmax(-1)
    for events in outcomes[:2]:
        scored = events[0]
        assert isinstance(scored, PromptScored)
        assert [token.token_id for token in scored.tokens] == list(prompt)
        assert scored.tokens[0].logprob is None
        for position, token in enumerate(scored.tokens[1:]):
            assert token.logprob == pytest.approx(float(rows[position][token.token_id]), abs=1e-4)
            best = rows[position].topk(3)
            assert [other for other, _, _ in token.top] == best.indices.tolist()
            assert [value for _, _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        ids = [token.token_id for event in events if isinstance(event, TextDelta) for token in event.tokens]
        assert ids == first.ids == generate(llama, prompt, 4, ends=())


async def collect(reader):
    return [event async for event in reader]


# --- limits ------------------------------------------------------------------------------------------


async def test_a_deadline_ends_a_request_with_what_it_has_and_frees_its_blocks(llama, open_split):
    request = GenerationRequest(prompt=prompt_of(20, 110), max_new_tokens=200, ignore_eos=True, timeout_s=0.15)
    async with open_split(llama.folder, 2) as session:
        reply = await ask(session, request)
        await all_blocks_free(session)
    assert reply.end.reason is FinishReason.DEADLINE
    assert reply.end.message
    expected = generate(llama, request.prompt, 200, ends=())
    assert 0 < len(reply.ids) < 200
    assert reply.ids == expected[: len(reply.ids)]
    assert reply.end.num_output_tokens == len(reply.ids)


async def test_a_full_queue_refuses_and_takes_again_when_there_is_room(llama, open_split):
    requests = [GenerationRequest(prompt=prompt_of(6, 120 + i), max_new_tokens=30, ignore_eos=True) for i in range(5)]
    async with open_split(llama.folder, 2, max_running=2, max_waiting=2) as session:
        readers = []
        with pytest.raises(QueueFullError) as refused:  # noqa: PT012  how many find a place is the scheduler's matter
            for request in requests:
                readers.append(await session.text_engine.generate(request))  # noqa: PERF401
        assert 2 <= len(readers) <= 4
        assert refused.value.retry_after_s > 0
        assert session.engine.snapshot().max_waiting == 2
        replies = await asyncio.gather(*(read(reader) for reader in readers))
        again = await ask(session, requests[0])
    expected = [generate(llama, request.prompt, 30, ends=()) for request in requests]
    assert [reply[0].ids for reply in replies] == expected[: len(readers)]
    assert again.ids == expected[0]


async def test_a_prompt_too_long_for_the_context_is_refused_with_the_numbers(llama, open_split):
    async with open_split(llama.folder, 1) as session:
        assert session.text_engine.model.context_length == 256
        with pytest.raises(PromptTooLongError, match=r"257 tokens.*256"):
            await session.text_engine.generate(GenerationRequest(prompt=(9,) * 257))


async def test_disconnects_free_every_block_and_leave_no_task(llama, open_split):
    """Before the first token, in the middle, and while the prompt is still computed in chunks."""
    async with open_split(llama.folder, 2, token_budget=8, steps_in_flight=2) as session:
        await ask(session, GenerationRequest(prompt=(9,), max_new_tokens=2))
        tasks = len(asyncio.all_tasks())
        for number in range(12):
            request = GenerationRequest(
                prompt=prompt_of(5 + 6 * number, 130 + number), max_new_tokens=150, num_choices=1 + number % 3
            )
            reader = await session.text_engine.generate(request)
            if number % 3 == 1:
                await anext(reader)
            elif number % 3 == 2:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await anext(reader)
            await reader.aclose()
        await all_blocks_free(session)
        assert len(asyncio.all_tasks()) == tasks


async def test_the_served_model_tells_what_it_is(llama, open_split):
    async with open_split(llama.folder, 2, kv_tokens=128) as session:
        engine = session.text_engine
        assert engine.model.context_length == 128
        assert (engine.model.vocab_size, engine.model.has_tokenizer) == (llama.vocab_size, True)
        assert engine.model.has_chat_template
        assert engine.model.chat_template == llama.tokenizer.chat_template
        assert engine.is_ready()
        assert engine.codec.encode("hello") == tuple(llama.tokenizer("hello")["input_ids"])
