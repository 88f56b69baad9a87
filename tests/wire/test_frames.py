"""A tensor frame that lies is refused before anything of its size is made."""

from __future__ import annotations

import tracemalloc

import pytest

from shardwright.errors import FrameError
from shardwright.types import SequenceSlice, StepInput
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.frames import FRAME_MAGIC
from shardwright.wire.limits import FRAGMENT_BYTES, MAX_INLINE_BYTES, WireLimits
from shardwright.wire.messages import StepMessage, TensorFrame
from shardwright.wire.step_codec import StepDecoder, decode_step, encode_step, step_parts

LIMITS = WireLimits(max_frame_bytes=8 << 20)
STEP = StepInput(
    epoch=1,
    step=2,
    slices=(SequenceSlice(seq_id=3, start_position=0, token_ids=(4,), block_table=(0,), sampling=None),),
)


def make_frame(**changes):
    """The head and data of a good frame, changed."""
    fields = {
        "magic": FRAME_MAGIC,
        "version": 1,
        "dtype": pb.DTYPE_FLOAT32,
        "shape": [2, 3],
        "length": 24,
        "name": "hidden",
        "data": bytes(24),
    }
    return pb.TensorFrame(**(fields | changes))


def raw_step(*frames):
    """A step message with these frames, as it comes off the wire."""
    part = pb.SequenceSlice(seq_id=3, token_ids=bytes([4, 0, 0, 0]), block_table=bytes(4))
    step = pb.StepInput(epoch=1, step=2, slices=[part])
    return pb.StepMessage(step=step.SerializeToString(), tensors=frames).SerializeToString()


def raw_part(*frames):
    """The same as a part of a step link."""
    return pb.StepPart(step=pb.StepMessage.FromString(raw_step(*frames))).SerializeToString()


def raw_fragment(tensor, offset, data):
    return pb.StepPart(fragment=pb.TensorFragment(tensor=tensor, offset=offset, data=data)).SerializeToString()


def test_a_good_frame_passes():
    message = decode_step(raw_step(make_frame()), LIMITS)
    assert message.tensors == (TensorFrame(name="hidden", dtype="float32", shape=(2, 3), data=bytes(24)),)
    assert message.step == STEP


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"magic": 0x12345678}, "starts with 0x12345678; expected 0x54465753"),
        ({"magic": 0}, "starts with 0x00000000"),
        ({"version": 2}, "of version 2; this side knows version 1"),
        ({"dtype": 0}, "dtype number 0; frames carry float32"),
        ({"dtype": 99}, "dtype number 99"),
        ({"name": ""}, "name has 0 characters"),
        ({"name": "x" * 2000}, "name has 2000 characters"),
        ({"shape": [2, 4]}, r"shape \[2, 4\] of float32 takes 32 bytes, but its length is 24"),
        ({"shape": []}, r"shape \[\] of float32 takes 4 bytes, but its length is 24"),
        ({"shape": [0, 3]}, "takes 0 bytes, but its length is 24"),
        ({"shape": [1] * 9, "length": 4}, "9 dimensions, and 8 is the most"),
        ({"shape": [2**41, 0], "length": 0, "data": b""}, f"no dimension may exceed {2**40}"),
        ({"shape": [2**40] * 8}, "takes"),
        ({"length": 23}, "but its length is 23"),
        ({"length": 2**62}, f"{2**62} bytes, and {8 << 20} is the most"),
        ({"data": bytes(23)}, "23 bytes of data; its frame says 24"),
        ({"data": bytes(25)}, "25 bytes of data; its frame says 24"),
    ],
)
def test_a_lying_frame_is_refused_with_what_is_wrong(changes, complaint):
    with pytest.raises(FrameError, match=complaint):
        decode_step(raw_step(make_frame(**changes)), LIMITS)
    with pytest.raises(FrameError, match=complaint):
        StepDecoder(LIMITS).feed(raw_part(make_frame(**changes)))


def test_a_frame_without_its_data_is_refused_where_nothing_can_follow():
    with pytest.raises(FrameError, match="0 bytes of data; its frame says 24"):
        decode_step(raw_step(make_frame(data=b"")), LIMITS)


