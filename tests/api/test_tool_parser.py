"""Tool calls out of text: every style, at every cut, whole and in a stream."""

import json

import pytest

from shardwright.api.schemas import FunctionDefinition
from shardwright.api.tool_parser import CallArguments, CallStart, Content, ToolParser, parse_answer
from shardwright.api.tools import (
    FUNCTION_GEMMA,
    GEMMA3,
    GEMMA4,
    HERMES,
    LLAMA3,
    STYLES,
    call_grammar,
    call_text,
    choose_style,
    describe_tools,
    without_tool_roles,
)
from shardwright.types import Grammar, GrammarKind

NAMES = ("weather", "time")
ARGUMENTS = {"city": 'Zürich "}</tool_call>{', "days": [1, 2.5, {"a": None}], "ok": True, "empty": {}}
MARKED = {"city": "Zürich, }{ the :city", "days": [1, 2.5, {"a": None}], "ok": True, "empty": {}, "none": []}


def arguments_of(style):
    return ARGUMENTS if style.arguments_key else MARKED


def streamed(style, pieces, *, several=True):
    """Content, calls and the order of what came, from text in pieces."""
    parser = ToolParser(style, NAMES, streaming=True, several=several)
    content, calls, came = "", [], []
    out = [piece for text in pieces for piece in parser.feed(text)] + parser.finish()
    for piece in out:
        came.append(type(piece))
        match piece:
            case Content():
                content += piece.text
            case CallStart():
                assert piece.index == len(calls)
                calls.append([piece.name, ""])
            case CallArguments():
                assert piece.index == len(calls) - 1
                calls[-1][1] += piece.text
    return content, [(name, text) for name, text in calls], came


def cuts(text):
    """The text whole, by characters, and cut at every place."""
    yield [text]
    yield list(text)
    yield from ([text[:at], text[at:]] for at in range(1, len(text)))


@pytest.mark.parametrize("style", STYLES.values(), ids=str)
def test_one_call_is_found_wherever_the_text_is_cut(style):
    arguments = arguments_of(style)
    text = call_text(style, "weather", arguments)
    for pieces in cuts(text):
        content, calls, came = streamed(style, pieces)
        assert content == ""
        assert [(name, json.loads(given)) for name, given in calls] == [("weather", arguments)]
        assert came[0] is CallStart
    content, calls = parse_answer(style, NAMES, text, several=True)
    assert (content, [(name, json.loads(given)) for name, given in calls]) == ("", [("weather", arguments)])


@pytest.mark.parametrize("style", STYLES.values(), ids=str)
def test_two_calls_are_found_and_only_one_if_only_one_is_wanted(style):
    text = style.separator.join([call_text(style, "weather", {"a": 1}), call_text(style, "time", {})])
    both = [("weather", {"a": 1}), ("time", {})]
    for several, expected in ((True, both), (False, both[:1])):
        for pieces in ([text], list(text)):
            content, calls, _ = streamed(style, pieces, several=several)
            assert (content, [(name, json.loads(given)) for name, given in calls]) == ("", expected)
        content, calls = parse_answer(style, NAMES, text, several=several)
        assert (content, [(name, json.loads(given)) for name, given in calls]) == ("", expected)


@pytest.mark.parametrize("style", [HERMES, FUNCTION_GEMMA, GEMMA4], ids=str)
def test_text_before_a_call_is_content_without_the_space_between(style):
    text = f"Let me look.\n\n{call_text(style, 'time', {})}\n"
    for pieces in cuts(text):
        content, calls, _ = streamed(style, pieces)
        assert (content, calls) == ("Let me look.", [("time", "{}")])
    assert parse_answer(style, NAMES, text, several=True) == ("Let me look.", [("time", "{}")])


@pytest.mark.parametrize("style", STYLES.values(), ids=str)
@pytest.mark.parametrize(
    "text", ["Hello, <b>world</b>! 3 < 4 ", "", " \n", "<tool", "<|", "a {b} c", "``", "x ``` y", "<start_of_turn>"]
)
def test_text_without_calls_comes_out_as_it_is(style, text):
    for pieces in cuts(text):
        assert streamed(style, pieces)[:2] == (text, [])
    assert parse_answer(style, NAMES, text, several=True) == (text, [])


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"a": }}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        (HERMES, "<tool_call>weather()</tool_call> then"),
        (HERMES, '<tool_call>{"name": {}, "arguments": []}'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>'),
        (LLAMA3, '{"name": "unknown", "parameters": {}}'),
        (LLAMA3, '{"answer": 42}'),
        (LLAMA3, '{"name": "weather"'),
        (GEMMA3, "{ not json at all"),
        (FUNCTION_GEMMA, "<start_function_call>call:unknown{}<end_function_call>"),
        (GEMMA4, "<|tool_call>call:weather{a<tool_call|>"),
        (GEMMA4, '<|tool_call>call:weather{a:<|"|>never ends'),
    ],
)
def test_what_is_no_call_is_plain_content_when_the_answer_is_whole(style, text):
    assert parse_answer(style, NAMES, text, several=True) == (text, [])


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call> and more'),
        (LLAMA3, '{"answer": 42, "more": [1, 2]}'),
        (LLAMA3, '{"parameters": {"a": 1}, "name": "unknown"} x'),
        (LLAMA3, '{"name": "' + "x" * 2000 + '", "parameters": {}}'),
        (GEMMA4, "<|tool_call>call:unknown{a:1}<tool_call|>"),
    ],
)
def test_what_names_no_tool_is_plain_content_in_a_stream_too(style, text):
    for pieces in ([text], list(text)):
        assert streamed(style, pieces)[:2] == (text, [])


