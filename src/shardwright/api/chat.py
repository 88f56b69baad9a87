"""`/v1/chat/completions`: answers a conversation, with tool calls where the model writes any."""

from __future__ import annotations

import json
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from shardwright.api.errors import invalid
from shardwright.api.keys import Client
from shardwright.api.metrics import Meter
from shardwright.api.render import ChunkWriter, chat_logprobs
from shardwright.api.sampling import answer_grammar, generation_request
from shardwright.api.schemas import (
    AssistantMessage,
    ChatRequest,
    Content,
    FunctionDefinition,
    MessageToolCall,
    NamedTool,
    ToolMessage,
)
from shardwright.api.service import Service, new_id, now
from shardwright.api.stream import DONE, EventWriter, UsageCounter, generate
from shardwright.api.tool_parser import CallArguments, CallStart, Piece, ToolParser, parse_answer
from shardwright.api.tool_parser import Content as TextPiece
from shardwright.api.tools import (
    ToolStyle,
    call_grammar,
    describe_tools,
    template_knows_tools,
    tool_json,
    without_tool_roles,
)
from shardwright.engine import ChoiceEnd, GenerationRequest, ScoredToken, TextDelta
from shardwright.types import Grammar, GrammarKind

KIND = "chat.completion"
CHUNK_KIND = "chat.completion.chunk"


async def chat(
    service: Service, client: Client, meter: Meter, fields: ChatRequest, writer: EventWriter
) -> Response | None:
    """Answer one request."""
    plan = _plan_tools(service, fields)
    request = await _prepare(service, fields, plan)
    conversation = _Chat(service, fields, plan, request)
    if fields.stream:
        await conversation.stream(client, meter, writer)
        return None
    return JSONResponse(await conversation.whole(client, meter))


# --- tools -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _ToolPlan:
    """How one request's tools are told to the model and read from its answer."""

    style: ToolStyle
    told: tuple[FunctionDefinition, ...]  # that the model is told of
    callable: tuple[FunctionDefinition, ...]  # that it may call
    must_call: bool
    several: bool

    @property
    def names(self) -> frozenset[str]:
        """What it may call, by name."""
        return frozenset(tool.name for tool in self.callable)


def _plan_tools(service: Service, fields: ChatRequest) -> _ToolPlan | None:
    """The plan; None when the model may call nothing. Raises `ApiError` 400 for tools that can't be served."""
    tools = tuple(tool.function for tool in fields.tools or ())
    names = [tool.name for tool in tools]
    for index, tool in enumerate(tools):
        if names.index(tool.name) != index:
            where = f"tools[{index}].function.name"
            raise invalid(f"{where}: {tool.name!r} is there twice", where)
        if tool.parameters is not None and tool.parameters.get("type", "object") != "object":
            where = f"tools[{index}].function.parameters"
            raise invalid(f"{where}: must be a schema of type object", where)
    choice = fields.tool_choice
    if not tools or choice == "none":
        return None
    if service.tool_style is None:
        raise invalid(
            "tools: the model's chat template shows no way of calling tools that is known here; "
            "start the server with --tool-style to choose one, or leave the tools out",
            "tools",
        )
    may_call = tools
    if isinstance(choice, NamedTool):
        may_call = tuple(tool for tool in tools if tool.name == choice.function.name)
        if not may_call:
            raise invalid(f"tool_choice names {choice.function.name!r}, which is not among the tools", "tool_choice")
    return _ToolPlan(
        style=service.tool_style,
        told=tools,
        callable=may_call,
        must_call=choice == "required" or isinstance(choice, NamedTool),
        several=fields.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
    )


def _grammar(fields: ChatRequest, plan: _ToolPlan | None) -> tuple[Grammar | None, str]:
    """What the answer must match, and the field that asked for it."""
    answer = answer_grammar(fields, fields.response_format)
    field = "structured_outputs" if fields.structured_outputs else "response_format"
    if plan is None:
        return answer, field
    if answer is not None and (plan.must_call or answer.kind not in {GrammarKind.JSON_OBJECT, GrammarKind.JSON_SCHEMA}):
        wanted = "when tool_choice asks for a call" if plan.must_call else "together with tools, unless it is JSON"
        raise invalid(f"{field} can't be given {wanted}", field)
    if answer is None and not plan.must_call and not any(tool.strict for tool in plan.callable):
        return None, field
    grammar = call_grammar(
        plan.style,
        plan.callable,
        must_call=plan.must_call,
        several=plan.several,
        answer=answer,
        all_strict=plan.must_call,
    )
    return grammar, "tools" if answer is None else field


