"""All that may happen to the master's core and to a worker's core: two closed unions of frozen facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from shardwright.types import (
    NO_RULES,
    Epoch,
    HeartbeatReport,
    PromptScores,
    SamplingParams,
    SeqId,
    StageAssignment,
    StepId,
    StopConditions,
    TokenId,
    TokenOut,
    TokenRules,
    WorkerCapacity,
    WorkerId,
)

# --- into the master -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A client's request. `seq_id` is new; the shell numbers them upwards."""

    seq_id: SeqId
    prompt: tuple[TokenId, ...]
    sampling: SamplingParams
    stop: StopConditions
    rules: TokenRules = NO_RULES
    num_prompt_logprobs: int | None = None  # set: score the prompt's tokens, with so many alternatives each
    timeout_s: float | None = None  # from now to its last token; then it finishes with DEADLINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """The client gave up. Unknown and finished ids are ignored."""

    seq_id: SeqId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    """A worker answered `Describe`; it may be placed from now on."""

    capacity: WorkerCapacity
    last_epoch: Epoch = 0  # the newest that it has heard of: the next pipeline's is above it


@dataclass(frozen=True, slots=True, kw_only=True)
class Deploy:
    """Place the model over the workers that have joined, under a new epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoaded:
    """A worker holds its stage's weights and KV blocks, verified."""

    worker_id: WorkerId
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoadFailed:
    """A worker could not build its stage, but is alive."""

    worker_id: WorkerId
    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOpened:
    """The shell holds the step link to the first stage and the token stream of the last."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A worker answered a heartbeat."""

    worker_id: WorkerId
    report: HeartbeatReport


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """A stream to or between workers broke, or a worker's process is known to be gone."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensSampled:
    """The last stage finished a step. `tokens` has one entry for each slice that asked for one, in the step's order."""

    epoch: Epoch
    step: StepId
    tokens: tuple[TokenOut, ...]
    prompt_scores: tuple[PromptScores, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """A stage could not compute a step; the stage's KV content is no longer known."""

    epoch: Epoch
    step: StepId
    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Nothing but time passed; sent when `next_deadline` is reached."""


MasterEvent: TypeAlias = (
    Submit
    | Abort
    | WorkerJoined
    | Deploy
    | StageLoaded
    | StageLoadFailed
    | PipelineOpened
    | Heartbeat
    | WorkerLost
    | TokensSampled
    | StepFailed
    | Tick
)

# --- into a worker ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """The master gives this worker a stage; a newer epoch replaces an older one."""

    assignment: StageAssignment


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFinished:
    """The compute side has built the stage."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """The compute side could not build the stage."""

    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArrived:
    """A step came from the master or the previous stage. Its tensors wait in the shell under (epoch, step)."""

    epoch: Epoch
    step: StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class StepComputed:
    """The compute thread finished a step; the result waits in the shell under (epoch, step)."""

    epoch: Epoch
    step: StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class StepErrored:
    """The compute thread raised on a step."""

    epoch: Epoch
    step: StepId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NextLinkLost:
    """The stream to the next stage broke."""

    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The master gives the stage up; steps of that epoch and older are void."""

    epoch: Epoch


WorkerEvent: TypeAlias = (
    Assigned | LoadFinished | LoadFailed | StepArrived | StepComputed | StepErrored | NextLinkLost | Released
)
