"""What a worker says of itself, and the small requests: protobuf <-> plain values, checked on the way in."""

from __future__ import annotations

from typing import Final

from shardwright.types import Epoch, HeartbeatReport, StepTiming, WorkerDescription
from shardwright.wire import checks
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import MAX_TIMINGS

EMPTY: Final = b""
"""A message without fields: `DescribeRequest`, `HeartbeatRequest`, `ReleaseReply`."""


def encode_tokens_request(epoch: Epoch) -> bytes:
    """Ask for the results of an epoch."""
    return pb.TokensRequest(epoch=epoch).SerializeToString()


def decode_tokens_request(raw: bytes) -> Epoch:
    """Raises `ProtocolError`."""
    return checks.parse(pb.TokensRequest, raw).epoch


def encode_release_request(epoch: Epoch) -> bytes:
    """Ask for a stage to be dropped."""
    return pb.ReleaseRequest(epoch=epoch).SerializeToString()


def decode_release_request(raw: bytes) -> Epoch:
    """Raises `ProtocolError`."""
    return checks.parse(pb.ReleaseRequest, raw).epoch


def encode_description(description: WorkerDescription) -> bytes:
    """Who a worker is."""
    message = pb.WorkerDescription(
        protocol_version=description.protocol_version,
        package_version=description.package_version,
        torch_version=description.torch_version,
        transformers_version=description.transformers_version,
        host_id=description.host_id,
        pid=description.pid,
        device=description.device,
        device_name=description.device_name,
        memory_total_bytes=description.memory_total_bytes,
        memory_available_bytes=description.memory_available_bytes,
        read_bandwidth=description.read_bandwidth,
        matrix_rate=description.matrix_rate,
        num_threads=description.num_threads,
        last_epoch=description.last_epoch,
        shared_memory_bytes=description.shared_memory_bytes,
        in_use=description.in_use,
    )
    return checks.serialize(message)


def decode_description(raw: bytes) -> WorkerDescription:
    """Raises `ProtocolError`."""
    source = checks.parse(pb.WorkerDescription, raw)
    return WorkerDescription(
        protocol_version=source.protocol_version,
        package_version=checks.text("WorkerDescription.package_version", source.package_version, empty=True),
        torch_version=checks.text("WorkerDescription.torch_version", source.torch_version, empty=True),
        transformers_version=checks.text(
            "WorkerDescription.transformers_version", source.transformers_version, empty=True
        ),
        host_id=checks.text("WorkerDescription.host_id", source.host_id, empty=True),
        pid=source.pid,
        device=checks.text("WorkerDescription.device", source.device),
        device_name=checks.text("WorkerDescription.device_name", source.device_name, empty=True),
        memory_total_bytes=source.memory_total_bytes,
        memory_available_bytes=source.memory_available_bytes,
        read_bandwidth=checks.number("WorkerDescription.read_bandwidth", source.read_bandwidth),
        matrix_rate=checks.number("WorkerDescription.matrix_rate", source.matrix_rate),
        num_threads=source.num_threads,
        last_epoch=source.last_epoch,
        shared_memory_bytes=source.shared_memory_bytes,
        in_use=source.in_use,
    )


def encode_report(report: HeartbeatReport) -> bytes:
    """A worker's state."""
    message = pb.HeartbeatReport(
        timestamp=report.timestamp,
        epoch=report.epoch,
        queue_depth=report.queue_depth,
        steps_done=report.steps_done,
        busy_s=report.busy_s,
        uptime_s=report.uptime_s,
        device=report.device,
        device_name=report.device_name,
        gpu_utilization=report.gpu_utilization,
        gpu_memory_used_bytes=report.gpu_memory_used_bytes,
        gpu_memory_total_bytes=report.gpu_memory_total_bytes,
        cpu_utilization=report.cpu_utilization,
        memory_used_bytes=report.memory_used_bytes,
        memory_total_bytes=report.memory_total_bytes,
        process_memory_bytes=report.process_memory_bytes,
        timings=[
            pb.StepTiming(
                num_sequences=timing.num_sequences,
                num_tokens=timing.num_tokens,
                mean_s=timing.mean_s,
                count=timing.count,
                concurrency=timing.concurrency,
            )
            for timing in report.timings
        ],
    )
    return checks.serialize(message)


def decode_report(raw: bytes) -> HeartbeatReport:
    """Raises `ProtocolError`."""
    source = checks.parse(pb.HeartbeatReport, raw)
    checks.at_most("HeartbeatReport.timings", len(source.timings), MAX_TIMINGS)
    has = source.HasField
    return HeartbeatReport(
        timestamp=checks.number("HeartbeatReport.timestamp", source.timestamp),
        epoch=source.epoch,
        queue_depth=source.queue_depth,
        steps_done=source.steps_done,
        busy_s=checks.number("HeartbeatReport.busy_s", source.busy_s),
        uptime_s=checks.number("HeartbeatReport.uptime_s", source.uptime_s),
        device=checks.text("HeartbeatReport.device", source.device),
        device_name=checks.text("HeartbeatReport.device_name", source.device_name, empty=True),
        gpu_utilization=(
            checks.number("HeartbeatReport.gpu_utilization", source.gpu_utilization) if has("gpu_utilization") else None
        ),
        gpu_memory_used_bytes=source.gpu_memory_used_bytes if has("gpu_memory_used_bytes") else None,
        gpu_memory_total_bytes=source.gpu_memory_total_bytes if has("gpu_memory_total_bytes") else None,
        cpu_utilization=checks.number("HeartbeatReport.cpu_utilization", source.cpu_utilization),
        memory_used_bytes=source.memory_used_bytes,
        memory_total_bytes=source.memory_total_bytes,
        process_memory_bytes=source.process_memory_bytes,
        timings=tuple(_read_timing(timing) for timing in source.timings),
    )


def _read_timing(source: pb.StepTiming) -> StepTiming:
    return StepTiming(
        num_sequences=source.num_sequences,
        num_tokens=source.num_tokens,
        mean_s=checks.number("StepTiming.mean_s", source.mean_s),
        count=source.count,
        concurrency=max(source.concurrency, 1),
    )
