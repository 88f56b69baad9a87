"""A whole cluster in one process and no time: the real cores, fake stages, and a network with bad manners.

One seed is one story: random workers, limits, prompts with shared beginnings, several answers to one prompt, penalties
and rules, scores of prompts, deadlines, a bounded queue, aborts, link delays, steps that fail, workers that die, fall
silent, come back or join late. Messages keep their order on one link and overtake each other across links. After each
event every invariant of the cores is checked; at each end of a request its tokens and scores are compared with what
the whole "model" answers to the prompt alone.
"""

import heapq
import random  # noqa: TID251  the story is drawn from a seed
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fake_stage import VOCABULARY, FakeStage, expected_answer, expected_scores

from shardwright.core import effects as out
from shardwright.core import events as ev
from shardwright.core.cluster import WorkerStatus
from shardwright.core.master import MasterState
from shardwright.core.settings import CoreSettings
from shardwright.core.worker import StagePhase, WorkerState
from shardwright.types import (
    FinishReason,
    HeartbeatReport,
    ModelCosts,
    PromptScores,
    SamplingParams,
    StageAssignment,
    StepInput,
    StepTiming,
    StopConditions,
    TokenOut,
    TokenRules,
    TokenScore,
    WorkerCapacity,
)

MAX_EVENTS = 30_000
HEARTBEAT_INTERVAL_S = 1.0
HEARTBEAT_TIMEOUT_S = 3.0


@dataclass(slots=True)
class Client:
    """One request as its client sees it."""

    submit: ev.Submit
    expected: list[int]
    expected_scores: list[TokenScore]
    submitted_at: float
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish: out.Finish | None = None
    aborted: bool = False


