"""Puts a worker together: machine, tensor cache, shell and listener; the one place where its parts meet."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shardwright.config import WorkerConfig
from shardwright.runtime.measure import resolve_device
from shardwright.runtime.probe import Machine
from shardwright.runtime.tensor_cache import TensorCache
from shardwright.runtime.tracing import traced_service
from shardwright.runtime.weight_receiver import WeightReceiver
from shardwright.runtime.worker import WorkerShell
from shardwright.transport.address import join_address
from shardwright.transport.base import Transport

CLOSE_GRACE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWorker:
    """Where a worker listens."""

    address: str  # host:port, for masters and other workers
    metrics_port: int  # for Prometheus; 0: none


@contextlib.asynccontextmanager
async def open_worker(config: WorkerConfig, transport: Transport, address: str) -> AsyncIterator[OpenWorker]:
    """A worker that listens at `address` until the block ends, and for Prometheus at `metrics_port` of `config.host`.

    Raises `ConfigError` for a device that is not there and `AddressInUseError` for a taken port, before it listens.
    """
    # All that computes, computes on one thread. OpenMP keeps a team for each thread that ever did, and once they have
    # more threads than there are cores it no longer waits actively: small products would take twice as long.
    compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
    kernel_dir = _kernel_dir(config)
    try:
        machine = await asyncio.get_running_loop().run_in_executor(
            compute,
            lambda: Machine(
                device=config.device,
                threads=config.threads,
                memory_bytes=config.memory_bytes,
                cache_dir=config.cache_dir,
                offload=config.offload,
                kernel_dir=kernel_dir,
            ),
        )
    except BaseException:
        compute.shutdown(wait=False)
        raise
    cache = TensorCache(config.cache_dir, limit_bytes=config.cache_limit_bytes)
    receiver = WeightReceiver(cache, cache_dir=config.cache_dir)
    shell = WorkerShell(
        device=str(machine.device),
        num_threads=machine.num_threads,
        compute=compute,
        probe=machine,
        receiver=receiver,
        transport=transport,
        offload=machine.offload,
        kernel_dir=kernel_dir,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(receiver.close)
        stack.push_async_callback(shell.close)
        if config.metrics_port is not None:
            shell.metrics_port = await _serve_metrics(shell, config.host, config.metrics_port, stack)
        service = await stack.enter_async_context(traced_service(config.otlp_endpoint, shell))
        listener = await transport.serve(address, service)
        stack.push_async_callback(listener.close, grace_s=CLOSE_GRACE_S)
        yield OpenWorker(address=listener.address, metrics_port=shell.metrics_port)


def _kernel_dir(config: WorkerConfig) -> Path:
    return config.cache_dir / "kernels"


def _build_kernel(config: WorkerConfig) -> None:
    """Compile the kernel of linear layers on a CPU where that was never done: the machine is measured with it.

    Raises `ConfigError` for a device that is not there.
    """
    if resolve_device(config.device).type == "cpu":
        from shardwright.model.product import find_product

        find_product(_kernel_dir(config))


async def _serve_metrics(shell: WorkerShell, host: str, port: int, stack: contextlib.AsyncExitStack) -> int:
    """Answer Prometheus until the stack is closed; gives the port."""
    from shardwright.runtime.worker_metrics import MetricsServer  # here: most workers need none of it

    server = await asyncio.to_thread(MetricsServer, shell, host=host, port=port)
    stack.push_async_callback(asyncio.to_thread, server.close)
    return server.port


async def run_worker(config: WorkerConfig, *, announce: Callable[[str, str], None]) -> None:
    """Serve as a worker over gRPC until cancelled.

    `announce` gets host:port once it listens, and host:port for Prometheus (empty: none).
    """
    from shardwright.transport.grpc import GrpcTransport

    transport = GrpcTransport(max_frame_bytes=config.max_frame_bytes)
    await asyncio.to_thread(_build_kernel, config)
    async with open_worker(config, transport, join_address(config.host, config.port)) as worker:
        announce(worker.address, join_address(config.host, worker.metrics_port) if worker.metrics_port else "")
        # The master looks at its model meanwhile; a stage can then be built without waiting for imports.
        threading.Thread(target=_import_model_code, name="import", daemon=True).start()
        await asyncio.Event().wait()


def _import_model_code() -> None:
    """Load the modules that stages are built with, which takes seconds."""
    importlib.import_module("shardwright.model.stage")