def test_a_stream_gives_the_arguments_as_they_come():
    parser = ToolParser(HERMES, NAMES, streaming=True)
    assert parser.feed('<tool_call>\n{"name": "weather", "arg') == []
    assert parser.feed('uments": {"ci') == [CallStart(0, "weather"), CallArguments(0, '{"ci')]
    assert parser.feed('ty": "Bern"') == [CallArguments(0, 'ty": "Bern"')]
    assert parser.feed("}}\n</tool") == [CallArguments(0, "}")]
    assert parser.feed("_call>") == []
    assert parser.finish() == []


def test_arguments_may_come_before_the_name_or_as_a_string():
    for style in (HERMES, LLAMA3):
        for body in ('{"arguments": {"a": 1}, "name": "time"}', '{"name": "time", "arguments": "{\\"a\\": 1}"}'):
            text = f"<tool_call>{body}</tool_call>" if style is HERMES else body
            for pieces in ([text], list(text)):
                content, calls, _ = streamed(style, pieces)
                assert (content, calls) == ("", [("time", '{"a": 1}')])


@pytest.mark.parametrize(
    "text",
    [
        '<|python_tag|>{"name": "time", "parameters": {}}',
        '{"type": "function", "name": "time", "parameters": {}}',
        '```json\n{"name": "time", "parameters": {}}\n```',
        '```tool_code\n{"name": "time", "parameters": {}}\n```\n',
        '\n {"name":"time","arguments":{}}',
    ],
)
def test_calls_without_markers_may_stand_in_tags_and_fences(text):
    for pieces in cuts(text):
        assert streamed(GEMMA3, pieces)[:2] == ("", [("time", "{}")])
    assert parse_answer(GEMMA3, NAMES, text, several=True) == ("", [("time", "{}")])


def test_the_python_tag_is_not_shown():
    for pieces in cuts("<|python_tag|>print(1)"):
        assert streamed(LLAMA3, pieces)[:2] == ("print(1)", [])


def test_a_long_answer_that_is_no_call_costs_time_in_proportion():
    """Half a megabyte in pieces; a parser that looked at all of it again for each piece would take minutes."""
    for style, text in (
        (HERMES, '<tool_call>{"name": "x", "arguments": "' + "a" * 500_000),
        (LLAMA3, '{"arguments": {"a": "' + "a" * 500_000),
        (GEMMA4, "<|tool_call>call:weather{" + '<|"|>a<|"|>:1,' * 30_000),
    ):
        parser = ToolParser(style, NAMES, streaming=True)
        for at in range(0, len(text), 200):
            parser.feed(text[at : at + 200])
        parser.finish()


# --- which style, and how tools are told -------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}<tool_call><function={{ x }}>{% endif %}", None),
        ("{% if tools %}<tool_call>x<arg_key>{% endif %}", None),
        ('<|start_header_id|>{{ tools }} "parameters"', LLAMA3),
        ("<|start_header_id|>", None),
        ("<start_of_turn>", GEMMA3),
        ("<start_of_turn>{{ tools }}<start_function_call>", FUNCTION_GEMMA),
        ("<|turn>{{ tools }}<|tool_call>", GEMMA4),
        ("<|im_start|>", None),
        ("", None),
    ],
)
def test_the_template_tells_the_style(template, style):
    assert choose_style("auto", template) is style
    assert choose_style("llama3", template) is LLAMA3
    assert choose_style("none", template) is None


def tool(name="weather", strict=None, **properties):
    return FunctionDefinition(
        name=name,
        description=f"Tells the {name}.",
        strict=strict,
        parameters={"type": "object", "properties": properties, "required": list(properties)[:1]},
    )


