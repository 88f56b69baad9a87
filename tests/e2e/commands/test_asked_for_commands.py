"""The commands by their asked-for names, from the repository's root, as real processes; and what they leave behind."""

import asyncio
import json
import socket
from pathlib import Path

import pytest
import torch
from real_processes import ROOT, eventually, port_of, processes_in, write_registry
from stage_loads import open_weights, whole_stage
from tiny_models import save_whole
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shardwright.runtime.metrics import CLUSTER_FIELDS, DOCUMENT_FIELDS, ROW_FIELDS, WORKER_FIELDS
from shardwright.runtime.weight_sender import send_stage
from shardwright.transport.grpc import GrpcTransport

WORDS = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, 151))]
PROMPT = "w5 w17 w3 w99"
PROMPT_IDS = [5, 17, 3, 99]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model with a tokenizer of its own: token n is the word `wn`."""
    whole = save_whole("qwen3", tmp_path_factory.mktemp("tiny"))
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=WORDS[2], pad_token=WORDS[0])
    tokenizer.save_pretrained(whole.folder)
    return whole


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with workers.json and two live workers that have a cache each."""
    folder = tmp_path_factory.mktemp("shop")
    with processes_in(folder) as processes:
        workers = [processes.worker("--cache-dir", folder / f"cache{n}")[0] for n in (1, 2)]
        processes.ports = [port_of(worker) for worker in workers]
        write_registry(folder / "workers.json", processes.ports)
        yield processes


@pytest.fixture
def processes(tmp_path):
    with processes_in(tmp_path) as started:
        yield started


def whole_answer(whole, count):
    """The whole model's greedy continuation of the prompt, up to its end token."""
    ids = torch.tensor([PROMPT_IDS])
    out = whole.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    return out[0, len(PROMPT_IDS) :].tolist()


def test_worker_node_says_its_port_and_nothing_else(processes):
    worker = processes.run("--port", 0, "--host", "127.0.0.1", program=[str(ROOT / "worker_node.py")])
    port = port_of(worker)
    assert worker.out == f"Worker node started on port {port}\n"
    assert worker.err == ""
    socket.create_connection(("127.0.0.1", port), timeout=10).close()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads a process's environment as Linux shows it")
def test_a_worker_computes_with_huge_pages_and_short_waiting_unless_told_otherwise(processes, monkeypatch):
    """The C library and OpenMP read these once: the process has to have been started with them."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    for name in ("GLIBC_TUNABLES", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    worker = processes.run("--port", 0, "--host", "127.0.0.1", program=[str(ROOT / "worker_node.py")])
    port_of(worker)
    environ = Path(f"/proc/{worker.process.pid}/environ").read_text().split("\0")
    assert {"GLIBC_TUNABLES=glibc.malloc.hugetlb=1", "KMP_BLOCKTIME=1", "GOMP_SPINCOUNT=7"} <= set(environ)


def test_worker_node_listens_on_the_default_port(processes):
    """Where another process has that port, it says so and ends."""
    worker = processes.run("--host", "127.0.0.1", program=[str(ROOT / "worker_node.py")])
    eventually(lambda: worker.out != "" or worker.process.poll() is not None, timeout_s=60.0)
    if worker.process.poll() is None:
        assert worker.out == "Worker node started on port 50051\n"
    else:
        assert worker.wait() == 3
        assert "127.0.0.1:50051: another process has the port" in worker.err


def test_registering_twice_gives_one_entry_and_an_unreachable_worker_a_warning(processes, shop, tmp_path):
    """The file is made where the command runs."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = closed.getsockname()[1]
        for port, name, warns in (
            (shop.ports[0], "worker1", False),
            (shop.ports[0], "worker1", False),
            (away, "w2", True),
        ):
            run = processes.run(
                "--register", "--ip", "127.0.0.1", "--username", name, "--port", port,
                program=[str(ROOT / "master_node.py")],
            )  # fmt: skip
            assert run.wait() == 0, run.err
            assert ("warning: it is registered, but there is" in run.err) is warns
    assert json.loads((tmp_path / "workers.json").read_text(encoding="utf-8")) == [
        {"username": "worker1", "ip": "127.0.0.1", "port": shop.ports[0]},
        {"username": "w2", "ip": "127.0.0.1", "port": away},
    ]


