"""What only the gRPC transport can get wrong: ports, versions, other programs, processes that die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transport_fakes import DESCRIPTION, FakeWorker, make_step

from shardwright.errors import (
    AddressInUseError,
    ConfigError,
    LinkLostError,
    VersionMismatchError,
    WorkerUnreachableError,
)
from shardwright.transport.grpc import GrpcTransport
from shardwright.transport.grpc_options import PROTOCOL_METADATA, SERVICE_NAME, method_path
from shardwright.types import PROTOCOL_VERSION
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.messages import StepAck
from shardwright.wire.step_codec import step_parts

T = 5.0


@contextlib.asynccontextmanager
async def raw_channel(net):
    """A client that is not ours."""
    async with grpc.aio.insecure_channel(net.listener.address) as channel:
        yield channel


# --- versions and other programs -----------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [(("shardwright-protocol", "999"),), ()])
@pytest.mark.parametrize("method", ["Describe", "Heartbeat", "Release", "Tokens", "ProcessLayers", "InitializeWorker"])
async def test_a_caller_of_another_version_is_refused_with_both_versions(grpc_net, method, metadata):
    theirs = metadata[0][1] if metadata else "unknown"
    async with raw_channel(grpc_net) as channel:
        if method in {"Describe", "Heartbeat", "Release"}:
            call = channel.unary_unary(method_path(method))(b"", metadata=metadata)
        elif method == "Tokens":
            call = channel.unary_stream(method_path(method))(b"", metadata=metadata)
        else:
            call = channel.stream_stream(method_path(method))(metadata=metadata)
        assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert f"protocol version {theirs}, this worker version {PROTOCOL_VERSION}" in await call.details()
        assert dict(await call.trailing_metadata())["shardwright-error"] == "VersionMismatchError"


async def test_a_worker_of_another_version_is_named_with_both_versions(monkeypatch, grpc_net):
    monkeypatch.setattr("shardwright.transport.grpc_client.PROTOCOL_METADATA", (("shardwright-protocol", "99"),))
    expected = f"protocol version 99, this worker version {PROTOCOL_VERSION}"
    with pytest.raises(VersionMismatchError, match=expected):
        await grpc_net.client.describe(timeout_s=T)
    with pytest.raises(VersionMismatchError, match=expected):
        await anext(grpc_net.client.tokens(1))


async def test_another_grpc_server_is_no_worker():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = GrpcTransport().connect(f"127.0.0.1:{port}")
    with pytest.raises(VersionMismatchError, match=f"127.0.0.1:{port} answers, but not as a Shardwright worker"):
        await client.describe(timeout_s=T)
    await client.close()
    await server.stop(None)


async def test_a_server_that_speaks_no_grpc_is_unreachable():
    async def answer(reader, writer):
        with contextlib.suppress(ConnectionError):
            await reader.read(10)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = GrpcTransport().connect(f"127.0.0.1:{port}")
    with pytest.raises(WorkerUnreachableError, match="no answer from worker"):
        await client.describe(timeout_s=2)
    await client.close()
    server.close()
    await server.wait_closed()


async def test_the_health_service_says_serving(grpc_net):
    async with raw_channel(grpc_net) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE_NAME):
            response = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=T)
            assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_every_method_of_the_proto_is_served(grpc_net):
    """An unknown method is UNIMPLEMENTED; those of the proto answer or wait."""
    async with raw_channel(grpc_net) as channel:
        for method in pb.DESCRIPTOR.services_by_name["Worker"].methods:
            if method.client_streaming or method.server_streaming:
                call = channel.stream_stream(method_path(method.name))(metadata=PROTOCOL_METADATA)
                if not method.client_streaming:
                    await call.write(b"")
                assert "shardwright-protocol" in dict(await call.initial_metadata())
                call.cancel()
            else:
                call = channel.unary_unary(method_path(method.name))(b"", metadata=PROTOCOL_METADATA)
                assert await call.code() is not grpc.StatusCode.UNIMPLEMENTED


async def test_malformed_bytes_from_a_stranger_end_the_call_with_a_reason(grpc_net):
    async with raw_channel(grpc_net) as channel:
        link = channel.stream_stream(method_path("ProcessLayers"))(metadata=PROTOCOL_METADATA)
        await link.write(b"\xff\xff\xff")
        assert await link.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "StepPart: 3 bytes that are no such message" in await link.details()
        by_hand = channel.unary_unary(method_path("ProcessLayer"))(b"\x01", metadata=PROTOCOL_METADATA)
        assert dict(await by_hand.trailing_metadata())["shardwright-error"] == "ProtocolError"
    assert await grpc_net.client.describe(timeout_s=T) == DESCRIPTION


async def test_a_stranger_that_closes_without_saying_so_counts_as_lost(grpc_net, eventually):
    """A half-closed stream without its end message may have been cut: the worker takes it as lost."""
    async with raw_channel(grpc_net) as channel:
        link = channel.stream_stream(method_path("ProcessLayers"))(metadata=PROTOCOL_METADATA)
        for part in step_parts(make_step(1)):
            await link.write(part)
        await link.done_writing()
        assert await link.read() is not grpc.aio.EOF  # the acknowledgement
        assert dict(await link.trailing_metadata())["shardwright-error"] == "LinkLostError"
    await eventually(lambda: grpc_net.worker.links_lost == 1)


async def test_a_step_by_hand_over_the_frame_limit_is_refused_by_the_receiver(grpc_net):
    async with raw_channel(grpc_net) as channel:
        call = channel.unary_unary(method_path("ProcessLayer"))(bytes(70 << 20), metadata=PROTOCOL_METADATA)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# --- ports and addresses -------------------------------------------------------------------------------------


async def test_a_port_that_a_plain_socket_listens_on_is_in_use():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(
                AddressInUseError, match=rf"can't listen on {host}:{port}: another process has the port"
            ):
                await GrpcTransport().serve(f"{host}:{port}", FakeWorker())


async def test_a_second_process_can_not_share_the_port(grpc_net):
    """SO_REUSEPORT, gRPC's default, would let it in and give it half of the calls."""
    script = textwrap.dedent(f"""
        import asyncio
        from shardwright.errors import AddressInUseError
        from shardwright.transport.grpc import GrpcTransport
        async def main():
            try:
                await GrpcTransport().serve("{grpc_net.listener.address}", None)
            except AddressInUseError as exc:
                print(exc)
        asyncio.run(main())
    """)
    result = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert f"can't listen on {grpc_net.listener.address}: another process has the port" in result.stdout


