"""Steps and results above gRPC's default of 4 MiB travel in pieces; what is over the limits is not sent, nor taken."""

from __future__ import annotations

import pytest

from shardwright.errors import ProtocolError
from shardwright.types import (
    MAX_GRAMMAR_CHARS,
    MAX_LOGIT_BIAS,
    MAX_TOP_LOGPROBS,
    Grammar,
    GrammarKind,
    PromptScores,
    SamplingParams,
    SequenceSetup,
    SequenceSlice,
    StepInput,
    TokenOut,
    TokenRules,
    TokenScore,
)
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import FRAGMENT_BYTES, MAX_MESSAGE_BYTES, MAX_STEP_BYTES, WireLimits
from shardwright.wire.messages import StepMessage, StepResult, TensorFrame
from shardwright.wire.result_codec import ResultDecoder, result_parts
from shardwright.wire.step_codec import STEP_END, StepDecoder, step_parts

GRPC_DEFAULT_BYTES = 4 << 20
LARGE_VOCABULARY = 262_144

LARGEST_RULES = TokenRules(
    logit_bias=tuple((LARGE_VOCABULARY - number, -99.5) for number in range(MAX_LOGIT_BIAS, 0, -1)),
    grammar=Grammar(kind=GrammarKind.LARK, source="\N{SNOWMAN}" * MAX_GRAMMAR_CHARS),
    min_new_tokens=10,
)


