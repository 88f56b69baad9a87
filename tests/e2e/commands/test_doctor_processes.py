"""`shardwright doctor` as a real process with real workers, over gRPC; and what it leaves behind."""

import asyncio
import json

import pytest
from real_processes import port_of, processes_in, write_registry
from tiny_models import save_whole

from shardwright.transport.grpc import GrpcTransport


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_whole("qwen3", tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_registered_workers_are_examined_and_free_again(tiny, tmp_path):
    """Everything is measured, predicted and achieved; afterwards nobody holds a stage."""
    with processes_in(tmp_path) as processes:
        workers = [processes.worker("--cache-dir", tmp_path / f"cache{n}")[0] for n in (1, 2)]
        ports = [port_of(worker) for worker in workers]
        write_registry(tmp_path / "workers.json", ports)
        run = processes.run(
            "doctor", "--model", tiny.folder, "--cache-dir", tmp_path / "own", "--quick", "--json", "--sequences", 4,
            "--new-tokens", 16, "--prompt-tokens", 48,
        )  # fmt: skip
        assert run.wait() == 0, run.err
        content = json.loads(run.out)
        assert [worker["worker"] for worker in content["workers"]] == ["worker1", "worker2"]
        for worker in content["workers"]:
            assert worker["read_bandwidth"] > 1e8
            assert worker["matrix_rate"] > 1e8
            assert worker["layer_overheads"][0]["seconds"] > 0
        assert len(content["links"]) == 4
        assert all(0 < link["round_trip_s"] < 1 for link in content["links"])
        assert content["is_calibrated"]
        for kind in ("decode_one_tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s"):
            ratio = content["predicted"][kind] / content["achieved"][kind]
            assert 0.05 < ratio < 20, f"{kind}: the machine may be busy, but not so busy"
        assert content["sentences"]
        assert len(content["changes"]) <= 3
        assert "probing the stages" in run.err

        async def epochs():
            transport = GrpcTransport()
            found = []
            for port in ports:
                client = transport.connect(f"127.0.0.1:{port}")
                found.append((await client.heartbeat(timeout_s=10.0)).epoch)
                await client.close()
            return found

        assert asyncio.run(epochs()) == [0, 0]
