"""What travels between master and workers, as plain values: the meaning of each protobuf message.

The codec turns these into protobuf and back and checks limits on the way in; transports carry them. Tensor
data is any bytes-like object and is never copied here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from shardwright.types import Epoch, PromptScores, StageLoad, StepId, StepInput, TokenOut, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFrame:
    """One tensor's raw little-endian, row-major bytes with what is needed to check and view them."""

    name: str  # "hidden", or what else travels beside the activation
    dtype: str  # float32, bfloat16, float16, int64, int32
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMessage:
    """A step on a link: what to compute, and the previous stage's activation (none towards the first stage)."""

    step: StepInput
    tensors: tuple[TensorFrame, ...] = ()
    encoded_step: bytes | None = field(default=None, compare=False, repr=False)
    """`step` as it came, so that the next stage can get it without being encoded again; of this very step only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAck:
    """This step and all before it were taken off the receiver's queue: as many credits back to the sender."""

    epoch: Epoch
    step: StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrouble:
    """A step was refused or failed at `worker_id` or behind it; passed upstream until it reaches the master."""

    epoch: Epoch
    step: StepId
    worker_id: WorkerId
    reason: str
    link_lost: bool = False  # the link to the stage behind `worker_id` broke


StepReply: TypeAlias = StepAck | StepTrouble


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A step's end at the last stage: the tokens it sampled, in the step's order."""

    epoch: Epoch
    step: StepId
    tokens: tuple[TokenOut, ...]
    prompt_scores: tuple[PromptScores, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """The answer to the unary `ProcessLayer`: this stage's activation, or tokens and scores if it is the last stage."""

    tensors: tuple[TensorFrame, ...] = ()
    tokens: tuple[TokenOut, ...] = ()
    prompt_scores: tuple[PromptScores, ...] = ()


# --- InitializeWorker, master to worker --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBegin:
    """First message of the call: the stage, and every tensor of it by content."""

    load: StageLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChunk:
    """Bytes `offset` to `offset + len(data)` of the tensor whose content hash is `sha256`; in order for each tensor."""

    sha256: str
    offset: int
    data: bytes | bytearray | memoryview


LoadMessage: TypeAlias = LoadBegin | WeightChunk

# --- InitializeWorker, worker to master --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRequest:
    """The worker lacks this tensor from `offset` on (what came before an earlier connection broke is kept)."""

    sha256: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsNeeded:
    """What the worker found neither in its cache nor in a file of its own; empty when nothing has to be sent."""

    requests: tuple[WeightRequest, ...]
    bytes_from_disk: int  # found in files on the worker
    bytes_from_cache: int  # found in the worker's tensor cache


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far the stage is: `phase` is `receive`, `build` or `warm-up`."""

    phase: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDone:
    """The stage is ready. Sizes are of what the worker holds in memory now."""

    weight_bytes: int
    kv_bytes: int
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRefused:
    """The stage can't be built; the worker is alive and holds no stage."""

    reason: str


LoadReply: TypeAlias = WeightsNeeded | LoadProgress | LoadDone | LoadRefused