@pytest.mark.parametrize("address", ["203.0.113.7:0", "no-such-host.invalid:0"])
async def test_an_address_that_is_not_this_machines_is_a_config_error(address):
    with pytest.raises(ConfigError, match="can't listen on"):
        await GrpcTransport().serve(address, FakeWorker())


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", *(["[::1]"] if has_ipv6() else [])])
async def test_hosts_by_name_and_by_address_of_either_family(host):
    transport = GrpcTransport()
    listener = await transport.serve(f"{host}:0", FakeWorker())
    assert listener.address.startswith(f"{host}:")
    assert not listener.address.endswith(":0")
    client = transport.connect(listener.address)
    assert client.address == listener.address
    assert await client.describe(timeout_s=T) == DESCRIPTION
    await client.close()
    await listener.close(grace_s=0)


async def test_a_host_that_does_not_exist_is_unreachable():
    client = GrpcTransport().connect("no-such-host.invalid:50051")
    with pytest.raises(WorkerUnreachableError, match="no answer from worker at no-such-host"):
        await client.describe(timeout_s=T)
    await client.close()


async def test_proxies_of_the_environment_are_not_asked(monkeypatch, grpc_net):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    client = grpc_net.transport.connect(grpc_net.listener.address)
    assert await client.describe(timeout_s=T) == DESCRIPTION
    await client.close()


# --- processes that die --------------------------------------------------------------------------------------

CLIENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from fakes import make_step
from shardwright.transport.grpc import GrpcTransport

async def steps():
    yield make_step(1)
    await asyncio.Event().wait()

