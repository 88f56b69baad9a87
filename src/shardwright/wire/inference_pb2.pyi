from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_INT64: _ClassVar[DType]
    DTYPE_INT32: _ClassVar[DType]

class GrammarKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRAMMAR_KIND_UNSPECIFIED: _ClassVar[GrammarKind]
    GRAMMAR_KIND_JSON_OBJECT: _ClassVar[GrammarKind]
    GRAMMAR_KIND_JSON_SCHEMA: _ClassVar[GrammarKind]
    GRAMMAR_KIND_REGEX: _ClassVar[GrammarKind]
    GRAMMAR_KIND_LARK: _ClassVar[GrammarKind]

class LoadPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOAD_PHASE_UNSPECIFIED: _ClassVar[LoadPhase]
    LOAD_PHASE_RECEIVE: _ClassVar[LoadPhase]
    LOAD_PHASE_BUILD: _ClassVar[LoadPhase]
    LOAD_PHASE_WARM_UP: _ClassVar[LoadPhase]

class StepPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_PHASE_UNSPECIFIED: _ClassVar[StepPhase]
    STEP_PHASE_QUEUE: _ClassVar[StepPhase]
    STEP_PHASE_SERIALISE: _ClassVar[StepPhase]
    STEP_PHASE_COMPUTE: _ClassVar[StepPhase]
    STEP_PHASE_SEND: _ClassVar[StepPhase]
    STEP_PHASE_WAIT: _ClassVar[StepPhase]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT16: DType
DTYPE_INT64: DType
DTYPE_INT32: DType
GRAMMAR_KIND_UNSPECIFIED: GrammarKind
GRAMMAR_KIND_JSON_OBJECT: GrammarKind
GRAMMAR_KIND_JSON_SCHEMA: GrammarKind
GRAMMAR_KIND_REGEX: GrammarKind
GRAMMAR_KIND_LARK: GrammarKind
LOAD_PHASE_UNSPECIFIED: LoadPhase
LOAD_PHASE_RECEIVE: LoadPhase
LOAD_PHASE_BUILD: LoadPhase
LOAD_PHASE_WARM_UP: LoadPhase
STEP_PHASE_UNSPECIFIED: StepPhase
STEP_PHASE_QUEUE: StepPhase
STEP_PHASE_SERIALISE: StepPhase
STEP_PHASE_COMPUTE: StepPhase
STEP_PHASE_SEND: StepPhase
STEP_PHASE_WAIT: StepPhase

