"""What the command line's tests share: a way to run a command in an empty folder, and a session that needs no model."""

import asyncio
import contextlib
import socket
from dataclasses import dataclass, field

import pytest

from shardwright.cli.app import main
from shardwright.engine import FinishEvent, TokenEvent
from shardwright.errors import InvalidRequestError
from shardwright.types import (
    ClusterSnapshot,
    FinishReason,
    HeartbeatReport,
    LayerRange,
    StopConditions,
    WorkerSnapshot,
)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run_cli(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, in a folder of its own, and gives its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv, entry=main):
        code = entry([str(arg) for arg in argv])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@dataclass(frozen=True)
class FakeStage:
    stage: int
    worker: str
    start: int
    end: int
    weights_bytes: int = 3 * 1024 * 1024
    kv_blocks: int = 40


class FakeStream:
    """Gives each token's letter; `?` is half of a character and comes out with the next."""

    def __init__(self):
        self.held = ""

    def push(self, token):
        if token == FakeSession.HALF:
            self.held = "\N{SNOWMAN}"
            return ""
        held, self.held = self.held, ""
        return held + chr(token)

    def flush(self):
        return self.held


class FakeTokenizer:
    def stream(self):
        return FakeStream()


def report(busy_s, uptime_s, epoch=1):
    return HeartbeatReport(
        timestamp=0.0, epoch=epoch, queue_depth=0, steps_done=1, busy_s=busy_s, uptime_s=uptime_s, device="cpu",
        device_name="fake", gpu_utilization=None, gpu_memory_used_bytes=None, gpu_memory_total_bytes=None,
        cpu_utilization=10.0, memory_used_bytes=1, memory_total_bytes=2, process_memory_bytes=1,
    )  # fmt: skip


def snapshot(*reports):
    return ClusterSnapshot(
        epoch=1, ready=True, stages=(), num_blocks=40, num_free_blocks=40, num_waiting=0, num_running=0,
        num_steps_in_flight=0, max_steps_in_flight=1, total_prompt_tokens=0, total_cached_tokens=0,
        total_output_tokens=0, total_preemptions=0,
        workers=tuple(
            WorkerSnapshot(
                worker_id=f"worker{n}", status="READY", layers=LayerRange(n, n + 1), last_heard_s=0.0, report=each
            )
            for n, each in enumerate(reports)
        ),
    )  # fmt: skip


class FakeSession:
    """Answers with the prompt in upper case, token by token; a token is a character's number.

    A prompt that begins with `!` is refused, one with `~` fails after two tokens, one with `#` loses its stream.
    """

    HALF = 0x2603

    def __init__(self, *, tokenizer=True):
        self.tokenizer = FakeTokenizer() if tokenizer else None
        self.stages = [FakeStage(0, "worker0", 0, 2), FakeStage(1, "worker1", 2, 5)]
        self.submitted = []
        self.stops = []
        self.refreshed = 0
        self.engine = self

    def encode(self, prompt, *, chat):
        if self.tokenizer is None:
            raise InvalidRequestError("fake has no tokenizer; give token ids with --prompt-ids")
        return tuple(ord(c) for c in (f"<{prompt}>" if chat else prompt))

    def stop_conditions(self, *, max_new_tokens, ignore_eos):
        return StopConditions(max_new_tokens=max_new_tokens, stop_token_ids=frozenset() if ignore_eos else {0})

    async def submit(self, prompt, sampling, stop):
        if prompt[0] == ord("!"):
            raise InvalidRequestError("the prompt is longer\nthan the context")
        self.submitted.append((prompt, sampling))
        self.stops.append(stop)
        return len(self.submitted), self._events(prompt, stop)

    async def _events(self, prompt, stop):
        answer = [t if t == self.HALF else ord(chr(t).upper()) for t in prompt]
        for index, token in enumerate(answer[: stop.max_new_tokens]):
            await asyncio.sleep(0)
            if index == 2 and prompt[0] == ord("~"):
                yield FinishEvent(seq_id=1, reason=FinishReason.ERROR, message="worker1 is gone")
                return
            if index == 2 and prompt[0] == ord("#"):
                return
            yield TokenEvent(seq_id=1, index=index, token_id=token, logprob=-0.1)
        reason = FinishReason.LENGTH if len(answer) >= stop.max_new_tokens else FinishReason.STOP
        yield FinishEvent(seq_id=1, reason=reason, num_cached_tokens=1)

    async def refresh(self):
        self.refreshed += 1

    def snapshot(self):
        return snapshot(report(1.0 * self.refreshed, 2.0 * self.refreshed), None)


@dataclass
class FakeStart:
    """Stands in for `session_for`; remembers what a session was asked for."""

    session: FakeSession = field(default_factory=FakeSession)
    config: object = None
    local_workers: int = 0
    options: tuple = ()
    closed: bool = False

    @contextlib.asynccontextmanager
    async def __call__(self, config, *, local_workers, options=()):
        self.config, self.local_workers, self.options = config, local_workers, tuple(options)
        try:
            yield self.session
        finally:
            self.closed = True


@pytest.fixture
def fake_start(monkeypatch):
    start = FakeStart()
    monkeypatch.setattr("shardwright.cli.generate.session_for", start)
    return start


@pytest.fixture
def free_port():
    """A port of this machine's loopback that nothing listens on."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return closed.getsockname()[1]
