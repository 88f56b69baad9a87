"""Chunks, taken blocks, reused prefixes, overlapping steps, aborts and end tokens leave every answer as it was."""

import itertools
from dataclasses import replace

import pytest
from live_sessions import Ask, ask_all
from tiny_models import greedy_answer, prompt_of

from shardwright.types import FinishReason

FAMILIES = ["llama", "gemma3_text", "qwen3_moe"]  # plain; windows shorter than the prompts; a mixture of experts


def whole_answers(whole, asks):
    return [greedy_answer(whole.model, ask.prompt, ask.max_new_tokens) for ask in asks]


def tokens_of(replies):
    return [reply.tokens for reply in replies]


def finish_reasons(replies):
    return [reply.finish.reason for reply in replies]


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
async def test_steps_that_overlap_and_chunks_that_interleave_change_nothing(steps_in_flight, make_whole, open_split):
    whole = make_whole("llama")
    asks = [Ask(prompt=prompt_of(5 + 7 * i, i), max_new_tokens=6 + i, after=4 * i) for i in range(7)]
    async with open_split(whole.folder, 3, steps_in_flight=steps_in_flight, token_budget=9) as session:
        replies = await ask_all(session, asks)
        assert session.engine.snapshot().max_steps_in_flight == steps_in_flight
    assert tokens_of(replies) == whole_answers(whole, asks)


@pytest.mark.parametrize("family", FAMILIES)
async def test_sequences_that_lose_their_blocks_again_and_again_go_on_where_they_were(family, make_whole, open_split):
    """Five sequences that want 230 positions share 64."""
    whole = make_whole(family)
    asks = [Ask(prompt=prompt_of(10 + 3 * i, 40 + i), max_new_tokens=30) for i in range(5)]
    async with open_split(whole.folder, 2, token_budget=13, kv_tokens=64, steps_in_flight=2) as session:
        replies = await ask_all(session, asks)
        snapshot = session.engine.snapshot()
    assert snapshot.total_preemptions >= 3
    assert snapshot.num_free_blocks == snapshot.num_blocks == 16
    assert tokens_of(replies) == whole_answers(whole, asks)


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_reused_prefix_gives_the_same_answer_as_a_computed_one(family, make_whole, open_split):
    """A shared beginning, the same prompt again, and a prompt that goes on from an answer."""
    whole = make_whole(family)
    first = Ask(prompt=prompt_of(21, 50), max_new_tokens=10)
    (answer,) = whole_answers(whole, [first])
    later = [
        replace(first, after=10),
        Ask(prompt=[*first.prompt[:17], *prompt_of(5, 51)], max_new_tokens=8, after=10),
        Ask(prompt=[*first.prompt, *answer, *prompt_of(3, 52)], max_new_tokens=8, after=10),
        Ask(prompt=prompt_of(21, 53), max_new_tokens=8, after=10),
    ]
    async with open_split(whole.folder, 3, token_budget=8) as session:
        replies = await ask_all(session, [first, *later])
        snapshot = session.engine.snapshot()
    assert tokens_of(replies) == [answer, *whole_answers(whole, later)]
    # whole blocks of 4; the last token of a prompt is always computed, and the last of an answer never was
    assert [reply.finish.num_cached_tokens for reply in replies] == [0, 20, 16, 28, 0]
    assert snapshot.total_cached_tokens == 64


async def test_without_prefix_reuse_nothing_is_taken_from_others_and_the_answers_are_the_same(make_whole, open_split):
    whole = make_whole("llama")
    first = Ask(prompt=prompt_of(21, 50), max_new_tokens=10)
    async with open_split(whole.folder, 2, prefix_cache=False) as session:
        replies = await ask_all(session, [first, replace(first, after=10)])
    assert [reply.finish.num_cached_tokens for reply in replies] == [0, 0]
    assert tokens_of(replies) == whole_answers(whole, [first, first])


@pytest.mark.parametrize("family", FAMILIES)
async def test_aborts_in_the_middle_leave_the_others_as_they_are(family, make_whole, open_split):
    """One gives up while its prompt is cut in chunks, two while they decode; others then get their blocks."""
    whole = make_whole(family)
    asks = [
        Ask(prompt=prompt_of(12, 60), max_new_tokens=24),
        Ask(prompt=prompt_of(9, 61), max_new_tokens=40, abort_at=3),
        Ask(prompt=prompt_of(5, 62), max_new_tokens=20),
        Ask(prompt=prompt_of(16, 63), max_new_tokens=40, abort_at=11),
        Ask(prompt=prompt_of(19, 64), max_new_tokens=12, after=20),
        Ask(prompt=prompt_of(7, 65), max_new_tokens=12, after=40),
    ]
    async with open_split(whole.folder, 3, token_budget=7, kv_tokens=96, steps_in_flight=3) as session:
        _, gives_up = await session.submit(tuple(prompt_of(60, 66)), asks[0].sampling, session.stop_conditions(
            max_new_tokens=5, ignore_eos=True
        ))  # fmt: skip
        replies = await ask_all(session, asks[:1])
        await gives_up.aclose()
        replies += await ask_all(session, asks[1:])
        snapshot = session.engine.snapshot()
    expected = whole_answers(whole, asks)
    for ask, reply, answer in zip(asks, replies, expected, strict=True):
        if ask.abort_at is None:
            assert reply.tokens == answer
            assert reply.finish.reason is FinishReason.LENGTH
        else:
            assert reply.tokens == answer[: ask.abort_at]
            assert reply.finish.reason is FinishReason.ABORT
    assert snapshot.num_free_blocks == snapshot.num_blocks


async def test_an_answer_ends_at_an_end_token_and_the_others_go_on(make_whole, open_split):
    whole = make_whole("llama")
    asks = [Ask(prompt=prompt_of(8 + i, 70 + i), max_new_tokens=20) for i in range(4)]
    answers = whole_answers(whole, asks)
    ends = frozenset({answers[0][6], answers[2][3]})

    def cut(answer):
        before = list(itertools.takewhile(lambda token: token not in ends, answer))
        return answer[: len(before) + 1]

    expected = [cut(answer) for answer in answers]
    assert len({len(answer) for answer in expected}) > 1
    async with open_split(whole.folder, 2, steps_in_flight=2) as session:
        replies = await ask_all(session, [replace(ask, stop_token_ids=ends) for ask in asks])
    assert tokens_of(replies) == expected
    assert finish_reasons(replies) == [
        FinishReason.STOP if answer[-1] in ends else FinishReason.LENGTH for answer in expected
    ]


async def test_an_answer_ends_where_the_models_context_does(make_whole, open_split):
    whole = make_whole("llama", max_position_embeddings=32)
    ask = Ask(prompt=prompt_of(20, 80), max_new_tokens=30)
    async with open_split(whole.folder, 2) as session:
        (reply,) = await ask_all(session, [ask])
    assert reply.tokens == greedy_answer(whole.model, ask.prompt, 12)
    assert reply.finish.reason is FinishReason.LENGTH
