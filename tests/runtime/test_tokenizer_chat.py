"""Conversations become the tokens that `transformers` makes of them; templates stay in sandbox and bounds."""

import re
import threading
import time

import jinja2
import pytest
from tiny_tokenizers import CHAT, MAKERS, PARTS_CHAT
from transformers import AutoTokenizer

from shardwright.errors import InvalidRequestError
from shardwright.runtime import chat_template, tokenizer_convert
from shardwright.runtime.chat_template import ChatTemplate
from shardwright.runtime.tokenizer import Tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now> & 'here' — 날씨",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
USER = {"role": "user", "content": " Hello <|im_end|> 안녕 👩‍👩‍👧 {{ 7 * 7 }}  "}
CALLS = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
}
CONVERSATIONS = {
    "one message": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [USER, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Bye"}],
    "empty": [{"role": "user", "content": ""}],
    "tool calls": [USER, CALLS, {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "4 °C"}],
    "reasoning": [USER, {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}, USER],
}
FEATURES = {
    "chat": CHAT,
    "parts": PARTS_CHAT,
    "controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": (
        "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}\n{{ ns.n }}"
        "{{ m.reasoning_content or '' }}\n{% endfor %}\n{{ bos_token }}{{ dict(a=1).items() | list }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content or m.tool_calls | tojson(indent=2) }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    ),
    "tools": "{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ messages | tojson(indent=1) }}",
    "refuses": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok",
}


@pytest.fixture(scope="module", params=FEATURES)
def pair(request, tmp_path_factory):
    """A tokenizer with the template as `transformers` reads it, and as we do."""
    folder, made = tmp_path_factory.mktemp("original"), tmp_path_factory.mktemp("made")
    MAKERS["byte-level"](folder)
    (folder / "chat_template.jinja").write_text(FEATURES[request.param], encoding="utf-8")
    tokenizer_convert.convert(folder, made)
    return (
        AutoTokenizer.from_pretrained(str(folder), local_files_only=True),
        Tokenizer.load(folder=made, gguf=None, cache_dir=made / "unused"),
    )


@pytest.mark.parametrize("tools", [(), TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_becomes_the_same_tokens(pair, name, tools):
    """Or is refused, where `transformers` raises, with its reason."""
    reference, ours = pair
    messages = CONVERSATIONS[name]
    expected, refusal = theirs(reference, messages, tools=tools or None, add_generation_prompt=True, thinking=False)
    if refusal:
        with pytest.raises(InvalidRequestError, match=f"refused the messages: {re.escape(refusal)}"):
            ours.encode_chat(messages, tools=tools, options={"thinking": False})
    else:
        assert list(ours.encode_chat(messages, tools=tools, options={"thinking": False})) == expected


def theirs(reference, messages, **settings):
    """The tokens, and what the template raised."""
    try:
        return reference.apply_chat_template(messages, return_dict=False, **settings), ""
    except (jinja2.TemplateError, ValueError, TypeError) as exc:
        return None, str(exc).split("\n")[0]


def test_the_last_message_is_gone_on_with(pair):
    reference, ours = pair
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two, "}]
    expected, refusal = theirs(reference, messages, continue_final_message=True)
    if refusal:  # a template that does not show it
        with pytest.raises(InvalidRequestError, match="refused the messages"):
            ours.encode_chat(messages, continue_last=True)
    else:
        assert list(ours.encode_chat(messages, continue_last=True)) == expected
    with pytest.raises(InvalidRequestError, match=r"messages\[1\] has no content"):
        ours.encode_chat([USER, {"role": "assistant", "content": None}], continue_last=True)


def test_a_tokenizer_with_several_templates_takes_the_one_for_tools(tmp_path):
    folder, made = tmp_path / "original", tmp_path / "made"
    MAKERS["word level"](folder)
    tokenizer_convert.convert(folder, made)
    reference = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    ours = Tokenizer.load(folder=made, gguf=None, cache_dir=tmp_path)
    messages = [{"role": "user", "content": "w3 w4"}]
    for tools in ((), TOOLS):
        expected = reference.apply_chat_template(messages, tools=list(tools) or None, return_dict=False)
        assert list(ours.encode_chat(messages, tools=tools)) == expected
    assert ours.chat_template.startswith("w1 ")
    with pytest.raises(InvalidRequestError, match="several chat templates"):
        ChatTemplate({"rag": "x", "tool_use": "y"}, {}).render(messages)


def render(template, messages, **settings):
    return ChatTemplate(template, {}).render(messages, **settings)


def test_parts_of_a_text_are_lines_where_the_template_takes_strings():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined = {"role": "user", "content": "one\ntwo"}
    assert render(CHAT, [{"role": "user", "content": parts}]) == render(CHAT, [joined])
    assert "<|user|>+one+two</s>" in render(PARTS_CHAT, [{"role": "user", "content": parts}])
    assert "<|user|>one\ntwo</s>" in render(PARTS_CHAT, [joined])
    dumps = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert render(dumps, [{"role": "user", "content": parts}]) == "one\ntwo"


def test_arguments_in_json_are_objects_for_the_template():
    def calls(arguments):
        return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    assert render(CHAT, calls('{"a": "é"}')) == render(CHAT, calls({"a": "é"}))
    assert render(CHAT, calls("")) == render(CHAT, calls({}))
    for wrong in ("{", "[1]", "7", 7):
        with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.tool_calls\[0\]\.function\.arguments"):
            render(CHAT, calls(wrong))


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "messages is empty"),
        (["Hello"], r"messages\[0\]"),
        ([USER, {"content": "x"}], r"messages\[1\]"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content\[0\] is not a text part"),
        ([{"role": "assistant", "tool_calls": "f()"}], r"messages\[0\]\.tool_calls is not a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"messages\[0\]\.tool_calls\[0\] is not a tool call"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(messages, where):
    with pytest.raises(InvalidRequestError, match=where):
        render(CHAT, messages)


def test_a_model_without_a_template_refuses_conversations():
    assert not ChatTemplate(None, {})
    with pytest.raises(InvalidRequestError, match="no chat template"):
        render(None, [USER])


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "add_generation_prompt", "conversations"])
def test_options_can_not_stand_in_for_the_request(name):
    with pytest.raises(InvalidRequestError, match=name):
        render(CHAT, [USER], options={name: "x"})


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ ''.__class__ }}{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% include 'setup.py' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ ''.join(range(1000000000)) }}",
    ],
)
def test_a_template_can_not_leave_its_sandbox(attack):
    try:
        text = render(attack, [USER])
    except InvalidRequestError:
        return
    assert "class" not in text
    assert "module" not in text


def test_a_template_without_an_end_is_stopped():
    """The caller gets an error when the time is over, and the thread ends too."""
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequestError, match=r"within 0\.2 s"):
        ChatTemplate(endless, {}, timeout_s=0.2).render([USER])
    deadline = time.monotonic() + 10.0
    while any(thread.name == "chat-template" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_template_writes_and_is_has_a_bound(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    monkeypatch.setattr(chat_template, "MAX_TEMPLATE_CHARS", 200)
    with pytest.raises(InvalidRequestError, match="made 1100 characters"):
        render("{{ 'x' * 1100 }}", [USER])
    with pytest.raises(InvalidRequestError, match="has 201 characters"):
        render("x" * 201, [USER])
