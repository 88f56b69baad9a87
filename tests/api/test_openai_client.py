"""OpenAI's own Python client against a real server: what it sends is understood, what it gets fits its types."""

import asyncio
import json
import threading

import openai
import pytest
from fake_text_engine import MODEL, FakeTextEngine
from pydantic import BaseModel

from shardwright.api.schemas import ChatAnswer, ChatChunk, CompletionAnswer
from shardwright.api.tools import STYLES, call_text
from shardwright.types import FinishReason, GrammarKind

HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TEMPLATES = {
    "hermes": "{{ tools }}<tool_call>",
    "llama3": "{{ tools }}<|start_header_id|>",
    "gemma3": "<start_of_turn>",
    "functiongemma": "{{ tools }}<start_function_call>",
    "gemma4": "{{ tools }}<|tool_call>",
}


def says(text):
    return lambda *_: text


# --- chat --------------------------------------------------------------------------------------------


async def test_a_chat_is_answered_with_its_usage(start, client_of):
    server = await start(FakeTextEngine(num_cached=4))
    client = await client_of(server)
    answer = await client.chat.completions.create(model=MODEL, messages=HI)
    assert answer.choices[0].message.content == "You said: hi"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len("user: hi\nassistant: ") + 1
    assert answer.usage.completion_tokens == len("You said: hi")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_the_synchronous_client_works_too():
    from api_server import running_server

    found = {}

    async def run(done):
        async with running_server() as server:
            found["url"] = server.url
            ready.set()
            await asyncio.to_thread(done.wait)

    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(run(done)))
    thread.start()
    try:
        assert ready.wait(10)
        with openai.OpenAI(base_url=f"{found['url']}/v1", api_key="x", max_retries=0) as client:
            answer = client.chat.completions.create(model=MODEL, messages=HI)
            stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert answer.choices[0].message.content == text == "You said: hi"
    finally:
        done.set()
        thread.join(10)


async def test_a_stream_gives_the_same_text_piece_by_piece_and_its_usage_last(start, client_of):
    client = await client_of(await start())
    stream = await client.chat.completions.create(
        model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-2]] == list("You said: hi")
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("You said: hi")
    assert len({chunk.id for chunk in chunks}) == 1
    for chunk in chunks:
        ChatChunk.model_validate(chunk.model_dump(exclude_unset=True))


async def test_several_choices_are_told_apart(start, client_of):
    client = await client_of(await start())
    answer = await client.chat.completions.create(model=MODEL, messages=HI, n=3)
    assert [(c.index, c.message.content) for c in answer.choices] == [(i, "You said: hi" + "!" * i) for i in range(3)]
    texts = ["", "", ""]
    stream = await client.chat.completions.create(model=MODEL, messages=HI, n=3, stream=True)
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["You said: hi" + "!" * i for i in range(3)]
    assert answer.usage.prompt_tokens == len("user: hi\nassistant: ") + 1


async def test_logprobs_have_openais_form_whole_and_streamed(start, client_of):
    client = await client_of(await start(FakeTextEngine(reply=says("né"))))
    asked = {"model": MODEL, "messages": HI, "logprobs": True, "top_logprobs": 2}
    answer = await client.chat.completions.create(**asked)
    content = answer.choices[0].logprobs.content
    assert [(t.token, t.logprob, t.bytes) for t in content] == [("n", -0.5, [110]), ("é", -0.5, [195, 169])]
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("n", -0.5), ("o", -1.5)]
    stream = await client.chat.completions.create(**asked, stream=True)
    streamed = [t for c in [c async for c in stream] if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == content
    ChatAnswer.model_validate(answer.model_dump(exclude_unset=True))


async def test_every_parameter_reaches_the_engine(start, client_of):
    server = await start()
    client = await client_of(server)
    await client.chat.completions.create(
        model=MODEL,
        messages=HI,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        seed=-1,
        max_completion_tokens=7,
        stop=["a", "b"],
        logit_bias={"65": 5, "3": -100},
        user="anna",
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.2,
            "min_tokens": 3,
            "stop_token_ids": [10],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "timeout": 5,
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )
    request = server.engine.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.05)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.2)
    assert (sampling.repetition_penalty, sampling.seed) == (1.2, 2**64 - 1)
    assert request.rules.logit_bias == ((3, -100.0), (65, 5.0))
    assert (request.rules.min_new_tokens, request.max_new_tokens, request.timeout_s) == (3, 7, 5)
    assert (request.stop_strings, request.stop_token_ids) == (("a", "b"), frozenset({10}))
    assert request.ignore_eos
    assert request.include_stop
    assert request.keep_special
    assert 'options: {"enable_thinking": false}' in server.engine.codec.decode(request.prompt)


