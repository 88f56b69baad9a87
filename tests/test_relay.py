"""The relay of tests/support does to a connection what a worse network would, and only that."""

import asyncio
import contextlib
import hashlib
import sys
import time
from pathlib import Path
from random import Random  # noqa: TID251  seeded

import pytest
from relay import MOST_IN_TRANSIT, Relay, TokenBucket

RELAY = Path(__file__).parent / "support" / "relay.py"
LATE_S = 0.3  # the machine may be busy: times are bounded from below alone, or generously


@contextlib.asynccontextmanager
async def echo_server(*, greeting=b""):
    """Sends back what it gets, and ends when its client has."""
    serving = set()

    async def serve(reader, writer):
        serving.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            writer.write(greeting)
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.wait_for(asyncio.gather(*serving), 10)  # the relay has let go of all of them


async def connect(address):
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def close(writer):
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def round_trip_s(reader, writer, data=b"x"):
    began = time.perf_counter()
    writer.write(data)
    assert await asyncio.wait_for(reader.readexactly(len(data)), 20) == data
    return time.perf_counter() - began


async def is_broken(reader):
    """Whether the connection is gone, waiting a moment for it."""
    try:
        return await asyncio.wait_for(reader.read(1), 5) == b""
    except ConnectionError:
        return True


# --- delay -------------------------------------------------------------------------------------------


async def test_what_is_sent_arrives_after_the_delay_each_way():
    async with echo_server() as target, Relay(target, delay_s=0.1) as relay:
        reader, writer = await connect(relay.address)
        times = [await round_trip_s(reader, writer) for _ in range(3)]
        await close(writer)
    assert min(times) >= 0.2
    assert min(times) < 0.2 + LATE_S


async def test_a_stream_is_delayed_and_not_slowed_down():
    """Twenty messages on their way at once take one delay each way and not twenty."""
    async with echo_server() as target, Relay(target, delay_s=0.1) as relay:
        reader, writer = await connect(relay.address)
        began = time.perf_counter()
        for _ in range(20):
            writer.write(b"x" * 100)
            await asyncio.sleep(0.001)
        await reader.readexactly(2000)
        took = time.perf_counter() - began
        await close(writer)
    assert 0.2 <= took < 1.0


async def test_everything_arrives_in_order_over_many_connections_at_once():
    async def one(address, seed):
        dice = Random(seed)
        reader, writer = await connect(address)
        sent = hashlib.sha256()
        num_bytes = 0

        async def send():
            nonlocal num_bytes
            for _ in range(30):
                data = dice.randbytes(dice.randrange(1, 40000))
                sent.update(data)
                num_bytes += len(data)
                writer.write(data)
                await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        got = hashlib.sha256()
        while data := await reader.read(65536):
            got.update(data)
        await sending
        await close(writer)
        assert got.digest() == sent.digest()
        return num_bytes

    async with echo_server() as target, Relay(target, delay_s=0.01) as relay:
        counts = await asyncio.gather(*(one(relay.address, seed) for seed in range(8)))
        assert relay.num_connections == 8
        assert relay.bytes_there == relay.bytes_back == sum(counts)


async def test_a_lower_delay_lets_nothing_overtake_what_was_sent_before():
    async with echo_server() as target, Relay(target, delay_s=0.2) as relay:
        reader, writer = await connect(relay.address)
        writer.write(b"first")
        await asyncio.sleep(0.05)
        relay.delay_s = 0.0
        writer.write(b"second")
        assert await reader.readexactly(11) == b"firstsecond"
        assert await round_trip_s(reader, writer) < 0.1 + LATE_S
        await close(writer)


async def test_a_server_that_speaks_first_is_heard():
    async with echo_server(greeting=b"hello") as target, Relay(target) as relay:
        reader, writer = await connect(relay.address)
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
        await close(writer)


# --- bandwidth ---------------------------------------------------------------------------------------


def test_a_bucket_lets_a_burst_through_and_then_its_bandwidth():
    bucket = TokenBucket(1000.0, burst_bytes=500)
    assert bucket.leave(500, now=10.0) == 10.0
    assert bucket.leave(100, now=10.0) == pytest.approx(10.1)
    assert bucket.leave(100, now=10.0) == pytest.approx(10.2)
    assert bucket.leave(100, now=10.3) == pytest.approx(10.3)  # 100 bytes' worth of time has passed since 10.2
    assert bucket.leave(900, now=20.0) == pytest.approx(20.4)  # full again, which is 500 and no more


def test_what_lets_nothing_through_is_refused():
    with pytest.raises(ValueError, match="bytes_per_s is 0; it must be above 0"):
        TokenBucket(0)
    with pytest.raises(ValueError, match="burst_bytes is -1"):
        TokenBucket(1.0, burst_bytes=-1)
    with pytest.raises(ValueError, match="delay_s is -1"):
        Relay("127.0.0.1:1", delay_s=-1)
    with pytest.raises(ValueError, match="'nowhere' is no address"):
        Relay("nowhere")


