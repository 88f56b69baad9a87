"""One sequence's part of a step: protobuf <-> plain values. What comes from a peer is checked here, once.

This is done for each sequence of each step at each stage, while the stage before or after it waits: lists of ids are
copied as bytes, and what an error would say is put together only when there is one.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Final

from shardwright.errors import InvalidRequestError, ProtocolError
from shardwright.types import (
    MAX_GRAMMAR_CHARS,
    MAX_LOGIT_BIAS,
    MAX_TOP_LOGPROBS,
    Grammar,
    GrammarKind,
    SamplingParams,
    SequenceSetup,
    SequenceSlice,
    TokenRules,
)
from shardwright.wire import checks
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import MAX_BLOCK_TABLE, MAX_POSITION, MAX_STOP_TOKENS

_ID_BYTES: Final = 4
_GRAMMARS: Final[dict[GrammarKind, pb.GrammarKind]] = {
    GrammarKind.JSON_OBJECT: pb.GRAMMAR_KIND_JSON_OBJECT,
    GrammarKind.JSON_SCHEMA: pb.GRAMMAR_KIND_JSON_SCHEMA,
    GrammarKind.REGEX: pb.GRAMMAR_KIND_REGEX,
    GrammarKind.LARK: pb.GRAMMAR_KIND_LARK,
}
_GRAMMAR_KINDS: Final[dict[int, GrammarKind]] = {int(number): kind for kind, number in _GRAMMARS.items()}


def fill_slice(target: pb.SequenceSlice, part: SequenceSlice) -> None:
    """Write a slice into an empty `target`."""
    target.seq_id = part.seq_id
    target.start_position = part.start_position
    target.token_ids = _pack_ids(part.token_ids)
    target.block_table = _pack_ids(part.block_table)
    if part.sampling is not None:
        _fill_sampling(target.sampling, part.sampling)
    if part.setup is not None:
        _fill_setup(target.setup, part.setup)
    if part.num_prompt_logprobs is not None:
        target.num_prompt_logprobs = part.num_prompt_logprobs
    if part.next_token_id is not None:
        target.next_token_id = part.next_token_id


def read_slice(source: pb.SequenceSlice, step: str) -> SequenceSlice:
    """The slice; `step` names its step in errors. Raises `ProtocolError`."""
    try:
        return _read_slice(source)
    except (ProtocolError, InvalidRequestError) as exc:
        raise ProtocolError(f"{step}, sequence {source.seq_id}: {exc}") from exc


def num_ids(raw: bytes) -> int:
    """How many ids these bytes are."""
    return len(raw) // _ID_BYTES


def _read_slice(source: pb.SequenceSlice) -> SequenceSlice:
    token_ids = _read_ids("token id", source.token_ids)
    if not token_ids:
        raise ProtocolError("no tokens")
    checks.at_most("last position", source.start_position + len(token_ids), MAX_POSITION)
    checks.at_most("blocks", num_ids(source.block_table), MAX_BLOCK_TABLE)
    alternatives = source.num_prompt_logprobs if source.HasField("num_prompt_logprobs") else None
    if alternatives is not None:
        checks.at_most("num_prompt_logprobs", alternatives, MAX_TOP_LOGPROBS)
    following = source.next_token_id if source.HasField("next_token_id") else None
    if following is not None:
        checks.indices("next token id", (following,))
    return SequenceSlice(
        seq_id=source.seq_id,
        start_position=source.start_position,
        token_ids=token_ids,
        block_table=_read_ids("block id", source.block_table),
        sampling=_read_sampling(source.sampling) if source.HasField("sampling") else None,
        setup=_read_setup(source.setup) if source.HasField("setup") else None,
        num_prompt_logprobs=alternatives,
        next_token_id=following,
    )


def _pack_ids(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def _read_ids(what: str, raw: bytes) -> tuple[int, ...]:
    if len(raw) % _ID_BYTES:
        raise ProtocolError(f"{what}s of {len(raw)} bytes; each takes {_ID_BYTES}")
    ids = struct.unpack(f"<{num_ids(raw)}I", raw)
    # The highest byte of each is below 128, so that it is below 2^31; this is ten times faster than max().
    return ids if raw[_ID_BYTES - 1 :: _ID_BYTES].isascii() else checks.indices(what, ids)


def _fill_sampling(target: pb.SamplingParams, params: SamplingParams) -> None:
    target.temperature = params.temperature
    target.top_k = min(params.top_k, 2**32 - 1)  # no vocabulary is larger: no limit either way
    target.top_p = params.top_p
    target.seed = params.seed
    target.min_p = params.min_p
    target.repetition_penalty = params.repetition_penalty
    target.presence_penalty = params.presence_penalty
    target.frequency_penalty = params.frequency_penalty
    target.num_top_logprobs = params.num_top_logprobs


def _read_sampling(source: pb.SamplingParams) -> SamplingParams:
    return _make_sampling(
        (
            source.temperature,
            source.top_k,
            source.top_p,
            source.seed,
            source.min_p,
            source.repetition_penalty,
            source.presence_penalty,
            source.frequency_penalty,
            source.num_top_logprobs,
        )
    )


@functools.lru_cache(maxsize=4096)  # a sequence has the same in all its steps
def _make_sampling(values: tuple[float, int, float, int, float, float, float, float, int]) -> SamplingParams:
    temperature, top_k, top_p, seed, min_p, repetition, presence, frequency, num_top = values
    return SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        num_top_logprobs=num_top,
    )


def _fill_setup(target: pb.SequenceSetup, setup: SequenceSetup) -> None:
    target.num_prompt_tokens = setup.num_prompt_tokens
    target.tokens = _pack_ids(setup.tokens)
    target.stop_token_ids.extend(sorted(setup.stop_token_ids))
    rules = setup.rules
    target.rules.SetInParent()
    target.rules.bias_token_ids.extend(token_id for token_id, _ in rules.logit_bias)
    target.rules.biases.extend(bias for _, bias in rules.logit_bias)
    target.rules.min_new_tokens = min(rules.min_new_tokens, MAX_POSITION)  # no output is longer
    if rules.grammar is not None:
        target.rules.grammar.kind = _GRAMMARS[rules.grammar.kind]
        target.rules.grammar.source = rules.grammar.source


def _read_setup(source: pb.SequenceSetup) -> SequenceSetup:
    tokens = _read_ids("setup's token id", source.tokens)
    checks.at_most("setup's prompt tokens", source.num_prompt_tokens, len(tokens))
    checks.at_most("setup's stop tokens", len(source.stop_token_ids), MAX_STOP_TOKENS)
    return SequenceSetup(
        num_prompt_tokens=source.num_prompt_tokens,
        tokens=tokens,
        rules=_read_rules(source.rules),
        stop_token_ids=frozenset(checks.indices("setup's stop token id", source.stop_token_ids)),
    )


def _read_rules(source: pb.TokenRules) -> TokenRules:
    checks.at_most("biases", len(source.bias_token_ids), MAX_LOGIT_BIAS)
    checks.same_length("biases", len(source.bias_token_ids), len(source.biases))
    checks.at_most("min_new_tokens", source.min_new_tokens, MAX_POSITION)
    ids = checks.indices("token id of a bias", source.bias_token_ids)
    return TokenRules(
        logit_bias=tuple(zip(ids, source.biases, strict=True)),
        grammar=_read_grammar(source.grammar) if source.HasField("grammar") else None,
        min_new_tokens=source.min_new_tokens,
    )


def _read_grammar(source: pb.Grammar) -> Grammar:
    kind = _GRAMMAR_KINDS.get(source.kind)
    if kind is None:
        raise ProtocolError(f"grammar kind number {source.kind}; 1 to {len(_GRAMMARS)} exist")
    checks.text("grammar", source.source, limit=MAX_GRAMMAR_CHARS, empty=True)
    return Grammar(kind=kind, source=source.source)