async def test_what_is_left_out_has_openais_defaults(start, client_of):
    server = await start()
    client = await client_of(server)
    for _ in range(2):
        await client.chat.completions.create(model=MODEL, messages=HI)
    first, second = server.engine.requests
    assert (first.sampling.temperature, first.sampling.top_p, first.num_choices) == (1.0, 1.0, 1)
    assert first.max_new_tokens is None
    assert first.timeout_s == server.config.request_timeout_s
    assert first.sampling.seed != second.sampling.seed


async def test_messages_of_all_roles_reach_the_template(start, client_of):
    server = await start()
    client = await client_of(server)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    await client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        ],
        tools=[WEATHER],
    )
    prompt = server.engine.codec.decode(server.engine.requests[0].prompt)
    assert "system: Be\nbrief.\nuser: Weather?" in prompt
    assert '"arguments": {"city": "Bern"}' in prompt
    assert "tool: sun" in prompt
    assert prompt.startswith('tools: [{"type": "function", "function": {"name": "weather"')


async def test_a_last_answer_can_be_gone_on_with(start, client_of):
    server = await start(FakeTextEngine(reply=says(" world")))
    client = await client_of(server)
    messages = [*HI, {"role": "assistant", "content": "Hello"}]
    asked = {"model": MODEL, "messages": messages, "extra_body": {"continue_final_message": True, "echo": True}}
    answer = await client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == "Hello world"
    stream = await client.chat.completions.create(**asked, stream=True)
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Hello world"
    assert server.engine.codec.decode(server.engine.requests[0].prompt).endswith("assistant: Hello")


# --- structured output -------------------------------------------------------------------------------


class City(BaseModel):
    name: str
    size: int


async def test_a_schema_becomes_a_grammar_and_the_client_parses_the_answer(start, client_of):
    server = await start(FakeTextEngine(reply=says('{"name":"Bern","size":3}')))
    client = await client_of(server)
    answer = await client.chat.completions.parse(model=MODEL, messages=HI, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Bern", size=3)
    grammar = server.engine.requests[0].rules.grammar
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    assert set(json.loads(grammar.source)["properties"]) == {"name", "size"}


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_OBJECT),
        ({"extra_body": {"structured_outputs": {"regex": "[a-z]+"}}}, GrammarKind.REGEX),
        ({"extra_body": {"structured_outputs": {"choice": ["a b", 'c"\n']}}}, GrammarKind.LARK),
        ({"extra_body": {"structured_outputs": {"json": {"type": "integer"}}}}, GrammarKind.JSON_SCHEMA),
        ({"extra_body": {"structured_outputs": {"grammar": 'start: "x"'}}}, GrammarKind.LARK),
    ],
)
async def test_the_other_ways_of_asking_for_a_form(start, client_of, given, kind):
    server = await start()
    client = await client_of(server)
    await client.chat.completions.create(model=MODEL, messages=HI, **given)
    assert server.engine.requests[0].rules.grammar.kind is kind


async def test_a_grammar_that_cannot_be_followed_is_the_clients_mistake(start, client_of):
    client = await client_of(await start())
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=HI, response_format=schema)
    assert caught.value.param == "response_format"


# --- tools -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STYLES)
async def test_calls_of_every_style_become_tool_calls(start, client_of, name):
    style = STYLES[name]
    server = await start(
        FakeTextEngine(reply=says(call_text(style, "weather", {"city": "Bern"})), chat_template=TEMPLATES[name])
    )
    client = await client_of(server)
    asked = {"model": MODEL, "messages": HI, "tools": [WEATHER]}
    answer = await client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Bern"}
    ChatAnswer.model_validate(answer.model_dump(exclude_unset=True))

    async with client.chat.completions.stream(**asked) as stream:
        chunks = [event.chunk async for event in stream if event.type == "chunk"]
        final = await stream.get_final_completion()
    assert all(not chunk.choices[0].delta.content for chunk in chunks)
    assert final.choices[0].finish_reason == "tool_calls"
    streamed = final.choices[0].message.tool_calls[0]
    assert streamed.function.name == "weather"
    assert json.loads(streamed.function.arguments) == {"city": "Bern"}
    deltas = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == "weather"
    assert deltas[0].id == call.id or deltas[0].id.startswith("call_")
    assert all(each.id is None for each in deltas[1:])
    assert server.engine.requests[0].keep_special
    assert server.engine.requests[0].rules.grammar is None


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_choice_that_asks_for_a_call_forces_one(start, client_of, name, choice):
    text = call_text(STYLES[name], "weather", {"city": "Bern"})
    server = await start(FakeTextEngine(reply=says(text), chat_template=TEMPLATES[name]))
    client = await client_of(server)
    answer = await client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER], tool_choice=choice)
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    assert server.engine.requests[0].rules.grammar.kind is GrammarKind.LARK


