"""What steps result in: protobuf <-> plain values. What comes from a peer is checked here, once.

On the token stream a result is one part, unless the scores of very many prompt tokens make it too large: then it comes
in pieces (`result_parts`, `ResultDecoder`). The unary call's result is one message, however large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from shardwright.errors import ProtocolError
from shardwright.types import MAX_TOP_LOGPROBS, PromptScores, TokenId, TokenOut, TokenScore
from shardwright.wire import checks, frames
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import MAX_MESSAGE_BYTES, MAX_POSITION, MAX_STEP_BYTES, MAX_STEP_TOKENS, WireLimits
from shardwright.wire.messages import LayerResult, StepResult
from shardwright.wire.pieces import Pieces, cut

_WHAT: Final = "a step's result"


def result_parts(result: StepResult) -> Iterator[bytes]:
    """The result as parts of the token stream. Raises `ProtocolError` for one above `MAX_STEP_BYTES`."""
    part = pb.ResultPart()
    part.result.epoch = result.epoch
    part.result.step = result.step
    _fill_tokens(part.result, result.tokens)
    _fill_scores(part.result, result.prompt_scores)
    raw: bytes = part.SerializeToString()
    if len(raw) <= MAX_MESSAGE_BYTES:
        yield raw
        return
    for piece in cut(_WHAT, part.result.SerializeToString()):
        yield pb.ResultPart(piece=piece).SerializeToString()


class ResultDecoder:
    """Turns the parts of one token stream into results."""

    ended = False  # a token stream ends with its call

    def __init__(self) -> None:
        self._pieces = Pieces(_WHAT)

    def feed(self, raw: bytes) -> StepResult | None:
        """The result that this part completes, if it does. Raises `ProtocolError`."""
        part = checks.parse(pb.ResultPart, raw)
        kind = part.WhichOneof("part")
        if self._pieces.is_open and kind != "piece":
            raise ProtocolError(f"{kind or 'an empty part'} on a token stream; expected the rest of the result before")
        match kind:
            case "result":
                return _read_result(part.result)
            case "piece":
                whole = self._pieces.add(part.piece)
                return None if whole is None else _read_result(checks.parse(pb.StepResult, whole, limit=MAX_STEP_BYTES))
            case _:
                raise ProtocolError("a part of a token stream that holds neither result nor piece")


def encode_layer_result(result: LayerResult, limits: WireLimits) -> bytes:
    """One stage's result, in one message however large."""
    message = pb.LayerResult()
    for frame in result.tensors:
        frames.fill_frame(message.tensors.add(), frame, with_data=True)
    _fill_tokens(message, result.tokens)
    _fill_scores(message, result.prompt_scores)
    return checks.serialize(message, limit=limits.max_unary_bytes)


def decode_layer_result(raw: bytes, limits: WireLimits) -> LayerResult:
    """Raises `ProtocolError`, `FrameError` for a tensor."""
    source = checks.parse(pb.LayerResult, raw, limit=limits.max_unary_bytes)
    return LayerResult(
        tensors=frames.read_frames(source.tensors, limits, may_follow=False),
        tokens=_read_tokens(source.tokens),
        prompt_scores=_read_scores(source.prompt_scores),
    )


def _read_result(source: pb.StepResult) -> StepResult:
    return StepResult(
        epoch=source.epoch,
        step=source.step,
        tokens=_read_tokens(source.tokens),
        prompt_scores=_read_scores(source.prompt_scores),
    )


def _fill_tokens(target: pb.StepResult | pb.LayerResult, tokens: Iterable[TokenOut]) -> None:
    for token in tokens:
        entry = target.tokens.add(seq_id=token.seq_id, token_id=token.token_id, logprob=token.logprob)
        _fill_top(entry, token.top)


def _read_tokens(source: Iterable[pb.TokenOut]) -> tuple[TokenOut, ...]:
    tokens = tuple(
        TokenOut(
            seq_id=token.seq_id,
            token_id=token.token_id,
            logprob=token.logprob,
            top=_read_top(token),
        )
        for token in source
    )
    checks.num_slices("tokens of one step's result", len(tokens))
    checks.indices("token id", (token.token_id for token in tokens))
    checks.distinct("a step's result: sequence", [token.seq_id for token in tokens])
    return tokens


def _fill_scores(target: pb.StepResult | pb.LayerResult, runs: Iterable[PromptScores]) -> None:
    for run in runs:
        entry = target.prompt_scores.add(seq_id=run.seq_id, first_position=run.first_position)
        for score in run.scores:
            _fill_top(entry.scores.add(token_id=score.token_id, logprob=score.logprob), score.top)


def _fill_top(target: pb.TokenOut | pb.TokenScore, top: Sequence[tuple[TokenId, float]]) -> None:
    if top:
        target.top_token_ids.extend(token_id for token_id, _ in top)
        target.top_logprobs.extend(logprob for _, logprob in top)


def _read_scores(source: Sequence[pb.PromptScores]) -> tuple[PromptScores, ...]:
    checks.num_slices("prompts scored in one step's result", len(source))
    checks.at_most("scores of one step's result", sum(len(run.scores) for run in source), MAX_STEP_TOKENS)
    checks.distinct("a step's prompt scores: sequence", [run.seq_id for run in source])
    return tuple(_read_run(run) for run in source)


def _read_run(source: pb.PromptScores) -> PromptScores:
    where = f"prompt scores of sequence {source.seq_id}"
    if source.first_position == 0:
        raise ProtocolError(f"{where}: they begin at position 0, whose token nothing precedes")
    checks.at_most(f"{where}: last position", source.first_position + len(source.scores), MAX_POSITION)
    checks.indices(f"{where}: token id", (score.token_id for score in source.scores))
    return PromptScores(
        seq_id=source.seq_id,
        first_position=source.first_position,
        scores=tuple(
            TokenScore(
                token_id=score.token_id,
                logprob=score.logprob,
                top=_read_top(score),
            )
            for score in source.scores
        ),
    )


def _read_top(source: pb.TokenOut | pb.TokenScore) -> tuple[tuple[TokenId, float], ...]:
    token_ids, logprobs = source.top_token_ids, source.top_logprobs
    if not token_ids and not logprobs:
        return ()
    checks.at_most("likeliest tokens", len(token_ids), MAX_TOP_LOGPROBS)
    checks.same_length("likeliest tokens", len(token_ids), len(logprobs))
    return tuple(zip(checks.indices("likeliest token's id", token_ids), logprobs, strict=True))