def test_a_template_without_tools_gets_them_in_its_first_message_and_calls_as_text():
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": {"city": "Bern"}}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
        {"role": "user", "content": "And now?"},
    ]
    description = describe_tools(GEMMA3, [tool(city={"type": "string"})])
    turns = without_tool_roles(GEMMA3, messages, description)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert '"Tells the weather."' in turns[0]["content"]
    assert turns[0]["content"].endswith("Weather?")
    assert parse_answer(GEMMA3, NAMES, turns[1]["content"], several=True)[1] == [("weather", '{"city": "Bern"}')]
    assert turns[2]["content"] == "weather gave: sun\nAnd now?"


# --- grammars, followed by the library that the workers use ------------------------------------------


class Bytes:
    """A vocabulary of bytes, for llguidance."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<eos>")
    special_token_ids = (256,)

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)


def follows(grammar, text):
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    assert grammar.kind is GrammarKind.LARK
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar.source)) == ""
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), LLMatcher.grammar_from_lark(grammar.source))
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


CITY = {"type": "string"}
DAYS = {"type": "integer"}


@pytest.mark.parametrize("style", STYLES.values(), ids=str)
def test_a_forced_answer_is_a_call_that_follows_the_schema_and_nothing_else(style):
    tools = [tool(city=CITY, days=DAYS), tool("time")]
    grammar = call_grammar(style, tools, must_call=True, several=True)
    good = call_text(style, "weather", {"city": "Bern", "days": 3})
    assert follows(grammar, good)
    assert follows(grammar, call_text(style, "weather", {"city": "Bern"}))
    assert follows(grammar, call_text(style, "time", {}))
    assert follows(grammar, style.separator.join([good, good]))
    assert not follows(call_grammar(style, tools, must_call=True, several=False), style.separator.join([good, good]))
    for bad in (
        "Hello",
        "",
        call_text(style, "unknown", {}),
        call_text(style, "weather", {}),
        call_text(style, "weather", {"city": 3}),
        call_text(style, "weather", {"city": "Bern", "days": "x"}),
    ):
        assert not follows(grammar, bad), bad


@pytest.mark.parametrize("style", STYLES.values(), ids=str)
def test_nested_values_enums_and_unions_follow_the_schema(style):
    schema = {
        "unit": {"enum": ["c", "f"]},
        "place": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
        "list": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}},
    }
    grammar = call_grammar(style, [tool(**schema)], must_call=True, several=False)
    assert follows(grammar, call_text(style, "weather", {"unit": "c", "place": {"lat": 1.5}, "list": [True, None]}))
    assert follows(grammar, call_text(style, "weather", {"unit": "f"}))
    assert not follows(grammar, call_text(style, "weather", {"unit": "k"}))
    assert not follows(grammar, call_text(style, "weather", {"unit": "c", "place": {"lat": "x"}}))
    assert not follows(grammar, call_text(style, "weather", {"unit": "c", "list": [1]}))


def test_references_inside_a_tools_schema_still_hold():
    definition = FunctionDefinition(
        name="weather",
        parameters={
            "type": "object",
            "properties": {"at": {"$ref": "#/$defs/Place"}},
            "required": ["at"],
            "$defs": {"Place": {"type": "object", "properties": {"x": DAYS}, "required": ["x"]}},
        },
    )
    grammar = call_grammar(HERMES, [tool("time"), definition], must_call=True, several=False)
    assert follows(grammar, call_text(HERMES, "weather", {"at": {"x": 1}}))
    assert not follows(grammar, call_text(HERMES, "weather", {"at": {"x": "1"}}))


@pytest.mark.parametrize("style", STYLES.values(), ids=str)
def test_strict_tools_leave_the_model_its_choice_but_not_the_arguments(style):
    tools = [tool(city=CITY, strict=True), tool("time")]
    grammar = call_grammar(style, tools, must_call=False, several=True, all_strict=False)
    assert follows(grammar, "It is sunny, 3 < 4.")
    assert follows(grammar, call_text(style, "weather", {"city": "Bern"}))
    assert follows(grammar, call_text(style, "time", {"anything": 1}))
    assert not follows(grammar, call_text(style, "weather", {"city": 3}))
    if style.opening:
        assert follows(grammar, "Let me look.\n" + call_text(style, "weather", {"city": "Bern"}))


@pytest.mark.parametrize("style", [HERMES, GEMMA4, FUNCTION_GEMMA], ids=str)
def test_an_answer_that_is_a_call_or_follows_a_schema(style):
    answer = Grammar(kind=GrammarKind.JSON_SCHEMA, source='{"type":"object","properties":{"n":{"type":"integer"}}}')
    grammar = call_grammar(style, [tool(city=CITY)], must_call=False, several=True, answer=answer, all_strict=False)
    assert follows(grammar, '{"n": 3}')
    assert follows(grammar, call_text(style, "weather", {"city": "Bern"}))
    assert not follows(grammar, "Hello")
