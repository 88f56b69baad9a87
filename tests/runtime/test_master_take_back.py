"""A master asks a lost worker again and again, and uses it when it can: what it held is of an epoch that is over.

Workers compute nothing, but are spoken to over a network, which can be cut and mended.
"""

import asyncio
import contextlib
import functools
import logging
from dataclasses import dataclass, field, replace

import pytest
from fake_pipeline import COSTS, REPORT, FakePipeline

from shardwright.core.master import MasterState
from shardwright.core.settings import CoreSettings
from shardwright.engine import FinishEvent
from shardwright.runtime.master import MasterEngine
from shardwright.runtime.session import _introduce
from shardwright.transport.memory import MemoryTransport
from shardwright.types import GREEDY, PROTOCOL_VERSION, FinishReason, StopConditions, WorkerDescription
from shardwright.wire.messages import LoadDone

NAMES = ("a", "b")
HEARTBEAT_INTERVAL_S = 0.02


@dataclass
class FakeService:
    """A worker as its master reaches it; its part of the pipeline is told beforehand."""

    pipeline: FakePipeline
    description: WorkerDescription
    held: list[int] = field(default_factory=list)  # epochs of stages that it was given and not told to drop
    released: list[int] = field(default_factory=list)
    num_describes: int = 0

    async def describe(self):
        self.num_describes += 1
        return self.description

    async def heartbeat(self, traces_since=None):
        return replace(REPORT, epoch=max(self.held, default=0))

    async def release(self, epoch):
        self.released.append(epoch)
        if epoch in self.held:
            self.held.remove(epoch)

    def process_layers(self, incoming):
        return self.pipeline.answer_steps(incoming)

    def tokens(self, epoch):
        return self.pipeline.results()


class Cluster:
    """A master over two such workers."""

    def __init__(self, engine, network, services, addresses, pipeline):
        self.engine = engine
        self.network = network
        self.services = services
        self.addresses = addresses
        self.pipeline = pipeline

    def cut(self, name):
        self.network.cut(self.addresses[name])

    async def lose(self, name):
        """Cut a worker off, and wait until the master has noticed."""
        self.cut(name)
        await until(lambda: self.status(name) == "lost")

    def mend(self, name):
        self.network.mend(self.addresses[name])

    def status(self, name):
        return next(each.status for each in self.engine.snapshot().workers if each.worker_id == name)

    def stages(self):
        return [stage.worker_id for stage in self.engine.snapshot().stages]

    async def asked(self, name, times):
        """Wait until a worker was asked so often from now on who it is."""
        before = self.services[name].num_describes
        await until(lambda: self.services[name].num_describes >= before + times)

    async def answer(self, prompt, count):
        _, reader = await self.engine.submit(prompt, GREEDY, StopConditions(max_new_tokens=count))
        return await answer_of(reader)


async def answer_of(reader):
    *tokens, end = [event async for event in reader]
    assert isinstance(end, FinishEvent)
    assert end.reason is FinishReason.LENGTH, end.message
    return [token.token_id for token in tokens]


async def until(condition):
    async with asyncio.timeout(20.0):
        while not condition():  # noqa: ASYNC110  a snapshot announces itself to nobody
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def two_workers(*, missing=(), **settings):
    """A deployed master; what is `missing` can't be reached yet."""
    network, pipeline = MemoryTransport(), FakePipeline()
    description = WorkerDescription(
        protocol_version=PROTOCOL_VERSION, package_version="1", torch_version="2", transformers_version="5",
        host_id="", pid=1, device="cpu", device_name="", memory_total_bytes=10**6, memory_available_bytes=10**6,
        read_bandwidth=1e9, matrix_rate=1e9, num_threads=1,
    )  # fmt: skip
    services = {name: FakeService(pipeline, replace(description, host_id=name)) for name in NAMES}
    listeners = {name: await network.serve("127.0.0.1:0", service) for name, service in services.items()}
    addresses = {name: listener.address for name, listener in listeners.items()}
    for name in missing:
        network.cut(addresses[name])
    clients = {name: network.connect(address) for name, address in addresses.items()}

    async def load(assignment, client):
        await client.describe(timeout_s=5.0)  # a worker that can't be reached can't be given a stage
        services[assignment.worker_id].held.append(assignment.epoch)
        return LoadDone(weight_bytes=1, kv_bytes=1, load_s=0.0)

    values = {"block_size": 4, "token_budget": 64, "max_kv_tokens": 1024, "min_kv_tokens": 4, "workspace_bytes": 0}
    engine = MasterEngine(
        MasterState(CoreSettings(**values, recover=True, retry_after_s=0.05, **settings), COSTS),
        clients,
        load,
        heartbeat_interval_s=HEARTBEAT_INTERVAL_S,
        heartbeat_timeout_s=10.0,
        introduce=functools.partial(_introduce, timeout_s=5.0),
    )
    async with engine:
        await engine.deploy(tuple(services[name].description.capacity(name) for name in NAMES if name not in missing))
        yield Cluster(engine, network, services, addresses, pipeline)
    for client in clients.values():
        await client.close()
    for listener in listeners.values():
        await listener.close(grace_s=0.0)


