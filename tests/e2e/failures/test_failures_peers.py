"""Peers that lie, speak another version or are in the way: live workers refuse them and go on serving the others."""

import asyncio
import json
import socket
from dataclasses import replace

import grpc
import pytest
import torch
from real_processes import port_of, write_registry
from stage_loads import open_weights, whole_stage
from tiny_models import greedy_answer, prompt_of

from shardwright.errors import FrameError, InvalidRequestError, ProtocolError, ShardwrightError, StageLoadError
from shardwright.runtime.weight_sender import send_stage
from shardwright.transport.grpc import GrpcTransport
from shardwright.transport.grpc_options import PROTOCOL_METADATA, method_path
from shardwright.types import (
    SamplingParams,
    SequenceSlice,
    StepInput,
    WorkerDescription,
)
from shardwright.wire import inference_pb2 as pb
from shardwright.wire import step_codec
from shardwright.wire.limits import WireLimits
from shardwright.wire.messages import StepMessage, TensorFrame, WeightsNeeded

PROMPT = prompt_of(9, seed=1)
IDS = ",".join(map(str, PROMPT))
LIMITS = WireLimits(max_frame_bytes=1 << 24)
TIMEOUT_S = 30.0
BLOCKS = 8


@pytest.fixture
async def worker(cluster):
    """A client of the first live worker."""
    client = GrpcTransport(max_frame_bytes=LIMITS.max_frame_bytes).connect(f"127.0.0.1:{cluster.ports[0]}")
    yield client
    await client.close()


@pytest.fixture
def checkpoint(tiny):
    return open_weights(tiny.folder)


@pytest.fixture
async def load(worker, tiny, tmp_path):
    """The whole model as one stage, as a master would give it, without a hint where the worker may find the file."""
    epoch = 1 + (await worker.describe(timeout_s=TIMEOUT_S)).last_epoch
    return whole_stage(tiny.folder, epoch=epoch, cache_dir=tmp_path, num_blocks=BLOCKS)


