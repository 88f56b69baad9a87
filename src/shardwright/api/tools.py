r"""Tool calls: how each family of models is told of tools, writes its calls, and is made to write one. Pure.

Five styles are known, each one a way of writing a call in text:

    hermes          <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>      Hermes, Qwen 2.5 and 3, SmolLM3
    llama3          {"name": "f", "parameters": {...}}, maybe after <|python_tag|>; more than one parted by ;
    gemma3          the same in a line of its own, maybe in a fence; templates know nothing of tools
    functiongemma   <start_function_call>call:f{key:<escape>text<escape>,n:3}<end_function_call>
    gemma4          <|tool_call>call:f{key:<|"|>text<|"|>,n:3}<tool_call|>

`tool_parser.py` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardwright.api.sampling import compact_schema
from shardwright.api.schemas import FunctionDefinition
from shardwright.types import Grammar, GrammarKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStyle:
    """One way of writing tool calls. `opening` and `closing` stand around each call; empty: nothing does."""

    name: str
    opening: str
    closing: str
    arguments_key: str  # of the JSON object that a call is; empty: a call is call:name{...}
    separator: str  # between two calls
    text_mark: str = ""  # stands around text inside call:name{...}

    @property
    def is_bare(self) -> bool:
        """Whether only a call's own form tells it from an answer."""
        return not self.opening


HERMES: Final = ToolStyle(
    name="hermes", opening="<tool_call>", closing="</tool_call>", arguments_key="arguments", separator="\n"
)
LLAMA3: Final = ToolStyle(name="llama3", opening="", closing="", arguments_key="parameters", separator="; ")
GEMMA3: Final = ToolStyle(name="gemma3", opening="", closing="", arguments_key="parameters", separator="\n")
FUNCTION_GEMMA: Final = ToolStyle(
    name="functiongemma",
    opening="<start_function_call>",
    closing="<end_function_call>",
    arguments_key="",
    separator="",
    text_mark="<escape>",
)
GEMMA4: Final = ToolStyle(
    name="gemma4",
    opening="<|tool_call>",
    closing="<tool_call|>",
    arguments_key="",
    separator="",
    text_mark='<|"|>',
)
STYLES: Final[Mapping[str, ToolStyle]] = {
    style.name: style for style in (HERMES, LLAMA3, GEMMA3, FUNCTION_GEMMA, GEMMA4)
}


def choose_style(setting: str, chat_template: str) -> ToolStyle | None:
    """The style that was set, or the one that a chat template was written for; None: no tool calls."""
    if setting != "auto":
        return STYLES.get(setting)
    if GEMMA4.opening in chat_template:
        return GEMMA4
    if FUNCTION_GEMMA.opening in chat_template:
        return FUNCTION_GEMMA
    if HERMES.opening in chat_template:
        # Some families put XML of their own between the same markers.
        return None if "<function=" in chat_template or "<arg_key>" in chat_template else HERMES
    if "<|start_header_id|>" in chat_template:
        return LLAMA3 if template_knows_tools(chat_template) else None
    if "<start_of_turn>" in chat_template:
        return GEMMA3
    return None


def template_knows_tools(chat_template: str) -> bool:
    """Whether the template writes the tools into the prompt by itself."""
    return "tools" in chat_template


# --- the prompt --------------------------------------------------------------------------------------


def describe_tools(style: ToolStyle, tools: Sequence[FunctionDefinition]) -> str:
    """What a model is told of its tools when its template does not tell it."""
    example = call_text(style, "<name>", {"<argument>": "<value>"})
    functions = "\n".join(json.dumps(tool_json(tool)["function"], ensure_ascii=False) for tool in tools)
    return (
        "You can call functions. To call one, answer with the call alone, in exactly this form and without any other "
        f"text:\n{example}\nSeveral calls follow each other in the same form. What a function gives is told to you in "
        f"the next message. These functions exist, each described as JSON:\n{functions}"
    )


def tool_json(tool: FunctionDefinition) -> dict[str, Any]:
    """A tool in OpenAI's form, as templates take it."""
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"strict"})}


def call_text(style: ToolStyle, name: str, arguments: Mapping[str, Any]) -> str:
    """A call as a model of this style writes it."""
    if not style.arguments_key:
        return f"{style.opening}call:{name}{_marked(style, arguments)}{style.closing}"
    call = json.dumps({"name": name, style.arguments_key: arguments}, ensure_ascii=False)
    return f"{style.opening}\n{call}\n{style.closing}" if style.opening else call


