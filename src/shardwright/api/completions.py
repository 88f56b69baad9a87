"""`/v1/completions`: goes on from texts or token ids."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

from starlette.responses import JSONResponse, Response

from shardwright.api.errors import invalid
from shardwright.api.keys import Client
from shardwright.api.metrics import Meter
from shardwright.api.render import ChunkWriter, CompletionLogprobs
from shardwright.api.sampling import answer_grammar, generation_request
from shardwright.api.schemas import CompletionRequest
from shardwright.api.service import Service, new_id, now
from shardwright.api.stream import DONE, EventWriter, UsageCounter, generate
from shardwright.engine import ChoiceEnd, GenerationEvent, GenerationRequest, PromptScored, ScoredToken, TextDelta
from shardwright.types import Grammar, TokenId

DEFAULT_MAX_TOKENS = 16  # OpenAI's
KIND = "text_completion"

Prompt: TypeAlias = str | tuple[TokenId, ...]


async def complete(
    service: Service, client: Client, meter: Meter, fields: CompletionRequest, writer: EventWriter
) -> Response | None:
    """Answer one request."""
    requests, texts = await _prepare(service, fields)
    completion = _Completion(service, fields, requests, texts)
    if fields.stream:
        await completion.stream(client, meter, writer)
        return None
    return JSONResponse(await completion.whole(client, meter))


async def _prepare(service: Service, fields: CompletionRequest) -> tuple[list[GenerationRequest], list[str]]:
    """What the engine is asked, and for `echo` the prompts' texts."""
    prompts = _prompts(fields)
    if len(prompts) > service.config.max_prompts:
        raise invalid(f"prompt holds {len(prompts)} prompts; at most {service.config.max_prompts} are taken", "prompt")
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise invalid("best_of must equal n: all choices are given", "best_of")
    max_tokens = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    if not max_tokens and not fields.echo:
        raise invalid("max_tokens may be 0 only with echo", "max_tokens")
    if not service.engine.model.has_tokenizer:
        if any(isinstance(prompt, str) for prompt in prompts):
            raise invalid("the model has no tokenizer; give the prompt as token ids", "prompt")
        if fields.echo:
            raise invalid("the model has no tokenizer that could tell the prompt's text", "echo")

    def encode() -> list[tuple[TokenId, ...]]:
        return [service.engine.codec.encode(each) if isinstance(each, str) else each for each in prompts]

    def decode() -> list[str]:
        return [each if isinstance(each, str) else service.engine.codec.decode(each) for each in prompts]

    ids = await service.text("prompt", encode)
    grammar = answer_grammar(fields)
    if grammar is not None:
        await _check(service, grammar)
    requests = [
        generation_request(
            fields,
            prompt,
            model=service.engine.model,
            config=service.config,
            prompt_field="prompt",
            max_tokens=max(max_tokens, 1),
            max_tokens_field="max_tokens",
            grammar=grammar,
            num_top_logprobs=fields.logprobs or 0,
            num_prompt_logprobs=fields.logprobs if fields.echo else None,
        )
        for prompt in ids
    ]
    return requests, await service.text("prompt", decode) if fields.echo else [""] * len(ids)


def _prompts(fields: CompletionRequest) -> list[Prompt]:
    prompt = fields.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [_ids(prompt)]
    return [each if isinstance(each, str) else _ids(each) for each in prompt]


def _ids(value: object) -> tuple[TokenId, ...]:
    assert isinstance(value, Sequence), "the schema took something else"
    return tuple(value)


async def _check(service: Service, grammar: Grammar) -> None:
    await service.text("structured_outputs", lambda: service.engine.check_grammar(grammar))


