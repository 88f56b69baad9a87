"""Whatever a model prefers, an output that follows a grammar matches it, and ends where the grammar does."""

import json
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from byte_vocabulary import END, OTHER_END, TOKENS, TOOL, VOCABULARY, text_of

from shardwright.errors import InvalidRequestError
from shardwright.model.grammar import GrammarCompiler, GrammarMatcher
from shardwright.model.vocabulary import Vocabulary
from shardwright.types import Grammar, GrammarKind

ANY_OBJECT = Grammar(kind=GrammarKind.JSON_OBJECT)


def schema(value):
    return Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps(value))


def regex(source):
    return Grammar(kind=GrammarKind.REGEX, source=source)


def lark(source):
    return Grammar(kind=GrammarKind.LARK, source=source)


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(VOCABULARY)


def allowed(matcher, **how):
    bits = np.zeros(matcher.num_words, np.uint32)
    matcher.allow(bits, **how)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


def feed(matcher, text):
    """Give a text byte by byte, each of which must be allowed; or stop at the first that is not."""
    for place, byte in enumerate(text.encode()):
        if byte not in allowed(matcher):
            return text.encode()[:place].decode()
        matcher.accept(byte)
    return text


def wander(matcher, seed, *, most=600):
    """Random tokens among those allowed, with a liking for what closes things; until a stop token."""
    choose = np.random.default_rng(seed)
    likes = np.ones(len(TOKENS))
    likes[[*b'"}],', END, OTHER_END]] = 40
    tokens = []
    while len(tokens) < most:
        ids = allowed(matcher)
        weights = likes[ids] / likes[ids].sum()
        tokens.append(int(choose.choice(ids, p=weights)))
        matcher.accept(tokens[-1])
        if tokens[-1] in {END, OTHER_END}:
            assert matcher.trouble is None
            return text_of(tokens)
    pytest.fail(f"no end after {most} tokens: {text_of(tokens)!r}")


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b\u00e4", 3]}, "minItems": 1, "maxItems": 4},
        "mail": {"type": ["null", "boolean"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_person(text):
    value = json.loads(text)
    assert list(value) in (["name", "age", "tags"], ["name", "age", "tags", "mail"])
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 130
    assert 1 <= len(value["tags"]) <= 4
    assert all(tag in ("a", "b\u00e4", 3) for tag in value["tags"])
    assert value.get("mail") in (None, True, False)


def is_float(text):
    assert re.fullmatch(r"[1-9]\d{0,3}\.\d{2} (EUR|\$)", text)


def is_sum(text):
    assert re.fullmatch(r"[0-9(]([0-9+()]*[0-9)])?", text)
    assert isinstance(eval(text, {"__builtins__": {}}), int)  # noqa: S307  digits, plus and brackets


GRAMMARS = {
    "object": (ANY_OBJECT, lambda text: isinstance(json.loads(text), dict) or pytest.fail(text)),
    "schema": (schema(PERSON), is_person),
    "regex": (regex(r"[1-9]\d{0,3}\.\d{2} (EUR|\$)".replace(r"\d", "[0-9]")), is_float),
    "lark": (lark('start: sum\nsum: part ("+" part)*\npart: /[1-9][0-9]?/ | "(" sum ")"'), is_sum),
}


@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_random_output_is_valid_and_ends_with_a_stop_token(compiler, kind):
    grammar, check = GRAMMARS[kind]
    texts = [wander(compiler.matcher(grammar, {END, OTHER_END}), seed) for seed in range(25)]
    for text in texts:
        check(text)
    assert len(set(texts)) > 5


def test_exactly_the_stop_tokens_end_a_grammar(compiler):
    for stops in ({END}, {OTHER_END}, {END, OTHER_END}):
        matcher = compiler.matcher(regex("ab?"), stops)
        assert allowed(matcher) == [ord("a"), TOKENS.index(b"ab")]
        matcher.accept(ord("a"))
        assert allowed(matcher) == sorted({ord("b"), *stops})
        matcher.accept(ord("b"))
        assert allowed(matcher) == sorted(stops)
        matcher.accept(max(stops))
        assert allowed(matcher) == sorted(stops)
        assert matcher.trouble is None


def test_without_stop_tokens_the_texts_end_is_the_grammars(compiler):
    """A request that ignores the end goes on with it until its length is reached."""
    for stops in (set(), {5000, -1}):
        matcher = compiler.matcher(regex("a"), stops)
        matcher.accept(ord("a"))
        for _ in range(3):
            assert allowed(matcher) == [END]
            matcher.accept(END)


def test_a_stop_token_that_is_text_does_not_end_an_output_before_the_grammar(compiler):
    matcher = compiler.matcher(regex("a\n*b"), {ord("\n"), END})
    matcher.accept(ord("a"))
    assert allowed(matcher) == [ord("b")]
    matcher.accept(ord("b"))
    assert allowed(matcher) == [ord("\n"), END]


def test_a_special_token_that_a_grammar_names_is_allowed_also_as_a_stop_token(compiler):
    matcher = compiler.matcher(lark('start: <|tool|> "ab" <|end|>'), {OTHER_END, END})
    assert allowed(matcher) == [TOOL]
    matcher.accept(TOOL)
    for byte in b"ab":
        assert allowed(matcher)[0] == byte
        matcher.accept(byte)
    assert allowed(matcher) == [OTHER_END]
    matcher.accept(OTHER_END)
    assert allowed(matcher) == [END, OTHER_END]
    assert matcher.trouble is None


def test_before_the_least_length_a_stop_token_comes_only_where_nothing_else_can(compiler):
    matcher = compiler.matcher(regex("ab?"), {END})
    matcher.accept(ord("a"))
    assert allowed(matcher, may_stop=False) == [ord("b")]
    matcher.accept(ord("b"))
    assert allowed(matcher, may_stop=False) == [END]


def test_whitespace_is_bounded_in_json(compiler):
    """One blank, or one new line with its indentation: small models can't lose themselves in more."""
    matcher = compiler.matcher(ANY_OBJECT, {END})
    assert feed(matcher, '{\n  "a": [1, 2, {}],\n  "b" : "x"\n}') == '{\n  "a": [1, 2, {}],\n  "b" : "x"\n}'
    assert allowed(matcher) == [END]
    for text, good in (("{  ", "{ "), ("{\n\n", "{\n"), ("{\n" + " " * 30, "{\n" + " " * 24), ("{\t", "{"), (" {", "")):
        assert feed(compiler.matcher(ANY_OBJECT, {END}), text) == good


def test_a_schema_may_choose_its_own_whitespace(compiler):
    compact = schema({"type": "object", "x-guidance": {"whitespace_flexible": False}})
    assert feed(compiler.matcher(compact, {END}), '{"a":1}') == '{"a":1}'
    assert feed(compiler.matcher(compact, {END}), '{"a": 1}') == '{"a":'


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (regex("a("), "regex can't be used: regex parse error:.*unclosed group"),
        (regex("(?=a)b"), "look-around"),
        (regex(r"(a)\1"), "backreferences"),
        (regex(r"[^\s\S]"), "nothing that the model can write"),
        (regex("(" * 30_000 + ")" * 30_000), "nest"),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, source="{"), "not JSON"),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, source="[" * 50_000), "not JSON"),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, source="[1]"), "not a JSON object"),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, source='{"x-guidance": 3}'), "not a JSON object"),
        (schema({"type": "text"}), "json_schema can't be used: Invalid type: text$"),
        (schema({"not": {"type": "string"}}), r'Unimplemented keys: \["not"\]$'),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (schema({"type": "string", "format": "no-such"}), "no-such"),
        (schema({"$ref": "http://elsewhere/schema"}), "does not fetch"),
        (schema({"x-guidance": {"no_such_option": 1}}), "no_such_option"),
        (lark("begin: /a/"), "no start rule"),
        (lark("start: other"), r'at 1\(8\): unknown name: "other"\n   1 . start: other\n +\^$'),
        (lark("start: a\na: a"), "nothing that the model can write"),
        (lark('start: <|unheard-of|> "x"'), "unknown special token"),
        (lark("start[temperature=0.5]: /a/"), "'temperature' is not supported"),
        (lark('start: x\nx[capture, stop="b"]: /a*/'), "'stop' is not supported"),
        (lark("start: " + "(" * 9000 + "/a/" + ")" * 9000), "deeply nested"),
        (lark("start: A\nA: /(\\p{L}[a-z]*x){400}/ & /(.*\\p{Lu}.*){300}/ & ~/(.*ab.*){200}/"), "fuel"),
        (schema({"type": "string", "pattern": "^(.*a.*b.*c){50}$", "maxLength": 5000}), "Unable to determine"),
        (schema({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1500)}}), "max is 1000"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_with_its_reason(compiler, grammar, message):
    with pytest.raises(InvalidRequestError, match=f"(?s){message}") as refused:
        compiler.check(grammar)
    assert len(str(refused.value)) < 1200
    assert "no_forcing" not in str(refused.value)