def _marked(style: ToolStyle, value: object) -> str:
    if isinstance(value, str):
        return f"{style.text_mark}{value}{style.text_mark}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_marked(style, each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_marked(style, each) for each in value) + "]"
    return json.dumps(value)


def without_tool_roles(
    style: ToolStyle, messages: Sequence[Mapping[str, Any]], description: str
) -> list[dict[str, Any]]:
    """A conversation for a template that knows nothing of tools.

    The description goes into the first message; calls become text in the style, results become the user's words, and
    messages of one role that follow each other become one, since such templates want the roles to alternate.
    """
    names: dict[str, str] = {}
    turns: list[dict[str, Any]] = []
    for message in messages:
        role, text = str(message["role"]), str(message.get("content") or "")
        if role == "assistant":
            calls = message.get("tool_calls") or ()
            for call in calls:
                names[call["id"]] = call["function"]["name"]
            texts = [call_text(style, call["function"]["name"], call["function"]["arguments"]) for call in calls]
            text = "\n".join([text, *texts] if text else texts)
        elif role == "tool":
            role, text = "user", f"{names.get(message['tool_call_id'], 'The function')} gave: {text}"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n{text}"
        else:
            turns.append({"role": role, "content": text})
    if description:
        if turns[0]["role"] in {"system", "user"}:
            turns[0]["content"] = (
                f"{turns[0]['content']}\n\n{description}"
                if turns[0]["role"] == "system"
                else f"{description}\n\n{turns[0]['content']}"
            )
        else:
            turns.insert(0, {"role": "user", "content": description})
    return turns


# --- grammars ----------------------------------------------------------------------------------------


def call_grammar(
    style: ToolStyle,
    tools: Sequence[FunctionDefinition],
    *,
    must_call: bool,
    several: bool,
    answer: Grammar | None = None,
    all_strict: bool = True,
) -> Grammar:
    """A grammar of answers that call some of `tools`.

    With `must_call` the answer is calls alone. Otherwise it may be text too: any that begins no call, or what `answer`
    allows instead of calls. Arguments follow the tools' schemas; without `all_strict` only those of strict tools do.
    Raises `ApiError` 400 for schemas that are too large.
    """
    rules = (
        _json_call(style, tools, all_strict=all_strict)
        if style.arguments_key
        else _MarkedCalls(style, tools, all_strict=all_strict).rules()
    )
    again = f" ({_quoted(style.separator)} call)*" if style.separator else " call*"
    calls = f"call{again}" if several else "call"
    lines = [*rules]
    if must_call:
        lines.insert(0, f"start: {calls}")
    elif answer is not None:
        lines.insert(0, f"start: {calls} | answer")
        lines.append(f"answer: %json {answer.source or _ANY_OBJECT}")
    elif style.is_bare:
        # An answer that begins with a brace is a call: nothing else tells the two apart.
        lines.insert(0, f"start: {calls} | TEXT")
        lines.append(r"TEXT: /[^{](.|\n)*/")
    else:
        # Text is free until a call's marker is there, then the call is not: the lazy rule ends at the first marker.
        lines.insert(0, f"start: (head inner){'*' if several else '?'} TEXT")
        lines.append("head[lazy]: TEXT " + _quoted(style.opening))
        lines.append(r"TEXT: /(.|\n)*/")
    return Grammar(kind=GrammarKind.LARK, source="\n".join(lines) + "\n")


_ANY_OBJECT = '{"type":"object"}'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json_call(style: ToolStyle, tools: Sequence[FunctionDefinition], *, all_strict: bool) -> list[str]:
    """Rules for a call that is JSON: one schema with an alternative for each tool, whose own schema is a definition."""
    definitions: dict[str, Any] = {}
    alternatives = []
    for number, tool in enumerate(tools):
        definitions[f"tool{number}"] = _moved(_parameters(tool, all_strict=all_strict), f"#/$defs/tool{number}")
        properties = {"name": {"const": tool.name}, style.arguments_key: {"$ref": f"#/$defs/tool{number}"}}
        alternatives.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    schema = compact_schema({"anyOf": alternatives, "$defs": definitions}, "tools")
    if style.is_bare:
        return ["call: object", f"object: %json {schema}"]
    return [
        f"call: {_quoted(style.opening)} inner",
        f'inner: "\\n" object {_quoted(chr(10) + style.closing)}',
        f"object: %json {schema}",
    ]


