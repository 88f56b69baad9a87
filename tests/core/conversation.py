"""Words for scripted conversations with the core: short makers of events, and the way to a ready pipeline."""

from shardwright.core.effects import MasterEffect, SendStep
from shardwright.core.events import (
    Deploy,
    Heartbeat,
    PipelineOpened,
    StageLoaded,
    Submit,
    TokensSampled,
    WorkerJoined,
)
from shardwright.core.master import MasterState
from shardwright.core.settings import CoreSettings
from shardwright.types import (
    HeartbeatReport,
    LayerRange,
    ModelCosts,
    SamplingParams,
    SequenceSlice,
    StageAssignment,
    StepInput,
    StepTiming,
    StopConditions,
    TokenOut,
    WorkerCapacity,
)

GREEDY = SamplingParams()

COSTS = ModelCosts(
    name="tiny",
    hidden_size=8,
    layer_bytes=(1000,) * 4,
    layer_kv_bytes_per_token=(8,) * 4,
    embedding_bytes=500,
    head_bytes=500,
    tied_embedding=False,
    activation_bytes_per_token=16,
    max_context=32,
)


def settings(**changes: object) -> CoreSettings:
    """Blocks of 4 positions, 16 of them, 8 tokens a step."""
    values = {"block_size": 4, "token_budget": 8, "max_kv_tokens": 64, "min_kv_tokens": 4, "workspace_bytes": 0}
    return CoreSettings(**(values | changes))


def joined(
    worker_id: str, *, host_id: str = "", memory_bytes: int = 10**6, read_bandwidth: float = 1e9
) -> WorkerJoined:
    return WorkerJoined(
        capacity=WorkerCapacity(
            worker_id=worker_id,
            host_id=host_id or f"host of {worker_id}",
            device="cpu",
            memory_bytes=memory_bytes,
            read_bandwidth=read_bandwidth,
            matrix_rate=read_bandwidth,
        )
    )


def submit(seq_id: int, prompt: tuple[int, ...], *, new: int = 4, stop: tuple[int, ...] = ()) -> Submit:
    return Submit(
        seq_id=seq_id,
        prompt=prompt,
        sampling=GREEDY,
        stop=StopConditions(max_new_tokens=new, stop_token_ids=frozenset(stop)),
    )


def piece(
    seq_id: int, start: int, tokens: tuple[int, ...], table: tuple[int, ...], *, samples: bool = True
) -> SequenceSlice:
    return SequenceSlice(
        seq_id=seq_id,
        start_position=start,
        token_ids=tokens,
        block_table=table,
        sampling=GREEDY if samples else None,
    )


def send(number: int, *pieces: SequenceSlice, epoch: int = 1, worker_id: str = "a") -> SendStep:
    return SendStep(worker_id=worker_id, step=StepInput(epoch=epoch, step=number, slices=pieces))


def steps(effects: list[MasterEffect]) -> list[StepInput]:
    """The steps that are sent, in their order."""
    return [effect.step for effect in effects if isinstance(effect, SendStep)]


def sampled(number: int, *tokens: tuple[int, int], epoch: int = 1) -> TokensSampled:
    """Answer to a step: pairs of sequence and token."""
    outs = tuple(TokenOut(seq_id=seq_id, token_id=token, logprob=-1.0) for seq_id, token in tokens)
    return TokensSampled(epoch=epoch, step=number, tokens=outs)


def heartbeat(worker_id: str, *timings: StepTiming, epoch: int = 1) -> Heartbeat:
    report = HeartbeatReport(
        timestamp=0.0,
        epoch=epoch,
        queue_depth=0,
        steps_done=0,
        busy_s=0.0,
        uptime_s=0.0,
        device="cpu",
        device_name="",
        gpu_utilization=None,
        gpu_memory_used_bytes=None,
        gpu_memory_total_bytes=None,
        cpu_utilization=0.0,
        memory_used_bytes=0,
        memory_total_bytes=0,
        process_memory_bytes=0,
        timings=timings,
    )
    return Heartbeat(worker_id=worker_id, report=report)


def timing(num_sequences: int, mean_s: float) -> StepTiming:
    return StepTiming(num_sequences=num_sequences, num_tokens=num_sequences, mean_s=mean_s, count=9)


def assignment(
    *, epoch: int = 1, index: int = 0, of: int = 1, layers: tuple[int, int] = (0, 4), worker_id: str = "a"
) -> StageAssignment:
    return StageAssignment(
        epoch=epoch,
        worker_id=worker_id,
        stage_index=index,
        num_stages=of,
        layers=LayerRange(*layers),
        num_blocks=16,
        block_size=4,
        next_worker_id=None if index + 1 == of else "next",
    )


def tell(master: MasterState, *events: object, now: float = 0.0) -> list[MasterEffect]:
    """Hand the events over one after the other, check every invariant, and return the last one's effects."""
    effects: list[MasterEffect] = []
    for event in events:
        effects = master.handle(event, now)
        master.check()
    return effects


def bring_up(master: MasterState, *, epoch: int = 1, now: float = 0.0) -> list[MasterEffect]:
    """From AssignStage to PipelineReady: every placed worker loads, the links open, the probe comes back."""
    for stage in master.snapshot().stages:
        tell(master, StageLoaded(worker_id=stage.worker_id, epoch=epoch), now=now)
    return tell(master, PipelineOpened(epoch=epoch), sampled(1, (0, 9), epoch=epoch), now=now)


def ready_master(*worker_ids: str, costs: ModelCosts = COSTS, **changes: object) -> MasterState:
    """A master with a ready pipeline over these workers, each on a host of its own."""
    master = MasterState(settings(**changes), costs)
    tell(master, *(joined(worker_id) for worker_id in worker_ids or ("a",)), Deploy())
    bring_up(master)
    return master