def starting(seq_id, num_tokens, *, chunk=512):
    """The slice that ends a prompt, with all that can travel beside it."""
    tokens = tuple(LARGE_VOCABULARY - 1 - position % 1000 for position in range(num_tokens))
    return SequenceSlice(
        seq_id=seq_id,
        start_position=num_tokens - chunk,
        token_ids=tokens[-chunk:],
        block_table=tuple(range(num_tokens // 16)),
        sampling=SamplingParams(repetition_penalty=1.1),
        setup=SequenceSetup(
            num_prompt_tokens=num_tokens, tokens=tokens, rules=LARGEST_RULES, stop_token_ids=frozenset(range(64))
        ),
    )


def step_of(*slices, tensor_bytes=0):
    data = bytes(range(256)) * (tensor_bytes // 256)
    frame = TensorFrame(name="hidden", dtype="int32", shape=(tensor_bytes // 4,), data=data)
    step = StepInput(epoch=1, step=1, slices=slices, dropped=(0, 7))
    return StepMessage(step=step, tensors=(frame,) if tensor_bytes else ())


def through(decoder, parts):
    """What a decoder makes of parts; all but the last complete nothing."""
    assert max(map(len, parts)) <= MAX_MESSAGE_BYTES < GRPC_DEFAULT_BYTES
    *before, last = [decoder.feed(part) for part in parts]
    assert before == [None] * len(before)
    return last


def scored(num_scores, *, first_seq=1, per_run=512):
    """Scores of prompts in runs of one step's slice, each token with all its alternatives."""
    top = tuple((LARGE_VOCABULARY - 1 - number, -0.125 * number) for number in range(MAX_TOP_LOGPROBS))
    score = TokenScore(token_id=LARGE_VOCABULARY - 1, logprob=-0.3, top=top)
    return tuple(
        PromptScores(seq_id=first_seq + run, first_position=1, scores=(score,) * per_run)
        for run in range(num_scores // per_run)
    )


def test_the_setup_of_a_prompt_of_100_000_tokens_with_the_largest_rules_is_one_message():
    message = step_of(starting(1, 100_000), tensor_bytes=1 << 20)
    (part,) = step_parts(message)
    assert through(StepDecoder(WireLimits()), [part]) == message


@pytest.mark.parametrize("tensor_bytes", [0, 1 << 20, 3 << 20])
def test_a_step_of_many_large_setups_travels_in_pieces_before_its_tensors(tensor_bytes):
    message = step_of(*(starting(seq_id, 131_072) for seq_id in range(12)), tensor_bytes=tensor_bytes)
    parts = list(step_parts(message))
    assert sum(map(len, parts)) > GRPC_DEFAULT_BYTES
    decoder = StepDecoder(WireLimits())
    assert through(decoder, parts) == message
    assert through(decoder, parts) == message  # the link is ready for the next step
    assert decoder.feed(STEP_END) is None


def test_a_step_of_long_block_tables_travels_in_pieces():
    table = (2**31 - 1,) * (1 << 20)
    part = SequenceSlice(seq_id=1, start_position=0, token_ids=(1,), block_table=table, sampling=None)
    message = step_of(part)
    assert through(StepDecoder(WireLimits()), list(step_parts(message))) == message


def test_a_step_above_the_limit_is_not_sent():
    table = (2**31 - 1,) * (1 << 20)
    slices = [
        SequenceSlice(seq_id=seq_id, start_position=0, token_ids=(1,), block_table=table, sampling=None)
        for seq_id in range(MAX_STEP_BYTES // (4 << 20))
    ]
    with pytest.raises(ProtocolError, match=f"step 1, in bytes: [0-9]+, and {MAX_STEP_BYTES} is the most"):
        list(step_parts(step_of(*slices)))


def test_a_result_with_the_scores_of_a_step_of_64_rows_is_one_message():
    result = StepResult(
        epoch=1,
        step=1,
        tokens=tuple(
            TokenOut(seq_id=seq_id, token_id=5, logprob=-1.5, top=scored(1, per_run=1)[0].scores[0].top)
            for seq_id in range(64)
        ),
        prompt_scores=scored(8192),
    )
    (part,) = result_parts(result)
    assert through(ResultDecoder(), [part]) == result


def test_a_result_with_very_many_scores_travels_in_pieces():
    result = StepResult(epoch=1, step=1, tokens=(), prompt_scores=scored(32_768))
    parts = list(result_parts(result))
    assert sum(map(len, parts)) > GRPC_DEFAULT_BYTES
    decoder = ResultDecoder()
    assert through(decoder, parts) == result
    assert through(decoder, parts) == result


def test_a_result_above_the_limit_is_not_sent():
    """It would take a step of over a quarter of a million scored tokens."""
    result = StepResult(epoch=1, step=1, tokens=(), prompt_scores=scored(MAX_STEP_BYTES // 240))
    with pytest.raises(ProtocolError, match=f"a step's result, in bytes: [0-9]+, and {MAX_STEP_BYTES} is the most"):
        list(result_parts(result))


def step_piece(data, *, is_last=False):
    return pb.StepPart(piece=pb.MessagePiece(data=data, is_last=is_last)).SerializeToString()


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (STEP_END, "end on a step link; expected the rest of the step before"),
        (b"", "an empty part on a step link; expected the rest"),
        (pb.StepPart(fragment=pb.TensorFragment()).SerializeToString(), "fragment on a step link"),
        (step_piece(b""), "a step: an empty piece"),
        (step_piece(b"\xff", is_last=True), "StepMessage: 2 bytes that are no such message"),
    ],
)
def test_pieces_of_a_step_that_do_not_fit_are_refused(second, complaint):
    decoder = StepDecoder(WireLimits())
    assert decoder.feed(step_piece(b"\xff")) is None
    with pytest.raises(ProtocolError, match=complaint):
        decoder.feed(second)


def test_another_result_between_the_pieces_of_one_is_refused():
    decoder = ResultDecoder()
    assert decoder.feed(pb.ResultPart(piece=pb.MessagePiece(data=b"x")).SerializeToString()) is None
    (whole,) = result_parts(StepResult(epoch=1, step=1, tokens=()))
    with pytest.raises(ProtocolError, match="result on a token stream; expected the rest of the result before"):
        decoder.feed(whole)


def test_pieces_without_end_are_refused_before_they_fill_the_memory():
    decoder = StepDecoder(WireLimits())
    piece = step_piece(bytes(FRAGMENT_BYTES))
    for _ in range(MAX_STEP_BYTES // FRAGMENT_BYTES):
        assert decoder.feed(piece) is None
    with pytest.raises(ProtocolError, match="is the most"):
        decoder.feed(piece)