class _Completion:
    """One request on its way."""

    def __init__(
        self, service: Service, fields: CompletionRequest, requests: list[GenerationRequest], texts: list[str]
    ) -> None:
        self._service = service
        self._fields = fields
        self._requests = requests
        self._texts = texts  # of the prompts, for `echo`
        self._num_choices = requests[0].num_choices
        self._id = new_id("cmpl-")
        self._created = now()
        self._usage = UsageCounter(requests)
        count = len(requests) * self._num_choices
        self._logprobs = (
            None if fields.logprobs is None else [CompletionLogprobs(fields.logprobs) for _ in range(count)]
        )
        self._only_prompt = fields.max_tokens == 0

    async def _events(self, client: Client, meter: Meter) -> AsyncGenerator[tuple[int, GenerationEvent]]:
        """The engine's events. Without tokens to generate they are over with the prompts' scores."""
        if self._only_prompt and self._logprobs is None:
            return
        num_missing = len(self._requests)
        async with aclosing(generate(self._service, client, meter, self._requests, "prompt")) as events:
            async for number, event in events:
                if not self._only_prompt:
                    yield number, event
                elif isinstance(event, PromptScored):
                    yield number, event
                    num_missing -= 1
                    if not num_missing:
                        return

    async def whole(self, client: Client, meter: Meter) -> dict[str, Any]:
        """The answer in one piece."""
        count = len(self._requests) * self._num_choices
        texts = [[self._texts[index // self._num_choices]] for index in range(count)]
        tokens: list[list[tuple[str, Sequence[ScoredToken]]]] = [[] for _ in range(count)]
        finish = ["length"] * count
        async with aclosing(self._events(client, meter)) as events:
            async for number, event in events:
                match event:
                    case PromptScored():
                        for index in self._choices(number):
                            tokens[index].append((self._texts[number], event.tokens))
                    case TextDelta():
                        index = number * self._num_choices + event.choice
                        texts[index].append(event.text)
                        tokens[index].append((event.text, event.tokens))
                    case ChoiceEnd():
                        finish[number * self._num_choices + event.choice] = event.reason.value
                        self._usage.add(number, event)
        choices = [
            {
                "index": index,
                "text": "".join(texts[index]),
                "logprobs": self._merged(index, tokens[index]),
                "finish_reason": finish[index],
            }
            for index in range(count)
        ]
        return {
            "id": self._id,
            "object": KIND,
            "created": self._created,
            "model": self._service.engine.model.name,
            "choices": choices,
            "usage": self._usage.to_json(),
        }

    def _merged(self, index: int, pieces: Sequence[tuple[str, Sequence[ScoredToken]]]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        merged = self._logprobs[index].take("", ())
        for text, tokens in pieces:
            for key, values in self._logprobs[index].take(text, tokens).items():
                merged[key].extend(values)
        return merged

    async def stream(self, client: Client, meter: Meter, writer: EventWriter) -> None:
        """The answer in events."""
        options = self._fields.stream_options
        include_usage = bool(options and options.include_usage)
        chunks = ChunkWriter(
            answer_id=self._id,
            kind=KIND,
            created=self._created,
            model=self._service.engine.model.name,
            include_usage=include_usage,
        )
        logprobs = self._logprobs
        async with aclosing(self._events(client, meter)) as events:
            if self._fields.echo and logprobs is None:
                # The prompt waits for the first event, so that an error before it still has a status of its own.
                first = await anext(events, None)
                for index in range(len(self._requests) * self._num_choices):
                    await writer.write(chunks.text(index, self._texts[index // self._num_choices]))
                if first is not None:
                    await self._write(writer, chunks, *first)
            async for number, event in events:
                await self._write(writer, chunks, number, event)
        if self._only_prompt:
            for index in range(len(self._requests) * self._num_choices):
                await writer.write(chunks.completion(index, "", finish="length"))
        if include_usage:
            await writer.write(chunks.usage(self._usage.to_json()))
        await writer.write(DONE)

    async def _write(self, writer: EventWriter, chunks: ChunkWriter, number: int, event: GenerationEvent) -> None:
        match event:
            case TextDelta():
                index = number * self._num_choices + event.choice
                if self._logprobs is not None:
                    scores = self._logprobs[index].take(event.text, event.tokens)
                    await writer.write(chunks.completion(index, event.text, logprobs=scores))
                elif event.text:
                    await writer.write(chunks.text(index, event.text))
            case PromptScored():
                assert self._logprobs is not None, "nobody asked for the prompt's scores"
                for index in self._choices(number):
                    scores = self._logprobs[index].take(self._texts[number], event.tokens)
                    await writer.write(chunks.completion(index, self._texts[number], logprobs=scores))
            case ChoiceEnd():
                self._usage.add(number, event)
                index = number * self._num_choices + event.choice
                await writer.write(chunks.completion(index, "", finish=event.reason.value))

    def _choices(self, number: int) -> range:
        return range(number * self._num_choices, (number + 1) * self._num_choices)
