"""Values that can't travel are refused where they are made."""

import pytest

from shardwright.errors import InvalidRequestError
from shardwright.types import MAX_GRAMMAR_CHARS, Grammar, GrammarKind


def test_a_grammar_with_half_a_surrogate_pair_is_refused_with_its_place():
    with pytest.raises(InvalidRequestError, match=r"the regex holds half a surrogate pair, U\+D83D, at character 2"):
        Grammar(kind=GrammarKind.REGEX, source="ab\ud83d")


def test_a_grammar_that_is_too_long_is_refused_with_the_bound():
    with pytest.raises(InvalidRequestError, match=f"{MAX_GRAMMAR_CHARS + 1} characters; at most {MAX_GRAMMAR_CHARS}"):
        Grammar(kind=GrammarKind.LARK, source="x" * (MAX_GRAMMAR_CHARS + 1))