# --- the prompt --------------------------------------------------------------------------------------


async def _prepare(service: Service, fields: ChatRequest, plan: _ToolPlan | None) -> GenerationRequest:
    model = service.engine.model
    if not model.has_chat_template or not model.has_tokenizer:
        raise invalid(f"{model.name} has no chat template; use /v1/completions", "messages")
    messages, has_tool_messages = _messages(fields)
    told = [tool_json(tool) for tool in plan.told] if plan else []
    if (plan or has_tool_messages) and not template_knows_tools(model.chat_template):
        if service.tool_style is None:
            raise invalid("messages: the model's chat template has no place for tool calls", "messages")
        description = describe_tools(plan.style, plan.told) if plan else ""
        messages = without_tool_roles(service.tool_style, messages, description)
        told = []
    grammar, grammar_field = _grammar(fields, plan)
    codec = service.engine.codec
    prompt = await service.text(
        "messages",
        lambda: codec.encode_chat(
            messages,
            tools=told,
            options=fields.chat_template_kwargs,
            continue_last=bool(fields.continue_final_message),
        ),
    )
    if grammar is not None:
        await service.text(grammar_field, lambda: service.engine.check_grammar(grammar))
    max_tokens = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    max_field = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    if max_tokens == 0:
        raise invalid("max_tokens is 0; it must be at least 1", "max_tokens")
    return generation_request(
        fields,
        prompt,
        model=model,
        config=service.config,
        prompt_field="messages",
        max_tokens=max_tokens,
        max_tokens_field=max_field,
        grammar=grammar,
        num_top_logprobs=fields.top_logprobs or 0,
        keep_special=plan is not None,
    )


