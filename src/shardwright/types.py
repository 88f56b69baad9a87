"""The nouns that every room shares: ids, layer ranges, steps, assignments, weights, reports.

Everything here is a frozen value made of plain Python data: no tensors, no sockets, no clock. Times are
seconds as floats, sizes are bytes, rates are bytes or operations per second.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from typing import TypeAlias

from shardwright.errors import InvalidRequestError

WorkerId: TypeAlias = str
SeqId: TypeAlias = int
StepId: TypeAlias = int
Epoch: TypeAlias = int
BlockId: TypeAlias = int
TokenId: TypeAlias = int

PROTOCOL_VERSION = 3
"""Raised whenever a message changes its meaning; master and workers must agree on it."""

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_CHARS = 64 * 1024

OFFLOADS = ("cpu", "nvme")
"""Where a worker may keep weights that its memory can't hold: the host's pinned memory under a GPU, or a disk."""

OFFLOAD_BUFFERS = 2
"""Layers that a stage with offloaded ones has buffers for: one computes while the next one's weights are read."""

VOCABULARY_TENSOR = "shardwright.vocabulary"
"""The name under which a last stage gets the bytes of the model's tokens, as one more tensor of dtype U8; see
`model/vocabulary.py`. It is absent for a model without a tokenizer: such a one can't follow grammars.
"""


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """The decoder layers `start` (inclusive) to `end` (exclusive); a stage's share of the model."""

    start: int
    end: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.end, f"not a layer range: [{self.start}, {self.end})"

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer < self.end

    def __str__(self) -> str:
        return f"{self.start}-{self.end - 1}"


class FinishReason(enum.Enum):
    """Why a sequence ended; the value is what clients see."""

    STOP = "stop"  # the model gave an end token or a stop token
    LENGTH = "length"  # max_new_tokens or the model's context is used up
    ABORT = "abort"  # the client gave up
    ERROR = "error"  # the request can't be served, or the cluster failed under it
    DEADLINE = "deadline"  # the request's time was up before it was done
    REJECTED = "rejected"  # the queue was full when it came


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the last stage picks a token from one row of logits.

    Temperature 0 is greedy. The choice depends on the logits, these values and the token's position alone,
    never on the batch: the random number for position p is a function of (seed, p).
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0  # least probability, as a part of the likeliest token's; 0: no limit
    seed: int = 0
    repetition_penalty: float = 1.0  # of tokens in prompt or output; 1: none
    presence_penalty: float = 0.0  # taken from the logit of each token in the output
    frequency_penalty: float = 0.0  # taken from it once for each time that it is there
    num_top_logprobs: int = 0  # likeliest tokens to report beside the chosen one

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise InvalidRequestError(f"temperature is {self.temperature}; it must lie between 0 and 100")
        if self.top_k < 0:
            raise InvalidRequestError(f"top_k is {self.top_k}; it must be 0 (no limit) or above")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise InvalidRequestError(f"min_p is {self.min_p}; it must lie between 0 and 1")
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise InvalidRequestError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0 and at most 100"
            )
        for name, value in (
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ):
            if not -2.0 <= value <= 2.0:
                raise InvalidRequestError(f"{name} is {value}; it must lie between -2 and 2")
        if not 0 <= self.num_top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequestError(
                f"{self.num_top_logprobs} top logprobs were asked for; between 0 and {MAX_TOP_LOGPROBS} can be given"
            )
        if not 0 <= self.seed < 2**64:
            raise InvalidRequestError(f"seed is {self.seed}; it must lie between 0 and 2^64 - 1")

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on the sequence's earlier tokens."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


