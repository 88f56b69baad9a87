"""Puts a worker together: machine, tensor cache, shell and listener; the one place where its parts meet."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from shardwright.config import WorkerConfig
from shardwright.errors import ClusterError, ConfigError
from shardwright.runtime.kernel_cache import KernelCache
from shardwright.runtime.lasting_imports import import_for_good
from shardwright.runtime.measure import resolve_device
from shardwright.runtime.probe import Machine
from shardwright.runtime.step_watch import StepWatch
from shardwright.runtime.tensor_cache import TensorCache
from shardwright.runtime.tracing import traced_service
from shardwright.runtime.weight_receiver import WeightReceiver
from shardwright.runtime.worker import WorkerShell
from shardwright.transport.address import join_address
from shardwright.transport.base import Transport

if TYPE_CHECKING:
    from shardwright.runtime.ranks import Ranks

log = logging.getLogger(__name__)

CLOSE_GRACE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWorker:
    """Where a worker listens."""

    address: str  # host:port, for masters and other workers
    metrics_port: int  # for Prometheus; 0: none


@contextlib.asynccontextmanager
async def open_worker(
    config: WorkerConfig,
    transport: Transport,
    address: str,
    *,
    on_lost: Callable[[str], None] | None = None,
    say: Callable[[str], None] = log.warning,
) -> AsyncIterator[OpenWorker]:
    """A worker that listens at `address` until the block ends, and for Prometheus at `metrics_port` of `config.host`.

    With `config.tensor_parallel` it starts the other ranks. If one of them is lost, or the worker hangs in a step,
    `on_lost` is called (on a thread of its own) with what happened, and has to end the process (default: it does).
    `say` gets what a user should know.
    Raises `ConfigError` for a device that is not there and `AddressInUseError` for a taken port, before it listens.
    """
    if config.offload != "none" and config.tensor_parallel > 1:
        raise ConfigError(
            "offload and tensor_parallel exclude each other: a worker with several ranks keeps all its weights"
        )
    # All that computes, computes on one thread. OpenMP keeps a team for each thread that ever did, and once they have
    # more threads than there are cores it no longer waits actively: small products would take twice as long.
    compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
    kernels = KernelCache(config.cache_dir)
    ranks = _start_ranks(config, on_lost, say)

    def open_machine() -> Machine:
        if ranks is not None:
            ranks.join(kernels=kernels.deepspeed_folder, all_reduce=config.all_reduce, kernel_dir=kernels.folder)
        return Machine(
            device=config.device,
            threads=config.threads if ranks is None else ranks.threads,
            memory_bytes=config.memory_bytes,
            cache_dir=config.cache_dir,
            offload=config.offload,
            kernel_dir=kernels.folder,
            ranks=ranks,
        )

    try:
        machine = await asyncio.get_running_loop().run_in_executor(compute, open_machine)
    except BaseException:
        compute.shutdown(wait=False)
        if ranks is not None:
            ranks.kill()
        raise
    cache = TensorCache(config.cache_dir, limit_bytes=config.cache_limit_bytes)
    receiver = WeightReceiver(cache, cache_dir=config.cache_dir)
    watch = _watch_steps(on_lost) if ranks is None else None
    shell = WorkerShell(
        device=str(machine.device),
        num_threads=machine.num_threads,
        compute=compute,
        probe=machine,
        receiver=receiver,
        transport=transport,
        offload=machine.offload,
        kernel_dir=kernels.folder,
        ranks=ranks,
        watch=watch,
    )
    async with contextlib.AsyncExitStack() as stack:
        if ranks is not None:
            stack.push_async_callback(asyncio.to_thread, ranks.close)
        if watch is not None:
            stack.callback(watch.close)
        stack.push_async_callback(receiver.close)
        stack.push_async_callback(shell.close)
        if config.metrics_port is not None:
            shell.metrics_port = await _serve_metrics(shell, config.host, config.metrics_port, stack)
        service = await stack.enter_async_context(traced_service(config.otlp_endpoint, shell))
        listener = await transport.serve(address, service)
        stack.push_async_callback(listener.close, grace_s=CLOSE_GRACE_S)
        yield OpenWorker(address=listener.address, metrics_port=shell.metrics_port)


def _build_kernel(config: WorkerConfig) -> None:
    """Compile the kernel of linear layers on a CPU where that was never done: the machine is measured with it.

    Raises `ConfigError` for a device that is not there.
    """
    import_for_good("torch")
    if resolve_device(config.device).type == "cpu":
        from shardwright.model.product import find_product

        find_product(KernelCache(config.cache_dir).folder)


def _stop_building() -> None:
    """The worker may end while a kernel is compiled: the compiler ends with it."""
    from shardwright.model.kernel_build import stop_building

    stop_building()


def _start_ranks(
    config: WorkerConfig, on_lost: Callable[[str], None] | None, say: Callable[[str], None]
) -> Ranks | None:
    """The other ranks' processes. They end with the thread that starts them: the event loop's."""
    if config.tensor_parallel == 1:
        return None
    from shardwright.model.deepspeed_kernel import check_deepspeed
    from shardwright.runtime.measure import usable_cores
    from shardwright.runtime.ranks import Ranks, rank_devices

    check_deepspeed()
    devices = rank_devices(resolve_device(config.device), config.tensor_parallel)
    threads = max((config.threads or usable_cores()) // config.tensor_parallel, 1)
    holder: list[Ranks] = []

    def end(what: str) -> None:
        for ranks in holder:
            ranks.kill()
        _end_process(what)

    holder.append(Ranks(devices=devices, threads=threads, on_lost=on_lost or end, say=say))
    return holder[0]


def _watch_steps(on_lost: Callable[[str], None] | None) -> StepWatch:
    """Who notices that this process hangs in a step."""

    def lose(what: str) -> None:
        (on_lost or _end_process)(f"this worker hangs in a step: {what}; it can't go on, and ends")

    return StepWatch(lose)


def _end_process(what: str) -> NoReturn:
    """The compute thread may stand in a step that never ends, so nothing is put in order."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {what}\n".encode())
    os._exit(ClusterError.exit_code)


async def _serve_metrics(shell: WorkerShell, host: str, port: int, stack: contextlib.AsyncExitStack) -> int:
    """Answer Prometheus until the stack is closed; gives the port."""
    from shardwright.runtime.worker_metrics import MetricsServer  # here: most workers need none of it

    server = await asyncio.to_thread(MetricsServer, shell, host=host, port=port)
    stack.push_async_callback(asyncio.to_thread, server.close)
    return server.port


async def run_worker(
    config: WorkerConfig, *, announce: Callable[[str, str], None], say: Callable[[str], None] = log.warning
) -> None:
    """Serve as a worker over gRPC until cancelled.

    `announce` gets host:port once it listens, and host:port for Prometheus (empty: none); `say` what a user should
    know.
    """
    from shardwright.transport.grpc import GrpcTransport

    transport = GrpcTransport(max_frame_bytes=config.max_frame_bytes)
    try:
        await asyncio.to_thread(_build_kernel, config)
        async with open_worker(config, transport, join_address(config.host, config.port), say=say) as worker:
            announce(worker.address, join_address(config.host, worker.metrics_port) if worker.metrics_port else "")
            # The master looks at its model meanwhile; a stage can then be built without waiting for imports.
            threading.Thread(target=_import_model_code, name="import", daemon=True).start()
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        _stop_building()
        raise


def _import_model_code() -> None:
    """Load the modules that stages are built with, which takes seconds."""
    import_for_good("shardwright.model.stage")
