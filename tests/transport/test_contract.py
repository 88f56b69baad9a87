"""What every transport promises; see `transport/base.py`."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from transport_fakes import DESCRIPTION, LINK, MACHINE, REPORT, AnotherRoomsError, FakeWorker, make_load, make_step

from shardwright.errors import (
    AddressInUseError,
    ClusterError,
    ConfigError,
    FrameError,
    LinkLostError,
    ProtocolError,
    ShardwrightError,
    StageLoadError,
    StaleEpochError,
    WorkerUnreachableError,
)
from shardwright.types import PromptScores, TokenOut, TokenScore
from shardwright.wire.limits import MAX_PING_BYTES, MAX_TRANSFER_SIZES
from shardwright.wire.messages import (
    LayerResult,
    LoadBegin,
    LoadDone,
    LoadProgress,
    StepAck,
    StepResult,
    WeightChunk,
    WeightsNeeded,
)

T = 5.0


async def messages(*items):
    """An outgoing stream that ends after these."""
    for item in items:
        yield item


async def collect(iterator, then=lambda: None):
    """All that comes; `then` is called after each."""
    found = []
    async for item in iterator:
        found.append(item)
        then()
    return found


class Outgoing:
    """An outgoing stream that a test feeds, and that stays open until it is told to end."""

    def __init__(self):
        self._queue = asyncio.Queue()
        self.closed = False

    def put(self, item):
        self._queue.put_nowait(item)

    def end(self):
        self._queue.put_nowait(None)

    async def __aiter__(self):
        try:
            while (item := await self._queue.get()) is not None:
                yield item
        finally:
            self.closed = True


# --- unary calls ---------------------------------------------------------------------------------------------


async def test_description_report_and_release_arrive_as_they_were(net):
    assert await net.client.describe(timeout_s=T) == DESCRIPTION
    assert await net.client.heartbeat(timeout_s=T) == REPORT
    await net.client.release(12, timeout_s=T)
    assert net.worker.released == [12]


async def test_who_asks_for_traces_says_from_where_on(net):
    await net.client.heartbeat(timeout_s=T)
    await net.client.heartbeat(timeout_s=T, traces_since=0)
    await net.client.heartbeat(timeout_s=T, traces_since=2**63)
    assert net.worker.traces_since == [None, 0, 2**63]


async def test_a_ping_takes_and_brings_as_many_bytes_as_were_wished_for(net):
    sizes = [(0, 0), (8, 3), (5 << 20, 0), (0, 5 << 20), (MAX_PING_BYTES, MAX_PING_BYTES)]
    for there, back in sizes:
        data = bytes([7]) * there
        answer = await net.client.ping(data, reply_bytes=back, timeout_s=T)
        assert answer == bytes([back % 251]) * back
        assert net.worker.pings.pop() == (data, back)


@pytest.mark.parametrize(("num_bytes", "reply_bytes"), [(MAX_PING_BYTES + 1, 0), (0, MAX_PING_BYTES + 1), (0, -1)])
async def test_a_ping_that_is_too_large_is_never_sent(net, num_bytes, reply_bytes):
    with pytest.raises(ProtocolError, match="PingRequest"):
        await net.client.ping(bytes(num_bytes), reply_bytes=reply_bytes, timeout_s=T)
    assert net.worker.pings == []


async def test_an_answer_to_a_ping_has_as_many_bytes_as_were_wished_for(net):
    async def ping(data, reply_bytes):
        return data * (reply_bytes + 1)

    net.worker.ping = ping
    with pytest.raises(ProtocolError, match="4 bytes; 3 were asked for"):
        await net.client.ping(b"x", reply_bytes=3, timeout_s=T)


async def test_measurements_arrive_as_they_were(net):
    for dtype in ("float16", "bfloat16", "float32"):
        assert await net.client.measure_machine(dtype, timeout_s=T) == replace(MACHINE, dtype=dtype)
    assert await net.client.measure_link("[::1]:7", (0, 1 << 20), timeout_s=T) == LINK
    assert net.worker.measured == ["float16", "bfloat16", "float32", ("[::1]:7", (0, 1 << 20))]


async def test_what_can_not_be_measured_is_refused_before_it_is_sent(net):
    with pytest.raises(ProtocolError, match=r"'int64'.*choose one of float32, bfloat16, float16"):
        await net.client.measure_machine("int64", timeout_s=T)
    with pytest.raises(ProtocolError, match=f"sizes: 17, and {MAX_TRANSFER_SIZES} is the most"):
        await net.client.measure_link("127.0.0.1:1", (1,) * 17, timeout_s=T)
    with pytest.raises(ProtocolError, match=f"must lie between 0 and {MAX_PING_BYTES}"):
        await net.client.measure_link("127.0.0.1:1", (MAX_PING_BYTES + 1,), timeout_s=T)
    assert net.worker.measured == []


async def test_a_measurement_that_fails_says_why(net):
    net.worker.raises = WorkerUnreachableError("no answer from worker at 10.0.0.7:1")
    with pytest.raises(WorkerUnreachableError, match=r"10\.0\.0\.7:1"):
        await net.client.measure_link("10.0.0.7:1", (1,), timeout_s=T)


async def test_one_step_by_hand_gives_the_stages_result(net):
    message = make_step(1)
    result = await net.client.process_layer(message, timeout_s=T)
    assert result == LayerResult(tensors=message.tensors, tokens=(TokenOut(seq_id=9, token_id=5, logprob=-0.25),))
    assert net.worker.steps == [message]


async def test_a_step_by_hand_may_be_larger_than_grpcs_default_message(net):
    message = make_step(1, tensor_bytes=9 << 20)
    result = await net.client.process_layer(message, timeout_s=20)
    assert result.tensors == message.tensors


@pytest.mark.parametrize("kind", [StageLoadError, StaleEpochError, FrameError, ConfigError, ShardwrightError])
async def test_an_error_of_the_worker_is_raised_as_the_same_kind_with_its_message(net, kind):
    net.worker.raises = kind("layer 7: no such thing, ümlaut and all")
    with pytest.raises(kind, match="layer 7: no such thing, ümlaut and all") as caught:
        await net.client.describe(timeout_s=T)
    assert type(caught.value) is kind


async def test_an_error_of_an_unknown_kind_comes_as_its_nearest_known_ancestor(net):
    net.worker.raises = AnotherRoomsError("from elsewhere")
    with pytest.raises(ShardwrightError, match="from elsewhere") as caught:
        await net.client.heartbeat(timeout_s=T)
    assert type(caught.value) is ShardwrightError


async def test_a_very_long_error_still_arrives(net):
    net.worker.raises = ProtocolError("ü" * 100_000)
    with pytest.raises(ProtocolError, match="üüü"):
        await net.client.describe(timeout_s=T)


async def test_a_workers_bug_is_a_cluster_error_that_names_the_worker(net):
    net.worker.raises = ZeroDivisionError("oops")
    with pytest.raises(ClusterError, match=rf"worker at {net.client.address} failed.*oops"):
        await net.client.describe(timeout_s=T)


async def test_nobody_there_is_said_at_once(net):
    client = net.transport.connect("127.0.0.1:1")
    with pytest.raises(WorkerUnreachableError, match=r"no answer from worker at 127\.0\.0\.1:1.*shardwright worker"):
        await client.describe(timeout_s=T)
    with pytest.raises(WorkerUnreachableError):
        await anext(client.process_layers(messages(make_step(1))))
    with pytest.raises(WorkerUnreachableError):
        await anext(client.tokens(1))
    await client.close()


async def test_a_worker_that_does_not_answer_in_time_is_unreachable(net):
    net.worker.gate.clear()
    with pytest.raises(WorkerUnreachableError, match=r"within 0\.1 s"):
        await net.client.heartbeat(timeout_s=0.1)
    net.worker.gate.set()
    assert await net.client.heartbeat(timeout_s=T) == REPORT


@pytest.mark.parametrize("address", ["", "localhost", "host:", ":1", "1.2.3.4:port", "1.2.3.4:70000", "::1:50051"])
async def test_what_is_no_address_is_refused_by_name(net, address):
    with pytest.raises(ConfigError, match="address"):
        net.transport.connect(address)
    with pytest.raises(ConfigError, match="address"):
        await net.transport.serve(address, FakeWorker())


# --- loading -------------------------------------------------------------------------------------------------


async def test_weights_stream_in_chunks_while_answers_come_back(net):
    load = make_load(num_tensors=3, num_bytes=5 << 20)
    go_on = asyncio.Event()

    async def master():
        yield LoadBegin(load=load)
        await go_on.wait()  # the answer to the first message comes before anything else is sent
        for number, spec in enumerate(load.tensors):
            for offset in range(0, spec.num_bytes, 1 << 20):
                yield WeightChunk(sha256=spec.sha256, offset=offset, data=bytes([number]) * (1 << 20))

    replies = []
    async for reply in net.client.initialize_worker(master()):
        replies.append(reply)
        go_on.set()
    assert net.worker.loads == [load]
    assert isinstance(replies[0], WeightsNeeded)
    assert [request.sha256 for request in replies[0].requests] == [spec.sha256 for spec in load.tensors]
    received = [reply.done_bytes for reply in replies if isinstance(reply, LoadProgress) and reply.phase == "receive"]
    assert received == [count << 20 for count in range(1, 16)]
    assert replies[-1] == LoadDone(weight_bytes=15 << 20, kv_bytes=1, load_s=0.5)
    for number, spec in enumerate(load.tensors):
        assert net.worker.weights[spec.sha256] == bytes([number]) * spec.num_bytes


async def test_a_stage_may_have_more_tensors_than_one_message_holds(net):
    load = make_load(num_tensors=40_000)
    replies = [reply async for reply in net.client.initialize_worker(messages(LoadBegin(load=load)))]
    assert net.worker.loads == [load]
    assert len(replies[0].requests) == 40_000
    assert isinstance(replies[-1], LoadDone)


async def test_two_loads_at_once_do_not_mix(net):
    loads = [make_load(num_tensors=1, num_bytes=4 << 20) for _ in range(2)]

    async def load_one(load, fill):
        spec = load.tensors[0]
        chunks = [
            WeightChunk(sha256=f"{fill:064x}", offset=offset, data=bytes([fill]) * (1 << 19))
            for offset in range(0, spec.num_bytes, 1 << 19)
        ]
        return [reply async for reply in net.client.initialize_worker(messages(LoadBegin(load=load), *chunks))]

    first, second = await asyncio.gather(load_one(loads[0], 1), load_one(loads[1], 2))
    assert isinstance(first[-1], LoadDone)
    assert isinstance(second[-1], LoadDone)
    assert net.worker.weights == {f"{fill:064x}": bytes([fill]) * (4 << 20) for fill in (1, 2)}


async def test_an_error_at_load_reaches_the_master_as_it_is(net):
    net.worker.raises = StageLoadError("layer 3 does not fit: 9 GiB of 8")
    with pytest.raises(StageLoadError, match="layer 3 does not fit"):
        await collect(net.client.initialize_worker(messages(LoadBegin(load=make_load()))))


async def test_an_error_in_the_middle_of_a_load_reaches_a_master_that_is_sending(net):
    """The worker ends the call while weights are under way: the master learns why, not just that writing failed."""
    load = make_load(num_tensors=1, num_bytes=1 << 30)

    async def refuse(incoming):
        await anext(incoming)
        yield LoadProgress(phase="receive", done_bytes=0, total_bytes=1)
        await anext(incoming)
        raise StageLoadError("no space left on the device")

    async def master():
        yield LoadBegin(load=load)
        for offset in range(0, 1 << 30, 1 << 20):
            yield WeightChunk(sha256=load.tensors[0].sha256, offset=offset, data=bytes(1 << 20))

    net.worker.initialize_worker = refuse
    with pytest.raises(StageLoadError, match="no space left"):
        await collect(net.client.initialize_worker(master()))


# --- the step link -------------------------------------------------------------------------------------------


async def test_steps_arrive_in_order_and_are_acknowledged(net):
    steps = [make_step(number) for number in range(200)]
    acks = [reply async for reply in net.client.process_layers(messages(*steps))]
    assert net.worker.steps == steps
    assert acks == [StepAck(epoch=3, step=number) for number in range(200)]
    assert (net.worker.links_ended, net.worker.links_lost) == (1, 0)


async def test_an_acknowledgement_comes_before_the_next_step_is_sent(net):
    outgoing = Outgoing()
    link = net.client.process_layers(outgoing.__aiter__())
    for number in range(5):
        outgoing.put(make_step(number))
        assert await anext(link) == StepAck(epoch=3, step=number)
    outgoing.end()
    assert [reply async for reply in link] == []


async def test_steps_without_tensors_and_with_many_tokens_pass(net):
    steps = [make_step(1, tensor_bytes=None), make_step(2, tensor_bytes=None, tokens=100_000)]
    acks = [reply async for reply in net.client.process_layers(messages(*steps))]
    assert len(acks) == 2
    assert net.worker.steps == steps


async def test_large_activations_travel_in_fragments_between_small_ones(net):
    steps = [
        make_step(1),
        make_step(2, tensor_bytes=32 << 20),
        make_step(3),
        make_step(4, tensor_bytes=(1 << 20) + 2),
        make_step(5, tensor_bytes=0),
    ]
    acks = [reply async for reply in net.client.process_layers(messages(*steps))]
    assert [ack.step for ack in acks] == [1, 2, 3, 4, 5]
    assert net.worker.steps == steps


async def test_two_links_at_once_keep_their_own_order(net):
    async def drive(epoch):
        steps = [make_step(number, epoch=epoch, tensor_bytes=100_000) for number in range(50)]
        return [reply async for reply in net.client.process_layers(messages(*steps))]

    first, second = await asyncio.gather(drive(1), drive(2))
    assert first == [StepAck(epoch=1, step=number) for number in range(50)]
    assert second == [StepAck(epoch=2, step=number) for number in range(50)]
    assert [m.step.step for m in net.worker.steps if m.step.epoch == 1] == list(range(50))


async def test_a_reader_that_stops_holds_up_its_sender(net):
    """What waits between the two is bounded, whatever the sender would like to send."""
    net.worker.reading.clear()
    sent = 0

    async def endless():
        nonlocal sent
        while sent < 200:
            sent += 1
            yield make_step(sent, tensor_bytes=1 << 20)

    link = net.client.process_layers(endless())
    first = asyncio.create_task(anext(link))
    await asyncio.sleep(0.5)
    assert sent < 50
    held_at = sent
    net.worker.reading.set()
    await first
    count = 1 + sum([1 async for _ in link])
    assert (count, sent) == (200, 200)
    assert held_at < 50


async def test_a_step_over_the_receivers_limit_is_refused_and_the_sender_told_why(net):
    with pytest.raises(FrameError, match="is the most"):
        await collect(net.client.process_layers(messages(make_step(1, tensor_bytes=(64 << 20) + 2))))
    assert net.worker.steps == []


async def test_an_error_of_the_outgoing_iterator_ends_the_call(net, eventually):
    taken = asyncio.Event()

    async def broken():
        yield make_step(1)
        await taken.wait()
        raise StageLoadError("the disk is gone")

    with pytest.raises(StageLoadError, match="the disk is gone"):
        await collect(net.client.process_layers(broken()), then=taken.set)
    await eventually(lambda: net.worker.links_lost == 1)


# --- tokens --------------------------------------------------------------------------------------------------


async def test_results_stream_until_the_epoch_ends(net):
    results = [
        StepResult(epoch=4, step=number, tokens=(TokenOut(seq_id=1, token_id=number, logprob=-1.5),))
        for number in range(20)
    ]
    for result in [*results, None]:
        net.worker.results.put_nowait(result)
    assert [result async for result in net.client.tokens(4)] == results
    assert net.worker.token_streams_closed == 1


async def test_a_result_larger_than_grpcs_default_message_arrives_in_its_turn(net):
    top = tuple((100_000 + number, -0.5 * number) for number in range(20))
    scores = PromptScores(seq_id=1, first_position=1, scores=(TokenScore(token_id=7, logprob=-2.5, top=top),) * 20_000)
    results = [
        StepResult(epoch=4, step=1, tokens=()),
        StepResult(epoch=4, step=2, tokens=(), prompt_scores=(scores,)),
        StepResult(epoch=4, step=3, tokens=(TokenOut(seq_id=1, token_id=5, logprob=-1.5, top=top),)),
    ]
    for result in [*results, None]:
        net.worker.results.put_nowait(result)
    assert [result async for result in net.client.tokens(4)] == results


async def test_leaving_the_token_stream_closes_it_at_the_worker(net, eventually):
    stream = net.client.tokens(4)
    net.worker.results.put_nowait(StepResult(epoch=4, step=1, tokens=()))
    assert (await anext(stream)).step == 1
    await stream.aclose()
    await eventually(lambda: net.worker.token_streams_closed == 1)


async def test_a_stale_epoch_is_refused_by_kind(net):
    net.worker.raises = StaleEpochError("epoch 4 is over; the current one is 5")
    with pytest.raises(StaleEpochError, match="epoch 4 is over"):
        await anext(net.client.tokens(4))


# --- broken links and ends -----------------------------------------------------------------------------------


async def test_a_worker_that_dies_breaks_its_open_streams(net):
    outgoing = Outgoing()
    outgoing.put(make_step(1))
    link = net.client.process_layers(outgoing.__aiter__())
    stream = net.client.tokens(3)
    waiting = asyncio.create_task(anext(stream))
    assert await anext(link) == StepAck(epoch=3, step=1)
    await asyncio.sleep(0.05)
    await net.listener.close(grace_s=0)
    with pytest.raises(LinkLostError):
        await asyncio.wait_for(anext(link), 2)
    with pytest.raises(LinkLostError):
        await asyncio.wait_for(waiting, 2)
    assert outgoing.closed
    assert net.worker.links_lost == 1
    with pytest.raises(WorkerUnreachableError):
        await net.client.describe(timeout_s=2)


async def test_grace_lets_open_calls_end(net):
    net.worker.gate.clear()
    asking = asyncio.create_task(net.client.describe(timeout_s=T))
    await asyncio.sleep(0.1)
    asyncio.get_running_loop().call_later(0.1, net.worker.gate.set)
    await net.listener.close(grace_s=3)
    assert await asking == DESCRIPTION


async def test_a_client_that_leaves_in_the_middle_is_noticed_by_the_worker(net, eventually):
    outgoing = Outgoing()
    outgoing.put(make_step(1))
    link = net.client.process_layers(outgoing.__aiter__())
    await anext(link)
    await link.aclose()
    await eventually(lambda: net.worker.links_lost == 1, limit_s=1)
    assert outgoing.closed
    assert net.worker.links_ended == 0


async def test_a_client_that_leaves_while_the_worker_waits_elsewhere_closes_the_answers(net, eventually):
    """Not every service waits for `incoming`: then its iterator of answers is closed instead."""
    closed = asyncio.Event()

    async def answers(incoming):
        del incoming
        try:
            yield StepAck(epoch=1, step=1)
            await asyncio.sleep(60)
        finally:
            closed.set()

    net.worker.process_layers = answers
    link = net.client.process_layers(Outgoing().__aiter__())
    await anext(link)
    await link.aclose()
    await eventually(closed.is_set, limit_s=1)


async def test_a_reader_task_of_the_service_learns_that_the_client_is_gone(net, eventually):
    """A service may read `incoming` in a task of its own: it gets `LinkLostError` there."""
    ends = []

    async def answers(incoming):
        async def read():
            try:
                async for message in incoming:
                    acks.put_nowait(StepAck(epoch=1, step=message.step.step))
            except LinkLostError as exc:
                ends.append(exc)

        acks = asyncio.Queue()
        reader = asyncio.create_task(read())
        try:
            while True:
                yield await acks.get()
        finally:
            await reader

    net.worker.process_layers = answers
    outgoing = Outgoing()
    outgoing.put(make_step(8))
    link = net.client.process_layers(outgoing.__aiter__())
    assert (await anext(link)).step == 8
    await link.aclose()
    await eventually(lambda: len(ends) == 1, limit_s=1)


async def test_closing_the_client_ends_its_streams_with_link_lost(net, eventually):
    link = net.client.process_layers(Outgoing().__aiter__())
    waiting = asyncio.create_task(anext(link))
    await asyncio.sleep(0.1)
    await net.client.close()
    with pytest.raises(LinkLostError):
        await asyncio.wait_for(waiting, 2)
    with pytest.raises(LinkLostError):
        await net.client.describe(timeout_s=T)
    with pytest.raises(LinkLostError):
        await anext(net.client.tokens(1))
    await eventually(lambda: net.worker.links_lost == 1)


async def test_cancelling_a_caller_is_a_cancellation_and_not_a_lost_link(net, eventually):
    waiting = asyncio.create_task(anext(net.client.tokens(3)))
    asking = asyncio.create_task(anext(net.client.process_layers(Outgoing().__aiter__())))
    net.worker.gate.set()
    await asyncio.sleep(0.1)
    waiting.cancel()
    asking.cancel()
    for task in (waiting, asking):
        with pytest.raises(asyncio.CancelledError):
            await task
    await eventually(lambda: net.worker.token_streams_closed == 1 and net.worker.links_lost == 1)
    assert await net.client.describe(timeout_s=T) == DESCRIPTION


async def test_a_timeout_of_the_callers_own_stays_a_timeout(net):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await anext(net.client.tokens(3))


async def test_closing_twice_is_allowed(net):
    await net.client.describe(timeout_s=T)
    await net.client.close()
    await net.client.close()
    await net.listener.close(grace_s=0)
    await net.listener.close(grace_s=0)


async def test_a_client_made_before_its_worker_reaches_it_later(net):
    address = net.listener.address
    await net.listener.close(grace_s=0)
    with pytest.raises(WorkerUnreachableError):
        await net.client.describe(timeout_s=1)
    again = await net.transport.serve(address, net.worker)
    async with asyncio.timeout(10):
        while True:
            try:
                assert await net.client.describe(timeout_s=1) == DESCRIPTION
                break
            except WorkerUnreachableError:
                await asyncio.sleep(0.05)
    await again.close(grace_s=0)


async def test_two_workers_on_one_port_are_refused_by_name(net):
    with pytest.raises(AddressInUseError, match=net.listener.address):
        await net.transport.serve(net.listener.address, FakeWorker())
    assert await net.client.describe(timeout_s=T) == DESCRIPTION
