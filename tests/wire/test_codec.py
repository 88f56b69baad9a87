"""Every message comes back as it went, and nothing malformed comes through as anything but a `ProtocolError`."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from operator import attrgetter, itemgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.errors import ProtocolError
from shardwright.types import (
    MAX_GRAMMAR_CHARS,
    MAX_LOGIT_BIAS,
    MAX_TOP_LOGPROBS,
    PHASE_BUCKETS_S,
    WEIGHT_SOURCES,
    FileHint,
    Grammar,
    GrammarKind,
    HeartbeatReport,
    LayerRange,
    LinkMeasures,
    LinkReport,
    MachineMeasures,
    PhaseTimes,
    PromptScores,
    RankLoad,
    SamplingParams,
    SequenceSetup,
    SequenceSlice,
    StageAssignment,
    StageLoad,
    StepInput,
    StepPhase,
    StepTiming,
    StepTrace,
    TensorSpec,
    TokenOut,
    TokenRules,
    TokenScore,
    WorkerDescription,
)
from shardwright.wire import inference_pb2 as pb
from shardwright.wire import load_codec, measure_codec, report_codec, result_codec, step_codec
from shardwright.wire.limits import (
    MAX_MESSAGE_BYTES,
    MAX_PING_BYTES,
    MAX_REASON_CHARS,
    MAX_TRACES,
    MAX_WEIGHT_CHUNK_BYTES,
    WireLimits,
)
from shardwright.wire.load_codec import LOAD_END, LoadDecoder, load_parts
from shardwright.wire.messages import (
    LayerResult,
    LoadBegin,
    LoadDone,
    LoadProgress,
    LoadRefused,
    StepAck,
    StepMessage,
    StepResult,
    StepTrouble,
    TensorFrame,
    WeightChunk,
    WeightRequest,
    WeightsNeeded,
)
from shardwright.wire.result_codec import ResultDecoder, result_parts
from shardwright.wire.step_codec import STEP_END, StepDecoder, step_parts

LIMITS = WireLimits(max_frame_bytes=1 << 20)
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}

u64 = st.integers(0, 2**64 - 1)
u31 = st.integers(0, 2**31 - 1)
short = st.text(min_size=1, max_size=12)
maybe_text = st.text(max_size=12)
figure = st.floats(0, 1e30)
sha = st.binary(min_size=32, max_size=32).map(bytes.hex)
sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**32 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=u64,
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    num_top_logprobs=st.integers(0, MAX_TOP_LOGPROBS),
)
rules = st.builds(
    TokenRules,
    logit_bias=st.lists(st.tuples(u31, st.floats(-100, 100)), max_size=4).map(tuple),
    grammar=st.none() | st.builds(Grammar, kind=st.sampled_from(GrammarKind), source=maybe_text),
    min_new_tokens=u31,
)


@st.composite
def setups(draw):
    known = tuple(draw(st.lists(u31, max_size=6)))
    return SequenceSetup(
        num_prompt_tokens=draw(st.integers(0, len(known))),
        tokens=known,
        rules=draw(rules),
        stop_token_ids=draw(st.frozensets(u31, max_size=3)),
    )


slices = st.lists(
    st.builds(
        SequenceSlice,
        seq_id=u64,
        start_position=st.integers(0, 2**31 - 10),
        token_ids=st.lists(u31, min_size=1, max_size=5).map(tuple),
        block_table=st.lists(u31, max_size=5).map(tuple),
        sampling=st.none() | sampling,
        setup=st.none() | setups(),
        num_prompt_logprobs=st.none() | st.integers(0, MAX_TOP_LOGPROBS),
        next_token_id=st.none() | u31,
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda part: part.seq_id,
)
steps = st.builds(
    StepInput,
    epoch=u64,
    step=u64,
    slices=slices.map(tuple),
    steps_in_flight=st.integers(1, 1024),
    dropped=st.lists(u64, max_size=3).map(tuple),
)
logprob = st.floats(-1e6, 0) | st.just(-math.inf)
top = st.lists(st.tuples(u31, logprob), max_size=MAX_TOP_LOGPROBS).map(tuple)
tokens = st.lists(
    st.builds(TokenOut, seq_id=u64, token_id=u31, logprob=logprob, top=top), max_size=4, unique_by=lambda t: t.seq_id
).map(tuple)
prompt_scores = st.lists(
    st.builds(
        PromptScores,
        seq_id=u64,
        first_position=st.integers(1, 2**31 - 4),
        scores=st.lists(st.builds(TokenScore, token_id=u31, logprob=logprob, top=top), max_size=3).map(tuple),
    ),
    max_size=3,
    unique_by=lambda run: run.seq_id,
).map(tuple)


@st.composite
def frames(draw):
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = math.prod(shape) * ITEM_BYTES[dtype]
    return TensorFrame(name=draw(short), dtype=dtype, shape=shape, data=draw(st.binary(min_size=size, max_size=size)))


tensor_lists = st.lists(frames(), max_size=3, unique_by=lambda frame: frame.name).map(tuple)
step_messages = st.builds(StepMessage, step=steps, tensors=tensor_lists)
layer_results = st.builds(LayerResult, tensors=tensor_lists, tokens=tokens, prompt_scores=prompt_scores)
step_results = st.builds(StepResult, epoch=u64, step=u64, tokens=tokens, prompt_scores=prompt_scores)
step_replies = st.builds(StepAck, epoch=u64, step=u64) | st.builds(
    StepTrouble, epoch=u64, step=u64, worker_id=short, reason=maybe_text, link_lost=st.booleans()
)


@st.composite
def assignments(draw):
    num_stages = draw(st.integers(1, 9))
    index = draw(st.integers(0, num_stages - 1))
    start = draw(st.integers(0, 90))
    return StageAssignment(
        epoch=draw(u64),
        worker_id=draw(short),
        stage_index=index,
        num_stages=num_stages,
        layers=LayerRange(start, start + draw(st.integers(1, 9))),
        num_blocks=draw(st.integers(1, 2**31)),
        block_size=draw(st.integers(1, 1024)),
        next_worker_id=None if index == num_stages - 1 else draw(short),
        offloaded_layers=tuple(sorted(draw(st.sets(st.integers(start, start))))),
    )


specs = st.builds(
    TensorSpec,
    name=short,
    dtype=st.sampled_from(["BF16", "GGML_Q4_1"]),
    shape=st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    num_bytes=st.integers(0, 2**40),
    sha256=sha,
)
loads = st.builds(
    StageLoad,
    assignment=assignments(),
    model_config=short,
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    tensors=st.lists(specs, max_size=3, unique_by=lambda spec: spec.name).map(tuple),
    file_hints=st.lists(
        st.builds(
            FileHint,
            path=short,
            num_bytes=st.integers(0, 2**41),
            hub_repo=maybe_text,
            hub_revision=maybe_text,
            hub_filename=maybe_text,
        ),
        max_size=2,
    ).map(tuple),
    next_address=maybe_text,
    master_id=maybe_text,
)
chunks = st.builds(WeightChunk, sha256=sha, offset=st.integers(0, 2**39), data=st.binary(min_size=1, max_size=50))
load_replies = (
    st.builds(
        WeightsNeeded,
        requests=st.lists(
            st.builds(WeightRequest, sha256=sha, offset=st.integers(0, 2**40)),
            max_size=3,
            unique_by=lambda request: request.sha256,
        ).map(tuple),
        bytes_from_disk=u64,
        bytes_from_cache=u64,
    )
    | st.builds(LoadProgress, phase=st.sampled_from(["receive", "build", "warm-up"]), done_bytes=u64, total_bytes=u64)
    | st.builds(LoadDone, weight_bytes=u64, kv_bytes=u64, load_s=figure)
    | st.builds(LoadRefused, reason=maybe_text)
)
descriptions = st.builds(
    WorkerDescription,
    protocol_version=st.integers(0, 2**32 - 1),
    package_version=maybe_text,
    torch_version=maybe_text,
    transformers_version=maybe_text,
    host_id=maybe_text,
    pid=u64,
    device=short,
    device_name=maybe_text,
    memory_total_bytes=u64,
    memory_available_bytes=u64,
    read_bandwidth=figure,
    matrix_rate=figure,
    num_threads=st.integers(0, 2**32 - 1),
    metrics_port=st.integers(0, 65535),
    offload=st.sampled_from(["", "cpu", "nvme"]),
    offload_bytes=u64,
    offload_bandwidth=figure,
    num_ranks=st.integers(1, 64),
)


@st.composite
def traces(draw):
    arrived_s, started_s, finished_s, sent_s = sorted(draw(st.lists(figure, min_size=4, max_size=4)))
    return StepTrace(
        epoch=draw(u64), step=draw(u64), num_sequences=draw(u31), num_tokens=draw(u31), arrived_s=arrived_s,
        started_s=started_s, finished_s=finished_s, sent_s=sent_s, serialise_s=draw(figure), bytes_in=draw(u64),
        bytes_out=draw(u64),
    )  # fmt: skip


def tuples_of(values, **bounds):
    return st.lists(values, **bounds).map(tuple)


num_buckets = len(PHASE_BUCKETS_S) + 1
phases = st.builds(
    PhaseTimes,
    phase=st.sampled_from(StepPhase),
    counts=tuples_of(u64, min_size=num_buckets, max_size=num_buckets),
    total_s=figure,
)
reports = st.builds(
    HeartbeatReport,
    timestamp=figure,
    epoch=u64,
    queue_depth=u31,
    steps_done=u64,
    busy_s=figure,
    uptime_s=figure,
    device=short,
    device_name=maybe_text,
    gpu_utilization=st.none() | figure,
    gpu_memory_used_bytes=st.none() | u64,
    gpu_memory_total_bytes=st.none() | u64,
    cpu_utilization=figure,
    memory_used_bytes=u64,
    memory_total_bytes=u64,
    process_memory_bytes=u64,
    timings=st.lists(
        st.builds(StepTiming, num_sequences=u31, num_tokens=u31, mean_s=figure, count=u64), max_size=3
    ).map(tuple),
    gpu_temperature_c=st.none() | figure,
    gpu_power_w=st.none() | figure,
    clock_received_s=figure,
    clock_sent_s=figure,
    offloaded_bytes=u64,
    offload_read_bytes=u64,
    offload_wait_s=figure,
    weight_bytes=u64,
    kv_bytes=u64,
    traces=tuples_of(traces(), max_size=3),
    next_trace=u64,
    phases=tuples_of(phases, max_size=3, unique_by=lambda times: times.phase),
    link=st.none() | st.builds(LinkReport, peer=short, bytes_sent=u64, steps_sent=u64, round_trip_s=st.none() | figure),
    errors=tuples_of(
        st.tuples(st.sampled_from(["LinkLostError", "Übel", "other"]), u64), max_size=3, unique_by=itemgetter(0)
    ),
    loaded_bytes=tuples_of(st.tuples(st.sampled_from(WEIGHT_SOURCES), u64), max_size=3, unique_by=itemgetter(0)),
    ranks=tuples_of(
        st.builds(
            RankLoad,
            rank=st.integers(1, 63),
            device=short,
            device_name=maybe_text,
            process_memory_bytes=u64,
            gpu_utilization=st.none() | figure,
            gpu_memory_used_bytes=st.none() | u64,
            gpu_memory_total_bytes=st.none() | u64,
            gpu_temperature_c=st.none() | figure,
            gpu_power_w=st.none() | figure,
        ),
        max_size=3,
        unique_by=attrgetter("rank"),
    ),
)
matrix_dtypes = st.sampled_from(["float32", "bfloat16", "float16"])
machines = st.builds(
    MachineMeasures,
    dtype=matrix_dtypes,
    num_threads=u31,
    read_bandwidth=figure,
    matrix_rate=figure,
    disk_bandwidth=st.none() | figure,
)
ping_bytes = st.integers(0, MAX_PING_BYTES)
links = st.builds(LinkMeasures, round_trip_s=figure, transfers=tuples_of(st.tuples(u64, figure), max_size=3))


def encode_load(message):
    """One load message as one part, decoded by a decoder that has seen its LoadBegin."""
    (part,) = load_parts(message)
    return part


def decode_chunk(raw):
    decoder = LoadDecoder()
    decoder.feed(encode_load(LoadBegin(load=LOAD)))
    return decoder.feed(raw)


def anew(message):
    """The same message, to be encoded and not passed on."""
    return replace(message, encoded_step=None)


def encode_step_part(message):
    (part,) = step_parts(anew(message))
    return part


def encode_result(result):
    (part,) = result_parts(result)
    return part


LOAD = StageLoad(
    assignment=StageAssignment(
        epoch=1,
        worker_id="w",
        stage_index=0,
        num_stages=1,
        layers=LayerRange(0, 2),
        num_blocks=4,
        block_size=16,
        next_worker_id=None,
    ),
    model_config="{}",
    dtype="float32",
    tensors=(),
    file_hints=(),
    next_address="",
)

CODECS = {
    "step": (
        step_messages,
        lambda message: step_codec.encode_step(anew(message), LIMITS),
        lambda raw: step_codec.decode_step(raw, LIMITS),
    ),
    "step part": (step_messages, encode_step_part, lambda raw: StepDecoder(LIMITS).feed(raw)),
    "layer result": (
        layer_results,
        lambda result: result_codec.encode_layer_result(result, LIMITS),
        lambda raw: result_codec.decode_layer_result(raw, LIMITS),
    ),
    "step result": (step_results, encode_result, lambda raw: ResultDecoder().feed(raw)),
    "step reply": (step_replies, step_codec.encode_step_reply, step_codec.decode_step_reply),
    "load begin": (st.builds(LoadBegin, load=loads), encode_load, lambda raw: LoadDecoder().feed(raw)),
    "weight chunk": (chunks, encode_load, decode_chunk),
    "load reply": (load_replies, load_codec.encode_load_reply, load_codec.decode_load_reply),
    "description": (descriptions, report_codec.encode_description, report_codec.decode_description),
    "report": (reports, report_codec.encode_report, report_codec.decode_report),
    "heartbeat request": (
        st.none() | u64,
        report_codec.encode_heartbeat_request,
        report_codec.decode_heartbeat_request,
    ),
    "ping": (
        st.tuples(st.binary(max_size=9), ping_bytes),
        lambda ping: measure_codec.encode_ping(*ping),
        measure_codec.decode_ping,
    ),
    "machine request": (matrix_dtypes, measure_codec.encode_machine_request, measure_codec.decode_machine_request),
    "machine": (machines, measure_codec.encode_machine, measure_codec.decode_machine),
    "link request": (
        st.tuples(short, tuples_of(ping_bytes, max_size=3)),
        lambda request: measure_codec.encode_link_request(*request),
        measure_codec.decode_link_request,
    ),
    "link": (links, measure_codec.encode_link, measure_codec.decode_link),
    "tokens request": (u64, report_codec.encode_tokens_request, report_codec.decode_tokens_request),
    "release request": (u64, report_codec.encode_release_request, report_codec.decode_release_request),
}
every_codec = pytest.mark.parametrize("name", CODECS)


@every_codec
@given(data=st.data())
def test_a_message_comes_back_as_it_went(name, data):
    values, encode, decode = CODECS[name]
    value = data.draw(values)
    assert decode(encode(value)) == value


@every_codec
@given(data=st.data())
def test_damaged_bytes_give_a_value_or_a_protocol_error_and_nothing_else(name, data):
    """Cut short, bits flipped, pieces doubled: what still decodes is a value that can be encoded again."""
    values, encode, decode = CODECS[name]
    raw = bytearray(encode(data.draw(values)))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw)))
        match data.draw(st.sampled_from(["flip", "cut", "double"])):
            case "flip" if position < len(raw):
                raw[position] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del raw[position:]
            case _:
                raw[position:position] = raw[: position + 3]
    check_decodes_or_refuses(bytes(raw), encode, decode)


@every_codec
@given(raw=st.binary(max_size=200))
def test_random_bytes_give_a_value_or_a_protocol_error_and_nothing_else(name, raw):
    _, encode, decode = CODECS[name]
    check_decodes_or_refuses(raw, encode, decode)


def check_decodes_or_refuses(raw, encode, decode):
    """Any other exception fails the test."""
    try:
        value = decode(raw)
    except ProtocolError as exc:
        value, complaint = None, str(exc)
        assert complaint
    if value is not None:  # a part may complete no message
        encode(value)


@given(message=step_messages, tensors=tensor_lists)
def test_a_step_is_passed_on_as_it_came_with_other_tensors(message, tensors):
    came = StepDecoder(LIMITS).feed(encode_step_part(message))
    (part,) = step_parts(replace(came, tensors=tensors))
    passed_on = StepDecoder(LIMITS).feed(part)
    assert (passed_on.step, passed_on.tensors) == (message.step, tensors)
    assert passed_on.encoded_step == came.encoded_step


# --- what is refused -----------------------------------------------------------------------------------------


def ids(*values):
    """Ids as they travel in long lists."""
    return struct.pack(f"<{len(values)}I", *values)


def raw_step(*slices, **fields):
    """A step message as bytes."""
    step = pb.StepInput(step=9, slices=slices, **fields)
    return pb.StepMessage(step=step.SerializeToString()).SerializeToString()


def raw_slice(**fields):
    """A step with one sequence, as bytes."""
    return raw_step(pb.SequenceSlice(**({"seq_id": 1, "token_ids": ids(1), "block_table": ids(0)} | fields)))


def raw_sampling(**fields):
    return raw_slice(sampling=pb.SamplingParams(top_p=1, **fields))


def raw_setup(**fields):
    return raw_slice(setup=pb.SequenceSetup(**fields))


def raw_rules(**fields):
    return raw_setup(rules=pb.TokenRules(**fields))


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (raw_step(), "step 9 computes no sequence"),
        (raw_slice(token_ids=b""), "step 9, sequence 1: no tokens"),
        (raw_slice(token_ids=ids(1, 2**31)), f"token id: {2**31}; ids must be below"),
        (raw_slice(block_table=ids(2**32 - 1)), "block id: 4294967295"),
        (raw_slice(token_ids=b"12345"), "sequence 1: token ids of 5 bytes; each takes 4"),
        (raw_slice(block_table=b"123"), "sequence 1: block ids of 3 bytes"),
        (raw_slice(start_position=2**31), "last position"),
        (raw_slice(sampling=pb.SamplingParams(temperature=-1, top_p=1)), "sequence 1: temperature is -1"),
        (raw_slice(sampling=pb.SamplingParams(temperature=math.nan, top_p=1)), "temperature is nan"),
        (raw_slice(sampling=pb.SamplingParams(top_p=0)), "top_p is 0"),
        (raw_slice(sampling=pb.SamplingParams(top_p=1.5)), r"top_p is 1\.5"),
        (raw_sampling(), "repetition_penalty is 0"),
        (raw_sampling(repetition_penalty=math.nan), "repetition_penalty is nan"),
        (raw_sampling(min_p=1.5), r"min_p is 1\.5"),
        (raw_sampling(repetition_penalty=1, presence_penalty=-3), "presence_penalty is -3"),
        (raw_sampling(repetition_penalty=1, frequency_penalty=math.inf), "frequency_penalty is inf"),
        (raw_sampling(repetition_penalty=1, num_top_logprobs=21), "21 top logprobs were asked for"),
        (raw_slice(num_prompt_logprobs=21), "num_prompt_logprobs: 21, and 20 is the most"),
        (raw_slice(next_token_id=2**31), "sequence 1: next token id: 2147483648"),
        (raw_setup(tokens=ids(2**31)), "sequence 1: setup's token id: 2147483648"),
        (raw_setup(tokens=b"12"), "setup's token ids of 2 bytes"),
        (raw_setup(tokens=ids(1, 2), num_prompt_tokens=3), "setup's prompt tokens: 3, and 2 is the most"),
        (raw_setup(stop_token_ids=[2**31]), "setup's stop token id: 2147483648"),
        (raw_setup(tokens=ids(1) * ((1 << 23) + 1)), f"setup tokens of step 9: {(1 << 23) + 1}, and {1 << 23} is the"),
        (raw_setup(stop_token_ids=[1] * ((1 << 20) + 1)), f"stop tokens: {(1 << 20) + 1}, and {1 << 20} is the most"),
        (raw_rules(bias_token_ids=[1, 2], biases=[0.5]), "biases: 2 token ids, but 1 values"),
        (raw_rules(bias_token_ids=[2**31], biases=[1]), "token id of a bias: 2147483648"),
        (raw_rules(bias_token_ids=[7], biases=[math.nan]), "sequence 1: logit_bias of token 7 is nan"),
        (raw_rules(bias_token_ids=[7], biases=[101]), "logit_bias of token 7 is 101"),
        (
            raw_rules(bias_token_ids=[1] * (MAX_LOGIT_BIAS + 1), biases=[0] * (MAX_LOGIT_BIAS + 1)),
            f"biases: {MAX_LOGIT_BIAS + 1}, and {MAX_LOGIT_BIAS} is the most",
        ),
        (raw_rules(min_new_tokens=2**31 + 1), "min_new_tokens: 2147483649"),
        (raw_rules(grammar=pb.Grammar(source="x")), "grammar kind number 0; 1 to 4 exist"),
        (raw_rules(grammar=pb.Grammar(kind=9)), "grammar kind number 9"),
        (
            raw_rules(grammar=pb.Grammar(kind=pb.GRAMMAR_KIND_REGEX, source="x" * (MAX_GRAMMAR_CHARS + 1))),
            f"grammar: {MAX_GRAMMAR_CHARS + 1} characters, and {MAX_GRAMMAR_CHARS} is the most",
        ),
        (
            raw_step(pb.SequenceSlice(token_ids=ids(1), block_table=ids(0)), dropped=[1] * 65537),
            "sequences that step 9 drops: 65537, and 65536 is the most",
        ),
        (raw_slice(block_table=ids(0) * ((1 << 20) + 1)), f"blocks: {(1 << 20) + 1}, and {1 << 20} is the most"),
        (raw_slice(token_ids=ids(0) * ((1 << 20) + 1)), f"tokens of step 9: {(1 << 20) + 1}"),
        (raw_step(*[pb.SequenceSlice(seq_id=1, token_ids=ids(1))] * 2), "step 9: sequence 1 comes twice"),
        (
            raw_step(*[pb.SequenceSlice(token_ids=ids(1))] * ((1 << 16) + 1)),
            "sequences of step 9: 65537, and 65536 is the most",
        ),
        (pb.StepMessage(step=b"\xff").SerializeToString(), "StepInput: 1 bytes that are no such message"),
        (b"\xff\xff", "StepMessage: 2 bytes that are no such message"),
    ],
)
def test_a_step_out_of_range_is_refused_with_what_is_wrong(raw, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        step_codec.decode_step(raw, WireLimits())


def test_a_message_over_its_limit_is_not_even_parsed():
    with pytest.raises(ProtocolError, match=f"StepReply: {MAX_MESSAGE_BYTES + 1} bytes; a message may hold"):
        step_codec.decode_step_reply(bytes(MAX_MESSAGE_BYTES + 1))
    with pytest.raises(ProtocolError, match="StepMessage"):
        step_codec.decode_step(bytes(LIMITS.max_unary_bytes + 1), LIMITS)


def test_a_step_link_keeps_its_order():
    end_first = StepDecoder(LIMITS)
    assert end_first.feed(STEP_END) is None
    assert end_first.ended
    with pytest.raises(ProtocolError, match="goes on after its end"):
        end_first.feed(STEP_END)
    with pytest.raises(ProtocolError, match="neither step, piece, fragment nor end"):
        StepDecoder(LIMITS).feed(b"")
    part = SequenceSlice(seq_id=1, start_position=0, token_ids=(1,), block_table=(), sampling=None)
    frame = TensorFrame(name="h", dtype="int32", shape=(1 << 18,), data=bytes(1 << 20))
    other = TensorFrame(name="i", dtype="int32", shape=(1,), data=bytes(4))
    message = StepMessage(step=StepInput(epoch=1, step=1, slices=(part,)), tensors=(frame, other))
    halfway = StepDecoder(WireLimits(max_frame_bytes=2 << 20))
    assert halfway.feed(next(step_parts(message))) is None
    with pytest.raises(ProtocolError, match="end on a step link; expected a fragment of the step before"):
        halfway.feed(STEP_END)


def begin(**changes):
    """A LoadBegin with changes, as a part."""
    message = pb.LoadPart.FromString(encode_load(LoadBegin(load=LOAD)))
    for path, value in changes.items():
        target, _, field = path.rpartition("__")
        owner = getattr(message.begin, target) if target else message.begin
        setattr(owner, field, value)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"assignment__end_layer": 0}, r"end_layer is 0; it must lie between 1 and"),
        ({"assignment__first_layer": 2}, r"first_layer is 2; it must lie between 0 and 1"),
        ({"assignment__stage_index": 1}, r"stage_index is 1; it must lie between 0 and 0"),
        ({"assignment__num_stages": 0}, "num_stages is 0"),
        ({"assignment__num_blocks": 0}, "num_blocks is 0"),
        ({"assignment__block_size": 1 << 20}, "block_size is 1048576; it must lie between 1 and 65536"),
        ({"assignment__worker_id": ""}, "worker_id is empty"),
        ({"assignment__next_worker_id": "w2"}, "the last stage names a next worker, 'w2'"),
        ({"dtype": pb.DTYPE_INT32}, "dtype is number 5; a stage computes in float32, bfloat16, float16"),
        ({"dtype": 77}, "dtype is number 77"),
        ({"model_config": ""}, "model_config is empty"),
        ({"model_config": "x" * ((1 << 20) + 1)}, "model_config: 1048577 characters, and 1048576 is the most"),
        ({"num_tensors": 1 << 20}, "tensors of a stage: 1048576, and 65536 is the most"),
    ],
)
def test_a_load_out_of_range_is_refused_with_what_is_wrong(changes, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        LoadDecoder().feed(begin(**changes))


def spec(**changes):
    return pb.TensorSpec(
        **({"name": "a", "dtype": "BF16", "shape": [2], "num_bytes": 4, "sha256": bytes(32)} | changes)
    )


def tensors(*specs):
    return pb.LoadPart(more_tensors=pb.MoreTensors(tensors=specs)).SerializeToString()


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([begin(), begin()], "a second LoadBegin"),
        ([tensors(spec())], "MoreTensors without a LoadBegin"),
        ([begin(num_tensors=2), tensors()], "MoreTensors without tensors"),
        ([begin(num_tensors=2), LOAD_END], "end in a load; expected 2 more tensors"),
        ([begin(num_tensors=1), tensors(spec(), spec(name="b"))], "tensors of this stage: 2, and 1 is the most"),
        ([begin(num_tensors=2), tensors(spec(), spec())], "tensor 'a' comes twice"),
        ([begin(num_tensors=1), tensors(spec(sha256=b"short"))], "a SHA-256 of 5 bytes"),
        ([begin(num_tensors=1), tensors(spec(shape=[1] * 9))], "9 dimensions"),
        ([begin(num_tensors=1), tensors(spec(num_bytes=1 << 41))], "is the most"),
        ([LOAD_END, begin()], "goes on after its end"),
        ([b""], "neither begin, tensors, chunk nor end"),
        (
            [pb.LoadPart(chunk=pb.WeightChunk(sha256=bytes(32), data=b"x")).SerializeToString()],
            "a WeightChunk before the LoadBegin",
        ),
        ([begin(), pb.LoadPart(chunk=pb.WeightChunk(sha256=bytes(32))).SerializeToString()], "in bytes is 0"),
        (
            [begin(), pb.LoadPart(chunk=pb.WeightChunk(sha256=bytes(31), data=b"x")).SerializeToString()],
            "a SHA-256 of 31 bytes",
        ),
        (
            [
                begin(),
                pb.LoadPart(
                    chunk=pb.WeightChunk(sha256=bytes(32), data=bytes(MAX_WEIGHT_CHUNK_BYTES + 1))
                ).SerializeToString(),
            ],
            "in bytes is 1048577; it must lie between 1 and 1048576",
        ),
        (
            [
                begin(),
                pb.LoadPart(chunk=pb.WeightChunk(sha256=bytes(32), offset=1 << 40, data=b"x")).SerializeToString(),
            ],
            "the end of a WeightChunk",
        ),
    ],
)
def test_a_load_out_of_order_is_refused_with_what_is_wrong(parts, complaint):
    decoder = LoadDecoder()
    for part in parts[:-1]:
        decoder.feed(part)
    with pytest.raises(ProtocolError, match=complaint):
        decoder.feed(parts[-1])


def test_a_weight_chunk_that_is_too_large_is_not_sent():
    chunk = WeightChunk(sha256="0" * 64, offset=0, data=bytes(MAX_WEIGHT_CHUNK_BYTES + 1))
    with pytest.raises(ProtocolError, match="1048577"):
        list(load_parts(chunk))


def test_a_load_of_very_many_tensors_is_cut_below_the_message_limit():
    many = tuple(
        TensorSpec(name=f"{'x' * 900}{number}", dtype="F32", shape=(1,), num_bytes=4, sha256=f"{number:064x}")
        for number in range(10_000)
    )
    load = StageLoad(
        assignment=LOAD.assignment,
        model_config="y" * (1 << 20),
        dtype="float32",
        tensors=many,
        file_hints=(),
        next_address="",
    )
    parts = list(load_parts(LoadBegin(load=load)))
    assert max(map(len, parts)) <= MAX_MESSAGE_BYTES
    decoder = LoadDecoder()
    results = [decoder.feed(part) for part in parts]
    assert results[:-1] == [None] * (len(parts) - 1)
    assert results[-1] == LoadBegin(load=load)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (pb.LoadReply(), "neither needed, progress, done nor refused"),
        (pb.LoadReply(progress=pb.LoadProgress(phase=0)), "phase is number 0"),
        (pb.LoadReply(progress=pb.LoadProgress(phase=9)), "phase is number 9"),
        (pb.LoadReply(done=pb.LoadDone(load_s=-1)), "load_s is -1"),
        (pb.LoadReply(done=pb.LoadDone(load_s=math.inf)), "load_s is inf"),
        (pb.LoadReply(needed=pb.WeightsNeeded(requests=[pb.WeightRequest(sha256=b"")])), "a SHA-256 of 0 bytes"),
        (pb.LoadReply(refused=pb.LoadRefused(reason="x" * (MAX_REASON_CHARS + 1))), "LoadRefused.reason"),
    ],
)
def test_a_load_reply_out_of_range_is_refused(message, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        load_codec.decode_load_reply(message.SerializeToString())


def test_reasons_are_cut_to_what_a_receiver_takes():
    refused = load_codec.decode_load_reply(load_codec.encode_load_reply(LoadRefused(reason="r" * 100_000)))
    assert refused == LoadRefused(reason="r" * MAX_REASON_CHARS)
    trouble = StepTrouble(epoch=1, step=2, worker_id="w", reason="r" * 100_000)
    back = step_codec.decode_step_reply(step_codec.encode_step_reply(trouble))
    assert back == StepTrouble(epoch=1, step=2, worker_id="w", reason="r" * MAX_REASON_CHARS)


@pytest.mark.parametrize("reply", [pb.StepReply(), pb.StepReply(trouble=pb.StepTrouble(reason="no worker"))])
def test_a_step_reply_that_says_nothing_is_refused(reply):
    with pytest.raises(ProtocolError, match=r"neither ack nor trouble|worker_id is empty"):
        step_codec.decode_step_reply(reply.SerializeToString())


def raw_report(**fields):
    return pb.HeartbeatReport(device="cpu", **fields)


def raw_traces(count=1, **fields):
    whole = dict.fromkeys(("epochs", "steps", "num_sequences", "num_tokens", "bytes_in", "bytes_out"), [1] * count)
    times = {"arrived_s": 1.0, "started_s": 2.0, "finished_s": 3.0, "sent_s": 4.0, "serialise_s": 0.5}
    return pb.StepTraces(**(whole | {name: [value] * count for name, value in times.items()} | fields))


def raw_phase(**fields):
    return pb.PhaseTimes(**({"phase": pb.STEP_PHASE_QUEUE, "counts": [1] * 17, "total_s": 1} | fields))


def raw_machine(**fields):
    return pb.MachineMeasures(**({"dtype": pb.DTYPE_FLOAT32} | fields))


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (pb.HeartbeatReport(device="cpu", busy_s=math.nan), "busy_s is nan"),
        (pb.HeartbeatReport(device="cpu", cpu_utilization=-3), "cpu_utilization is -3"),
        (pb.HeartbeatReport(device="cpu", gpu_utilization=math.inf), "gpu_utilization is inf"),
        (pb.HeartbeatReport(), "device is empty"),
        (pb.HeartbeatReport(device="cpu", timings=[pb.StepTiming()] * 4097), "timings: 4097, and 4096 is the most"),
        (raw_report(gpu_temperature_c=math.nan), "gpu_temperature_c is nan"),
        (raw_report(gpu_power_w=-1), "gpu_power_w is -1"),
        (raw_report(clock_sent_s=math.inf), "clock_sent_s is inf"),
        (raw_report(traces=raw_traces(MAX_TRACES + 1)), "traces: 4097, and 4096 is the most"),
        (raw_report(traces=pb.StepTraces(steps=[1, 2], epochs=[1])), "StepTraces.epochs: 1 values for 2 steps"),
        (raw_report(traces=pb.StepTraces(bytes_out=[1])), "StepTraces.bytes_out: 1 values for 0 steps"),
        (raw_report(traces=raw_traces(started_s=[9.0])), "step 1 arrived at 1.0, started at 9.0, finished at 3.0"),
        (raw_report(traces=raw_traces(finished_s=[math.nan])), "finished at nan"),
        (raw_report(traces=raw_traces(sent_s=[math.inf])), "sent at inf; these must be finite"),
        (raw_report(traces=raw_traces(arrived_s=[-1.0])), "arrived at -1.0"),
        (raw_report(traces=raw_traces(serialise_s=[-1.0])), "serialise_s is -1"),
        (raw_report(phases=[raw_phase()] * 2), "phase 1 comes twice"),
        (raw_report(phases=[raw_phase()] * 6), "phases: 6, and 5 is the most"),
        (raw_report(phases=[raw_phase(phase=0)]), "PhaseTimes.phase is 0; known: 1, 2"),
        (raw_report(phases=[raw_phase(phase=77)]), "PhaseTimes.phase is 77"),
        (raw_report(phases=[raw_phase(counts=[1] * 16)]), "counts: 16 buckets; there are 17"),
        (raw_report(phases=[raw_phase(total_s=-0.5)]), "total_s is -0.5"),
        (raw_report(link=pb.LinkReport()), "LinkReport.peer is empty"),
        (raw_report(link=pb.LinkReport(peer="w", round_trip_s=-1)), "round_trip_s is -1"),
        (raw_report(errors=[pb.NamedCount(name="A")] * 2), "errors: name 'A' comes twice"),
        (raw_report(errors=[pb.NamedCount(name=f"A{n}") for n in range(65)]), "errors: 65, and 64 is the most"),
        (raw_report(errors=[pb.NamedCount(name="a sentence")]), "'a sentence'; it must be the name of a class"),
        (raw_report(errors=[pb.NamedCount()]), "errors: name is empty"),
        (raw_report(loaded_bytes=[pb.NamedCount(name="tape")]), "'tape'; known: disk, cache, network"),
        (raw_report(ranks=[pb.RankLoad(device="cpu")]), "RankLoad.rank is 0"),
        (raw_report(ranks=[pb.RankLoad(rank=1, device="cpu")] * 64), "HeartbeatReport.ranks"),
        (raw_report(ranks=[pb.RankLoad(rank=1, device="cpu")] * 2), "HeartbeatReport.ranks: rank 1 comes twice"),
    ],
)
def test_a_report_out_of_range_is_refused(message, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        report_codec.decode_report(message.SerializeToString())


def test_a_report_with_as_many_traces_as_there_may_be_is_far_from_a_messages_limit():
    largest = StepTrace(
        epoch=2**63, step=2**63, num_sequences=2**32 - 1, num_tokens=2**32 - 1, arrived_s=1.5, started_s=2.5,
        finished_s=3.5, sent_s=4.5, serialise_s=0.5, bytes_in=2**63, bytes_out=2**63,
    )  # fmt: skip
    report = HeartbeatReport(
        timestamp=0, epoch=1, queue_depth=0, steps_done=0, busy_s=0, uptime_s=0, device="cpu", device_name="",
        gpu_utilization=None, gpu_memory_used_bytes=None, gpu_memory_total_bytes=None, cpu_utilization=0,
        memory_used_bytes=0, memory_total_bytes=0, process_memory_bytes=0, traces=(largest,) * MAX_TRACES,
    )  # fmt: skip
    raw = report_codec.encode_report(report)
    assert len(raw) < MAX_MESSAGE_BYTES // 8
    assert report_codec.decode_report(raw) == report


@pytest.mark.parametrize(
    ("decode", "message", "complaint"),
    [
        (measure_codec.decode_ping, pb.PingRequest(reply_bytes=MAX_PING_BYTES + 1), "reply_bytes is 16777217"),
        (measure_codec.decode_ping, pb.PingRequest(data=bytes(MAX_PING_BYTES + 1)), "data in bytes: 16777217"),
        (measure_codec.decode_machine_request, pb.MeasureMachineRequest(), "dtype is 0; it must be one of float32"),
        (measure_codec.decode_machine_request, pb.MeasureMachineRequest(dtype=pb.DTYPE_INT64), "dtype is int64"),
        (measure_codec.decode_machine, raw_machine(dtype=pb.DTYPE_INT32), "dtype is int32"),
        (measure_codec.decode_machine, raw_machine(read_bandwidth=-1), "read_bandwidth is -1"),
        (measure_codec.decode_machine, raw_machine(matrix_rate=math.inf), "matrix_rate is inf"),
        (measure_codec.decode_machine, raw_machine(disk_bandwidth=math.nan), "disk_bandwidth is nan"),
        (measure_codec.decode_link_request, pb.MeasureLinkRequest(), "address is empty"),
        (measure_codec.decode_link_request, pb.MeasureLinkRequest(address="a:1", sizes=[2**40]), "size is 1099511"),
        (measure_codec.decode_link_request, pb.MeasureLinkRequest(address="a:1", sizes=[1] * 17), "sizes: 17"),
        (measure_codec.decode_link, pb.LinkMeasures(round_trip_s=-1), "round_trip_s is -1"),
        (measure_codec.decode_link, pb.LinkMeasures(transfers=[pb.Transfer(seconds=-1)]), "seconds is -1"),
        (measure_codec.decode_link, pb.LinkMeasures(transfers=[pb.Transfer()] * 17), "transfers: 17"),
    ],
)
def test_a_ping_or_measurement_out_of_range_is_refused(decode, message, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        decode(message.SerializeToString())


def test_an_offload_tier_that_nobody_knows_is_refused():
    message = pb.WorkerDescription(device="cpu", offload="tape")
    with pytest.raises(ProtocolError, match="offload is 'tape'; known: cpu, nvme"):
        report_codec.decode_description(message.SerializeToString())


@pytest.mark.parametrize("layers", [(1,), (5,), (3, 3), (4, 3)])
def test_offloaded_layers_that_are_not_of_the_stage_are_refused(layers):
    message = pb.StageAssignment(
        worker_id="w", num_stages=1, first_layer=2, end_layer=5, num_blocks=1, block_size=1, offloaded_layers=layers
    )
    with pytest.raises(ProtocolError, match=r"offloaded_layers: \[.*\] are not some of the layers 2 to 4"):
        load_codec._read_assignment(message)


def test_a_metrics_port_that_is_none_is_refused():
    message = pb.WorkerDescription(device="cpu", metrics_port=65536)
    with pytest.raises(ProtocolError, match="metrics_port is 65536"):
        report_codec.decode_description(message.SerializeToString())


def raw_result(**fields):
    return pb.ResultPart(result=pb.StepResult(**fields)).SerializeToString()


def raw_token(**fields):
    return raw_result(tokens=[pb.TokenOut(seq_id=4, **fields)])


def raw_run(**fields):
    return raw_result(prompt_scores=[pb.PromptScores(**({"seq_id": 4, "first_position": 1} | fields))])


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (raw_result(tokens=[pb.TokenOut(seq_id=4)] * 2), "sequence 4 comes twice"),
        (raw_token(token_id=2**31), "token id: 2147483648"),
        (raw_token(top_token_ids=[1]), "likeliest tokens: 1 token ids, but 0 values"),
        (raw_token(top_logprobs=[-1]), "likeliest tokens: 0 token ids, but 1 values"),
        (raw_token(top_token_ids=[2**31], top_logprobs=[-1]), "likeliest token's id: 2147483648"),
        (raw_token(top_token_ids=[1] * 21, top_logprobs=[-1] * 21), "likeliest tokens: 21, and 20 is the most"),
        (raw_run(first_position=0), "prompt scores of sequence 4: they begin at position 0"),
        (raw_run(first_position=2**31, scores=[pb.TokenScore()]), "last position"),
        (raw_run(scores=[pb.TokenScore(token_id=2**31)]), "sequence 4: token id: 2147483648"),
        (raw_run(scores=[pb.TokenScore(top_token_ids=[1])]), "1 token ids, but 0 values"),
        (raw_result(prompt_scores=[pb.PromptScores(seq_id=4, first_position=1)] * 2), "sequence 4 comes twice"),
        (
            raw_result(prompt_scores=[pb.PromptScores(first_position=1)] * ((1 << 16) + 1)),
            "prompts scored in one step's result: 65537, and 65536 is the most",
        ),
        (raw_run(scores=[pb.TokenScore()] * ((1 << 20) + 1)), "scores of one step's result: 1048577"),
        (b"", "neither result nor piece"),
        (pb.ResultPart(piece=pb.MessagePiece(is_last=True)).SerializeToString(), "a step's result: an empty piece"),
    ],
)
def test_a_result_out_of_range_is_refused_with_what_is_wrong(raw, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        ResultDecoder().feed(raw)
