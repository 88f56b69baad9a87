"""Turns a request's fields into the engine's terms: sampling, rules, stops. Pure."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from shardwright.api.errors import invalid
from shardwright.api.limits import MAX_SCHEMA_CHARS
from shardwright.api.schemas import GenerationFields, JsonObjectFormat, JsonSchemaFormat, ResponseFormat
from shardwright.config import ServeConfig
from shardwright.engine import GenerationRequest, ServedModel
from shardwright.errors import InvalidRequestError
from shardwright.types import Grammar, GrammarKind, SamplingParams, TokenId, TokenRules


def generation_request(
    fields: GenerationFields,
    prompt: tuple[TokenId, ...],
    *,
    model: ServedModel,
    config: ServeConfig,
    prompt_field: str,
    max_tokens: int | None,
    max_tokens_field: str,
    grammar: Grammar | None,
    num_top_logprobs: int = 0,
    num_prompt_logprobs: int | None = None,
    keep_special: bool = False,
) -> GenerationRequest:
    """What the engine is asked for one prompt. Raises `ApiError` 400 for what model or server have no room for."""
    num_choices = fields.n or 1
    if num_choices > config.max_choices:
        raise invalid(f"n is {num_choices}; at most {config.max_choices} choices can be asked for", "n")
    timeout_s = config.request_timeout_s if fields.timeout is None else fields.timeout
    if timeout_s > config.request_timeout_s:
        raise invalid(f"timeout is {timeout_s:g} s; at most {config.request_timeout_s:g} s are given", "timeout")
    if not prompt:
        raise invalid("the prompt has no tokens; there is nothing to go on from", prompt_field)
    _check_context(len(prompt), max_tokens, model.context_length, prompt_field, max_tokens_field)
    for field, ids in ((prompt_field, prompt), ("stop_token_ids", fields.stop_token_ids or ())):
        if ids and max(ids) >= model.vocab_size:
            raise invalid(f"token {max(ids)} is not in the vocabulary of {model.vocab_size} tokens", field)
    try:
        return GenerationRequest(
            prompt=prompt,
            max_new_tokens=max_tokens,
            sampling=_sampling(fields, num_top_logprobs),
            rules=TokenRules(
                logit_bias=_logit_bias(fields, model), grammar=grammar, min_new_tokens=fields.min_tokens or 0
            ),
            stop_strings=_stops(fields),
            stop_token_ids=frozenset(fields.stop_token_ids or ()),
            ignore_eos=bool(fields.ignore_eos),
            include_stop=bool(fields.include_stop_str_in_output),
            keep_special=keep_special or fields.skip_special_tokens is False,
            num_choices=num_choices,
            num_prompt_logprobs=num_prompt_logprobs,
            timeout_s=timeout_s,
        )
    except InvalidRequestError as exc:
        raise invalid(str(exc)) from exc


def _check_context(num_prompt: int, max_tokens: int | None, limit: int, prompt_field: str, max_field: str) -> None:
    if num_prompt >= limit:
        raise invalid(
            f"the prompt has {num_prompt} tokens; the model's context is {limit}, the answer's tokens included",
            prompt_field,
            "context_length_exceeded",
        )
    if max_tokens is not None and num_prompt + max_tokens > limit:
        raise invalid(
            f"the prompt has {num_prompt} tokens and {max_field} is {max_tokens}; together they may be {limit} at most",
            max_field,
            "context_length_exceeded",
        )


def _sampling(fields: GenerationFields, num_top_logprobs: int) -> SamplingParams:
    return SamplingParams(
        temperature=_or(fields.temperature, 1.0),
        top_k=max(fields.top_k or 0, 0),
        top_p=_or(fields.top_p, 1.0),
        min_p=_or(fields.min_p, 0.0),
        seed=secrets.randbits(63) if fields.seed is None else fields.seed % 2**64,
        repetition_penalty=_or(fields.repetition_penalty, 1.0),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        num_top_logprobs=num_top_logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _logit_bias(fields: GenerationFields, model: ServedModel) -> tuple[tuple[TokenId, float], ...]:
    biases = {int(token): float(bias) for token, bias in (fields.logit_bias or {}).items()}
    if len(biases) != len(fields.logit_bias or {}):
        raise invalid("logit_bias names a token twice", "logit_bias")
    if biases and max(biases) >= model.vocab_size:
        raise invalid(
            f"logit_bias: token {max(biases)} is not in the vocabulary of {model.vocab_size} tokens", "logit_bias"
        )
    return tuple(sorted(biases.items()))


def _stops(fields: GenerationFields) -> tuple[str, ...]:
    stop = fields.stop
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(dict.fromkeys(stop))


# --- what the answer must match ----------------------------------------------------------------------


def answer_grammar(fields: GenerationFields, response_format: ResponseFormat | None = None) -> Grammar | None:
    """What the whole answer must match, tool calls aside. Raises `ApiError` 400 for a schema that is too large."""
    if isinstance(response_format, JsonObjectFormat):
        return Grammar(kind=GrammarKind.JSON_OBJECT)
    if isinstance(response_format, JsonSchemaFormat):
        source = compact_schema(response_format.json_schema.schema_, "response_format.json_schema.schema")
        return Grammar(kind=GrammarKind.JSON_SCHEMA, source=source)
    wanted = fields.structured_outputs
    if wanted is None:
        return None
    if wanted.regex is not None:
        return Grammar(kind=GrammarKind.REGEX, source=wanted.regex)
    if wanted.grammar is not None:
        return Grammar(kind=GrammarKind.LARK, source=wanted.grammar)
    if wanted.choice is not None:
        alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in wanted.choice)
        if len(alternatives) > MAX_SCHEMA_CHARS:
            raise invalid(f"the choices have more than {MAX_SCHEMA_CHARS} characters", "structured_outputs.choice")
        return Grammar(kind=GrammarKind.LARK, source=f"start: {alternatives}\n")
    schema = wanted.json_ if isinstance(wanted.json_, dict) else {} if wanted.json_ else {"not": {}}
    return Grammar(kind=GrammarKind.JSON_SCHEMA, source=compact_schema(schema, "structured_outputs.json"))


def compact_schema(schema: Mapping[str, Any], param: str) -> str:
    """A JSON schema without spaces. Raises `ApiError` 400 when it is too large."""
    source = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if len(source) > MAX_SCHEMA_CHARS:
        raise invalid(f"the schema has {len(source)} characters; at most {MAX_SCHEMA_CHARS} are taken", param)
    return source