def test_a_model_without_an_end_token_follows_no_grammar():
    with pytest.raises(InvalidRequestError, match="end of a text"):
        GrammarCompiler(Vocabulary(tokens=(b"a",), special_ids=frozenset(), end_id=None)).check(regex("a"))


def test_an_empty_regex_matches_the_empty_output_alone(compiler):
    assert allowed(compiler.matcher(regex(""), {END})) == [END]


def test_text_without_a_choice_is_tokenised_as_the_model_likes(compiler):
    """Also where the grammar asks for forcing: its tokens would be another tokenizer's."""
    for option in ("", '\n%llguidance {"no_forcing": false}'):
        matcher = compiler.matcher(lark(f'start: "name"{option}'), {END})
        assert allowed(matcher) == [ord("n"), TOKENS.index(b"name")]


def test_compiled_grammars_are_remembered_and_the_oldest_forgotten():
    compiler = GrammarCompiler(VOCABULARY, max_compiled=3)
    for letter in "abc":
        compiler.check(regex(letter))
    first = compiler._compiled[regex("a")]
    compiler.check(regex("a"))
    compiler.check(regex("d"))
    assert compiler._compiled[regex("a")] is first
    assert [grammar.source for grammar in compiler._compiled] == ["c", "a", "d"]
    compiler.matcher(regex("b"), {END}).accept(ord("b"))
    assert allowed(compiler.matcher(regex("b"), {END})) == [ord("b")]  # one sequence's output is not another's