async def test_without_a_choice_of_tools_the_model_is_told_of_none(start, client_of):
    text = call_text(STYLES["hermes"], "weather", {})
    server = await start(FakeTextEngine(reply=says(text)))
    client = await client_of(server)
    answer = await client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == text
    assert "weather" not in server.engine.codec.decode(server.engine.requests[0].prompt)


async def test_a_broken_call_is_plain_content(start, client_of):
    text = '<tool_call>{"name": "weather", "arguments": {oops}}</tool_call>'
    client = await client_of(await start(FakeTextEngine(reply=says(text))))
    answer = await client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")


async def test_one_call_only_when_parallel_calls_are_not_wanted(start, client_of):
    one = call_text(STYLES["hermes"], "weather", {"city": "Bern"})
    client = await client_of(await start(FakeTextEngine(reply=says(f"{one}\n{one}"))))
    for parallel, count in ((True, 2), (False, 1)):
        answer = await client.chat.completions.create(
            model=MODEL, messages=HI, tools=[WEATHER], parallel_tool_calls=parallel
        )
        assert len(answer.choices[0].message.tool_calls) == count


async def test_a_strict_tool_is_enforced_though_the_model_may_choose(start, client_of):
    server = await start()
    client = await client_of(server)
    tool = openai.pydantic_function_tool(City)
    answer = await client.chat.completions.create(model=MODEL, messages=HI, tools=[tool])
    assert answer.choices[0].message.content == "You said: hi"
    assert "City" in server.engine.requests[0].rules.grammar.source


async def test_logprobs_of_a_streamed_call_are_all_there(start, client_of):
    text = call_text(STYLES["hermes"], "weather", {"city": "Bern"})
    client = await client_of(await start(FakeTextEngine(reply=says(text))))
    stream = await client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER], logprobs=True, stream=True)
    tokens = [
        t.token for c in [c async for c in stream] if c.choices[0].logprobs for t in c.choices[0].logprobs.content
    ]
    assert "".join(tokens) == text


async def test_a_model_without_a_way_of_calling_refuses_tools(start, client_of):
    client = await client_of(await start(FakeTextEngine(chat_template="<|im_start|>")))
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER])
    assert caught.value.param == "tools"


# --- completions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["You said: ab"]),
        (["ab", "cd"], ["You said: ab", "You said: cd"]),
        ([97, 98], ["You said: ab"]),
        ([[97], [98, 99]], ["You said: a", "You said: bc"]),
    ],
)
async def test_prompts_may_be_texts_or_tokens_or_lists_of_them(start, client_of, prompt, expected):
    client = await client_of(await start())
    answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=50)
    assert [choice.text for choice in answer.choices] == expected
    texts = [""] * len(expected)
    async for chunk in await client.completions.create(model=MODEL, prompt=prompt, max_tokens=50, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
        CompletionAnswer.model_validate(chunk.model_dump(exclude_unset=True))
    assert texts == expected


async def test_choices_are_numbered_prompt_by_prompt(start, client_of):
    client = await client_of(await start())
    answer = await client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=50)
    assert [(c.index, c.text) for c in answer.choices] == [
        (0, "You said: a"),
        (1, "You said: a!"),
        (2, "You said: b"),
        (3, "You said: b!"),
    ]
    assert answer.usage.prompt_tokens == 4


async def test_a_completion_ends_after_sixteen_tokens_by_default(start, client_of):
    client = await client_of(await start(FakeTextEngine(reply=says("x" * 40))))
    answer = await client.completions.create(model=MODEL, prompt="a")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("x" * 16, "length")


