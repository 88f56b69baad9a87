"""`plan` and `verify` from the shell's side."""

import contextlib
import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from shardwright.cli import plan as plan_module
from shardwright.core.placement import PlacementSettings, place
from shardwright.runtime.verify import Difference, Verdict
from shardwright.types import ModelCosts, WorkerCapacity

COSTS = ModelCosts(
    name="toy", hidden_size=8, layer_bytes=(2**20,) * 6, layer_kv_bytes_per_token=(64,) * 6, embedding_bytes=2**20,
    head_bytes=2**20, tied_embedding=False, activation_bytes_per_token=16, max_context=2048,
)  # fmt: skip
MODEL = SimpleNamespace(costs=COSTS, dtype="float32")


def worker(name, memory_bytes):
    return WorkerCapacity(
        worker_id=name, host_id=name, device="cpu", memory_bytes=memory_bytes, read_bandwidth=1e10, matrix_rate=1e11
    )


@pytest.fixture
def planned(monkeypatch):
    workers = [worker("big", 2**30), worker("small", 2**29), worker("tiny", 1000)]

    async def fake(config, *, local_workers, worker_options):
        return MODEL, {"small": 2}, place(COSTS, workers, PlacementSettings(max_kv_tokens=config.kv_tokens))

    monkeypatch.setattr(plan_module, "_plan", fake)


def test_a_plan_says_what_goes_where_and_why(run_cli, planned):
    outcome = run_cli("plan", "--model", "toy")
    assert outcome.code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    assert [row[1] for row in rows] == ["big", "small x 2"]
    assert rows[0][2].startswith("0-")
    assert rows[1][2].endswith("-5")
    assert "stage 0: " in outcome.out
    assert "not used: tiny: it can't hold even one layer" in outcome.out
    assert "toy, float32, 6 layers, 4096 KV blocks" in outcome.out


def test_a_plan_as_json_covers_every_layer_once(run_cli, planned):
    plan = json.loads(run_cli("plan", "--json", "--kv-tokens", "1600").out)
    stages = plan["stages"]
    assert [stages[0]["start"], stages[0]["end"], stages[-1]["end"]] == [0, stages[1]["start"], 6]
    assert plan["num_blocks"] == 100
    assert [stage["ranks"] for stage in stages] == [1, 2]
    assert [each["worker"] for each in plan["left_out"]] == ["tiny"]
    assert sum(stage["weight_bytes"] for stage in stages) == 8 * 2**20


def test_a_plan_shows_what_is_offloaded_and_what_that_costs(run_cli, planned, monkeypatch):
    capacity = WorkerCapacity(
        worker_id="small", host_id="h", device="cpu", memory_bytes=21 * 2**18, read_bandwidth=1e10, matrix_rate=1e11,
        offload="nvme", offload_bytes=2**30, offload_bandwidth=2**30,
    )  # fmt: skip
    limits = PlacementSettings(workspace_bytes=0, min_kv_tokens=16, max_kv_tokens=64)

    async def fake(config, *, local_workers, worker_options):
        return MODEL, {}, place(COSTS, [capacity], limits)

    monkeypatch.setattr(plan_module, "_plan", fake)
    out = run_cli("plan", "--model", "toy").out
    assert "offloaded MiB" in out
    assert "of its 6 layers" in out
    assert "on disk, since no placement fits in memory alone" in out
    assert "each step reads them at 1.07 GB/s" in out
    (stage,) = json.loads(run_cli("plan", "--json").out)["stages"]
    assert stage["offloaded_bytes"] == len(stage["offloaded_layers"]) * 2**20 > 0


def test_a_plan_without_workers_says_what_to_do(run_cli, tmp_path):
    outcome = run_cli("plan", "--model", tmp_path / "none")
    assert outcome.code == 2
    assert outcome.err.startswith("error: workers.json lists no worker; add one")