async def test_a_lost_worker_that_is_there_again_is_a_spare_without_its_old_stage():
    async with two_workers() as cluster:
        victim = cluster.stages()[-1]
        lost = cluster.services[victim]
        [old_epoch] = lost.held
        cluster.pipeline.open_.clear()
        _, reader = await cluster.engine.submit((5,), GREEDY, StopConditions(max_new_tokens=30))
        await cluster.lose(victim)
        cluster.pipeline.open_.set()
        assert await answer_of(reader) == [6 + index for index in range(30)], "on the worker that is left"
        assert victim not in cluster.stages()
        assert lost.held == [old_epoch], "it could not be told"
        cluster.mend(victim)
        await until(lambda: cluster.status(victim) == "joining")
        assert (lost.held, lost.released) == ([], [old_epoch])
        assert await cluster.answer((9,), 3) == [10, 11, 12]


async def test_a_worker_is_lost_and_taken_back_any_number_of_times():
    async with two_workers() as cluster:
        for _ in range(3):
            victim = cluster.stages()[0]
            await cluster.lose(victim)
            await until(cluster.engine.is_ready)
            cluster.mend(victim)
            await until(lambda victim=victim: cluster.status(victim) == "joining")
            assert await cluster.answer((9,), 3) == [10, 11, 12]
        assert cluster.engine.snapshot().total_recoveries == 3


async def test_why_a_worker_can_not_be_used_is_logged_once_however_often_it_is_asked(caplog):
    caplog.set_level(logging.INFO, logger="shardwright.runtime.master")

    def reasons():
        return [record.getMessage() for record in caplog.records if "can't be used" in record.getMessage()]

    async with two_workers() as cluster:
        victim = cluster.stages()[-1]
        cluster.cut(victim)
        await until(lambda: len(reasons()) == 1)
        await asyncio.sleep(5 * HEARTBEAT_INTERVAL_S)
        assert len(reasons()) == 1
        assert "the network is cut" in reasons()[0]
        cluster.services[victim].description = replace(cluster.services[victim].description, in_use=True)
        cluster.mend(victim)
        await until(lambda: len(reasons()) == 2)
        assert "is serving another master" in reasons()[1]


async def test_a_worker_that_serves_another_master_is_left_alone_until_it_is_free():
    async with two_workers() as cluster:
        victim = cluster.stages()[-1]
        lost = cluster.services[victim]
        await cluster.lose(victim)
        lost.description = replace(lost.description, in_use=True)
        cluster.mend(victim)
        await cluster.asked(victim, 3)
        assert cluster.status(victim) == "lost"
        assert lost.released == [], "it may be the other master's stage"
        lost.description = replace(lost.description, in_use=False)
        await until(lambda: cluster.status(victim) == "joining")


async def test_a_worker_of_another_version_is_not_taken_back():
    async with two_workers() as cluster:
        victim = cluster.stages()[-1]
        lost = cluster.services[victim]
        await cluster.lose(victim)
        lost.description = replace(lost.description, protocol_version=PROTOCOL_VERSION + 1)
        cluster.mend(victim)
        await cluster.asked(victim, 3)
        assert cluster.status(victim) == "lost"


async def test_a_worker_that_was_not_there_at_the_start_joins_when_it_is():
    async with two_workers(missing=("b",)) as cluster:
        assert cluster.stages() == ["a"]
        cluster.mend("b")
        await until(lambda: cluster.engine.snapshot().workers[-1].worker_id == "b")
        assert cluster.status("b") == "joining"
        assert cluster.services["b"].released == [], "it was never given a stage"
        cluster.cut("a")
        await until(lambda: cluster.stages() == ["b"] and cluster.engine.is_ready())
        assert await cluster.answer((9,), 3) == [10, 11, 12]


@pytest.mark.parametrize("last_epoch", [1, 40])
async def test_with_all_workers_lost_the_model_is_placed_again_once_one_is_back_in_an_epoch_that_it_has_not_seen(
    last_epoch,
):
    async with two_workers() as cluster:
        for name in NAMES:
            cluster.cut(name)
        await until(lambda: [cluster.status(name) for name in NAMES] == ["lost", "lost"])
        assert not cluster.engine.is_ready()
        back = cluster.services["a"]
        back.description = replace(back.description, last_epoch=last_epoch)
        cluster.mend("a")
        await until(cluster.engine.is_ready)
        assert cluster.stages() == ["a"]
        assert cluster.engine.snapshot().epoch > last_epoch
        assert await cluster.answer((9,), 3) == [10, 11, 12]