async def test_echo_and_logprobs_have_the_old_form_with_offsets(start, client_of):
    client = await client_of(await start(FakeTextEngine(reply=says("dé"))))
    asked = {"model": MODEL, "prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 2}
    answer = await client.completions.create(**asked)
    choice = answer.choices[0]
    assert choice.text == "abdé"
    assert choice.logprobs.tokens == ["\x01", "a", "b", "d", "é"]
    assert choice.logprobs.text_offset == [0, 0, 1, 2, 3]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert choice.logprobs.top_logprobs == [None, {"a": -0.5}, {"b": -0.5}, {"d": -0.5}, {"é": -0.5}]
    chunks = [chunk.choices[0] async for chunk in await client.completions.create(**asked, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert [o for chunk in chunks if chunk.logprobs for o in chunk.logprobs.text_offset] == [0, 0, 1, 2, 3]
    plain = [
        c.choices[0].text async for c in await client.completions.create(**asked | {"logprobs": None}, stream=True)
    ]
    assert "".join(plain) == "abdé"


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_can_be_scored_without_going_on(start, client_of, logprobs, stream):
    server = await start()
    client = await client_of(server)
    asked = {"model": MODEL, "prompt": ["ab", "c"], "echo": True, "max_tokens": 0, "logprobs": logprobs}
    if stream:
        chunks = [c.choices[0] async for c in await client.completions.create(**asked, stream=True)]
        assert [chunk.text for chunk in chunks if chunk.text] == ["ab", "c"]
        assert [chunk.finish_reason for chunk in chunks[-2:]] == ["length", "length"]
        return
    answer = await client.completions.create(**asked)
    assert [choice.text for choice in answer.choices] == ["ab", "c"]
    assert answer.usage.completion_tokens == 0
    if logprobs:
        assert answer.choices[0].logprobs.tokens == ["\x01", "a", "b"]
    assert server.engine.num_running == 0


async def test_stop_strings_and_their_inclusion(start, client_of):
    client = await client_of(await start(FakeTextEngine(reply=says("one two three"))))
    asked = {"model": MODEL, "prompt": "a", "stop": "two", "max_tokens": 50}
    assert (await client.completions.create(**asked)).choices[0].text == "one "
    extra = {"include_stop_str_in_output": True}
    assert (await client.completions.create(**asked, extra_body=extra)).choices[0].text == "one two"


# --- models ------------------------------------------------------------------------------------------


async def test_the_model_is_listed_and_found_by_its_name(start, client_of):
    client = await client_of(await start())
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).max_model_len == 4096
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/model")


# --- errors ------------------------------------------------------------------------------------------


async def refused(client, **changes):
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(**{"model": MODEL, "messages": HI} | changes)
    return caught.value


async def test_another_model_is_not_found(start, client_of):
    error = await refused(await client_of(await start()), model="gpt-9")
    assert (error.status_code, error.code, error.param) == (404, "model_not_found", "model")


async def test_a_prompt_that_is_too_long_says_so(start, client_of):
    client = await client_of(await start(FakeTextEngine(context_length=30)))
    error = await refused(client, messages=[{"role": "user", "content": "x" * 100}])
    assert (error.status_code, error.code, error.param) == (400, "context_length_exceeded", "messages")
    error = await refused(client, max_tokens=20)
    assert (error.status_code, error.code, error.param) == (400, "context_length_exceeded", "max_tokens")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_says_when_to_try_again(start, client_of, stream):
    error = await refused(await client_of(await start(FakeTextEngine(queue_is_full=True))), stream=stream)
    assert isinstance(error, openai.RateLimitError)
    assert error.response.headers["retry-after"] == "2"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_cluster_is_unavailable(start, client_of, stream):
    error = await refused(await client_of(await start(FakeTextEngine(is_down=True))), stream=stream)
    assert (error.status_code, error.code) == (503, "cluster_error")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_before_the_first_token_is_a_status(start, client_of, stream):
    server = await start(FakeTextEngine(hold=asyncio.Event()))
    error = await refused(await client_of(server), stream=stream, extra_body={"timeout": 0.05})
    assert (error.status_code, error.code) == (504, "deadline_exceeded")
    assert server.engine.num_running == 0


@pytest.mark.parametrize(
    ("reason", "code", "status"),
    [
        (FinishReason.DEADLINE, "deadline_exceeded", 504),
        (FinishReason.ERROR, "cluster_error", 503),
        (FinishReason.ABORT, "aborted", 503),
    ],
)
async def test_an_end_in_the_middle_is_an_event_of_a_stream_and_a_status_otherwise(
    start, client_of, reason, code, status
):
    client = await client_of(await start(FakeTextEngine(ends_with=reason, breaks_after=3)))
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    text = ""
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012  the text so far counts too
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == "You"
    assert caught.value.code == code
    error = await refused(client)
    assert (error.status_code, error.code) == (status, code)


async def test_one_prompt_that_fails_ends_the_others(start, client_of):
    server = await start(FakeTextEngine(ends_with=FinishReason.ERROR, breaks_after=2))
    client = await client_of(server)
    with pytest.raises(openai.InternalServerError):
        await client.completions.create(model=MODEL, prompt=["a", "b", "c"])
    assert server.engine.num_running == 0


async def test_a_clients_own_timeout_aborts_the_sequence(start, client_of):
    server = await start(FakeTextEngine(hold=asyncio.Event()))
    client = await client_of(server, timeout=0.1)
    with pytest.raises(openai.APITimeoutError):
        await client.chat.completions.create(model=MODEL, messages=HI)
    async with asyncio.timeout(5):
        await server.engine.aborted.wait()