def _parameters(tool: FunctionDefinition, *, all_strict: bool) -> dict[str, Any]:
    if not (all_strict or tool.strict):
        return {"type": "object"}
    if tool.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **tool.parameters}


def _moved(value: Any, place: str) -> Any:
    """A schema whose references hold when it stands at `place` of another one."""
    if isinstance(value, dict):
        moved = {key: _moved(each, place) for key, each in value.items()}
        reference = value.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            moved["$ref"] = place + reference[1:]
        return moved
    if isinstance(value, list):
        return [_moved(each, place) for each in value]
    return value


class _MarkedCalls:
    """Rules for calls of the form call:name{key:value}: the schemas' usual parts, and any value for the rest."""

    def __init__(self, style: ToolStyle, tools: Sequence[FunctionDefinition], *, all_strict: bool) -> None:
        self._style = style
        self._tools = tools
        self._all_strict = all_strict
        self._rules: list[str] = []
        self._count = 0

    def rules(self) -> list[str]:
        """All rules, `call` among them."""
        calls = []
        for tool in self._tools:
            schema = _parameters(tool, all_strict=self._all_strict)
            calls.append(f"{_quoted(f'call:{tool.name}')} {self._object(schema, schema)}")
        mark = _quoted(self._style.text_mark)
        first = self._style.text_mark[0]
        return [
            f"call: {_quoted(self._style.opening)} inner",
            f"inner: ({' | '.join(calls)}) {_quoted(self._style.closing)}",
            *self._rules,
            f"text: {mark} CHARS? {mark}",
            rf"CHARS: /[^{first}]+/",
            r"NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/",
            r"INTEGER: /-?(0|[1-9][0-9]*)/",
            r"KEY: /[A-Za-z0-9_.-]+/",
            'value: text | NUMBER | "true" | "false" | "null" | object | array',
            'object: "{" (KEY ":" value ("," KEY ":" value)*)? "}"',
            'array: "[" (value ("," value)*)? "]"',
        ]

    def _new(self, body: str) -> str:
        self._count += 1
        name = f"rule{self._count}"
        self._rules.append(f"{name}: {body}")
        return name

    def _value(self, schema: Any, root: Mapping[str, Any]) -> str:
        if not isinstance(schema, dict):
            return "value"
        if "const" in schema or "enum" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            if isinstance(values, list) and values:
                return self._new(" | ".join(_quoted(_marked(self._style, each)) for each in values))
            return "value"
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return self._new(" | ".join(self._value(each, root) for each in schema[key]))
        kind = schema.get("type")
        if isinstance(kind, list) and kind:
            return self._new(" | ".join(self._value({**schema, "type": each}, root) for each in kind))
        match kind:
            case "object":
                return self._object(schema, root)
            case "array":
                item = self._value(schema.get("items"), root)
                return self._new(f'"[" ({item} ("," {item})*)? "]"')
            case "string":
                return "text"
            case "integer":
                return "INTEGER"
            case "number":
                return "NUMBER"
            case "boolean":
                return self._new('"true" | "false"')
            case "null":
                return '"null"'
            case _:
                return "value"

    def _object(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        properties = schema.get("properties")
        if not isinstance(properties, dict) or not properties:
            return '"{" "}"' if schema.get("additionalProperties") is False else "object"
        required = schema.get("required")
        needed = set(required) if isinstance(required, list) else set()
        # rest<i> is what may follow once something stands before it, first<i> the same with nothing before.
        pairs = [
            (name in needed, f"{_quoted(name + ':')} {self._value(each, root)}") for name, each in properties.items()
        ]
        rest, first = '"}"', '"}"'
        for is_needed, pair in reversed(pairs):
            next_rest = f'"," {pair} {rest}' if is_needed else f'"," {pair} {rest} | {rest}'
            next_first = f"{pair} {rest}" if is_needed else f"{pair} {rest} | {first}"
            rest, first = self._new(next_rest), self._new(next_first)
        return f'"{{" {first}'
