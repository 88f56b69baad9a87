"""Steps and their results: protobuf <-> plain values. What comes from a peer is checked here, once.

Whole messages (`encode_...`, `decode_...`) serve the unary call and replies. On the step link a step is one part as
long as its tensors are small; else a part with the frames' heads, followed by fragments (`step_parts`, `StepDecoder`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, assert_never

from shardwright.errors import InvalidRequestError, ProtocolError
from shardwright.types import SamplingParams, SequenceSlice, StepInput, TokenOut
from shardwright.wire import checks, frames
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import (
    MAX_BLOCK_TABLE,
    MAX_INLINE_BYTES,
    MAX_POSITION,
    MAX_REASON_CHARS,
    MAX_STEP_TOKENS,
    MAX_STEPS_IN_FLIGHT,
    WireLimits,
)
from shardwright.wire.messages import (
    LayerResult,
    StepAck,
    StepMessage,
    StepReply,
    StepResult,
    StepTrouble,
    TensorFrame,
)

STEP_END: Final[bytes] = pb.StepPart(end=pb.StreamEnd()).SerializeToString()
"""The last part of a step link that ends as it should."""


# --- steps ---------------------------------------------------------------------------------------------------


def encode_step(message: StepMessage, limits: WireLimits) -> bytes:
    """The step in one message, however large; for the unary call."""
    target = pb.StepMessage()
    _fill_step(target, message, with_data=True)
    return checks.serialize(target, limit=limits.max_unary_bytes)


def decode_step(raw: bytes, limits: WireLimits) -> StepMessage:
    """Raises `ProtocolError`, `FrameError` for a tensor."""
    source = checks.parse(pb.StepMessage, raw, limit=limits.max_unary_bytes)
    return StepMessage(
        step=_read_step(source.step), tensors=frames.read_frames(source.tensors, limits, may_follow=False)
    )


def step_parts(message: StepMessage) -> Iterator[bytes]:
    """The step as parts of a step link: one, unless its tensors hold more than `MAX_INLINE_BYTES`."""
    whole = sum(frames.bytes_of(frame.data).nbytes for frame in message.tensors) <= MAX_INLINE_BYTES
    part = pb.StepPart()
    _fill_step(part.step, message, with_data=whole)
    yield checks.serialize(part)
    if not whole:
        for fragment in frames.cut(message.tensors):
            yield pb.StepPart(fragment=fragment).SerializeToString()


class StepDecoder:
    """Turns the parts of one step link into steps."""

    def __init__(self, limits: WireLimits) -> None:
        self._limits = limits
        self._message: StepMessage | None = None  # waits for fragments
        self._fragments = frames.Fragments((), ())
        self.ended = False

    def feed(self, raw: bytes) -> StepMessage | None:
        """The step that this part completes, if it does. Raises `ProtocolError`, `FrameError` for a tensor."""
        if self.ended:
            raise ProtocolError("a step link goes on after its end")
        part = checks.parse(pb.StepPart, raw)
        kind = part.WhichOneof("part")
        if self._message is not None and kind != "fragment":
            raise ProtocolError(f"{kind or 'an empty part'} on a step link; expected a fragment of the step before")
        match kind:
            case "step":
                return self._begin(part.step)
            case "fragment":
                return self._go_on(part.fragment)
            case "end":
                self.ended = True
                return None
            case _:
                raise ProtocolError("a part of a step link that holds neither step, fragment nor end")

    def _begin(self, source: pb.StepMessage) -> StepMessage | None:
        tensors = frames.read_frames(source.tensors, self._limits, may_follow=True)
        message = StepMessage(step=_read_step(source.step), tensors=tensors)
        pending = [index for index, frame in enumerate(source.tensors) if frames.is_pending(frame)]
        if not pending:
            return message
        self._message = message
        self._fragments = frames.Fragments(tensors, pending)
        return None

    def _go_on(self, fragment: pb.TensorFragment) -> StepMessage | None:
        self._fragments.add(fragment)
        if not self._fragments.complete:
            return None
        message, self._message = self._message, None
        return message


def _fill_step(target: pb.StepMessage, message: StepMessage, *, with_data: bool) -> None:
    step = message.step
    target.step.epoch = step.epoch
    target.step.step = step.step
    target.step.steps_in_flight = step.steps_in_flight
    for part in step.slices:
        entry = target.step.slices.add(
            seq_id=part.seq_id,
            start_position=part.start_position,
            token_ids=part.token_ids,
            block_table=part.block_table,
        )
        if part.sampling is not None:
            entry.sampling.temperature = part.sampling.temperature
            entry.sampling.top_k = min(part.sampling.top_k, 2**32 - 1)  # no vocabulary is larger: no limit either way
            entry.sampling.top_p = part.sampling.top_p
            entry.sampling.seed = part.sampling.seed
    for frame in message.tensors:
        frames.fill_frame(target.tensors.add(), frame, with_data=with_data)


def _read_step(source: pb.StepInput) -> StepInput:
    where = f"step {source.step}"
    if not source.slices:
        raise ProtocolError(f"{where} computes no sequence")
    checks.num_slices(f"sequences of {where}", len(source.slices))
    checks.at_most(f"tokens of {where}", sum(len(part.token_ids) for part in source.slices), MAX_STEP_TOKENS)
    checks.distinct(f"{where}: sequence", [part.seq_id for part in source.slices])
    slices = tuple(_read_slice(part, f"{where}, sequence {part.seq_id}") for part in source.slices)
    return StepInput(
        epoch=source.epoch,
        step=source.step,
        slices=slices,
        steps_in_flight=min(max(source.steps_in_flight, 1), MAX_STEPS_IN_FLIGHT),  # absent: one
    )


def _read_slice(source: pb.SequenceSlice, where: str) -> SequenceSlice:
    if not source.token_ids:
        raise ProtocolError(f"{where}: no tokens")
    checks.at_most(f"{where}: last position", source.start_position + len(source.token_ids), MAX_POSITION)
    checks.at_most(f"{where}: blocks", len(source.block_table), MAX_BLOCK_TABLE)
    return SequenceSlice(
        seq_id=source.seq_id,
        start_position=source.start_position,
        token_ids=checks.indices(f"{where}: token id", source.token_ids),
        block_table=checks.indices(f"{where}: block id", source.block_table),
        sampling=_read_sampling(source.sampling, where) if source.HasField("sampling") else None,
    )


def _read_sampling(source: pb.SamplingParams, where: str) -> SamplingParams:
    try:
        return SamplingParams(temperature=source.temperature, top_k=source.top_k, top_p=source.top_p, seed=source.seed)
    except InvalidRequestError as exc:
        raise ProtocolError(f"{where}: {exc}") from exc


# --- answers -------------------------------------------------------------------------------------------------


def encode_step_reply(reply: StepReply) -> bytes:
    """One acknowledgement or trouble."""
    match reply:
        case StepAck():
            message = pb.StepReply(ack=pb.StepAck(epoch=reply.epoch, step=reply.step))
        case StepTrouble():
            trouble = pb.StepTrouble(
                epoch=reply.epoch,
                step=reply.step,
                worker_id=reply.worker_id,
                reason=reply.reason[:MAX_REASON_CHARS],
                link_lost=reply.link_lost,
            )
            message = pb.StepReply(trouble=trouble)
        case _:
            assert_never(reply)
    return checks.serialize(message)


def decode_step_reply(raw: bytes) -> StepReply:
    """Raises `ProtocolError`."""
    source = checks.parse(pb.StepReply, raw)
    match source.WhichOneof("reply"):
        case "ack":
            return StepAck(epoch=source.ack.epoch, step=source.ack.step)
        case "trouble":
            trouble = source.trouble
            return StepTrouble(
                epoch=trouble.epoch,
                step=trouble.step,
                worker_id=checks.text("StepTrouble.worker_id", trouble.worker_id),
                reason=checks.text("StepTrouble.reason", trouble.reason, limit=MAX_REASON_CHARS, empty=True),
                link_lost=trouble.link_lost,
            )
        case _:
            raise ProtocolError("a StepReply that holds neither ack nor trouble")


def encode_step_result(result: StepResult) -> bytes:
    """The tokens of one step."""
    message = pb.StepResult(epoch=result.epoch, step=result.step)
    _fill_tokens(message.tokens, result.tokens)
    return checks.serialize(message)


def decode_step_result(raw: bytes) -> StepResult:
    """Raises `ProtocolError`."""
    source = checks.parse(pb.StepResult, raw)
    return StepResult(epoch=source.epoch, step=source.step, tokens=_read_tokens(source.tokens))


def encode_layer_result(result: LayerResult, limits: WireLimits) -> bytes:
    """One stage's result, in one message however large."""
    message = pb.LayerResult()
    for frame in result.tensors:
        frames.fill_frame(message.tensors.add(), frame, with_data=True)
    _fill_tokens(message.tokens, result.tokens)
    return checks.serialize(message, limit=limits.max_unary_bytes)


def decode_layer_result(raw: bytes, limits: WireLimits) -> LayerResult:
    """Raises `ProtocolError`, `FrameError` for a tensor."""
    source = checks.parse(pb.LayerResult, raw, limit=limits.max_unary_bytes)
    tensors: tuple[TensorFrame, ...] = frames.read_frames(source.tensors, limits, may_follow=False)
    return LayerResult(tensors=tensors, tokens=_read_tokens(source.tokens))


def _fill_tokens(target: object, tokens: Iterable[TokenOut]) -> None:
    target.extend(  # type: ignore[attr-defined]  # a repeated field; its class differs between protobuf's backends
        pb.TokenOut(seq_id=token.seq_id, token_id=token.token_id, logprob=token.logprob) for token in tokens
    )


def _read_tokens(source: Iterable[pb.TokenOut]) -> tuple[TokenOut, ...]:
    tokens = tuple(TokenOut(seq_id=t.seq_id, token_id=t.token_id, logprob=t.logprob) for t in source)
    checks.num_slices("tokens of one step's result", len(tokens))
    checks.indices("token id", (token.token_id for token in tokens))
    checks.distinct("a step's result: sequence", [token.seq_id for token in tokens])
    return tokens
