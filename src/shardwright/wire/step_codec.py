"""Steps and the answers to them: protobuf <-> plain values. What comes from a peer is checked here, once.

Whole messages (`encode_...`, `decode_...`) serve the unary call and replies. On the step link a step is one part as
long as it is small; large tensors follow in fragments, and a step that is large without them comes in pieces
(`step_parts`, `StepDecoder`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, assert_never

from shardwright.errors import ProtocolError
from shardwright.types import StepInput
from shardwright.wire import checks, frames
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import (
    MAX_DROPPED,
    MAX_INLINE_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_REASON_CHARS,
    MAX_SETUP_TOKENS,
    MAX_STEP_BYTES,
    MAX_STEP_TOKENS,
    MAX_STEPS_IN_FLIGHT,
    WireLimits,
)
from shardwright.wire.messages import StepAck, StepMessage, StepReply, StepTrouble, TensorFrame
from shardwright.wire.pieces import Pieces, cut
from shardwright.wire.slice_codec import fill_slice, num_ids, read_slice

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
    return _read_message(source, frames.read_frames(source.tensors, limits, may_follow=False))


def step_parts(message: StepMessage) -> Iterator[bytes]:
    """The step as parts of a step link: one, unless it is large or its tensors hold over `MAX_INLINE_BYTES`.

    Raises `ProtocolError` for a step above `MAX_STEP_BYTES`.
    """
    whole = sum(frames.bytes_of(frame.data).nbytes for frame in message.tensors) <= MAX_INLINE_BYTES
    part = pb.StepPart()
    _fill_step(part.step, message, with_data=whole)
    raw: bytes = part.SerializeToString()
    if len(raw) <= MAX_MESSAGE_BYTES:
        yield raw
    else:
        for piece in cut(f"step {message.step.step}", part.step.SerializeToString()):
            yield pb.StepPart(piece=piece).SerializeToString()
    if not whole:
        for fragment in frames.cut(message.tensors):
            yield pb.StepPart(fragment=fragment).SerializeToString()


class StepDecoder:
    """Turns the parts of one step link into steps."""

    def __init__(self, limits: WireLimits) -> None:
        self._limits = limits
        self._message: StepMessage | None = None  # waits for fragments
        self._fragments = frames.Fragments((), ())
        self._pieces = Pieces("a step")
        self.ended = False

    def feed(self, raw: bytes) -> StepMessage | None:
        """The step that this part completes, if it does. Raises `ProtocolError`, `FrameError` for a tensor."""
        if self.ended:
            raise ProtocolError("a step link goes on after its end")
        part = checks.parse(pb.StepPart, raw)
        kind = part.WhichOneof("part")
        if self._message is not None and kind != "fragment":
            raise ProtocolError(f"{kind or 'an empty part'} on a step link; expected a fragment of the step before")
        if self._pieces.is_open and kind != "piece":
            raise ProtocolError(f"{kind or 'an empty part'} on a step link; expected the rest of the step before")
        match kind:
            case "step":
                return self._begin(part.step)
            case "piece":
                whole = self._pieces.add(part.piece)
                return None if whole is None else self._begin(checks.parse(pb.StepMessage, whole, limit=MAX_STEP_BYTES))
            case "fragment":
                return self._go_on(part.fragment)
            case "end":
                self.ended = True
                return None
            case _:
                raise ProtocolError("a part of a step link that holds neither step, piece, fragment nor end")

    def _begin(self, source: pb.StepMessage) -> StepMessage | None:
        tensors = frames.read_frames(source.tensors, self._limits, may_follow=True)
        message = _read_message(source, tensors)
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
    target.step = _encode_input(message.step) if message.encoded_step is None else message.encoded_step
    for frame in message.tensors:
        frames.fill_frame(target.tensors.add(), frame, with_data=with_data)


def _encode_input(step: StepInput) -> bytes:
    target = pb.StepInput(epoch=step.epoch, step=step.step, steps_in_flight=step.steps_in_flight, dropped=step.dropped)
    for part in step.slices:
        fill_slice(target.slices.add(), part)
    raw: bytes = target.SerializeToString()
    return raw


def _read_message(source: pb.StepMessage, tensors: tuple[TensorFrame, ...]) -> StepMessage:
    raw = source.step
    step = _read_step(checks.parse(pb.StepInput, raw, limit=MAX_STEP_BYTES))
    return StepMessage(step=step, tensors=tensors, encoded_step=raw)


def _read_step(source: pb.StepInput) -> StepInput:
    where = f"step {source.step}"
    if not source.slices:
        raise ProtocolError(f"{where} computes no sequence")
    checks.num_slices(f"sequences of {where}", len(source.slices))
    checks.at_most(f"tokens of {where}", sum(num_ids(s.token_ids) for s in source.slices), MAX_STEP_TOKENS)
    checks.at_most(f"setup tokens of {where}", sum(num_ids(s.setup.tokens) for s in source.slices), MAX_SETUP_TOKENS)
    checks.at_most(f"sequences that {where} drops", len(source.dropped), MAX_DROPPED)
    slices = tuple(read_slice(part, where) for part in source.slices)
    checks.distinct(f"{where}: sequence", [part.seq_id for part in slices])
    return StepInput(
        epoch=source.epoch,
        step=source.step,
        slices=slices,
        steps_in_flight=min(max(source.steps_in_flight, 1), MAX_STEPS_IN_FLIGHT),  # absent: one
        dropped=tuple(source.dropped),
    )


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
