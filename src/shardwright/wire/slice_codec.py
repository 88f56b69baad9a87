"""One sequence's part of a step: protobuf <-> plain values. What comes from a peer is checked here, once."""

from __future__ import annotations

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
from shardwright.wire.limits import MAX_BLOCK_TABLE, MAX_POSITION, MAX_SETUP_TOKENS, MAX_STOP_TOKENS

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
    target.token_ids.extend(part.token_ids)
    target.block_table.extend(part.block_table)
    if part.sampling is not None:
        _fill_sampling(target.sampling, part.sampling)
    if part.setup is not None:
        _fill_setup(target.setup, part.setup)
    if part.num_prompt_logprobs is not None:
        target.num_prompt_logprobs = part.num_prompt_logprobs
    if part.next_token_id is not None:
        target.next_token_id = part.next_token_id


def read_slice(source: pb.SequenceSlice, where: str) -> SequenceSlice:
    """The slice; `where` names it in errors. Raises `ProtocolError`."""
    if not source.token_ids:
        raise ProtocolError(f"{where}: no tokens")
    checks.at_most(f"{where}: last position", source.start_position + len(source.token_ids), MAX_POSITION)
    checks.at_most(f"{where}: blocks", len(source.block_table), MAX_BLOCK_TABLE)
    alternatives = source.num_prompt_logprobs if source.HasField("num_prompt_logprobs") else None
    if alternatives is not None:
        checks.at_most(f"{where}: num_prompt_logprobs", alternatives, MAX_TOP_LOGPROBS)
    following = source.next_token_id if source.HasField("next_token_id") else None
    if following is not None:
        checks.indices(f"{where}: next token id", (following,))
    return SequenceSlice(
        seq_id=source.seq_id,
        start_position=source.start_position,
        token_ids=checks.indices(f"{where}: token id", source.token_ids),
        block_table=checks.indices(f"{where}: block id", source.block_table),
        sampling=_read_sampling(source.sampling, where) if source.HasField("sampling") else None,
        setup=_read_setup(source.setup, f"{where}, setup") if source.HasField("setup") else None,
        num_prompt_logprobs=alternatives,
        next_token_id=following,
    )


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


def _read_sampling(source: pb.SamplingParams, where: str) -> SamplingParams:
    try:
        return SamplingParams(
            temperature=source.temperature,
            top_k=source.top_k,
            top_p=source.top_p,
            seed=source.seed,
            min_p=source.min_p,
            repetition_penalty=source.repetition_penalty,
            presence_penalty=source.presence_penalty,
            frequency_penalty=source.frequency_penalty,
            num_top_logprobs=source.num_top_logprobs,
        )
    except InvalidRequestError as exc:
        raise ProtocolError(f"{where}: {exc}") from exc


def _fill_setup(target: pb.SequenceSetup, setup: SequenceSetup) -> None:
    target.num_prompt_tokens = setup.num_prompt_tokens
    target.tokens.extend(setup.tokens)
    target.stop_token_ids.extend(sorted(setup.stop_token_ids))
    rules = setup.rules
    target.rules.SetInParent()
    target.rules.bias_token_ids.extend(token_id for token_id, _ in rules.logit_bias)
    target.rules.biases.extend(bias for _, bias in rules.logit_bias)
    target.rules.min_new_tokens = min(rules.min_new_tokens, MAX_POSITION)  # no output is longer
    if rules.grammar is not None:
        target.rules.grammar.kind = _GRAMMARS[rules.grammar.kind]
        target.rules.grammar.source = rules.grammar.source


def _read_setup(source: pb.SequenceSetup, where: str) -> SequenceSetup:
    checks.at_most(f"{where}: tokens", len(source.tokens), MAX_SETUP_TOKENS)
    checks.at_most(f"{where}: prompt tokens", source.num_prompt_tokens, len(source.tokens))
    checks.at_most(f"{where}: stop tokens", len(source.stop_token_ids), MAX_STOP_TOKENS)
    return SequenceSetup(
        num_prompt_tokens=source.num_prompt_tokens,
        tokens=checks.indices(f"{where}: token id", source.tokens),
        rules=_read_rules(source.rules, where),
        stop_token_ids=frozenset(checks.indices(f"{where}: stop token id", source.stop_token_ids)),
    )


def _read_rules(source: pb.TokenRules, where: str) -> TokenRules:
    checks.at_most(f"{where}: biases", len(source.bias_token_ids), MAX_LOGIT_BIAS)
    checks.same_length(f"{where}: biases", len(source.bias_token_ids), len(source.biases))
    checks.at_most(f"{where}: min_new_tokens", source.min_new_tokens, MAX_POSITION)
    ids = checks.indices(f"{where}: token id of a bias", source.bias_token_ids)
    try:
        return TokenRules(
            logit_bias=tuple(zip(ids, source.biases, strict=True)),
            grammar=_read_grammar(source.grammar, where) if source.HasField("grammar") else None,
            min_new_tokens=source.min_new_tokens,
        )
    except InvalidRequestError as exc:
        raise ProtocolError(f"{where}: {exc}") from exc


def _read_grammar(source: pb.Grammar, where: str) -> Grammar:
    kind = _GRAMMAR_KINDS.get(source.kind)
    if kind is None:
        raise ProtocolError(f"{where}: grammar kind number {source.kind}; 1 to {len(_GRAMMARS)} exist")
    checks.text(f"{where}: grammar", source.source, limit=MAX_GRAMMAR_CHARS, empty=True)
    return Grammar(kind=kind, source=source.source)