class GrammarKind(enum.Enum):
    """The language that a grammar's source is written in."""

    JSON_OBJECT = "json_object"  # any JSON object; the source is empty
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"  # a context-free grammar in llguidance's dialect of Lark


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What the whole output of a sequence must match."""

    kind: GrammarKind
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.source) > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                f"the {self.kind.value} has {len(self.source)} characters; at most {MAX_GRAMMAR_CHARS} are taken"
            )
        try:
            self.source.encode()
        except UnicodeEncodeError as exc:
            raise InvalidRequestError(
                f"the {self.kind.value} holds half a surrogate pair, U+{ord(self.source[exc.start]):04X}, at "
                f"character {exc.start}; that is no text"
            ) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """Which tokens a sequence may get, beside what the logits say. Large: the last stage gets it once a sequence."""

    logit_bias: tuple[tuple[TokenId, float], ...] = ()  # added to the logits, in order of the ids
    grammar: Grammar | None = None
    min_new_tokens: int = 0  # no stop token is chosen before the output has so many

    def __post_init__(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"logit_bias names {len(self.logit_bias)} tokens; at most {MAX_LOGIT_BIAS} are taken"
            )
        for token_id, bias in self.logit_bias:
            if not -100.0 <= bias <= 100.0:
                raise InvalidRequestError(f"logit_bias of token {token_id} is {bias}; it must lie between -100 and 100")
        if self.min_new_tokens < 0:
            raise InvalidRequestError(f"min_new_tokens is {self.min_new_tokens}; it must be at least 0")

    def __bool__(self) -> bool:
        return bool(self.logit_bias or self.grammar or self.min_new_tokens)


GREEDY = SamplingParams()
NO_RULES = TokenRules()


@dataclass(frozen=True, slots=True, kw_only=True)
class StopConditions:
    """When a sequence ends by itself. Known to the master alone."""

    max_new_tokens: int
    stop_token_ids: frozenset[TokenId] = frozenset()  # end-of-sequence ids are among them unless ignored

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidRequestError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSetup:
    """What the last stage has to know of a sequence whose tokens depend on more than one row of logits.

    Travels with the first slice that samples after the sequence was admitted, and again after each preemption or
    recovery; sequences with neither penalties nor rules have none. The last stage counts on from here by itself and
    forgets the sequence when a step's `dropped` names it.
    """

    num_prompt_tokens: int
    tokens: tuple[TokenId, ...]  # all that are known, the slice's among them: prompt, then output so far
    rules: TokenRules
    stop_token_ids: frozenset[TokenId]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSlice:
    """The part of one sequence that a step computes.

    `token_ids` are the tokens at positions `start_position` to `start_position + len(token_ids) - 1`;
    `block_table` names the blocks of positions 0 to the last of these. `sampling` is set when the last of
    these tokens is the sequence's last known one, so that its logits give the next token.

    `num_prompt_logprobs` is set when the client wants to know how likely the prompt's own tokens are: the last stage
    then scores each token that follows one of the slice's, `next_token_id` (the prompt's token after the slice)
    being the last of them. It says how many likeliest alternatives to report with each.
    """

    seq_id: SeqId
    start_position: int
    token_ids: tuple[TokenId, ...]
    block_table: tuple[BlockId, ...]
    sampling: SamplingParams | None
    setup: SequenceSetup | None = None
    num_prompt_logprobs: int | None = None
    next_token_id: TokenId | None = None  # absent in the prompt's last slice

    @property
    def num_tokens(self) -> int:
        """New tokens of this sequence in the step."""
        return len(self.token_ids)

    @property
    def context_length(self) -> int:
        """Positions that the last of these tokens attends to, itself included."""
        return self.start_position + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One step as it travels through all stages: a ragged batch of sequence slices, in a fixed order."""

    epoch: Epoch
    step: StepId
    slices: tuple[SequenceSlice, ...]
    steps_in_flight: int = 1  # that the master aims at: stages on one machine share its cores among so many
    dropped: tuple[SeqId, ...] = ()  # sequences whose setup the last stage may forget, before it looks at the slices

    @property
    def num_tokens(self) -> int:
        """Rows of the step's activation."""
        return sum(s.num_tokens for s in self.slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOut:
    """A token that the last stage picked for a sequence."""

    seq_id: SeqId
    token_id: TokenId
    logprob: float  # natural log of the token's probability under the unmodified logits
    top: tuple[tuple[TokenId, float], ...] = ()  # the likeliest tokens with theirs, as many as were asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """How likely a token of the prompt was, given those before it."""

    token_id: TokenId
    logprob: float
    top: tuple[tuple[TokenId, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """The scores of a run of a prompt's tokens; `first_position` is the first one's, never 0: nothing precedes it."""

    seq_id: SeqId
    first_position: int
    scores: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """What a model's parts weigh, for placement. Bytes are as held in memory in the compute dtype."""

    name: str
    hidden_size: int
    layer_bytes: tuple[int, ...]  # weights of each layer
    layer_kv_bytes_per_token: tuple[int, ...]  # K and V of one position, each layer
    embedding_bytes: int
    head_bytes: int  # norm and output head, as needed on the last stage
    tied_embedding: bool  # the head is the embedding: first and last stage in one hold it once
    activation_bytes_per_token: int
    max_context: int  # positions that the model was made for
    element_bytes: int = 2  # of one weight in the compute dtype
    context_costs: tuple[tuple[int, float], ...] = ()
    """Pairs of (window, cost of one attended position for a token), one for each length of window in the model; the
    unit is the cost of a token without attention. Empty: attention costs nothing beside the rest."""
    layer_kv_heads: tuple[int, ...] = ()  # the fewest of each layer's attentions; empty: not known

    def for_ranks(self, num_ranks: int) -> ModelCosts:
        """What workers of so many ranks need: where a layer has fewer KV heads than ranks, several hold the same."""
        copies = (max(num_ranks // heads, 1) for heads in self.layer_kv_heads)
        sizes = tuple(size * count for size, count in zip(self.layer_kv_bytes_per_token, copies, strict=True))
        return dataclasses.replace(self, layer_kv_bytes_per_token=sizes)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the whole model."""
        return len(self.layer_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCapacity:
    """What a worker can do, measured by itself; placement reads nothing else about it."""

    worker_id: WorkerId
    host_id: str  # equal for workers that share cores and memory bandwidth
    device: str  # cpu, cuda:0, mps
    memory_bytes: int  # what the worker may use for weights and KV; workers on one host's CPU share it
    read_bandwidth: float  # bytes/s that one step can stream weights at
    matrix_rate: float  # floating-point operations/s in the compute dtype
    link_delay_s: float = 0.0  # one way, from the previous stage or the master
    shared_memory_bytes: int = 0  # what all workers on this host's device may use together; 0: the largest of theirs
    offload: str = ""  # where it can keep weights beside its memory: one of `OFFLOADS`; empty: nowhere
    offload_bytes: int = 0  # that it can keep there; workers of one host share its disk
    offload_bandwidth: float = 0.0  # bytes/s that they come from there with


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAssignment:
    """One stage of one epoch's pipeline, as decided by placement."""

    epoch: Epoch
    worker_id: WorkerId
    stage_index: int
    num_stages: int
    layers: LayerRange
    num_blocks: int
    block_size: int
    next_worker_id: WorkerId | None  # None on the last stage
    num_sharing: int = 1  # stages of this pipeline on the same host and device, this one included
    offloaded_layers: tuple[int, ...] = ()  # rising; their weights are kept in the worker's offload tier

    @property
    def is_first(self) -> bool:
        """Holds the embedding."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """Holds the norm and the head, and samples."""
        return self.stage_index == self.num_stages - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a checkpoint, as stored in its file: raw bytes, named by their content.

    `dtype` is safetensors' tag (`F32`, `BF16`, `F16`, ...) or `GGML_<type>` for GGUF's. `shape` is the row-major
    shape of the values, also where the bytes are quantised.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    sha256: str  # lower-case hex of the raw bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHint:
    """A checkpoint file that a worker might have too: where the master has it and what it would be on the hub."""

    path: str
    num_bytes: int
    hub_repo: str = ""  # empty where the file is not from the hub
    hub_revision: str = ""
    hub_filename: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    """All that a worker needs to build a stage: the assignment, the model's config, and its tensors by content."""

    assignment: StageAssignment
    model_config: str  # JSON of the model's config, `model_type` included
    dtype: str  # float32, bfloat16, float16
    tensors: tuple[TensorSpec, ...]
    file_hints: tuple[FileHint, ...]
    next_address: str  # host:port of the next stage's worker; empty on the last stage
    master_id: str = ""  # random: tells a load that is taken up again from one of another master, however alike


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDescription:
    """What a worker answers to `Describe`: who it is, what it runs on, what it measured."""

    protocol_version: int
    package_version: str
    torch_version: str
    transformers_version: str
    host_id: str
    pid: int
    device: str
    device_name: str
    memory_total_bytes: int
    memory_available_bytes: int  # what it would use for weights and KV now
    read_bandwidth: float  # bytes/s, measured
    matrix_rate: float  # operations/s, measured
    num_threads: int
    last_epoch: Epoch = 0  # the newest that it has heard of; a new pipeline's must be above
    shared_memory_bytes: int = 0  # what all workers on its device may use together now; 0: not told
    in_use: bool = False  # a master or another stage has a stream open to it
    metrics_port: int = 0  # where it answers Prometheus; 0: nowhere
    offload: str = ""  # where it was told to keep weights that its memory can't hold; empty: nowhere
    offload_bytes: int = 0  # room for them there now
    offload_bandwidth: float = 0.0  # bytes/s, measured
    num_ranks: int = 1  # devices that compute each layer together; memory, speed and threads are theirs together

    def capacity(self, worker_id: WorkerId) -> WorkerCapacity:
        """What placement needs to know of it."""
        return WorkerCapacity(
            worker_id=worker_id,
            host_id=self.host_id,
            device=self.device,
            memory_bytes=self.memory_available_bytes,
            read_bandwidth=self.read_bandwidth,
            matrix_rate=self.matrix_rate,
            shared_memory_bytes=self.shared_memory_bytes,
            offload=self.offload,
            offload_bytes=self.offload_bytes,
            offload_bandwidth=self.offload_bandwidth,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """Mean compute time of the steps of one shape at one stage, since the last report."""

    num_sequences: int
    num_tokens: int
    mean_s: float
    count: int
    concurrency: int = 1  # stages of the same device that computed at the same time, as far as the master aimed at it


class StepPhase(enum.Enum):
    """What a stage's time goes into, step by step."""

    QUEUE = "queue"  # off the link, until the compute thread takes it
    SERIALISE = "serialise"  # on the compute thread: bytes to tensors before the layers, tensors to bytes behind them
    COMPUTE = "compute"  # the rest of the compute thread's time for it
    SEND = "send"  # computed, until the link or the token stream has taken it
    WAIT = "wait"  # the compute thread had nothing to do before it


PHASE_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds of the buckets that phases are counted in; one more bucket takes what is above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """How long one phase took at a stage, since its worker's process began."""

    phase: StepPhase
    counts: tuple[int, ...]  # steps by bucket, one more than `PHASE_BUCKETS_S` has; not summed up
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """One step's passage through one stage, in seconds on the worker's own monotonic clock."""

    epoch: Epoch
    step: StepId
    num_sequences: int
    num_tokens: int
    arrived_s: float  # whole, off the link
    started_s: float  # taken by the compute thread
    finished_s: float  # off the compute thread
    sent_s: float  # taken by the link to the next stage, or by the token stream
    serialise_s: float  # of the time between started and finished
    bytes_in: int  # of tensors, from the previous stage
    bytes_out: int  # of tensors, to the next stage


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """The link from a stage to the next one, since it was opened."""

    peer: WorkerId
    bytes_sent: int  # of tensors
    steps_sent: int
    round_trip_s: float | None  # of a small message, lately; None before it was measured


WEIGHT_SOURCES = ("disk", "cache", "network")
"""Where a stage's weights may come from: files of the worker's own, its tensor cache, the master."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoad:
    """How one device of a worker with several does, and the process that computes on it."""

    rank: int  # 0: the worker's own process
    device: str
    device_name: str
    process_memory_bytes: int
    gpu_utilization: float | None = None  # percent; None without a GPU that can be asked
    gpu_memory_used_bytes: int | None = None
    gpu_memory_total_bytes: int | None = None
    gpu_temperature_c: float | None = None
    gpu_power_w: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatReport:
    """A worker's state as of `timestamp` (seconds since 1970, the worker's clock)."""

    timestamp: float
    epoch: Epoch  # 0: holds no stage
    queue_depth: int  # steps that wait for the compute thread
    steps_done: int  # since the stage was loaded
    busy_s: float  # compute time since the stage was loaded
    uptime_s: float  # since the stage was loaded; 0 without one
    device: str
    device_name: str
    gpu_utilization: float | None  # percent; None without a GPU that can be asked
    gpu_memory_used_bytes: int | None
    gpu_memory_total_bytes: int | None
    cpu_utilization: float  # percent of all cores of the machine
    memory_used_bytes: int  # of the machine
    memory_total_bytes: int
    process_memory_bytes: int  # resident size of the worker's process
    timings: tuple[StepTiming, ...] = ()  # only for who asks for traces: they are told once
    gpu_temperature_c: float | None = None
    gpu_power_w: float | None = None
    clock_received_s: float = 0.0  # the worker's monotonic clock when the question came
    clock_sent_s: float = 0.0  # and when this answer was made
    weight_bytes: int = 0  # of the stage that is held
    kv_bytes: int = 0
    traces: tuple[StepTrace, ...] = ()  # of the steps from number `traces_since` on, oldest first, those still kept
    next_trace: int = 0  # what to ask for next time: the number of steps traced so far
    phases: tuple[PhaseTimes, ...] = ()
    link: LinkReport | None = None  # None on the last stage, and without a stage
    errors: tuple[tuple[str, int], ...] = ()  # by kind (the error class's name), since the process began
    loaded_bytes: tuple[tuple[str, int], ...] = ()  # weights by source (disk, cache, network), since the process began
    offloaded_bytes: int = 0  # of weights that are not in memory but in the worker's offload tier
    offload_read_bytes: int = 0  # read back from there, since the process began
    offload_wait_s: float = 0.0  # that steps waited for it, since the process began
    ranks: tuple[RankLoad, ...] = ()  # the worker's devices beside `device`, from rank 1 on

    @property
    def all_ranks(self) -> tuple[RankLoad, ...]:
        """All devices that compute together, the report's own first, as rank 0; empty where it is the only one."""
        if not self.ranks:
            return ()
        own = RankLoad(
            rank=0,
            device=self.device,
            device_name=self.device_name,
            process_memory_bytes=self.process_memory_bytes,
            gpu_utilization=self.gpu_utilization,
            gpu_memory_used_bytes=self.gpu_memory_used_bytes,
            gpu_memory_total_bytes=self.gpu_memory_total_bytes,
            gpu_temperature_c=self.gpu_temperature_c,
            gpu_power_w=self.gpu_power_w,
        )
        return (own, *self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineMeasures:
    """What a worker's machine can do, measured when it was asked."""

    dtype: str  # that the matrix rate was measured with
    num_threads: int
    read_bandwidth: float  # bytes/s of memory, streamed by all threads
    matrix_rate: float  # operations/s
    disk_bandwidth: float | None  # bytes/s, read past the page cache where the system can; None: could not be measured


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkMeasures:
    """What the way from one process to a worker can do, measured when it was asked."""

    round_trip_s: float  # of a message of a few bytes, the median
    transfers: tuple[tuple[int, float], ...]  # (bytes, seconds there and acknowledged, the median)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """One worker as the master's core sees it."""

    worker_id: WorkerId
    status: str
    layers: LayerRange | None
    last_heard_s: float | None  # on the core's clock
    report: HeartbeatReport | None
    reason: str = ""  # why it was lost


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSnapshot:
    """All that metrics, dashboards and the CLI may know of the master's state, frozen at one moment."""

    epoch: Epoch
    ready: bool
    stages: tuple[StageAssignment, ...]
    workers: tuple[WorkerSnapshot, ...]
    num_blocks: int
    num_free_blocks: int
    num_waiting: int
    num_running: int
    num_steps_in_flight: int
    max_steps_in_flight: int
    total_prompt_tokens: int
    total_cached_tokens: int  # prompt tokens that a reused prefix saved
    total_output_tokens: int
    total_preemptions: int
    max_waiting: int = 0  # the queue's bound; 0: none
    num_cached_blocks: int = 0  # free ones whose content the prefix cache can give again
    recovering_from: str = ""  # why the pipeline is being placed anew; empty while it is not
    total_recoveries: int = 0  # times that a pipeline took steps again after it was broken
    total_recovery_s: float = 0.0  # that these took, from what broke the old one to the new one's first token
    total_recomputed_tokens: int = 0  # whose K and V were lost with a pipeline, so that they are computed again
    finished: tuple[tuple[FinishReason, int], ...] = field(default=())
