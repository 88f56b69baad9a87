"""The last stage remembers what a sequence's next token depends on, and notices when it is told something else."""

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from byte_vocabulary import END, TOKENS, VOCABULARY

from shardwright.errors import FrameError
from shardwright.model import sampler_state
from shardwright.model.grammar import GrammarCompiler
from shardwright.model.sampler_state import SamplerStates, TokenCounts
from shardwright.types import (
    NO_RULES,
    Grammar,
    GrammarKind,
    SamplingParams,
    SequenceSetup,
    SequenceSlice,
    TokenRules,
)

PENALTY = SamplingParams(presence_penalty=1.0)
AB = TokenRules(grammar=Grammar(kind=GrammarKind.REGEX, source="a*b"))


def setup_of(*tokens, prompt=3, rules=NO_RULES, stops=frozenset({END})):
    return SequenceSetup(num_prompt_tokens=prompt, tokens=tokens, rules=rules, stop_token_ids=stops)


def part_of(*tokens, start=0, seq_id=7, sampling=PENALTY, setup=None):
    return SequenceSlice(
        seq_id=seq_id,
        start_position=start,
        token_ids=tokens,
        block_table=(0,),
        sampling=sampling,
        setup=setup,
    )


@pytest.fixture
def states():
    return SamplerStates(len(TOKENS), GrammarCompiler(VOCABULARY))


def allowed(state):
    bits = np.zeros(state.num_words, np.uint32)
    state.allow(bits)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_of_the_output_and_ids_those_of_all(seed):
    choose = np.random.default_rng(seed)
    prompt = tuple(choose.integers(5 * 4**seed, size=1 + 3 * 4**seed).tolist())
    counts, output = TokenCounts(prompt), []
    for token in choose.integers(6 * 4**seed, size=300).tolist():
        counts.add(token)
        output.append(token)
        if len(output) % 50 == 0:
            assert len(set(counts.ids.tolist())) == len(counts.ids)
            known = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
            assert known == {token: Counter(output)[token] for token in {*prompt, *output}}


def test_a_sequence_goes_on_behind_each_token_that_was_added(states):
    state = states.find(part_of(1, 2, 3, setup=setup_of(1, 2, 3)))
    for position, token in enumerate((9, 9, 4), start=3):
        state.add(token)
        assert states.find(part_of(token, start=position)) is state
    assert dict(zip(state.counts.ids.tolist(), state.counts.counts.tolist(), strict=True)) == {
        1: 0, 2: 0, 3: 0, 9: 2, 4: 1
    }  # fmt: skip


def test_the_same_tokens_in_a_new_setup_give_the_same_memory(states):
    """After a preemption: whatever was counted and matched is counted and matched again."""
    tokens = (*b"xyz", *b"aa")
    rules = replace(AB, min_new_tokens=4)
    lived = states.find(part_of(*b"xyz", setup=setup_of(*b"xyz", rules=rules)))
    for token in b"aa":
        lived.add(token)
    made = states.find(part_of(*tokens, setup=setup_of(*tokens, rules=rules)))
    assert made is not lived
    assert len(states) == 1
    for token in (*b"ab", END):
        assert made.counts.ids.tolist() == lived.counts.ids.tolist()
        assert made.counts.counts.tolist() == lived.counts.counts.tolist()
        assert made.may_stop == lived.may_stop
        assert allowed(made) == allowed(lived)
        made.add(token)
        lived.add(token)


@pytest.mark.parametrize(
    "part",
    [
        part_of(8, start=4),  # not the token that was sampled
        part_of(9, start=5),  # a token was missed
        part_of(9, start=3),
        part_of(3, start=2),  # the token before comes again
    ],
)
def test_a_slice_that_contradicts_what_was_sampled_is_refused(states, part):
    state = states.find(part_of(1, 2, 3, 5, setup=setup_of(1, 2, 3, 5)))
    state.add(9)
    with pytest.raises(FrameError, match=r"sequence 7 goes on behind token .* its last one is token 9 at 4$"):
        states.find(part)
    assert states.find(part_of(9, start=4)) is state


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (part_of(4), "sequence 7 has penalties, but came without"),
        (part_of(1, 2, setup=setup_of(1, 2, 3)), "goes on behind token 2 at 1, but its last one is token 3 at 2"),
        (part_of(1, 2, 3, setup=setup_of(1, 2, 3, prompt=4)), "a prompt of 4 among 3"),
        (part_of(1, 2, 3, setup=setup_of(1, 2, 3, prompt=0)), "a prompt of 0"),
        (part_of(1, 2, 3, setup=setup_of(1, 303, 3)), "names a token that is not one of 303"),
        (part_of(1, 2, 3, setup=setup_of(1, 2, 3, rules=TokenRules(logit_bias=((303, 1.0),)))), "not one of 303"),
        (part_of(1, 2, 3, setup=setup_of(1, 2, 3, rules=TokenRules(logit_bias=((-1, 1.0),)))), "not one of 303"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_memory(states, part, message):
    with pytest.raises(FrameError, match=message):
        states.find(part)
    assert len(states) == 0


def test_penalties_that_come_later_are_refused(states):
    state = states.find(part_of(*b"xyz", sampling=SamplingParams(), setup=setup_of(*b"xyz", rules=AB)))
    state.add(ord("a"))
    with pytest.raises(FrameError, match="had none when it began"):
        states.find(part_of(ord("a"), start=3))


def test_sequences_without_penalties_and_setup_need_no_memory(states):
    assert states.find(part_of(1, 2, sampling=SamplingParams(temperature=1.0))) is None
    assert len(states) == 0


def test_dropped_sequences_are_forgotten_and_unknown_ones_ignored(states):
    for seq_id in (1, 2):
        states.find(part_of(1, 2, 3, seq_id=seq_id, setup=setup_of(1, 2, 3)))
    states.forget((1, 99))
    assert len(states) == 1
    with pytest.raises(FrameError, match="sequence 1 has penalties"):
        states.find(part_of(5, start=3, seq_id=1))


def test_memories_are_bounded(states, monkeypatch):
    monkeypatch.setattr(sampler_state, "MAX_SEQUENCES", 2)
    for seq_id in (1, 2, 2, 1):
        states.find(part_of(1, 2, 3, seq_id=seq_id, setup=setup_of(1, 2, 3)))
    with pytest.raises(FrameError, match="sequence 3 is one too many: 2 have"):
        states.find(part_of(1, 2, 3, seq_id=3, setup=setup_of(1, 2, 3)))


def test_a_grammar_needs_a_vocabulary_and_a_source_that_compiles(states):
    part = part_of(*b"xyz", setup=setup_of(*b"xyz", rules=AB))
    with pytest.raises(FrameError, match="sequence 7 has a grammar, but this stage was given no vocabulary"):
        SamplerStates(303, None).find(part)
    wrong = TokenRules(grammar=Grammar(kind=GrammarKind.REGEX, source="("))
    with pytest.raises(FrameError, match="sequence 7: the regex can't be used"):
        states.find(part_of(*b"xyz", setup=setup_of(*b"xyz", rules=wrong)))


def test_trouble_with_a_grammar_is_logged_once_and_ends_the_output(states, caplog):
    state = states.find(part_of(*b"xyz", setup=setup_of(*b"xyz", rules=AB)))
    with caplog.at_level(logging.WARNING):
        for token in b"aab" + b"x":
            state.add(token)
        assert allowed(state) == [END]
        assert allowed(state) == [END]
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "sequence 7 can't follow its grammar behind token 4 of its output and ends there"
    ]