def test_threads_share_a_compiler():
    compiler = GrammarCompiler(VOCABULARY, max_compiled=2)
    wrong = []

    def work(seed):
        for i in range(20):
            text = wander(compiler.matcher(regex(f"x{(seed + i) % 5}[ab]*"), {END}), i)
            if not text.startswith(f"x{(seed + i) % 5}"):
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_output_that_the_grammar_does_not_allow_leaves_the_stop_tokens(compiler):
    matcher = compiler.matcher(regex("abc"), {END})
    matcher.accept(ord("x"))
    assert matcher.trouble
    assert allowed(matcher) == [END]
    matcher.accept(ord("a"))
    assert allowed(matcher) == [END]


def test_a_grammar_that_gets_too_complex_leaves_the_stop_tokens(compiler):
    """So ambiguous that the ways to read the output grow with its length; each token stays cheap enough for others."""
    matcher = compiler.matcher(lark('start: s\ns: s s | "a" | "b" s | s "a"'), {END})
    longest_s = 0.0
    for token in range(3000):
        started = time.thread_time()
        ids = allowed(matcher)
        if matcher.trouble:
            break
        assert ids
        matcher.accept((ord("a"), ord("b"))[token % 2])
        longest_s = max(longest_s, time.thread_time() - started)
    assert "max is 1000" in matcher.trouble
    assert "\n" not in matcher.trouble
    assert allowed(matcher) == [END]
    assert longest_s < 0.5


def test_a_grammar_that_needs_tokens_that_the_model_lacks_is_refused_or_ends():
    """A tokenizer without the bytes of all characters."""
    letters = (b"a", b"b", b"c", b"</s>")
    compiler = GrammarCompiler(Vocabulary(tokens=letters, special_ids=frozenset({3}), end_id=3))
    with pytest.raises(InvalidRequestError, match="nothing that the model can write"):
        compiler.check(regex("x"))
    matcher = compiler.matcher(regex("ax"), {3})
    matcher.accept(0)
    assert allowed(matcher) == [3]
    assert matcher.trouble


def test_a_grammar_is_checked_without_torch():
    """The master has none."""
    code = "import sys, shardwright.model.grammar; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_matcher_says_which_words_it_needs(compiler):
    assert isinstance(compiler.matcher(ANY_OBJECT, {END}), GrammarMatcher)
    assert compiler.matcher(ANY_OBJECT, {END}).num_words == -(-len(TOKENS) // 32)
