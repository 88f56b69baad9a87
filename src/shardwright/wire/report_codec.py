"""What a worker says of itself, and the small requests: protobuf <-> plain values, checked on the way in."""

from __future__ import annotations

from typing import Final

from shardwright.errors import ProtocolError
from shardwright.types import (
    OFFLOADS,
    WEIGHT_SOURCES,
    Epoch,
    HeartbeatReport,
    RankLoad,
    StepTiming,
    WorkerDescription,
)
from shardwright.wire import checks, trace_codec
from shardwright.wire import inference_pb2 as pb
from shardwright.wire.limits import MAX_RANKS, MAX_TIMINGS

EMPTY: Final = b""
"""A message without fields: `DescribeRequest`, `ReleaseReply`."""


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


def encode_heartbeat_request(traces_since: int | None) -> bytes:
    """Ask for a worker's state; None: without traces and timings."""
    return pb.HeartbeatRequest(traces_since=traces_since).SerializeToString()


def decode_heartbeat_request(raw: bytes) -> int | None:
    """The first trace that is wanted; None: no traces and no timings. Raises `ProtocolError`."""
    source = checks.parse(pb.HeartbeatRequest, raw)
    return source.traces_since if source.HasField("traces_since") else None


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
        metrics_port=description.metrics_port,
        offload=description.offload,
        offload_bytes=description.offload_bytes,
        offload_bandwidth=description.offload_bandwidth,
        num_ranks=description.num_ranks,
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
        metrics_port=checks.between("WorkerDescription.metrics_port", source.metrics_port, 0, 65535),
        offload=_offload(source.offload),
        offload_bytes=source.offload_bytes,
        offload_bandwidth=checks.number("WorkerDescription.offload_bandwidth", source.offload_bandwidth),
        num_ranks=checks.between("WorkerDescription.num_ranks", max(source.num_ranks, 1), 1, MAX_RANKS),
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
        gpu_temperature_c=report.gpu_temperature_c,
        gpu_power_w=report.gpu_power_w,
        clock_received_s=report.clock_received_s,
        clock_sent_s=report.clock_sent_s,
        weight_bytes=report.weight_bytes,
        kv_bytes=report.kv_bytes,
        traces=trace_codec.write_traces(report.traces) if report.traces else None,
        next_trace=report.next_trace,
        phases=[trace_codec.write_phase(times) for times in report.phases],
        link=trace_codec.write_link(report.link),
        errors=trace_codec.write_counts(report.errors),
        loaded_bytes=trace_codec.write_counts(report.loaded_bytes),
        offloaded_bytes=report.offloaded_bytes,
        offload_read_bytes=report.offload_read_bytes,
        offload_wait_s=report.offload_wait_s,
        ranks=[
            pb.RankLoad(
                rank=load.rank,
                device=load.device,
                device_name=load.device_name,
                process_memory_bytes=load.process_memory_bytes,
                gpu_utilization=load.gpu_utilization,
                gpu_memory_used_bytes=load.gpu_memory_used_bytes,
                gpu_memory_total_bytes=load.gpu_memory_total_bytes,
                gpu_temperature_c=load.gpu_temperature_c,
                gpu_power_w=load.gpu_power_w,
            )
            for load in report.ranks
        ],
    )
    return checks.serialize(message)


def decode_report(raw: bytes) -> HeartbeatReport:
    """Raises `ProtocolError`."""
    source = checks.parse(pb.HeartbeatReport, raw)
    checks.at_most("HeartbeatReport.timings", len(source.timings), MAX_TIMINGS)
    checks.at_most("HeartbeatReport.ranks", len(source.ranks), MAX_RANKS - 1)
    checks.distinct("HeartbeatReport.ranks: rank", [load.rank for load in source.ranks])
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
        gpu_temperature_c=(
            checks.number("HeartbeatReport.gpu_temperature_c", source.gpu_temperature_c)
            if has("gpu_temperature_c")
            else None
        ),
        gpu_power_w=checks.number("HeartbeatReport.gpu_power_w", source.gpu_power_w) if has("gpu_power_w") else None,
        clock_received_s=checks.number("HeartbeatReport.clock_received_s", source.clock_received_s),
        clock_sent_s=checks.number("HeartbeatReport.clock_sent_s", source.clock_sent_s),
        weight_bytes=source.weight_bytes,
        kv_bytes=source.kv_bytes,
        traces=trace_codec.read_traces(source.traces),
        next_trace=source.next_trace,
        phases=trace_codec.read_phases(source.phases),
        link=trace_codec.read_link(source.link) if has("link") else None,
        errors=trace_codec.read_counts("HeartbeatReport.errors", source.errors),
        loaded_bytes=trace_codec.read_counts("HeartbeatReport.loaded_bytes", source.loaded_bytes, WEIGHT_SOURCES),
        offloaded_bytes=source.offloaded_bytes,
        offload_read_bytes=source.offload_read_bytes,
        offload_wait_s=checks.number("HeartbeatReport.offload_wait_s", source.offload_wait_s),
        ranks=tuple(_read_rank(load) for load in source.ranks),
    )


def _read_rank(source: pb.RankLoad) -> RankLoad:
    has = source.HasField
    return RankLoad(
        rank=checks.between("RankLoad.rank", source.rank, 1, MAX_RANKS - 1),
        device=checks.text("RankLoad.device", source.device),
        device_name=checks.text("RankLoad.device_name", source.device_name, empty=True),
        process_memory_bytes=source.process_memory_bytes,
        gpu_utilization=(
            checks.number("RankLoad.gpu_utilization", source.gpu_utilization) if has("gpu_utilization") else None
        ),
        gpu_memory_used_bytes=source.gpu_memory_used_bytes if has("gpu_memory_used_bytes") else None,
        gpu_memory_total_bytes=source.gpu_memory_total_bytes if has("gpu_memory_total_bytes") else None,
        gpu_temperature_c=(
            checks.number("RankLoad.gpu_temperature_c", source.gpu_temperature_c) if has("gpu_temperature_c") else None
        ),
        gpu_power_w=checks.number("RankLoad.gpu_power_w", source.gpu_power_w) if has("gpu_power_w") else None,
    )


def _offload(tier: str) -> str:
    if tier and tier not in OFFLOADS:
        raise ProtocolError(f"WorkerDescription.offload is {tier[:64]!r}; known: {', '.join(OFFLOADS)}")
    return tier


def _read_timing(source: pb.StepTiming) -> StepTiming:
    return StepTiming(
        num_sequences=source.num_sequences,
        num_tokens=source.num_tokens,
        mean_s=checks.number("StepTiming.mean_s", source.mean_s),
        count=source.count,
        concurrency=max(source.concurrency, 1),
    )
