"""What the master's core costs for each token: `python bench/core_cost.py`. Prints microseconds of CPU, no shell.

Sequences with long contexts decode on a pipeline of two stages; only `handle(TokensSampled)` and `next_deadline` are
timed, as the shell calls them. The second part measures steps while as many requests wait as run, a third of them for
a prefix that another computes.
"""

import argparse
import time

from shardwright.core.effects import SendStep
from shardwright.core.events import Deploy, PipelineOpened, StageLoaded, Submit, TokensSampled, WorkerJoined
from shardwright.core.master import MasterState
from shardwright.core.settings import CoreSettings
from shardwright.types import ModelCosts, SamplingParams, StepInput, StopConditions, TokenOut, WorkerCapacity

COSTS = ModelCosts(
    name="bench",
    hidden_size=8,
    layer_bytes=(1000,) * 4,
    layer_kv_bytes_per_token=(8,) * 4,
    embedding_bytes=500,
    head_bytes=500,
    tied_embedding=False,
    activation_bytes_per_token=16,
    max_context=10**6,
)


def ready_master(settings: CoreSettings) -> tuple[MasterState, list[StepInput]]:
    """A master whose pipeline took its first probe, and the steps that are on their way."""
    master = MasterState(settings, COSTS)
    for name in ("a", "b"):
        capacity = WorkerCapacity(
            worker_id=name, host_id=name, device="cpu", memory_bytes=10**9, read_bandwidth=1e9, matrix_rate=1e9
        )
        master.handle(WorkerJoined(capacity=capacity), 0.0)
    master.handle(Deploy(), 0.0)
    for name in ("a", "b"):
        master.handle(StageLoaded(worker_id=name, epoch=1), 0.0)
    return master, sent(master.handle(PipelineOpened(epoch=1), 0.0))


def sent(effects: list) -> list[StepInput]:
    """The steps among these effects."""
    return [effect.step for effect in effects if isinstance(effect, SendStep)]


def answer(step: StepInput) -> TokensSampled:
    """One token for each slice that asks for one."""
    tokens = tuple(TokenOut(seq_id=s.seq_id, token_id=7, logprob=-1.0) for s in step.slices if s.sampling is not None)
    return TokensSampled(epoch=step.epoch, step=step.step, tokens=tokens)


def measure(*, num_running: int, context: int, num_waiting: int, steps_in_flight: int | None, num_steps: int) -> float:
    """Microseconds of CPU for each token."""
    settings = CoreSettings(
        max_running=num_running,
        max_kv_tokens=num_running * (context + 4 * num_steps + 64),
        max_steps_in_flight=steps_in_flight,
        token_budget=512,
        probe_interval_s=5.0,
        max_waiting=10_000,
    )
    master, in_flight = ready_master(settings)
    for seq_id in range(1, num_running + num_waiting + 1):
        shared = seq_id % 3 == 0
        start = 0 if shared else 1000 * seq_id
        submit = Submit(
            seq_id=seq_id,
            prompt=tuple(range(start, start + context)),
            sampling=SamplingParams(),
            stop=StopConditions(max_new_tokens=10**5),
            timeout_s=10**6,
        )
        in_flight += sent(master.handle(submit, 0.0))
    now = 0.0
    done = tokens = 0
    spent = 0.0
    while done < num_steps:
        event = answer(in_flight.pop(0))
        is_decoding = all(step.num_tokens == len(step.slices) for step in in_flight)
        now += 0.01
        began = time.process_time()
        effects = master.handle(event, now)
        master.next_deadline()
        took = time.process_time() - began
        if is_decoding and event.tokens and master.snapshot().num_running == num_running:
            spent += took
            done += 1
            tokens += len(event.tokens)
        in_flight += sent(effects)
    return 1e6 * spent / tokens


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="steps to measure for each line")
    arguments = parser.parse_args()
    print(f"{'running':>8} {'context':>8} {'waiting':>8} {'in flight':>10} {'us/token':>9}")
    for num_running, context, num_waiting, steps in (
        (1, 2000, 0, 1),
        (8, 2000, 0, 2),
        (32, 100, 0, 1),
        (32, 2000, 0, 1),
        (32, 2000, 0, 4),
        (32, 2000, 0, None),
        (32, 2000, 200, 1),
        (64, 4000, 1000, 2),
    ):
        cost = measure(
            num_running=num_running,
            context=context,
            num_waiting=num_waiting,
            steps_in_flight=steps,
            num_steps=arguments.steps,
        )
        print(f"{num_running:8} {context:8} {num_waiting:8} {steps or 'chosen':>10} {cost:9.1f}")


if __name__ == "__main__":
    main()
