"""What requests and answers look like: OpenAI's fields, a few of vLLM's, and nothing else.

Every field that is not here is refused, and so is every value that would have no effect: OpenAI's fields for what
this server does not do are here with the one value that asks for nothing. The OpenAPI document is made from these
classes; requests are checked by them, answers are not built with them (that would cost too much for each token).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from shardwright.api.errors import FieldError
from shardwright.api.limits import (
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_PARTS,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
)
from shardwright.types import MAX_GRAMMAR_CHARS, MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS

Identifier = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """No unknown field, no conversion: "1" is no number and 1 is no truth value."""

    model_config = ConfigDict(strict=True, extra="forbid")


# --- what both kinds of requests share ---------------------------------------------------------------


class StreamOptions(Strict):
    """How an answer is streamed."""

    include_usage: bool | None = Field(None, description="A last chunk tells the tokens that were used.")
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(Strict):
    """What the whole answer must match; exactly one of the fields. vLLM's extension."""

    regex: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = Field(
        None, description="Context-free, in llguidance's dialect of Lark."
    )
    json_: dict[str, JsonValue] | bool | None = Field(None, alias="json", description="A JSON schema.")
    choice: Annotated[list[Stop], Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.regex, self.grammar, self.json_, self.choice)) != 1:
            raise ValueError("must have exactly one of regex, grammar, json and choice")
        return self


class GenerationFields(Strict):
    """How to choose tokens and when to stop."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy; 1 by default.")
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[Finite, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(None, description="Random when left out.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    user: Identifier | None = Field(None, description="Written to the server's log, and used for nothing else.")
    safety_identifier: Identifier | None = Field(None, description="As user.")
    prompt_cache_key: Identifier | None = Field(None, description="As user; prefixes are cached for everybody.")
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="Extension; 0 and -1: no limit.")
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = Field(None, description="Extension.")
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = Field(None, description="Extension.")
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="Extension.")
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = Field(
        None, description="Extension."
    )
    ignore_eos: bool | None = Field(None, description="Extension.")
    include_stop_str_in_output: bool | None = Field(None, description="Extension.")
    skip_special_tokens: bool | None = Field(None, description="Extension; true by default.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Extension.")
    timeout: Annotated[Finite, Field(gt=0)] | None = Field(None, description="Extension: seconds for the whole answer.")

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "may be given only when stream is true")
        return self


# --- completions -------------------------------------------------------------------------------------


class CompletionRequest(GenerationFields):
    """A request to go on from text."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    ) = Field(description="Text, token ids, or a list of either.")
    echo: bool | None = Field(None, description="The answer begins with the prompt.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = Field(None, description="Must equal n.")
    suffix: Literal[""] | None = None


# --- chat --------------------------------------------------------------------------------------------


class TextPart(Strict):
    """A piece of text; images, sound and files are not taken."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]


class SystemMessage(Strict):
    """Instructions; `developer` is another name for `system`."""

    role: Literal["system", "developer"]
    content: Content
    name: None = None


class UserMessage(Strict):
    """What the user said."""

    role: Literal["user"]
    content: Content
    name: None = None


class CalledFunction(Strict):
    """The function of a call, and its arguments as JSON."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    arguments: str


class MessageToolCall(Strict):
    """A call that the model made earlier."""

    id: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="As streamed chunks carry it.")


class AssistantMessage(Strict):
    """What the model said earlier, or called."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = None
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("must have content or tool_calls")
        return self


class ToolMessage(Strict):
    """What a called tool gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = Field(None, description="A JSON schema of type object.")
    strict: bool | None = Field(None, description="Enforce the schema, whether or not the model would follow it.")


class Tool(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The name of a function."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class NamedTool(Strict):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A schema that the answer follows."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = Field(None, description="The schema is always enforced.")
    description: Literal[""] | None = None


class JsonSchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(GenerationFields):
    """A request to answer a conversation."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = Field(
        None, description="Extension: go on with the last message, which is the assistant's."
    )
    echo: bool | None = Field(
        None, description="Extension: with continue_final_message, the answer begins with that message."
    )
    chat_template_kwargs: Annotated[dict[str, JsonValue], Field(max_length=64)] | None = Field(
        None, description="Extension: further variables for the chat template."
    )
    # What this server does not do; each may be given with the value that asks for nothing.
    audio: None = None
    function_call: None = None
    functions: None = None
    metadata: Annotated[dict[str, str], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    reasoning_effort: None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "may be given only when logprobs is true")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise FieldError("tool_choice", "may be given only with tools")
        if self.tools is None and self.parallel_tool_calls is not None:
            raise FieldError("parallel_tool_calls", "may be given only with tools")
        if None not in {self.max_tokens, self.max_completion_tokens} and self.max_tokens != self.max_completion_tokens:
            raise FieldError("max_tokens", "differs from max_completion_tokens; give one of them")
        if self.continue_final_message and not isinstance(self.messages[-1], AssistantMessage):
            raise FieldError("continue_final_message", "needs a last message of the role assistant")
        if self.echo and not self.continue_final_message:
            raise FieldError("echo", "may be true only with continue_final_message")
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise FieldError("structured_outputs", "can't be given together with response_format")
        return self


# --- answers -----------------------------------------------------------------------------------------


class Answer(BaseModel):
    """An answer has no other fields than these."""

    model_config = ConfigDict(extra="forbid")


class ErrorObject(Answer):
    """What went wrong. `param` is the field that is wrong, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """The body of every answer that is no success."""

    error: ErrorObject


class PromptTokensDetails(Answer):
    """Tokens of the prompt that a cached prefix saved."""

    cached_tokens: int


class Usage(Answer):
    """The tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Answer):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """The tokens of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerToolCall(Answer):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Answer):
    """What the model says, or calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[AnswerToolCall] | None = None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(Answer):
    """A chat's answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class DeltaFunction(Answer):
    """More of a call: first the name, then pieces of the arguments."""

    name: str | None = None
    arguments: str


class DeltaToolCall(Answer):
    """More of the call with this number."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: DeltaFunction


class Delta(Answer):
    """More of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChunkChoice(Answer):
    """More of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(Answer):
    """The data of one event of a streamed chat. The last event's data is `[DONE]`, or an error object."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(Answer):
    """The tokens of a text; offsets are characters from its beginning."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One text; in a stream, more of it, and the reason in the last."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(Answer):
    """The texts, prompt by prompt; in a stream, the data of one event, and `usage` in the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelObject(Answer):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="Most tokens of prompt and answer together. Extension.")


class ModelList(Answer):
    """All models: the one that is served."""

    object: Literal["list"]
    data: list[ModelObject]


class Status(Answer):
    """How the server is."""

    status: str