def test_master_node_generates_on_the_registered_workers(shop, tiny):
    """Prints the answer alone, streams metrics, and the second run sends and hashes nothing."""
    answer = " ".join(WORDS[token] for token in whole_answer(tiny, 12) if token != 2)
    cache = shop.folder / "master-cache"
    errors = []
    for _ in range(2):
        run = shop.run(
            "--generate", "--prompt", PROMPT, "--model", tiny.folder, "--max-length", len(PROMPT_IDS) + 12,
            program=[str(ROOT / "master_node.py")], SHARDWRIGHT_CACHE_DIR=str(cache),
        )  # fmt: skip
        assert run.wait() == 0, run.err
        assert run.out == answer + "\n"
        errors.append(run.err)
    assert "model: hash" in errors[0]
    assert "model: hash" not in errors[1]
    metrics = json.loads((shop.folder / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) == set(DOCUMENT_FIELDS)
    assert set(metrics["cluster"]) == set(CLUSTER_FIELDS)
    assert [set(row) for row in metrics["workers"]] == [set(WORKER_FIELDS)] * 2
    assert {row["worker"] for row in metrics["workers"]} == {"worker1", "worker2"}
    assert sum(metrics["cluster"]["requests_finished"].values()) == 1
    for row in metrics["workers"]:
        assert row["timestamp"] > 1.7e9
        assert 0 < row["memory_utilization"] <= 100
    assert {row["layers"] for row in metrics["workers"]} != {None}
    rows = [json.loads(line) for line in (shop.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {tuple(row) for row in rows} == {tuple(ROW_FIELDS)}
    assert {row["worker"] for row in rows} == {"worker1", "worker2"}
    assert len({row["timestamp"] for row in rows}) >= 2, "the second run went on with the first one's file"


def test_workers_tells_the_live_state(shop):
    run = shop.run("workers", "--json")
    assert run.wait() == 0
    listed = json.loads(run.out)
    assert [(each["username"], each["port"], each["alive"]) for each in listed] == [
        ("worker1", shop.ports[0], True),
        ("worker2", shop.ports[1], True),
    ]
    assert all(each["memory_available_bytes"] > 0 and each["device"] == "cpu" for each in listed)


def test_plan_loads_nothing(shop, tiny):
    """It shows where the layers would go; no worker holds a stage afterwards and no tensor was hashed or sent."""
    before = [path for path in shop.folder.rglob("*") if path.is_file()]
    epochs = [each["epoch"] for each in json.loads(_json_of(shop.run("workers", "--json")))]
    run = shop.run("plan", "--model", tiny.folder, "--json", SHARDWRIGHT_CACHE_DIR=str(shop.folder / "plan-cache"))
    assert run.wait() == 0, run.err
    plan = json.loads(run.out)
    assert plan["num_layers"] == 5
    stages = plan["stages"]
    assert [stages[0]["start"], stages[-1]["end"]] == [0, 5]
    assert {stage["worker"] for stage in stages} <= {"worker1", "worker2"}
    assert [each["epoch"] for each in json.loads(_json_of(shop.run("workers", "--json")))] == epochs
    assert [path for path in shop.folder.rglob("*") if path.is_file()] == before


def _json_of(run):
    assert run.wait() == 0, run.err
    return run.out


async def test_weights_and_kernels_of_a_worker_are_listed_and_cleared(processes, tiny, tmp_path):
    """Every tensor that came over the wire is there once under its hash, and gone after `cache clear`.

    So is the kernel that the worker compiled, where it found a compiler.
    """
    cache = tmp_path / "cache"
    [(worker, port)] = await asyncio.to_thread(processes.workers, 1, "--cache-dir", cache)
    load = whole_stage(tiny.folder, epoch=1, cache_dir=tmp_path / "master")
    client = GrpcTransport(max_frame_bytes=1 << 24).connect(f"127.0.0.1:{port}")
    done = await send_stage(client, load, open_weights(tiny.folder), lambda _: None)
    await client.close()
    assert done.weight_bytes > 0
    worker.process.kill()
    content = {spec.sha256: spec.num_bytes for spec in load.tensors}

    def run(*argv):
        return _json_of(processes.run("cache", *argv, "--cache-dir", cache))

    listed = json.loads(await asyncio.to_thread(run, "ls", "--json"))
    tensors = [each for each in listed if each["kind"] == "tensor"]
    kernels = [each for each in listed if each["kind"] == "kernel"]
    assert {each["sha256"]: each["num_bytes"] for each in tensors} == content
    assert not any(each["partial"] for each in tensors)
    files = {path.name: path.stat().st_size for path in (cache / "kernels").glob("product-*.so")}
    assert {each["name"]: each["num_bytes"] for each in kernels} == files
    cleared = await asyncio.to_thread(run, "clear")
    freed = sum(content.values()) + sum(files.values())
    assert cleared == f"{freed / 1024**2:.1f} MiB freed in {cache}\n"
    assert json.loads(await asyncio.to_thread(run, "ls", "--json")) == []