class TensorFrame(_message.Message):
    __slots__ = ("magic", "version", "dtype", "shape", "length", "name", "data")
    MAGIC_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    magic: int
    version: int
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    length: int
    name: str
    data: bytes
    def __init__(self, magic: _Optional[int] = ..., version: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., length: _Optional[int] = ..., name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class TensorFragment(_message.Message):
    __slots__ = ("tensor", "offset", "data")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    offset: int
    data: bytes
    def __init__(self, tensor: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class StreamEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MessagePiece(_message.Message):
    __slots__ = ("data", "is_last")
    DATA_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    is_last: bool
    def __init__(self, data: _Optional[bytes] = ..., is_last: _Optional[bool] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "num_top_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    num_top_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., num_top_logprobs: _Optional[int] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "source")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    kind: GrammarKind
    source: str
    def __init__(self, kind: _Optional[_Union[GrammarKind, str]] = ..., source: _Optional[str] = ...) -> None: ...

class TokenRules(_message.Message):
    __slots__ = ("bias_token_ids", "biases", "grammar", "min_new_tokens")
    BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    bias_token_ids: _containers.RepeatedScalarFieldContainer[int]
    biases: _containers.RepeatedScalarFieldContainer[float]
    grammar: Grammar
    min_new_tokens: int
    def __init__(self, bias_token_ids: _Optional[_Iterable[int]] = ..., biases: _Optional[_Iterable[float]] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., min_new_tokens: _Optional[int] = ...) -> None: ...

class SequenceSetup(_message.Message):
    __slots__ = ("num_prompt_tokens", "tokens", "rules", "stop_token_ids")
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    num_prompt_tokens: int
    tokens: bytes
    rules: TokenRules
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_prompt_tokens: _Optional[int] = ..., tokens: _Optional[bytes] = ..., rules: _Optional[_Union[TokenRules, _Mapping]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SequenceSlice(_message.Message):
    __slots__ = ("seq_id", "start_position", "token_ids", "block_table", "sampling", "setup", "num_prompt_logprobs", "next_token_id")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SETUP_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    start_position: int
    token_ids: bytes
    block_table: bytes
    sampling: SamplingParams
    setup: SequenceSetup
    num_prompt_logprobs: int
    next_token_id: int
    def __init__(self, seq_id: _Optional[int] = ..., start_position: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., block_table: _Optional[bytes] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., setup: _Optional[_Union[SequenceSetup, _Mapping]] = ..., num_prompt_logprobs: _Optional[int] = ..., next_token_id: _Optional[int] = ...) -> None: ...

class StepInput(_message.Message):
    __slots__ = ("epoch", "step", "slices", "steps_in_flight", "dropped")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    STEPS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    slices: _containers.RepeatedCompositeFieldContainer[SequenceSlice]
    steps_in_flight: int
    dropped: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., slices: _Optional[_Iterable[_Union[SequenceSlice, _Mapping]]] = ..., steps_in_flight: _Optional[int] = ..., dropped: _Optional[_Iterable[int]] = ...) -> None: ...

class StepMessage(_message.Message):
    __slots__ = ("step", "tensors")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    step: bytes
    tensors: _containers.RepeatedCompositeFieldContainer[TensorFrame]
    def __init__(self, step: _Optional[bytes] = ..., tensors: _Optional[_Iterable[_Union[TensorFrame, _Mapping]]] = ...) -> None: ...

class StepPart(_message.Message):
    __slots__ = ("step", "fragment", "end", "piece")
    STEP_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    step: StepMessage
    fragment: TensorFragment
    end: StreamEnd
    piece: MessagePiece
    def __init__(self, step: _Optional[_Union[StepMessage, _Mapping]] = ..., fragment: _Optional[_Union[TensorFragment, _Mapping]] = ..., end: _Optional[_Union[StreamEnd, _Mapping]] = ..., piece: _Optional[_Union[MessagePiece, _Mapping]] = ...) -> None: ...

class StepAck(_message.Message):
    __slots__ = ("epoch", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class StepTrouble(_message.Message):
    __slots__ = ("epoch", "step", "worker_id", "reason", "link_lost")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LINK_LOST_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    worker_id: str
    reason: str
    link_lost: bool
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., worker_id: _Optional[str] = ..., reason: _Optional[str] = ..., link_lost: _Optional[bool] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("ack", "trouble")
    ACK_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    ack: StepAck
    trouble: StepTrouble
    def __init__(self, ack: _Optional[_Union[StepAck, _Mapping]] = ..., trouble: _Optional[_Union[StepTrouble, _Mapping]] = ...) -> None: ...

class TokenOut(_message.Message):
    __slots__ = ("seq_id", "token_id", "logprob", "top_token_ids", "top_logprobs")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    token_id: int
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, seq_id: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class TokenScore(_message.Message):
    __slots__ = ("token_id", "logprob", "top_token_ids", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class PromptScores(_message.Message):
    __slots__ = ("seq_id", "first_position", "scores")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    first_position: int
    scores: _containers.RepeatedCompositeFieldContainer[TokenScore]
    def __init__(self, seq_id: _Optional[int] = ..., first_position: _Optional[int] = ..., scores: _Optional[_Iterable[_Union[TokenScore, _Mapping]]] = ...) -> None: ...

class TokensRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "step", "tokens", "prompt_scores")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SCORES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    tokens: _containers.RepeatedCompositeFieldContainer[TokenOut]
    prompt_scores: _containers.RepeatedCompositeFieldContainer[PromptScores]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[TokenOut, _Mapping]]] = ..., prompt_scores: _Optional[_Iterable[_Union[PromptScores, _Mapping]]] = ...) -> None: ...

class ResultPart(_message.Message):
    __slots__ = ("result", "piece")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    result: StepResult
    piece: MessagePiece
    def __init__(self, result: _Optional[_Union[StepResult, _Mapping]] = ..., piece: _Optional[_Union[MessagePiece, _Mapping]] = ...) -> None: ...

class LayerResult(_message.Message):
    __slots__ = ("tensors", "tokens", "prompt_scores")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SCORES_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorFrame]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenOut]
    prompt_scores: _containers.RepeatedCompositeFieldContainer[PromptScores]
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorFrame, _Mapping]]] = ..., tokens: _Optional[_Iterable[_Union[TokenOut, _Mapping]]] = ..., prompt_scores: _Optional[_Iterable[_Union[PromptScores, _Mapping]]] = ...) -> None: ...