class DamagedTensors:
    """A checkpoint of which one byte of one tensor comes out wrong, as from a broken relay."""

    def __init__(self, checkpoint, name):
        self.tensors = checkpoint.tensors
        self._checkpoint = checkpoint
        self._name = name

    def read(self, name, offset, length):
        data = bytearray(self._checkpoint.read(name, offset, length))
        if name == self._name:
            data[len(data) // 2] ^= 1
        return bytes(data)


def step_of(epoch, *, tokens=tuple(PROMPT), blocks=(3,), tensors=()):
    """The prompt as one step of one sequence that asks for a token."""
    part = SequenceSlice(
        seq_id=1, start_position=0, token_ids=tokens, block_table=blocks, sampling=SamplingParams(temperature=0.0)
    )
    return StepMessage(step=StepInput(epoch=epoch, step=1, slices=(part,)), tensors=tensors)


def step_with_frame(epoch, shape, length=None):
    """A step with one frame as protobuf; `length` may lie."""
    size = torch.Size(shape).numel() * 4
    good = TensorFrame(name="hidden", dtype="float32", shape=shape, data=bytes(size))
    message = pb.StepMessage.FromString(step_codec.encode_step(step_of(epoch, tensors=(good,)), LIMITS))
    if length is not None:
        message.tensors[0].length = length
    return message


async def test_a_corrupted_chunk_is_refused_by_name_and_the_right_one_taken(worker, checkpoint, load, tiny):
    """The damaged tensor is not kept: the next load asks for it alone, gets it, and the model answers as the whole."""
    name = "model.layers.2.mlp.down_proj.weight"
    with pytest.raises(StageLoadError, match=name):
        await send_stage(worker, load, DamagedTensors(checkpoint, name), lambda _: None)
    again = replace(load, assignment=replace(load.assignment, epoch=load.assignment.epoch + 1))
    seen = []
    await send_stage(worker, again, checkpoint, seen.append)
    [needed] = [message for message in seen if isinstance(message, WeightsNeeded)]
    wanted = {spec.sha256: spec.name for spec in load.tensors}
    assert name in {wanted[request.sha256] for request in needed.requests}
    result = await worker.process_layer(step_of(again.assignment.epoch), timeout_s=TIMEOUT_S)
    assert [token.token_id for token in result.tokens] == greedy_answer(tiny.model, PROMPT, 1)
    third = replace(load, assignment=replace(load.assignment, epoch=load.assignment.epoch + 2))
    seen.clear()
    await send_stage(worker, third, checkpoint, seen.append)
    assert [message.requests for message in seen if isinstance(message, WeightsNeeded)] == [()]


async def test_lies_end_their_own_call_only(worker, checkpoint, load, tiny):
    """Lying lengths and shapes, unknown tokens and blocks, from strangers, while the stage is up."""
    await send_stage(worker, load, checkpoint, lambda _: None)
    epoch = load.assignment.epoch
    lies = [step_with_frame(epoch, (9, 48), length) for length in (9 * 48 * 4 + 4, 1 << 62, 16)]
    lies[1].tensors[0].shape[:] = [1 << 30, 1 << 30]
    lies[2].tensors[0].data = b""
    async with grpc.aio.insecure_channel(worker.address) as channel:
        for lie in lies:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(method_path("ProcessLayer"))(
                    lie.SerializeToString(), metadata=PROTOCOL_METADATA, timeout=TIMEOUT_S
                )
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            call = channel.stream_stream(method_path("ProcessLayers"))(metadata=PROTOCOL_METADATA)
            await call.write(pb.StepPart(step=lie).SerializeToString())
            assert await asyncio.wait_for(call.code(), TIMEOUT_S) is grpc.StatusCode.FAILED_PRECONDITION
    hidden = TensorFrame(name="hidden", dtype="float32", shape=(9, 48), data=bytes(9 * 48 * 4))
    for bad, kinds in (
        (step_of(epoch, tensors=(hidden,)), (FrameError,)),
        (step_of(epoch, tokens=(5, 10_000)), (ProtocolError, InvalidRequestError)),
        (step_of(epoch, blocks=(BLOCKS,)), (ProtocolError, InvalidRequestError)),
        (step_of(epoch, tokens=tuple(PROMPT) * 2), (ProtocolError, InvalidRequestError)),
    ):
        with pytest.raises(kinds):
            await worker.process_layer(bad, timeout_s=TIMEOUT_S)
    result = await worker.process_layer(step_of(epoch), timeout_s=TIMEOUT_S)
    assert [token.token_id for token in result.tokens] == greedy_answer(tiny.model, PROMPT, 1)


async def test_a_client_that_leaves_in_the_middle_of_a_load_hurts_nobody(worker, checkpoint, load, tiny):
    """It goes after the first chunk; the next master's load is built."""

    class Leaving(Exception):  # noqa: N818
        pass

    def leave(message):
        if not isinstance(message, WeightsNeeded):
            raise Leaving

    with pytest.raises((Leaving, ShardwrightError)):
        await send_stage(worker, load, checkpoint, leave, retries=0)
    again = replace(load, assignment=replace(load.assignment, epoch=load.assignment.epoch + 1))
    await send_stage(worker, again, checkpoint, lambda _: None)
    result = await worker.process_layer(step_of(again.assignment.epoch), timeout_s=TIMEOUT_S)
    assert [token.token_id for token in result.tokens] == greedy_answer(tiny.model, PROMPT, 1)


class OtherVersion:
    """A worker of a later protocol."""

    async def describe(self):
        return WorkerDescription(
            protocol_version=99, package_version="9.0", torch_version="", transformers_version="", host_id="h", pid=1,
            device="cpu", device_name="later", memory_total_bytes=1 << 34, memory_available_bytes=1 << 34,
            read_bandwidth=1e10, matrix_rate=1e11, num_threads=1,
        )  # fmt: skip


async def test_a_worker_of_another_version_is_refused(processes, tiny, tmp_path, error_of):
    """Nothing is sent to it."""
    listener = await GrpcTransport(max_frame_bytes=1 << 20).serve("127.0.0.1:0", OtherVersion())
    try:
        write_registry(tmp_path / "workers.json", [int(listener.address.rpartition(":")[2])])
        run = processes.run("generate", "--model", tiny.folder, "--prompt-ids", IDS)
        code = await asyncio.to_thread(run.wait)
    finally:
        await listener.close(grace_s=0.0)
    assert code == 3
    assert "worker1" in error_of(run)
    assert "protocol 99" in error_of(run)
    assert "install the same version" in error_of(run)


def test_two_workers_on_one_port_and_a_port_in_use(cluster, processes, error_of):
    """The second says so and ends; so does one whose port another program has."""
    second, _ = processes.worker(port=cluster.ports[0])
    with socket.socket() as plain:
        plain.bind(("127.0.0.1", 0))
        plain.listen(1)
        third, _ = processes.worker(port=plain.getsockname()[1])
        assert third.wait() == 3
    assert second.wait() == 3
    for run in (second, third):
        assert "another process has the port; choose another with --port" in error_of(run)
        assert run.out == ""


def test_a_port_is_free_again_once_its_worker_is_gone(processes):
    first, _ = processes.worker()
    port = port_of(first)
    first.process.kill()
    first.wait()
    second, _ = processes.worker(port=port)
    assert port_of(second) == port
    assert json.dumps(port) in second.out