def _messages(fields: ChatRequest) -> tuple[list[dict[str, Any]], bool]:
    """The conversation as templates take it, and whether tools occur in it."""
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for index, message in enumerate(fields.messages):
        where = f"messages[{index}]"
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in names:
                raise invalid(
                    f"{where}.tool_call_id: no call before it has the id {message.tool_call_id!r}",
                    f"{where}.tool_call_id",
                )
            found.append(
                {
                    "role": "tool",
                    "tool_call_id": message.tool_call_id,
                    "name": names[message.tool_call_id],
                    "content": _text(message.content),
                }
            )
        elif isinstance(message, AssistantMessage):
            turn: dict[str, Any] = {"role": "assistant", "content": _text(message.content)}
            if message.tool_calls:
                turn["tool_calls"] = [
                    _called(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(message.tool_calls)
                ]
                names |= {call.id: call.function.name for call in message.tool_calls}
            found.append(turn)
        else:
            role = "system" if message.role == "developer" else message.role
            found.append({"role": role, "content": _text(message.content)})
    return found, bool(names)


def _text(content: Content | None) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _called(call: MessageToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise invalid(f"{where}.function.arguments: must be a JSON object as text", f"{where}.function.arguments")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


# --- the answer --------------------------------------------------------------------------------------


class _Chat:
    """One request on its way."""

    def __init__(
        self, service: Service, fields: ChatRequest, plan: _ToolPlan | None, request: GenerationRequest
    ) -> None:
        self._service = service
        self._fields = fields
        self._plan = plan
        self._request = request
        self._id = new_id("chatcmpl-")
        self._created = now()
        self._usage = UsageCounter([request])
        last = fields.messages[-1]
        self._beginning = _text(last.content) if fields.echo and isinstance(last, AssistantMessage) else ""

    async def whole(self, client: Client, meter: Meter) -> dict[str, Any]:
        """The answer in one piece."""
        count = self._request.num_choices
        texts: list[list[str]] = [[] for _ in range(count)]
        tokens: list[list[ScoredToken]] = [[] for _ in range(count)]
        finish = ["stop"] * count
        async with aclosing(generate(self._service, client, meter, [self._request], "messages")) as events:
            async for _, event in events:
                if isinstance(event, TextDelta):
                    texts[event.choice].append(event.text)
                    tokens[event.choice].extend(event.tokens)
                elif isinstance(event, ChoiceEnd):
                    finish[event.choice] = event.reason.value
                    self._usage.add(0, event)
        choices = []
        for index in range(count):
            message, has_calls = self._message("".join(texts[index]))
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": chat_logprobs(tokens[index]) if self._fields.logprobs else None,
                    "finish_reason": "tool_calls" if has_calls and finish[index] == "stop" else finish[index],
                }
            )
        return {
            "id": self._id,
            "object": KIND,
            "created": self._created,
            "model": self._service.engine.model.name,
            "choices": choices,
            "usage": self._usage.to_json(),
        }

    def _message(self, text: str) -> tuple[dict[str, Any], bool]:
        plan = self._plan
        content, calls = text, list[tuple[str, str]]()
        if plan is not None:
            content, calls = parse_answer(plan.style, plan.names, text, several=plan.several)
        content = self._beginning + content
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = [
                {"id": new_id("call_"), "type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in calls
            ]
        return message, bool(calls)

    async def stream(self, client: Client, meter: Meter, writer: EventWriter) -> None:
        """The answer in events."""
        options = self._fields.stream_options
        include_usage = bool(options and options.include_usage)
        chunks = ChunkWriter(
            answer_id=self._id,
            kind=CHUNK_KIND,
            created=self._created,
            model=self._service.engine.model.name,
            include_usage=include_usage,
        )
        choices = [
            _StreamedChoice(chunks, index, self._plan, wants_logprobs=bool(self._fields.logprobs))
            for index in range(self._request.num_choices)
        ]
        has_begun = False
        async with aclosing(generate(self._service, client, meter, [self._request], "messages")) as events:
            async for _, event in events:
                if not has_begun:
                    # Only now, so that an error before the first token still has a status of its own.
                    has_begun = True
                    await writer.write(b"".join(choice.begin(self._beginning) for choice in choices))
                if isinstance(event, TextDelta):
                    if data := choices[event.choice].more(event):
                        await writer.write(data)
                elif isinstance(event, ChoiceEnd):
                    self._usage.add(0, event)
                    await writer.write(choices[event.choice].end(event))
        last = chunks.usage(self._usage.to_json()) if include_usage else b""
        await writer.write(last + DONE)


class _StreamedChoice:
    """Writes the chunks of one choice."""

    def __init__(self, chunks: ChunkWriter, index: int, plan: _ToolPlan | None, *, wants_logprobs: bool) -> None:
        self._chunks = chunks
        self._index = index
        self._wants_logprobs = wants_logprobs
        self._parser = (
            None if plan is None else ToolParser(plan.style, plan.names, streaming=True, several=plan.several)
        )
        self._tokens: list[ScoredToken] = []  # whose chunk has not come yet

    def begin(self, text: str) -> bytes:
        """The first chunk."""
        return self._chunks.chat(self._index, {"role": "assistant", "content": text})

    def more(self, delta: TextDelta) -> bytes:
        """The chunks of more text; none when all of it is held back."""
        if self._wants_logprobs:
            self._tokens.extend(delta.tokens)
        elif self._parser is None:
            return self._chunks.chat_text(self._index, delta.text) if delta.text else b""
        if self._parser is not None:
            return b"".join(self._piece(piece) for piece in self._parser.feed(delta.text))
        return self._chunk({"content": delta.text}) if delta.text or self._tokens else b""

    def end(self, end: ChoiceEnd) -> bytes:
        """What was held back, and the last chunk."""
        data = b""
        finish = end.reason.value
        if self._parser is not None:
            data = b"".join(self._piece(piece) for piece in self._parser.finish())
            if self._parser.num_calls and finish == "stop":
                finish = "tool_calls"
        if self._tokens:
            data += self._chunk({})
        return data + self._chunks.chat(self._index, {}, finish=finish)

    def _piece(self, piece: Piece) -> bytes:
        match piece:
            case TextPiece():
                return self._chunk({"content": piece.text})
            case CallStart():
                function = {"name": piece.name, "arguments": ""}
                call = {"index": piece.index, "id": new_id("call_"), "type": "function", "function": function}
                return self._chunk({"tool_calls": [call]})
            case CallArguments():
                return self._chunk({"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]})

    def _chunk(self, delta: dict[str, Any]) -> bytes:
        logprobs = None
        if self._wants_logprobs:
            logprobs = chat_logprobs(self._tokens)
            self._tokens = []
        return self._chunks.chat(self._index, delta, logprobs=logprobs)