class StageAssignment(_message.Message):
    __slots__ = ("epoch", "worker_id", "stage_index", "num_stages", "first_layer", "end_layer", "num_blocks", "block_size", "next_worker_id", "num_sharing", "offloaded_layers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NEXT_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARING_FIELD_NUMBER: _ClassVar[int]
    OFFLOADED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    worker_id: str
    stage_index: int
    num_stages: int
    first_layer: int
    end_layer: int
    num_blocks: int
    block_size: int
    next_worker_id: str
    num_sharing: int
    offloaded_layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., worker_id: _Optional[str] = ..., stage_index: _Optional[int] = ..., num_stages: _Optional[int] = ..., first_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., next_worker_id: _Optional[str] = ..., num_sharing: _Optional[int] = ..., offloaded_layers: _Optional[_Iterable[int]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape", "num_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    num_bytes: int
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., num_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class FileHint(_message.Message):
    __slots__ = ("path", "num_bytes", "hub_repo", "hub_revision", "hub_filename")
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HUB_REPO_FIELD_NUMBER: _ClassVar[int]
    HUB_REVISION_FIELD_NUMBER: _ClassVar[int]
    HUB_FILENAME_FIELD_NUMBER: _ClassVar[int]
    path: str
    num_bytes: int
    hub_repo: str
    hub_revision: str
    hub_filename: str
    def __init__(self, path: _Optional[str] = ..., num_bytes: _Optional[int] = ..., hub_repo: _Optional[str] = ..., hub_revision: _Optional[str] = ..., hub_filename: _Optional[str] = ...) -> None: ...

class LoadBegin(_message.Message):
    __slots__ = ("assignment", "model_config", "dtype", "num_tensors", "tensors", "file_hints", "next_address", "master_id")
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_CONFIG_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_TENSORS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FILE_HINTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MASTER_ID_FIELD_NUMBER: _ClassVar[int]
    assignment: StageAssignment
    model_config: str
    dtype: DType
    num_tensors: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    file_hints: _containers.RepeatedCompositeFieldContainer[FileHint]
    next_address: str
    master_id: str
    def __init__(self, assignment: _Optional[_Union[StageAssignment, _Mapping]] = ..., model_config: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., num_tensors: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., file_hints: _Optional[_Iterable[_Union[FileHint, _Mapping]]] = ..., next_address: _Optional[str] = ..., master_id: _Optional[str] = ...) -> None: ...

class MoreTensors(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ...) -> None: ...

class WeightChunk(_message.Message):
    __slots__ = ("sha256", "offset", "data")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    offset: int
    data: bytes
    def __init__(self, sha256: _Optional[bytes] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class LoadPart(_message.Message):
    __slots__ = ("begin", "more_tensors", "chunk", "end")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    MORE_TENSORS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    begin: LoadBegin
    more_tensors: MoreTensors
    chunk: WeightChunk
    end: StreamEnd
    def __init__(self, begin: _Optional[_Union[LoadBegin, _Mapping]] = ..., more_tensors: _Optional[_Union[MoreTensors, _Mapping]] = ..., chunk: _Optional[_Union[WeightChunk, _Mapping]] = ..., end: _Optional[_Union[StreamEnd, _Mapping]] = ...) -> None: ...

class WeightRequest(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    offset: int
    def __init__(self, sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class WeightsNeeded(_message.Message):
    __slots__ = ("requests", "bytes_from_disk", "bytes_from_cache")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_DISK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_CACHE_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[WeightRequest]
    bytes_from_disk: int
    bytes_from_cache: int
    def __init__(self, requests: _Optional[_Iterable[_Union[WeightRequest, _Mapping]]] = ..., bytes_from_disk: _Optional[int] = ..., bytes_from_cache: _Optional[int] = ...) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("phase", "done_bytes", "total_bytes")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    phase: LoadPhase
    done_bytes: int
    total_bytes: int
    def __init__(self, phase: _Optional[_Union[LoadPhase, str]] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class LoadDone(_message.Message):
    __slots__ = ("weight_bytes", "kv_bytes", "load_s")
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    weight_bytes: int
    kv_bytes: int
    load_s: float
    def __init__(self, weight_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., load_s: _Optional[float] = ...) -> None: ...

class LoadRefused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("needed", "progress", "done", "refused")
    NEEDED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    needed: WeightsNeeded
    progress: LoadProgress
    done: LoadDone
    refused: LoadRefused
    def __init__(self, needed: _Optional[_Union[WeightsNeeded, _Mapping]] = ..., progress: _Optional[_Union[LoadProgress, _Mapping]] = ..., done: _Optional[_Union[LoadDone, _Mapping]] = ..., refused: _Optional[_Union[LoadRefused, _Mapping]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerDescription(_message.Message):
    __slots__ = ("protocol_version", "package_version", "torch_version", "transformers_version", "host_id", "pid", "device", "device_name", "memory_total_bytes", "memory_available_bytes", "read_bandwidth", "matrix_rate", "num_threads", "last_epoch", "shared_memory_bytes", "in_use", "metrics_port", "offload", "offload_bytes", "offload_bandwidth", "num_ranks")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSFORMERS_VERSION_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    MATRIX_RATE_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    METRICS_PORT_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    package_version: str
    torch_version: str
    transformers_version: str
    host_id: str
    pid: int
    device: str
    device_name: str
    memory_total_bytes: int
    memory_available_bytes: int
    read_bandwidth: float
    matrix_rate: float
    num_threads: int
    last_epoch: int
    shared_memory_bytes: int
    in_use: bool
    metrics_port: int
    offload: str
    offload_bytes: int
    offload_bandwidth: float
    num_ranks: int
    def __init__(self, protocol_version: _Optional[int] = ..., package_version: _Optional[str] = ..., torch_version: _Optional[str] = ..., transformers_version: _Optional[str] = ..., host_id: _Optional[str] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., device_name: _Optional[str] = ..., memory_total_bytes: _Optional[int] = ..., memory_available_bytes: _Optional[int] = ..., read_bandwidth: _Optional[float] = ..., matrix_rate: _Optional[float] = ..., num_threads: _Optional[int] = ..., last_epoch: _Optional[int] = ..., shared_memory_bytes: _Optional[int] = ..., in_use: _Optional[bool] = ..., metrics_port: _Optional[int] = ..., offload: _Optional[str] = ..., offload_bytes: _Optional[int] = ..., offload_bandwidth: _Optional[float] = ..., num_ranks: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("traces_since",)
    TRACES_SINCE_FIELD_NUMBER: _ClassVar[int]
    traces_since: int
    def __init__(self, traces_since: _Optional[int] = ...) -> None: ...

class StepTiming(_message.Message):
    __slots__ = ("num_sequences", "num_tokens", "mean_s", "count", "concurrency")
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MEAN_S_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    num_sequences: int
    num_tokens: int
    mean_s: float
    count: int
    concurrency: int
    def __init__(self, num_sequences: _Optional[int] = ..., num_tokens: _Optional[int] = ..., mean_s: _Optional[float] = ..., count: _Optional[int] = ..., concurrency: _Optional[int] = ...) -> None: ...

class PhaseTimes(_message.Message):
    __slots__ = ("phase", "counts", "total_s")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    phase: StepPhase
    counts: _containers.RepeatedScalarFieldContainer[int]
    total_s: float
    def __init__(self, phase: _Optional[_Union[StepPhase, str]] = ..., counts: _Optional[_Iterable[int]] = ..., total_s: _Optional[float] = ...) -> None: ...

class StepTraces(_message.Message):
    __slots__ = ("epochs", "steps", "num_sequences", "num_tokens", "arrived_s", "started_s", "finished_s", "sent_s", "serialise_s", "bytes_in", "bytes_out")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_S_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    FINISHED_S_FIELD_NUMBER: _ClassVar[int]
    SENT_S_FIELD_NUMBER: _ClassVar[int]
    SERIALISE_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    epochs: _containers.RepeatedScalarFieldContainer[int]
    steps: _containers.RepeatedScalarFieldContainer[int]
    num_sequences: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    arrived_s: _containers.RepeatedScalarFieldContainer[float]
    started_s: _containers.RepeatedScalarFieldContainer[float]
    finished_s: _containers.RepeatedScalarFieldContainer[float]
    sent_s: _containers.RepeatedScalarFieldContainer[float]
    serialise_s: _containers.RepeatedScalarFieldContainer[float]
    bytes_in: _containers.RepeatedScalarFieldContainer[int]
    bytes_out: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epochs: _Optional[_Iterable[int]] = ..., steps: _Optional[_Iterable[int]] = ..., num_sequences: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., arrived_s: _Optional[_Iterable[float]] = ..., started_s: _Optional[_Iterable[float]] = ..., finished_s: _Optional[_Iterable[float]] = ..., sent_s: _Optional[_Iterable[float]] = ..., serialise_s: _Optional[_Iterable[float]] = ..., bytes_in: _Optional[_Iterable[int]] = ..., bytes_out: _Optional[_Iterable[int]] = ...) -> None: ...

class LinkReport(_message.Message):
    __slots__ = ("peer", "bytes_sent", "steps_sent", "round_trip_s")
    PEER_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    STEPS_SENT_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    peer: str
    bytes_sent: int
    steps_sent: int
    round_trip_s: float
    def __init__(self, peer: _Optional[str] = ..., bytes_sent: _Optional[int] = ..., steps_sent: _Optional[int] = ..., round_trip_s: _Optional[float] = ...) -> None: ...

class NamedCount(_message.Message):
    __slots__ = ("name", "count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    count: int
    def __init__(self, name: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class RankLoad(_message.Message):
    __slots__ = ("rank", "device", "device_name", "process_memory_bytes", "gpu_utilization", "gpu_memory_used_bytes", "gpu_memory_total_bytes", "gpu_temperature_c", "gpu_power_w")
    RANK_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    PROCESS_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_TEMPERATURE_C_FIELD_NUMBER: _ClassVar[int]
    GPU_POWER_W_FIELD_NUMBER: _ClassVar[int]
    rank: int
    device: str
    device_name: str
    process_memory_bytes: int
    gpu_utilization: float
    gpu_memory_used_bytes: int
    gpu_memory_total_bytes: int
    gpu_temperature_c: float
    gpu_power_w: float
    def __init__(self, rank: _Optional[int] = ..., device: _Optional[str] = ..., device_name: _Optional[str] = ..., process_memory_bytes: _Optional[int] = ..., gpu_utilization: _Optional[float] = ..., gpu_memory_used_bytes: _Optional[int] = ..., gpu_memory_total_bytes: _Optional[int] = ..., gpu_temperature_c: _Optional[float] = ..., gpu_power_w: _Optional[float] = ...) -> None: ...

class HeartbeatReport(_message.Message):
    __slots__ = ("timestamp", "epoch", "queue_depth", "steps_done", "busy_s", "uptime_s", "device", "device_name", "gpu_utilization", "gpu_memory_used_bytes", "gpu_memory_total_bytes", "cpu_utilization", "memory_used_bytes", "memory_total_bytes", "process_memory_bytes", "timings", "gpu_temperature_c", "gpu_power_w", "clock_received_s", "clock_sent_s", "weight_bytes", "kv_bytes", "traces", "next_trace", "phases", "link", "errors", "loaded_bytes", "offloaded_bytes", "offload_read_bytes", "offload_wait_s", "ranks")
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    STEPS_DONE_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    GPU_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    GPU_TEMPERATURE_C_FIELD_NUMBER: _ClassVar[int]
    GPU_POWER_W_FIELD_NUMBER: _ClassVar[int]
    CLOCK_RECEIVED_S_FIELD_NUMBER: _ClassVar[int]
    CLOCK_SENT_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRACES_FIELD_NUMBER: _ClassVar[int]
    NEXT_TRACE_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFLOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    timestamp: float
    epoch: int
    queue_depth: int
    steps_done: int
    busy_s: float
    uptime_s: float
    device: str
    device_name: str
    gpu_utilization: float
    gpu_memory_used_bytes: int
    gpu_memory_total_bytes: int
    cpu_utilization: float
    memory_used_bytes: int
    memory_total_bytes: int
    process_memory_bytes: int
    timings: _containers.RepeatedCompositeFieldContainer[StepTiming]
    gpu_temperature_c: float
    gpu_power_w: float
    clock_received_s: float
    clock_sent_s: float
    weight_bytes: int
    kv_bytes: int
    traces: StepTraces
    next_trace: int
    phases: _containers.RepeatedCompositeFieldContainer[PhaseTimes]
    link: LinkReport
    errors: _containers.RepeatedCompositeFieldContainer[NamedCount]
    loaded_bytes: _containers.RepeatedCompositeFieldContainer[NamedCount]
    offloaded_bytes: int
    offload_read_bytes: int
    offload_wait_s: float
    ranks: _containers.RepeatedCompositeFieldContainer[RankLoad]
    def __init__(self, timestamp: _Optional[float] = ..., epoch: _Optional[int] = ..., queue_depth: _Optional[int] = ..., steps_done: _Optional[int] = ..., busy_s: _Optional[float] = ..., uptime_s: _Optional[float] = ..., device: _Optional[str] = ..., device_name: _Optional[str] = ..., gpu_utilization: _Optional[float] = ..., gpu_memory_used_bytes: _Optional[int] = ..., gpu_memory_total_bytes: _Optional[int] = ..., cpu_utilization: _Optional[float] = ..., memory_used_bytes: _Optional[int] = ..., memory_total_bytes: _Optional[int] = ..., process_memory_bytes: _Optional[int] = ..., timings: _Optional[_Iterable[_Union[StepTiming, _Mapping]]] = ..., gpu_temperature_c: _Optional[float] = ..., gpu_power_w: _Optional[float] = ..., clock_received_s: _Optional[float] = ..., clock_sent_s: _Optional[float] = ..., weight_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., traces: _Optional[_Union[StepTraces, _Mapping]] = ..., next_trace: _Optional[int] = ..., phases: _Optional[_Iterable[_Union[PhaseTimes, _Mapping]]] = ..., link: _Optional[_Union[LinkReport, _Mapping]] = ..., errors: _Optional[_Iterable[_Union[NamedCount, _Mapping]]] = ..., loaded_bytes: _Optional[_Iterable[_Union[NamedCount, _Mapping]]] = ..., offloaded_bytes: _Optional[int] = ..., offload_read_bytes: _Optional[int] = ..., offload_wait_s: _Optional[float] = ..., ranks: _Optional[_Iterable[_Union[RankLoad, _Mapping]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ("data", "reply_bytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    reply_bytes: int
    def __init__(self, data: _Optional[bytes] = ..., reply_bytes: _Optional[int] = ...) -> None: ...

class PingReply(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class MeasureMachineRequest(_message.Message):
    __slots__ = ("dtype",)
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class MachineMeasures(_message.Message):
    __slots__ = ("dtype", "num_threads", "read_bandwidth", "matrix_rate", "disk_bandwidth")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    READ_BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    MATRIX_RATE_FIELD_NUMBER: _ClassVar[int]
    DISK_BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    num_threads: int
    read_bandwidth: float
    matrix_rate: float
    disk_bandwidth: float
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., num_threads: _Optional[int] = ..., read_bandwidth: _Optional[float] = ..., matrix_rate: _Optional[float] = ..., disk_bandwidth: _Optional[float] = ...) -> None: ...

class MeasureLinkRequest(_message.Message):
    __slots__ = ("address", "sizes")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    address: str
    sizes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, address: _Optional[str] = ..., sizes: _Optional[_Iterable[int]] = ...) -> None: ...

class Transfer(_message.Message):
    __slots__ = ("num_bytes", "seconds")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    seconds: float
    def __init__(self, num_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class LinkMeasures(_message.Message):
    __slots__ = ("round_trip_s", "transfers")
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    round_trip_s: float
    transfers: _containers.RepeatedCompositeFieldContainer[Transfer]
    def __init__(self, round_trip_s: _Optional[float] = ..., transfers: _Optional[_Iterable[_Union[Transfer, _Mapping]]] = ...) -> None: ...