def test_a_giant_is_refused_before_it_is_stored():
    """Only the first of two heads fits the limit: nothing of 6 MiB is made for it either."""
    half = {"shape": [3 << 19], "length": 6 << 20, "data": b""}
    raw = raw_part(make_frame(**half), make_frame(**half, name="other"))
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match=f"tensors of {12 << 20} bytes with one step, and {8 << 20} is the most"):
            StepDecoder(LIMITS).feed(raw)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_too_many_tensors_and_two_of_one_name_are_refused():
    with pytest.raises(FrameError, match="65 tensors with one step, and 64 is the most"):
        decode_step(raw_step(*(make_frame(name=f"t{number}") for number in range(65))), LIMITS)
    with pytest.raises(FrameError, match="same name"):
        decode_step(raw_step(make_frame(), make_frame()), LIMITS)


def test_small_tensors_travel_in_one_message_with_their_step():
    data = bytes(range(256)) * (MAX_INLINE_BYTES // 256)
    frame = TensorFrame(name="hidden", dtype="int32", shape=(len(data) // 4,), data=data)
    parts = list(step_parts(StepMessage(step=STEP, tensors=(frame,))))
    assert len(parts) == 1
    assert StepDecoder(LIMITS).feed(parts[0]) == StepMessage(step=STEP, tensors=(frame,))


def test_large_tensors_are_cut_and_put_together_into_buffers_that_can_be_written():
    """Every part stays far below gRPC's 4 MiB; two tensors and an empty one keep their order."""
    frames = (
        TensorFrame(name="hidden", dtype="bfloat16", shape=(3, 300_000), data=bytes(range(200)) * 9000),
        TensorFrame(name="none", dtype="int64", shape=(0, 5), data=b""),
        TensorFrame(name="beside", dtype="float16", shape=(100_000,), data=memoryview(bytes(range(100)) * 2000)),
    )
    message = StepMessage(step=STEP, tensors=frames)
    parts = list(step_parts(message))
    assert len(parts) == 1 + -(-1_800_000 // FRAGMENT_BYTES) + 1
    assert max(map(len, parts)) < FRAGMENT_BYTES + 100
    decoder = StepDecoder(LIMITS)
    results = [decoder.feed(part) for part in parts]
    assert results[:-1] == [None] * (len(parts) - 1)
    assert results[-1] == message
    assert isinstance(results[-1].tensors[0].data, bytearray)


@pytest.mark.parametrize(
    ("fragments", "complaint"),
    [
        ([(0, 4, bytes(4))], "fragment of tensor 0 at byte 4; expected tensor 0 at byte 0"),
        ([(1, 0, bytes(4))], "fragment of tensor 1 at byte 0; expected tensor 0 at byte 0"),
        ([(0, 0, bytes(8)), (0, 4, bytes(4))], "at byte 4; expected tensor 0 at byte 8"),
        ([(0, 0, bytes(25))], "fragment of 25 bytes at byte 0 of 24"),
        ([(0, 0, bytes(20)), (0, 20, bytes(5))], "fragment of 5 bytes at byte 20 of 24"),
        ([(0, 0, b"")], "fragment of 0 bytes"),
    ],
)
def test_fragments_out_of_place_are_refused(fragments, complaint):
    decoder = StepDecoder(LIMITS)
    assert decoder.feed(raw_part(make_frame(data=b""))) is None
    for fragment in fragments[:-1]:
        assert decoder.feed(raw_fragment(*fragment)) is None
    with pytest.raises(FrameError, match=complaint):
        decoder.feed(raw_fragment(*fragments[-1]))


def test_a_fragment_that_nobody_waits_for_is_refused():
    decoder = StepDecoder(LIMITS)
    with pytest.raises(FrameError, match="every tensor of the step is complete"):
        decoder.feed(raw_fragment(0, 0, b"x"))


@pytest.mark.parametrize(
    "frame",
    [
        TensorFrame(name="hidden", dtype="float32", shape=(5,), data=bytes(24)),
        TensorFrame(name="hidden", dtype="float8", shape=(24,), data=bytes(24)),
        TensorFrame(name="hidden", dtype="float32", shape=(6,), data=memoryview(bytes(48))[::2]),
    ],
    ids=["length", "dtype", "strided"],
)
def test_a_frame_that_lies_is_not_even_sent(frame):
    message = StepMessage(step=STEP, tensors=(frame,))
    with pytest.raises(FrameError):
        encode_step(message, LIMITS)
    with pytest.raises(FrameError):
        list(step_parts(message))
