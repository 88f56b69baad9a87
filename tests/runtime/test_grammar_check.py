"""Grammars are checked with the model's own vocabulary, which is read once, when the first one comes."""

import pytest

from shardwright.errors import InvalidRequestError
from shardwright.model.vocabulary import encode_vocabulary
from shardwright.runtime.grammar_check import GrammarCheck
from shardwright.types import Grammar, GrammarKind

LETTERS = [bytes([byte]) for byte in range(256)] + [b"</s>", b"<tail>"]


def regex(source):
    return Grammar(kind=GrammarKind.REGEX, source=source)


@pytest.fixture
def reads():
    return []


@pytest.fixture
def check(reads):
    def read():
        reads.append(1)
        return encode_vocabulary(LETTERS, special_ids=[256, 257], end_id=256)

    return GrammarCheck(read, vocab_size=len(LETTERS))


def test_a_grammar_that_can_be_followed_passes_and_the_vocabulary_is_read_once(check, reads):
    assert reads == []
    check(regex("[0-9]+"))
    check(Grammar(kind=GrammarKind.JSON_OBJECT))
    assert reads == [1]


def test_one_that_can_not_is_refused_with_the_reason(check):
    with pytest.raises(InvalidRequestError, match="regex can't be used"):
        check(regex("("))
    check(regex("a"))


def test_only_tokens_that_the_model_has_count():
    """An end token beyond the head's rows can never be chosen: no grammar could end."""
    blob = encode_vocabulary(LETTERS, special_ids=[256], end_id=256)
    with pytest.raises(InvalidRequestError, match="end of a text"):
        GrammarCheck(lambda: blob, vocab_size=256)(regex("a"))


def test_a_model_whose_tokens_are_no_bytes_of_their_own_follows_none():
    check = GrammarCheck(lambda: b"", vocab_size=10)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="can't be held to a grammar"):
            check(regex("a"))
