"""A conversation to the text that the model was trained on. Knows chat templates; nothing of tokens.

The templates are programs that come with a model. `transformers` runs them in a sandbox (no attributes of Python's
own, no mutation, plain data in); here they get bounds too: on their own size, on time and on what they may write. A
hostile template can still take memory until the time is over: models are the operator's choice.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from shardwright.errors import InvalidRequestError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 1 << 26
RENDER_TIMEOUT_S = 10.0

_OWN_VARIABLES = frozenset({
    "messages",
    "conversations",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
})  # fmt: skip


class ChatTemplate:
    """A model's chat template, or its set of named ones (`default`, `tool_use`)."""

    def __init__(
        self,
        source: str | Mapping[str, str] | None,
        special_tokens: Mapping[str, str],
        *,
        timeout_s: float = RENDER_TIMEOUT_S,
    ) -> None:
        self._named = {"default": source} if isinstance(source, str) else dict(source or {})
        self._special_tokens = dict(special_tokens)
        self._timeout_s = timeout_s
        self._parts: dict[str, bool] = {}  # by template

    def __bool__(self) -> bool:
        return any(self._named.values())

    def source(self, *, with_tools: bool = False) -> str:
        """The template that a conversation with or without tools goes through; empty where there is none."""
        if with_tools and "tool_use" in self._named:
            return self._named["tool_use"]
        return self._named.get("default", "")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        continue_last: bool = False,
    ) -> str:
        """The conversation's text, open for the answer; with `continue_last` the last message stays open instead.

        Messages and tools are in OpenAI's form. Raises `InvalidRequestError` for a model without a template, for
        what is no conversation, and where the template refuses it or goes on for too long.
        """
        template = self.source(with_tools=bool(tools))
        if not template:
            names = ", ".join(sorted(self._named))
            raise InvalidRequestError(
                f"this model has several chat templates ({names}) and none of them is the default; send plain text"
                if names
                else "this model has no chat template; send plain text (on the command line: --raw)"
            )
        if len(template) > MAX_TEMPLATE_CHARS:
            raise InvalidRequestError(
                f"the model's chat template has {len(template)} characters, more than {MAX_TEMPLATE_CHARS}"
            )
        for name in options or ():
            if name in _OWN_VARIABLES:
                raise InvalidRequestError(f"{name} can't be an option of the chat template: the request itself sets it")
        chat = plain_messages(messages, keep_parts=self._takes_parts(template))
        if continue_last and "content" not in chat[-1]:
            raise InvalidRequestError(f"messages[{len(chat) - 1}] has no content that could be gone on with")
        variables = {**self._special_tokens, **(options or {})}
        rendering = _Rendering(template, chat, list(tools) or None, variables, continue_last=continue_last)
        text = rendering.result(self._timeout_s)
        if len(text) > MAX_RENDERED_CHARS:
            raise InvalidRequestError(
                f"the model's chat template made {len(text)} characters of the messages, more than {MAX_RENDERED_CHARS}"
            )
        return text

    def _takes_parts(self, template: str) -> bool:
        """Whether a template writes the text of a list of parts; most take strings and would write the list itself."""
        if template not in self._parts:
            probe = [{"role": "user", "content": [{"type": "text", "text": _MARK}]}]
            try:
                text = _Rendering(template, probe, None, self._special_tokens, continue_last=False).result(
                    self._timeout_s
                )
            except InvalidRequestError:
                text = ""
            self._parts[template] = _MARK in text and "'type'" not in text and '"type"' not in text
        return self._parts[template]


_MARK = "Hello, world"


def plain_messages(messages: Sequence[Mapping[str, Any]], *, keep_parts: bool = False) -> list[dict[str, Any]]:
    """Messages as templates take them: tool calls' arguments as objects, nothing that is null, text in one string.

    Parts of a text are lines of that string; `keep_parts` leaves them to the template. Raises `InvalidRequestError`
    for what is no conversation of text.
    """
    if not messages:
        raise InvalidRequestError("messages is empty; give at least one message")
    return [_plain_message(message, f"messages[{index}]", keep_parts) for index, message in enumerate(messages)]


def _plain_message(message: Any, where: str, keep_parts: bool) -> dict[str, Any]:  # noqa: FBT001
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"{where} is not a message: it needs a role and content")
    plain = {key: value for key, value in message.items() if value is not None}
    if "content" in plain:
        texts = _texts(plain["content"], f"{where}.content")
        whole = isinstance(plain["content"], str)
        parts = [{"type": "text", "text": text} for text in texts]
        plain["content"] = parts if keep_parts and not whole else "\n".join(texts)
    if "tool_calls" in plain:
        calls = plain["tool_calls"]
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise InvalidRequestError(f"{where}.tool_calls is not a list")
        plain["tool_calls"] = [_plain_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return plain


def _texts(content: Any, where: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"{where} is neither a string nor a list of text parts")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(f"{where}[{index}] is not a text part; this server takes text alone")
        texts.append(part["text"])
    return texts


def _plain_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call whose arguments are an object: templates write them as JSON themselves."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise InvalidRequestError(f"{where} is not a tool call: it needs a function with a name and arguments")
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as exc:
            raise InvalidRequestError(f"{where}.function.arguments is not JSON: {exc}") from exc
    if not isinstance(arguments, Mapping | None):
        raise InvalidRequestError(f"{where}.function.arguments is not a JSON object")
    return {**call, "function": function}


class _TimeIsUpError(BaseException):
    """Set on a template's thread from outside; no template can catch it."""


class _Rendering:
    """One run of a template, on a thread that can be told to end.

    Only pure Python runs there, so an exception set from outside stops even a loop that writes nothing.
    """

    def __init__(
        self,
        template: str,
        messages: list[dict[str, Any]],
        tools: list[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        *,
        continue_last: bool,
    ) -> None:
        self._arguments = {
            **variables,
            "conversations": [messages],
            "tools": tools and [dict(tool) for tool in tools],
            "chat_template": template,
            "continue_final_message": continue_last,
            "add_generation_prompt": not continue_last,
        }
        self._text = ""
        self._error: BaseException | None = None

    def result(self, timeout_s: float) -> str:
        """What the template writes. Raises `InvalidRequestError` for its errors, and when it takes too long."""
        thread = threading.Thread(target=self._run, name="chat-template", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            assert thread.ident is not None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TimeIsUpError))
            raise InvalidRequestError(
                f"the model's chat template did not come to an end within {timeout_s:g} s; send shorter messages"
            )
        if self._error is not None:
            raise InvalidRequestError(
                f"the model's chat template refused the messages: {_reason(self._error)}"
            ) from self._error
        return self._text

    def _run(self) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(**self._arguments)
            self._text = rendered[0]
        except _TimeIsUpError:
            return
        except Exception as exc:  # noqa: BLE001  templates raise errors of any kind
            self._error = exc


def _reason(error: BaseException) -> str:
    text = str(error).split("\nRendered chat:")[0].strip()
    return " ".join(text.split()) or type(error).__name__