def test_a_model_that_is_not_there_is_told_before_workers_are_started(run_cli, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a worker was started")

    monkeypatch.setattr("shardwright.runtime.launcher.LocalWorkers", never)
    for command in (("plan",), ("generate", "hi")):
        outcome = run_cli(*command, "--model", tmp_path / "none", "--local-workers", "2", "--cache-dir", tmp_path)
        assert outcome.code == 2
        assert outcome.err.splitlines()[-1].startswith(f"error: {tmp_path / 'none'}: no file or folder")


def difference(margin):
    return Difference(index=7, split_token=5, whole_token=None, margin=margin, rounding=0.25)


def verdict(found=None):
    return Verdict(prompt=(1, 2), split_tokens=(3,) * 8, whole_tokens=(3,) * 8, difference=found)


@pytest.fixture
def verified(monkeypatch):
    seen = SimpleNamespace(verdicts=[verdict()], asked=None)

    async def fake(config, **asked):
        seen.asked = asked
        return MODEL, seen.verdicts

    monkeypatch.setattr("shardwright.runtime.verify.verify", fake)
    return seen


def test_identical_answers_are_called_so(run_cli, verified):
    outcome = run_cli("verify", "one", "two", "--stages", "4", "--max-new-tokens", "8")
    assert outcome.code == 0
    assert outcome.out == (
        "prompt 1: identical, 8 tokens after 2\ntoy in 4 stages, float32: identical to the whole model\n"
    )
    assert verified.asked["num_stages"] == 4
    assert list(verified.asked["prompts"]) == ["one", "two"]


def test_a_difference_is_an_error_that_says_where(run_cli, verified):
    verified.verdicts = [verdict(), verdict(difference(1.5))]
    outcome = run_cli("verify", "--stages", "9")
    assert outcome.code == 5
    assert "prompt 2: first differs at new token 7: split gives token 5, the whole model the end" in outcome.out
    assert "1.5 apart there, more than rounding (0.25)" in outcome.out
    assert outcome.err.splitlines()[-1] == "error: toy in 6 stages, float32: differs from the whole model on prompt 2"


def test_a_difference_within_rounding_is_told_but_passes(run_cli, verified):
    verified.verdicts = [verdict(), verdict(difference(0.125))]
    outcome = run_cli("verify")
    assert outcome.code == 0
    assert "0.125 apart there, within rounding (0.25)" in outcome.out
    assert outcome.out.endswith("the same within rounding as the whole model\n")


async def test_workers_come_from_the_registry_unless_local_ones_are_wanted(tmp_path, monkeypatch):
    """Local workers start while the model is looked at, and are stopped where it is no good."""
    from shardwright.cli.progress import StartProgress
    from shardwright.cli.start import model_and_workers
    from shardwright.config import MasterConfig
    from shardwright.errors import CheckpointError
    from shardwright.runtime.registry import Registry, WorkerEntry

    happened = []

    class FakeLocal:
        def __init__(self, count, *, options, keep):
            self.count = count
            happened.append((count, tuple(options)))

        async def start(self):
            happened.append("start")

        async def listening(self):
            return ["local"] * self.count

        async def stop(self):
            happened.append("stop")

    async def fake_open(config, _listener, *, with_tokenizer):
        happened.append(config.model)
        if config.model == "bad":
            raise CheckpointError("truncated")
        return config.model if with_tokenizer else f"{config.model} without a tokenizer"

    async def opened(config, **wish):
        async with contextlib.AsyncExitStack() as stack:
            return await model_and_workers(stack, config, StartProgress(Console(file=io.StringIO())), **wish)

    monkeypatch.setattr("shardwright.runtime.launcher.LocalWorkers", FakeLocal)
    monkeypatch.setattr("shardwright.runtime.session.open_model", fake_open)
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    monkeypatch.chdir(tmp_path)
    config = MasterConfig(registry=tmp_path / "workers.json", model="good")
    entry = WorkerEntry(username="w", ip="10.0.0.1", port=1)
    Registry(config.registry).add(entry)
    assert await opened(config, local_workers=0, options=()) == ("good", (entry,))
    assert happened == ["good"]
    happened.clear()
    assert await opened(config, local_workers=2, options=["--threads", "1"]) == ("good", ["local", "local"])
    assert happened == [(2, ("--threads", "1")), "start", "good", "stop"]
    plain = await opened(config, local_workers=0, options=(), with_tokenizer=False)
    assert plain == ("good without a tokenizer", (entry,))
    happened.clear()
    with pytest.raises(CheckpointError):
        await opened(MasterConfig(registry=config.registry, model="bad"), local_workers=1, options=())
    assert happened == [(1, ()), "start", "bad", "stop"]