async def test_bandwidth_is_limited_for_all_connections_together():
    async def transfer(address, size):
        reader, writer = await connect(address)
        await round_trip_s(reader, writer, bytes(size))
        await close(writer)

    async with echo_server() as target, Relay(target, bytes_per_s=1e6, burst_bytes=0) as relay:
        began = time.perf_counter()
        await asyncio.gather(transfer(relay.address, 200_000), transfer(relay.address, 200_000))
        took = time.perf_counter() - began
    assert 0.4 <= took < 0.4 + 5 * LATE_S  # the way back overlaps with the way there


async def test_with_a_limit_data_trickles_in_and_does_not_come_at_once():
    async with echo_server() as target, Relay(target, bytes_per_s=1e6, burst_bytes=0) as relay:
        reader, writer = await connect(relay.address)
        began = time.perf_counter()
        writer.write(bytes(400_000))
        await reader.readexactly(1000)
        first_s = time.perf_counter() - began
        await reader.readexactly(399_000)
        assert time.perf_counter() - began >= 0.4
        assert first_s < 0.3
        await close(writer)


async def test_a_reader_that_does_not_read_stops_the_sender():
    """The relay holds a bounded part of what is on its way, however much is sent."""
    ended, started = asyncio.Event(), asyncio.Event()

    async def never_reads(_, writer):
        started.set()
        await ended.wait()
        writer.transport.abort()

    server = await asyncio.start_server(never_reads, "127.0.0.1", 0, limit=1024)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with Relay(target) as relay:
        _, writer = await connect(relay.address)
        total = 0

        async def send():
            nonlocal total
            while True:
                writer.write(bytes(1 << 20))
                await writer.drain()
                total += 1 << 20

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(send(), 2)
        assert started.is_set()
        assert total < 3 * MOST_IN_TRANSIT  # the rest is what the kernel's four buffers hold
        writer.transport.abort()
        ended.set()
        await asyncio.sleep(0)
    server.close()


# --- cuts --------------------------------------------------------------------------------------------


async def test_a_cut_resets_connections_and_new_ones_until_it_is_mended():
    async with echo_server() as target, Relay(target) as relay:
        reader, writer = await connect(relay.address)
        await round_trip_s(reader, writer)
        relay.cut()
        assert await is_broken(reader)
        await close(writer)
        for _ in range(2):
            with contextlib.suppress(ConnectionError):
                reader, writer = await connect(relay.address)
                assert await is_broken(reader)
                await close(writer)
        relay.mend()
        reader, writer = await connect(relay.address)
        await round_trip_s(reader, writer)
        await close(writer)


async def test_what_is_on_its_way_when_the_line_is_cut_never_arrives():
    async with echo_server() as target, Relay(target, delay_s=0.2) as relay:
        reader, writer = await connect(relay.address)
        writer.write(b"lost")
        await asyncio.sleep(0.05)
        relay.cut()
        relay.mend()
        assert await is_broken(reader)
        await asyncio.sleep(0.3)
        assert relay.bytes_there == 0
        await close(writer)


async def test_a_silent_line_breaks_nothing_and_delivers_all_when_it_is_mended():
    async with echo_server() as target, Relay(target) as relay:
        reader, writer = await connect(relay.address)
        await round_trip_s(reader, writer)
        relay.silence()
        writer.write(b"anybody?")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(reading := asyncio.ensure_future(reader.readexactly(8))), 0.3)
        relay.mend()
        assert await asyncio.wait_for(reading, 5) == b"anybody?"
        await close(writer)


async def test_an_end_on_one_side_leaves_the_other_direction_open():
    async with echo_server() as target, Relay(target, delay_s=0.02) as relay:
        reader, writer = await connect(relay.address)
        writer.write(b"last words")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 5) == b"last words"
        await close(writer)


async def test_a_target_that_is_not_there_breaks_the_connection():
    async with echo_server() as target:
        pass
    async with Relay(target) as relay:
        reader, writer = await connect(relay.address)
        assert await is_broken(reader)
        await close(writer)


async def test_a_target_that_resets_resets_its_client():
    async def resets(reader, writer):
        await reader.read(1)
        writer.transport.abort()

    server = await asyncio.start_server(resets, "127.0.0.1", 0)
    async with Relay(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as relay:
        reader, writer = await connect(relay.address)
        writer.write(b"x")
        assert await is_broken(reader)
        await close(writer)
    server.close()


# --- as a process ------------------------------------------------------------------------------------


async def test_as_a_process_it_obeys_its_standard_input_and_ends_with_it():
    async with echo_server() as target:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(RELAY), "--to", target, "--delay-ms", "50",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        address = (await process.stdout.readline()).decode().removeprefix("listening on ").strip()
        reader, writer = await connect(address)
        assert await round_trip_s(reader, writer, b"12345") >= 0.1
        process.stdin.write(b"counts\n")
        assert await process.stdout.readline() == b"1 5 5\n"
        process.stdin.write(b"cut\n")
        assert await is_broken(reader)
        await close(writer)
        process.stdin.write(b"mend\ndelay 0\nnonsense\n")
        assert b"say cut" in await process.stderr.readline()
        reader, writer = await connect(address)
        assert await round_trip_s(reader, writer) < 0.1
        await close(writer)
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), 10) == 0