async def main():
    client = GrpcTransport().connect(sys.argv[2])
    async for ack in client.process_layers(steps()):
        print("acknowledged", flush=True)

asyncio.run(main())
"""
WORKER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from fakes import FakeWorker
from shardwright.transport.grpc import GrpcTransport

async def main():
    listener = await GrpcTransport().serve("127.0.0.1:0", FakeWorker())
    print(listener.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_worker_breaks_its_links_within_a_second():
    folder = str(Path(__file__).parent)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, folder, stdout=asyncio.subprocess.PIPE)
    address = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
    client = GrpcTransport().connect(address)

    async def steps():
        yield make_step(1)
        await asyncio.Event().wait()

    link = client.process_layers(steps())
    stream = client.tokens(1)
    waiting = asyncio.create_task(anext(stream))
    assert await anext(link) == StepAck(epoch=3, step=1)
    os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(1):
        with pytest.raises(LinkLostError, match=f"the link to the worker at {address} broke"):
            await anext(link)
    with pytest.raises((LinkLostError, WorkerUnreachableError)):
        await asyncio.wait_for(waiting, 1)
    with pytest.raises(WorkerUnreachableError):
        await client.heartbeat(timeout_s=T)
    await process.wait()
    await client.close()


async def test_a_killed_client_is_noticed_by_the_worker_within_a_second(grpc_net, eventually):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CLIENT,
        str(Path(__file__).parent),
        grpc_net.listener.address,
        stdout=asyncio.subprocess.PIPE,
    )
    assert await asyncio.wait_for(process.stdout.readline(), 60) == b"acknowledged\n"
    os.kill(process.pid, signal.SIGKILL)
    await eventually(lambda: grpc_net.worker.links_lost == 1, limit_s=1)
    await process.wait()


async def test_closing_under_open_calls_is_quiet(grpc_net, caplog, capfd):
    """Neither gRPC's Python nor its core has anything to complain about."""

    async def steps():
        for number in range(1_000_000):
            yield make_step(number, tensor_bytes=100_000)

    async def drive(stream):
        with contextlib.suppress(LinkLostError):
            async for _ in stream:
                pass

    drivers = [asyncio.create_task(drive(grpc_net.client.process_layers(steps()))) for _ in range(3)]
    drivers.append(asyncio.create_task(drive(grpc_net.client.tokens(1))))
    await asyncio.sleep(0.2)
    await grpc_net.listener.close(grace_s=0)
    await asyncio.wait_for(asyncio.gather(*drivers), 5)
    assert grpc_net.worker.token_streams_closed == 1
    assert [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"] == []
    assert capfd.readouterr().err == ""


async def test_leaving_under_open_calls_is_quiet(grpc_net, caplog):
    async def steps():
        for number in range(1_000_000):
            yield make_step(number, tensor_bytes=100_000)

    for _ in range(5):
        link = grpc_net.client.process_layers(steps())
        await anext(link)
        await link.aclose()
    await asyncio.sleep(0.2)
    assert await grpc_net.client.describe(timeout_s=T) == DESCRIPTION
    assert [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"] == []


async def test_a_frozen_worker_is_noticed_through_keepalive(monkeypatch):
    """Its machine still acknowledges packets, or is gone without a word: only unanswered pings tell."""
    monkeypatch.setattr("shardwright.transport.grpc_options.KEEPALIVE_S", 1)
    monkeypatch.setattr("shardwright.transport.grpc_options.KEEPALIVE_TIMEOUT_S", 1)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, str(Path(__file__).parent), stdout=asyncio.subprocess.PIPE
    )
    address = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
    client = GrpcTransport().connect(address)

    async def steps():
        yield make_step(1)
        await asyncio.Event().wait()

    link = client.process_layers(steps())
    await asyncio.wait_for(anext(link), 10)  # the worker answered: the link is open on both sides
    waiting = asyncio.create_task(anext(link))
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(LinkLostError, match="ping timeout"):
        await asyncio.wait_for(waiting, 10)
    process.kill()
    await process.wait()
    await client.close()
