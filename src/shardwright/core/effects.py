"""All that the master's core and a worker's core may ask of their shells: two closed unions of frozen requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from shardwright.types import (
    Epoch,
    FinishReason,
    SeqId,
    StageAssignment,
    StepId,
    StepInput,
    TokenId,
    TokenScore,
    WorkerId,
)

# --- out of the master -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignStage:
    """Send a worker its stage and the weights that it lacks; answer with StageLoaded or StageLoadFailed."""

    assignment: StageAssignment


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseStage:
    """Tell a worker to drop its stage."""

    worker_id: WorkerId
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPipeline:
    """Every stage is loaded: open the step link to the first and the token stream of the last, then PipelineOpened."""

    epoch: Epoch
    stages: tuple[StageAssignment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosePipeline:
    """The epoch is over: close its links; what still comes from it is void."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineReady:
    """The pipeline takes steps from now on."""

    epoch: Epoch
    stages: tuple[StageAssignment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployFailed:
    """No pipeline could be made or kept. `reason` says why and what to do; every open request ends with an error."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SendStep:
    """Put a step on the link to the first stage."""

    worker_id: WorkerId
    step: StepInput


@dataclass(frozen=True, slots=True, kw_only=True)
class EmitToken:
    """Hand one more token to the request's client. `index` counts new tokens from 0, without gap or repeat."""

    seq_id: SeqId
    index: int
    token_id: TokenId
    logprob: float
    top: tuple[tuple[TokenId, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmitPromptScores:
    """Hand the request's client the scores of the next tokens of its prompt, in order, before any token."""

    seq_id: SeqId
    scores: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Tell the request's client that it is over; exactly once for each request."""

    seq_id: SeqId
    reason: FinishReason
    message: str = ""
    num_cached_tokens: int = 0  # prompt tokens whose K and V were reused at the first admission
    retry_after_s: float = 0.0  # on REJECTED: when the queue is likely to have room
    num_preemptions: int = 0  # times that it gave its blocks up on its way


MasterEffect: TypeAlias = (
    AssignStage
    | ReleaseStage
    | OpenPipeline
    | ClosePipeline
    | PipelineReady
    | DeployFailed
    | SendStep
    | EmitToken
    | EmitPromptScores
    | Finish
)

# --- out of a worker -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStage:
    """Build the stage (weights, KV blocks, link to the next worker); answer LoadFinished or LoadFailed."""

    assignment: StageAssignment


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadStage:
    """Drop the stage's weights and KV blocks and close its links.

    With `keep_weights` the LoadStage that follows is of the same part of the model: the weights may be kept for it.
    """

    epoch: Epoch
    keep_weights: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeStep:
    """Give the step to the compute thread; at most one is there at a time."""

    epoch: Epoch
    step: StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class AckStep:
    """Tell the sender that the step was taken off the queue: one credit back."""

    epoch: Epoch
    step: StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardStep:
    """Send the step's activation to the next stage."""

    epoch: Epoch
    step: StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishTokens:
    """Send the step's tokens to the master."""

    epoch: Epoch
    step: StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class DropStep:
    """Forget a step's tensors: its epoch is over, or the stage failed before it."""

    epoch: Epoch
    step: StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseStep:
    """Answer the sender that a step breaks the protocol (old or unknown epoch, a gap in the step numbers)."""

    epoch: Epoch
    step: StepId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFailure:
    """Tell the sender that this stage, or one behind it, failed at a step; it travels upstream to the master."""

    epoch: Epoch
    step: StepId
    reason: str


WorkerEffect: TypeAlias = (
    LoadStage
    | UnloadStage
    | ComputeStep
    | AckStep
    | ForwardStep
    | PublishTokens
    | DropStep
    | RefuseStep
    | ReportFailure
)