class SimulatedWorker:
    """A worker's shell: the real core, a fake stage, and the tensors that wait."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused_until = 0.0
        self.begin()

    def begin(self) -> None:
        """A fresh process."""
        self.state = WorkerState()
        self.stage: FakeStage | None = None
        self.stage_epoch = 0
        self.computing: tuple[int, int] | None = None
        self.steps: dict[tuple[int, int], tuple[StepInput, tuple[int, ...]]] = {}
        self.answers: dict[tuple[int, int], tuple[tuple[TokenOut, ...], tuple[PromptScores, ...]]] = {}
        self.timings: list[StepTiming] = []


class Simulation:
    """One seed's story; `run` plays it to its end and raises AssertionError where something is wrong."""

    def __init__(self, seed: int, *, master_class: type[MasterState] = MasterState) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.trace: list[tuple[float, str, list]] = []
        self.counts: Counter[str] = Counter()
        self._heap: list[tuple[float, int, SimulatedWorker | None, Callable, tuple]] = []
        self._pushed = 0
        self._links: dict[tuple, float] = {}
        self._link_delays: dict[tuple, float] = {}
        self._tick_at: float | None = None
        self._oldest: tuple[int, int] | None = None  # of the open sequences: its id, and how often it was preempted
        self._make_cluster(master_class)
        self._make_requests()
        self._make_faults()

    # --- the story, drawn before it begins -----------------------------------------------------------

    def _make_cluster(self, master_class: type[MasterState]) -> None:
        rng = self.rng
        block_size = rng.choice((1, 2, 4, 4, 8))
        num_blocks = rng.randint(24 // block_size, rng.choice((40, 60, 200)) // block_size)
        self.recover = rng.random() < 0.75
        self.settings = CoreSettings(
            block_size=block_size,
            token_budget=rng.choice((1, 3, 8, 16, 64, 64)),
            max_running=rng.choice((1, 3, 16, 16)),
            max_kv_tokens=block_size * num_blocks,
            min_kv_tokens=min(16, block_size * num_blocks),
            workspace_bytes=0,
            prefix_cache=rng.random() < 0.8,
            max_steps_in_flight=rng.choice((None, 1, 2, 3, 5)),
            heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S,
            load_timeout_s=60.0,
            recover=self.recover,
            max_redeploys=rng.choice((0, 2, 8)),
            max_waiting=rng.choice((1, 4, 8)) if rng.random() < 0.2 else None,
            probe_interval_s=rng.choice((0.05, 0.5)) if rng.random() < 0.5 else None,
            prompt_logprob_tokens=rng.choice((1, 4, 64)),
            gather_s=rng.choice((0.0, 0.002, 0.05)),
        )
        num_layers = rng.randint(2, 5)
        costs = ModelCosts(
            name="fake",
            hidden_size=1,
            layer_bytes=(1000,) * num_layers,
            layer_kv_bytes_per_token=(8,) * num_layers,
            embedding_bytes=500,
            head_bytes=500,
            tied_embedding=rng.random() < 0.5,
            activation_bytes_per_token=8,
            max_context=rng.choice((40, 64, 100)),
        )
        self.max_context = costs.max_context
        self.master = master_class(self.settings, costs)
        self.workers = {
            f"w{index}": SimulatedWorker(f"w{index}") for index in range(rng.choice((1, 2, 3, num_layers + 1)))
        }
        hosts = rng.randint(1, len(self.workers))
        self.capacities = {
            name: WorkerCapacity(
                worker_id=name,
                host_id=f"h{index % hosts}",
                device="cpu",
                memory_bytes=rng.choice((8_000, 20_000, 100_000)),
                read_bandwidth=1e6 * rng.randint(1, 4),
                matrix_rate=1e9,
                link_delay_s=rng.choice((0.0, 0.01)),
            )
            for index, name in enumerate(self.workers)
        }
        self.compute_s = rng.choice((0.001, 0.01, 0.05))
        self.jitter_s = rng.choice((0.001, 0.02, 0.2))
        self.answer_delay_s = rng.choice((0.0, 0.0, 0.0, 0.4))  # more than a new pipeline may need to begin
        self.num_blocks = 0  # of the newest pipeline, for sequences
        self.named_blocks: set[int] = set()  # those that any sequence of this pipeline had in its table
        self.faults = 0  # what may excuse an error
        self.redeploys_left = 1
        self.closed: list[int] = []
        late = rng.random() < 0.2
        for index, name in enumerate(self.workers):
            joins_at = rng.uniform(1.0, 4.0) if late and index == len(self.workers) - 1 and index else 0.0
            self._at(joins_at, self._join, name)
            self._at(joins_at + HEARTBEAT_INTERVAL_S * rng.random(), self._heartbeat, name)
        self._at(rng.choice((0.0, 0.1)), self._tell_master, ev.Deploy())

    def _make_requests(self) -> None:
        rng = self.rng
        stems = [tuple(rng.randrange(VOCABULARY) for _ in range(30)) for _ in range(2)]
        self.clients: dict[int, Client] = {}
        most = rng.randint(2, 13)
        has_pause = rng.random() < 0.3  # the pipeline is idle for a while, with prefixes in its blocks
        while len(self.clients) < most:
            length = rng.choice((0, rng.randint(90, 120))) if rng.random() < 0.05 else rng.randint(1, 30)
            shared = rng.randint(0, length) if rng.random() < 0.6 else 0
            stem = rng.choice(stems)[:shared]
            prompt = stem + tuple(rng.randrange(VOCABULARY) for _ in range(length - len(stem)))
            submitted_at = rng.choice((0.0, rng.uniform(0.0, 1.5)))
            if has_pause and rng.random() < 0.5:
                submitted_at = rng.uniform(3.0, 6.0)
                if self.clients and rng.random() < 0.5:  # what was said before, and more
                    prompt = (self.clients[rng.randint(1, len(self.clients))].submit.prompt + prompt)[:30]
            for _ in range(rng.choice((1, 1, 1, 2, 4))):  # answers to the one prompt
                self._make_client(prompt, submitted_at)
        self.unfinished = len(self.clients)

    def _make_client(self, prompt: tuple[int, ...], submitted_at: float) -> None:
        rng = self.rng
        seq_id = len(self.clients) + 1
        has_rules = rng.random() < 0.25
        submit = ev.Submit(
            seq_id=seq_id,
            prompt=prompt,
            sampling=SamplingParams(
                temperature=1.0,
                seed=rng.choice((0, 0, 7)),
                frequency_penalty=rng.choice((0.0, 0.0, 0.0, 0.5)),
                num_top_logprobs=rng.choice((0, 0, 2)),
            ),
            stop=StopConditions(
                max_new_tokens=rng.randint(1, 20),
                stop_token_ids=frozenset(rng.sample(range(VOCABULARY), 2)) if rng.random() < 0.4 else frozenset(),
            ),
            rules=TokenRules(
                logit_bias=((rng.randrange(VOCABULARY), 1.0),) if has_rules else (),
                min_new_tokens=rng.randint(0, 8) if has_rules else 0,
            ),
            num_prompt_logprobs=rng.randint(0, 2) if rng.random() < 0.2 else None,
            timeout_s=rng.expovariate(1.0) if rng.random() < 0.15 else None,
        )
        expected = expected_answer(submit) if prompt else []
        self.clients[seq_id] = Client(submit, expected, expected_scores(submit), submitted_at)
        self._at(submitted_at, self._submit, seq_id)
        if rng.random() < 0.2:
            self._at(submitted_at + rng.expovariate(2.0), self._abort, seq_id)

    def _make_faults(self) -> None:
        rng = self.rng
        self.failing_step = rng.randint(1, 60) if rng.random() < 0.15 else 0
        self.failing_load = rng.randint(1, 6) if rng.random() < 0.06 else 0
        if rng.random() < 0.6:
            return
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(list(self.workers))
            at = rng.uniform(0.3, 4.0)
            if rng.random() < 0.6:
                self._at(at, self._kill, name)
            else:
                self._at(at, self._pause, name)

    # --- time ----------------------------------------------------------------------------------------

    def _at(self, when: float, call: Callable, *args: object, worker: SimulatedWorker | None = None) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (when, self._pushed, worker, call, args))

    def _send(self, link: tuple, call: Callable, *args: object, worker: SimulatedWorker | None = None) -> None:
        """Deliver after the link's delay, in the order of sending on this link."""
        base = self._link_delays.get(link)
        if base is None:
            base = self._link_delays[link] = self.rng.random() * self.jitter_s
        when = max(self._links.get(link, 0.0), self.now + base + self.rng.random() * self.jitter_s)
        self._links[link] = when
        self._at(when, call, *args, worker=worker)

    def _send_unordered(self, call: Callable, *args: object, worker: SimulatedWorker | None = None) -> None:
        self._at(self.now + self.rng.random() * 2 * self.jitter_s, call, *args, worker=worker)

    def run(self) -> None:
        """Play the story until every request is over and the last message has arrived."""
        heap = self._heap
        for _ in range(MAX_EVENTS):
            if not heap:
                break
            when, _, worker, call, args = heapq.heappop(heap)
            if worker is not None:
                if not worker.alive:
                    continue
                if worker.paused_until > when:  # a process that stands still takes nothing in
                    self._at(worker.paused_until, call, *args, worker=worker)
                    continue
            self.now = when
            call(*args)
        else:
            stuck = [seq_id for seq_id, client in self.clients.items() if client.finish is None]
            raise AssertionError(f"still going at {self.now:.1f} s; requests {stuck} are open")
        self._check_end()

    # --- the master's shell --------------------------------------------------------------------------

    def _tell_master(self, event: ev.MasterEvent) -> None:
        effects = self.master.handle(event, self.now)
        self.master.check()
        self._check_fairness()
        if effects:
            self.trace.append((self.now, "master", effects))
        if self.unfinished and isinstance(
            event, ev.TokensSampled
        ):  # the stages here are honest: no answer of theirs is a fault
            assert not any(isinstance(effect, out.ClosePipeline) for effect in effects), (event, effects)
        for effect in effects:
            self._MASTER_EFFECTS[type(effect)](self, effect)
        deadline = self.master.next_deadline()
        if deadline is not None and (self._tick_at is None or deadline < self._tick_at):
            self._tick_at = deadline
            self._at(deadline, self._tick)

    def _tick(self) -> None:
        self._tick_at = None
        if self.unfinished:
            self._tell_master(ev.Tick())

    def _on_assign(self, effect: out.AssignStage) -> None:
        assignment = effect.assignment
        worker = self.workers[assignment.worker_id]
        if assignment.stage_index == 0:
            self.num_blocks = assignment.num_blocks - (self.settings.probe_interval_s is not None)
            self.counts["pipelines"] += 1
            self.named_blocks.clear()
        if worker.alive:
            self._send_unordered(self._tell_worker, worker, ev.Assigned(assignment=assignment), worker=worker)
        else:
            lost = ev.WorkerLost(worker_id=worker.name, reason="connection refused")
            self._send_unordered(self._tell_master, lost)

    def _on_release(self, effect: out.ReleaseStage) -> None:
        worker = self.workers[effect.worker_id]
        self._send_unordered(self._tell_worker, worker, ev.Released(epoch=effect.epoch), worker=worker)

    def _on_open(self, effect: out.OpenPipeline) -> None:
        self._send_unordered(self._tell_master, ev.PipelineOpened(epoch=effect.epoch))

    def _on_send_step(self, effect: out.SendStep) -> None:
        self.counts["steps"] += 1
        worker = self.workers[effect.worker_id]
        snapshot = self.master.snapshot()
        assert effect.step.epoch == snapshot.epoch, f"{effect} in epoch {snapshot.epoch}"
        assert effect.step.epoch not in self.closed, f"{effect} after its pipeline was closed"
        assert effect.worker_id == snapshot.stages[0].worker_id
        assert all(worker.status == "ready" for worker in snapshot.workers if worker.layers is not None)
        self.counts["tokens computed"] += effect.step.num_tokens
        for part in effect.step.slices:
            if part.seq_id:
                self.named_blocks.update(part.block_table)
            elif effect.step.step > 1:
                self.counts["probes"] += 1
                assert self.named_blocks.isdisjoint(part.block_table), f"{part} is a probe in a sequence's block"
        self._send(("steps", worker.name, effect.step.epoch), self._arrive, worker, effect.step, (), worker=worker)

    def _on_emit(self, effect: out.EmitToken) -> None:
        client = self.clients[effect.seq_id]
        assert client.finish is None, f"{effect} after {client.finish}"
        assert effect.index == len(client.tokens), f"{effect} after {len(client.tokens)} tokens"
        client.tokens.append(effect.token_id)
        num_top = client.submit.sampling.num_top_logprobs
        assert len(effect.top) == num_top, effect

    def _on_emit_scores(self, effect: out.EmitPromptScores) -> None:
        client = self.clients[effect.seq_id]
        assert client.finish is None, f"{effect} after {client.finish}"
        assert not client.tokens, f"{effect} after {len(client.tokens)} tokens"
        client.scores += effect.scores
        self.counts["prompt scores"] += len(effect.scores)

    def _on_finish(self, effect: out.Finish) -> None:
        client = self.clients[effect.seq_id]
        assert client.finish is None, f"{effect} after {client.finish}"
        client.finish = effect
        self.unfinished -= 1
        self._check_answer(client, effect)

    def _on_deploy_failed(self, effect: out.DeployFailed) -> None:
        assert effect.reason
        if self.redeploys_left:
            self.redeploys_left -= 1
            self._at(self.now + 0.5, self._tell_master, ev.Deploy())

    def _on_close(self, effect: out.ClosePipeline) -> None:
        """What is on its way still arrives: the cores have to know better."""
        assert effect.epoch not in self.closed
        self.closed.append(effect.epoch)

    def _nothing(self, effect: object) -> None:
        pass

    _MASTER_EFFECTS: dict[type, Callable] = {  # noqa: RUF012  never written to
        out.AssignStage: _on_assign,
        out.ReleaseStage: _on_release,
        out.OpenPipeline: _on_open,
        out.ClosePipeline: _on_close,
        out.PipelineReady: _nothing,
        out.DeployFailed: _on_deploy_failed,
        out.SendStep: _on_send_step,
        out.EmitToken: _on_emit,
        out.EmitPromptScores: _on_emit_scores,
        out.Finish: _on_finish,
    }

    # --- a worker's shell ----------------------------------------------------------------------------

    def _tell_worker(self, worker: SimulatedWorker, event: ev.WorkerEvent) -> list[out.WorkerEffect]:
        effects = worker.state.handle(event, self.now)
        worker.state.check()
        if effects:
            self.trace.append((self.now, worker.name, effects))
        link_lost = isinstance(event, ev.NextLinkLost)
        for effect in effects:
            self._do_for_worker(worker, effect, link_lost=link_lost)
        return effects

    def _do_for_worker(self, worker: SimulatedWorker, effect: out.WorkerEffect, *, link_lost: bool) -> None:
        match effect:
            case out.LoadStage():
                assert worker.computing is None
                self._at(self.now + self.rng.uniform(0.01, 0.5), self._load, worker, effect.assignment, worker=worker)
            case out.UnloadStage():
                assert worker.computing is None, "a stage was unloaded under the compute thread"
                assert worker.stage_epoch == effect.epoch
                worker.stage = None
                worker.stage_epoch = 0
            case out.ComputeStep():
                assert worker.computing is None, "two steps on one compute thread"
                worker.computing = (effect.epoch, effect.step)
                duration = self.compute_s * self.rng.uniform(0.5, 1.5)
                self._at(self.now + duration, self._compute, worker, duration, worker=worker)
            case out.AckStep():
                assert worker.computing == (effect.epoch, effect.step)
            case out.ForwardStep():
                step, activation = worker.steps.pop((effect.epoch, effect.step))
                following = self.workers[worker.state.assignment.next_worker_id]
                link = ("steps", following.name, effect.epoch)
                self._send(link, self._arrive, following, step, activation, worker=following)
                if not following.alive and self.rng.random() < 0.7:
                    self._send(link, self._lose_link, worker, effect.epoch, worker=worker)
            case out.PublishTokens():
                del worker.steps[effect.epoch, effect.step]
                tokens, scores = worker.answers.pop((effect.epoch, effect.step))
                event = ev.TokensSampled(epoch=effect.epoch, step=effect.step, tokens=tokens, prompt_scores=scores)
                link = ("tokens", worker.name, effect.epoch)
                self._at(self.now + self.answer_delay_s, self._send, link, self._tell_master, event)
            case out.DropStep():
                worker.steps.pop((effect.epoch, effect.step), None)
                worker.answers.pop((effect.epoch, effect.step), None)
            case out.RefuseStep() | out.ReportFailure():
                if link_lost:
                    lost = worker.state.assignment.next_worker_id
                    event = ev.WorkerLost(worker_id=lost, reason=f"{worker.name}: {effect.reason}")
                else:
                    event = ev.StepFailed(
                        epoch=effect.epoch, step=effect.step, worker_id=worker.name, reason=effect.reason
                    )
                self._send(("trouble", worker.name), self._tell_master, event)

    def _load(self, worker: SimulatedWorker, assignment: StageAssignment) -> None:
        epoch = assignment.epoch
        self.counts["loads"] += 1
        if self.counts["loads"] == self.failing_load:
            self.faults += 1
            worker.stage = None
            worker.stage_epoch = 0
            self._tell_worker(worker, ev.LoadFailed(epoch=epoch, reason="no such tensor"))
            failed = ev.StageLoadFailed(worker_id=worker.name, epoch=epoch, reason="no such tensor")
            self._send_unordered(self._tell_master, failed)
            return
        worker.stage = FakeStage(assignment.num_blocks, assignment.block_size, max_running=self.settings.max_running)
        worker.stage_epoch = epoch
        self._tell_worker(worker, ev.LoadFinished(epoch=epoch))
        if worker.state.epoch == epoch and worker.state.phase is StagePhase.READY:
            self._send_unordered(self._tell_master, ev.StageLoaded(worker_id=worker.name, epoch=epoch))

    def _arrive(self, worker: SimulatedWorker, step: StepInput, activation: tuple[int, ...]) -> None:
        key = (step.epoch, step.step)
        fresh = key not in worker.steps
        worker.steps.setdefault(key, (step, activation))
        effects = self._tell_worker(worker, ev.StepArrived(epoch=step.epoch, step=step.step))
        if fresh and any(isinstance(effect, out.RefuseStep) for effect in effects):
            del worker.steps[key]

    def _compute(self, worker: SimulatedWorker, duration: float) -> None:
        epoch, number = worker.computing
        worker.computing = None
        assert worker.stage is not None, "a step was computed without a stage"
        assert worker.stage_epoch == epoch
        self.counts["computed"] += 1
        if self.counts["computed"] == self.failing_step:
            self.faults += 1
            self._tell_worker(worker, ev.StepErrored(epoch=epoch, step=number, reason="out of memory"))
            return
        step, activation = worker.steps[epoch, number]
        activation = worker.stage.compute(step, activation)
        worker.steps[epoch, number] = (step, activation)
        assignment = worker.state.assignment
        if assignment is not None and assignment.is_last:
            worker.answers[epoch, number] = worker.stage.sample(step, activation)
        worker.timings.append(
            StepTiming(
                num_sequences=len(step.slices),
                num_tokens=step.num_tokens,
                mean_s=duration,
                count=2,
                concurrency=min(step.steps_in_flight, 2),
            )
        )
        self._tell_worker(worker, ev.StepComputed(epoch=epoch, step=number))

    def _lose_link(self, worker: SimulatedWorker, epoch: int) -> None:
        self._tell_worker(worker, ev.NextLinkLost(epoch=epoch, reason="the stream broke"))

    # --- clients, heartbeats, faults -----------------------------------------------------------------

    def _submit(self, seq_id: int) -> None:
        self._tell_master(self.clients[seq_id].submit)

    def _abort(self, seq_id: int) -> None:
        self.clients[seq_id].aborted = True
        self._tell_master(ev.Abort(seq_id=seq_id))

    def _join(self, name: str) -> None:
        if self.workers[name].alive:
            self._tell_master(ev.WorkerJoined(capacity=self.capacities[name]))

    def _heartbeat(self, name: str) -> None:
        """The master asks, a worker that runs answers, and a worker that was lost introduces itself again."""
        if not self.unfinished:
            return
        self._at(self.now + HEARTBEAT_INTERVAL_S, self._heartbeat, name)
        worker = self.workers[name]
        if worker.alive:
            self._send_unordered(self._answer_heartbeat, worker, worker=worker)
        else:
            self._send_unordered(self._miss_heartbeat, name)

    def _miss_heartbeat(self, name: str) -> None:
        """Silence means loss only to a worker that was heard; of another the shell says that nobody answers."""
        known = self.master._cluster.workers.get(name)
        if known is not None and known.status is not WorkerStatus.LOST and known.last_heard_s is None:
            self._tell_master(ev.WorkerLost(worker_id=name, reason="no answer to the first heartbeat"))

    def _answer_heartbeat(self, worker: SimulatedWorker) -> None:
        known = self.master._cluster.workers.get(worker.name)
        if known is None or known.status is WorkerStatus.LOST:
            self._send_unordered(self._join, worker.name)
            return
        report = HeartbeatReport(
            timestamp=self.now,
            epoch=worker.state.epoch,
            queue_depth=worker.state.queue_depth,
            steps_done=0,
            busy_s=0.0,
            uptime_s=0.0,
            device="cpu",
            device_name="fake",
            gpu_utilization=None,
            gpu_memory_used_bytes=None,
            gpu_memory_total_bytes=None,
            cpu_utilization=0.0,
            memory_used_bytes=0,
            memory_total_bytes=0,
            process_memory_bytes=0,
            timings=tuple(worker.timings),
        )
        worker.timings.clear()
        self._send(("heartbeat", worker.name), self._tell_master, ev.Heartbeat(worker_id=worker.name, report=report))

    def _kill(self, name: str) -> None:
        worker = self.workers[name]
        if not worker.alive:
            return
        self.faults += 1
        self.counts["killed"] += 1
        worker.alive = False
        if self.rng.random() < 0.5:  # else its silence tells
            lost = ev.WorkerLost(worker_id=name, reason="connection reset")
            self._send_unordered(self._tell_master, lost)
        if self.rng.random() < 0.5:
            self._at(self.now + self.rng.uniform(0.5, 5.0), self._start_again, worker)

    def _start_again(self, worker: SimulatedWorker) -> None:
        # A new process: what was sent to the old one is gone, what is sent late still comes.
        self._heap[:] = [entry for entry in self._heap if entry[2] is not worker or entry[3] == self._tell_worker]
        heapq.heapify(self._heap)
        worker.alive = True
        worker.begin()
        self._tell_master(ev.WorkerJoined(capacity=self.capacities[worker.name]))

    def _pause(self, name: str) -> None:
        worker = self.workers[name]
        self.faults += 1
        self.counts["paused"] += 1
        worker.paused_until = self.now + self.rng.uniform(0.5, 2.5 * HEARTBEAT_TIMEOUT_S)

    # --- what must be true ---------------------------------------------------------------------------

    def _check_fairness(self) -> None:
        """Who came first of all that are open keeps its blocks: so everybody is first some day, and gets done."""
        oldest = min(self.master._open.values(), key=lambda sequence: sequence.seq_id, default=None)
        now = None if oldest is None else (oldest.seq_id, oldest.num_preemptions)
        if now is not None and self._oldest is not None and now[0] == self._oldest[0]:
            assert now == self._oldest, f"sequence {now[0]} came first and was preempted"
        self._oldest = now

    def _check_answer(self, client: Client, finish: out.Finish) -> None:
        submit = client.submit
        num_prompt = len(submit.prompt)
        tokens = client.tokens
        capacity = self.num_blocks * self.settings.block_size
        self.counts[finish.reason.value] += 1
        assert tokens == client.expected[: len(tokens)], f"{finish}: {tokens} is not the beginning of {client.expected}"
        scores = client.scores
        assert scores == client.expected_scores[: len(scores)], f"{finish}: wrong scores {scores}"
        assert len(scores) == len(client.expected_scores) or not tokens, f"{finish}: {len(scores)} scores"
        if submit.timeout_s is not None:
            deadline = client.submitted_at + submit.timeout_s
            assert self.now <= deadline, f"{finish}: its deadline was {deadline}"
            assert self.now == deadline or finish.reason is not FinishReason.DEADLINE, finish
        match finish.reason:
            case FinishReason.STOP:
                assert tokens == client.expected
                assert tokens[-1] in submit.stop.stop_token_ids
            case FinishReason.LENGTH:
                limit = min(self.max_context, capacity)
                assert len(tokens) == submit.stop.max_new_tokens or num_prompt + len(tokens) >= limit, finish
                assert not tokens or tokens[-1] not in submit.stop.stop_token_ids
            case FinishReason.ABORT:
                assert client.aborted
            case FinishReason.DEADLINE:
                assert submit.timeout_s is not None
                assert finish.message
            case FinishReason.REJECTED:
                assert self.settings.max_waiting is not None
                assert 1 <= finish.retry_after_s <= 60, finish
            case FinishReason.ERROR:
                assert finish.message
                never = not num_prompt or num_prompt > self.max_context or num_prompt > capacity
                placeable = "fits" not in finish.message  # too little memory is this story's, not a fault
                assert never or self.faults or not placeable, finish

    def _check_end(self) -> None:
        assert not self.unfinished, f"{self.unfinished} requests never ended"
        snapshot = self.master.snapshot()
        assert snapshot.num_running == 0
        assert snapshot.num_waiting == 0
        assert snapshot.num_steps_in_flight == 0 or self.faults, "a step never came back"
        if snapshot.num_steps_in_flight == 0:
            assert snapshot.num_free_blocks == snapshot.num_blocks, snapshot
        assert sum(count for _, count in snapshot.finished) == len(self.clients)
        for worker in self.workers.values():
            assert worker.state.queue_depth == 0 or not worker.alive, worker.name
        self.counts["preemptions"] += snapshot.total_preemptions
        assert snapshot.total_cached_tokens <= snapshot.total_prompt_tokens
        self.counts["cached tokens"] += snapshot.total_cached_tokens
        self.counts["output tokens"] += snapshot.total_output_tokens


def play(seed: int, *, master_class: type[MasterState] = MasterState) -> Simulation:
    """Play one seed twice: it must end well, and both times alike."""
    simulation = Simulation(seed, master_class=master_class)
    again = Simulation(seed, master_class=master_class)
    try:
        simulation.run()
        again.run()
    except (AssertionError, KeyError, IndexError) as exc:
        raise AssertionError(f"seed {seed}, {simulation.now:.3f} s: {type(exc).__name__}: {exc}") from exc
    assert simulation.trace == again.trace, f"seed {seed}: two runs differ"
    return simulation
