"""Cuts a stage over the ranks of one worker with DeepSpeed's AutoTP, and lets them add up what each computed.

Knows ranks as numbers and a process group; nothing of processes and how they were started. DeepSpeed is imported when
a group is joined: it takes a second, logs to standard output and belongs to an extra.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwright.model.deepspeed_kernel import import_deepspeed, load_kernel, quiet_deepspeed
from shardwright.model.families import FamilyPlan
from shardwright.model.rank_plan import RankPlan, apply_shapes, hook_joint_norm, patch_head_counts
from shardwright.model.skeleton import StageEnd
from shardwright.types import LayerRange

_ADDRESS = "127.0.0.1"
_COLLECTIVE_TIMEOUT = timedelta(days=365)
"""No limit of its own: whoever started the ranks watches them, and an idle worker may wait for its next step."""


class RankGroup:
    """This process's place among the ranks of its worker, once all have joined. One for each process."""

    def __init__(self, *, rank: int, num_ranks: int, device: torch.device, all_reduce: str) -> None:
        """`all_reduce` names what sums: `shm`, `gloo` or `nccl`."""
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self.all_reduce = all_reduce
        self.waits = False
        """Whether this rank may be waiting for the others just now: it is in a sum, or on its way into one."""
        self._comm: Any = importlib.import_module("deepspeed.comm")
        self.handle: Any = self._comm.get_world_group()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Say that this rank may wait for the others, for whoever watches it."""
        self.waits = True
        yield
        self.waits = False  # not after an error, which ends the worker

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up the ranks' tensors, in place."""
        with self.waiting():
            self._comm.inference_all_reduce(tensor, group=self.handle)
        return tensor

    def join_last(self, tensor: torch.Tensor, num_ranks: int) -> torch.Tensor:
        """All ranks' tensors, equal in shape, one behind the other along the last dimension."""
        pieces = [torch.empty_like(tensor) for _ in range(num_ranks)]
        with self.waiting():
            torch.distributed.all_gather(pieces, tensor.contiguous(), group=self.handle)
        return torch.cat(pieces, dim=-1)

    def collect(self, tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        """On rank 0 all ranks' tensors along the last dimension, which are `sizes` long; None on the others."""
        widest = max(sizes)
        if tensor.shape[-1] < widest:
            tensor = nn.functional.pad(tensor, (0, widest - tensor.shape[-1]))
        tensor = tensor.contiguous()
        if self.rank != 0:
            with self.waiting():
                torch.distributed.gather(tensor, dst=0, group=self.handle)
            return None
        pieces = [torch.empty_like(tensor) for _ in sizes]
        with self.waiting():
            torch.distributed.gather(tensor, pieces, dst=0, group=self.handle)
        return torch.cat([piece[..., :size] for piece, size in zip(pieces, sizes, strict=True)], dim=-1)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor on every rank; the others give one of the same shape and dtype that is written over."""
        tensor = tensor.contiguous()
        with self.waiting():
            torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=self.handle)
        return tensor

    def close(self) -> None:
        """Leave the group; all ranks do, or have ended."""
        torch.distributed.destroy_process_group()
        comm: Any = importlib.import_module("deepspeed.comm.comm")
        comm.cdb = None


def join_group(*, rank: int, num_ranks: int, device: torch.device, meeting: Path, kernels: Path | None) -> RankGroup:
    """Meet the other ranks at `meeting`, a file in a folder that only they can write to. Blocks until all are there.

    `kernels` is where DeepSpeed's shared-memory all-reduce was compiled (`deepspeed_kernel.build_kernel`); None: the
    process group sums.
    """
    os.environ.update(  # DeepSpeed and its kernel read these, and nothing else
        RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(num_ranks),
        MASTER_ADDR=_ADDRESS,
        MASTER_PORT=re.sub(r"\W", "", meeting.parent.name),  # names the kernel's shared memory; the folder is random
        GLOO_SOCKET_IFNAME=_loopback(),
    )
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    import_deepspeed(kernel=kernels is not None)
    with quiet_deepspeed():
        comm: Any = importlib.import_module("deepspeed.comm")
        store = torch.distributed.FileStore(str(meeting), num_ranks)  # type: ignore[attr-defined]
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=num_ranks, timeout=_COLLECTIVE_TIMEOUT
        )
        if kernels is not None:
            load_kernel(kernels)
        comm.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    if kernels is not None:
        torch.distributed.barrier()  # each has opened the others' memory, which then needs no name
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{_ADDRESS}_{os.environ['MASTER_PORT']}_{rank}"
        (Path("/dev/shm") / name).unlink(missing_ok=True)  # noqa: S108  or it would stay when the process is killed
    return RankGroup(
        rank=rank, num_ranks=num_ranks, device=device, all_reduce="shm" if kernels is not None else backend
    )


def _loopback() -> str:
    """The name of the interface that leads nowhere but to this machine."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])


# --- cutting -------------------------------------------------------------------------------------------------


class SummedLinear(nn.Module):
    """A linear layer that has some of the input features; the ranks' outputs are added up.

    The same as DeepSpeed's `LinearAllreduce`, around a layer of any form, such as a packed one.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, group: RankGroup) -> None:
        super().__init__()
        self.inner = _linear(weight, None)
        self._bias = bias
        self._group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features of this rank] -> [..., out_features]."""
        result = self._group.sum(self.inner(x))
        return result if self._bias is None else result + self._bias


def cut_stage(model: nn.Module, plan: FamilyPlan, ranks: RankPlan, layers: LayerRange, group: RankGroup) -> None:
    """Replace a sliced meta model's linear layers by this rank's parts of them, as DeepSpeed's AutoTP makes them."""
    auto_tp = _auto_tp(model, ranks, group)
    parts = {f"{path}.{leaf}" for path in (*ranks.columns, *ranks.rows) for leaf in ("weight", "bias")}
    for path in sorted(ranks.columns | ranks.rows):
        parent_name, _, name = path.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            child = parent.get_submodule(name)
        except AttributeError:
            continue  # another stage's layer
        part = auto_tp._replace(child, path, False)
        setattr(parent, name, part)
        if path in ranks.rows:
            _tell_of_waiting(part, group)
    for name, parameter in model.named_parameters():
        if name in parts and name in ranks.shards:
            wanted = ranks.shards[name].size
            assert parameter.shape[ranks.shards[name].dim] == wanted, f"AutoTP cuts {name} to {list(parameter.shape)}"
    apply_shapes(model, {name: shard for name, shard in ranks.shards.items() if name not in parts})
    patch_head_counts(model, plan, ranks.num_ranks, layers)


def _tell_of_waiting(layer: nn.Module, group: RankGroup) -> None:
    """DeepSpeed's layers sum by themselves, somewhere in their forward."""

    def before(_: nn.Module, __: tuple[Any, ...]) -> None:
        group.waits = True

    def after(_: nn.Module, __: tuple[Any, ...], ___: torch.Tensor) -> None:
        group.waits = False

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def _auto_tp(model: nn.Module, ranks: RankPlan, group: RankGroup) -> Any:
    """AutoTP with a policy that names every layer. Its division by KV heads would leave ranks without any."""
    rules: Any = importlib.import_module("deepspeed.module_inject.auto_tp")
    config: Any = importlib.import_module("deepspeed.module_inject.autotp_config")
    shard: Any = importlib.import_module("deepspeed.module_inject.tp_shard")
    kinds = config.PartitionType
    specs = [
        config.TPLayerSpec(
            patterns=[f"^{re.escape(path)}\\.weight$"],
            partition_type=kinds.ROW if path in ranks.rows else kinds.COLUMN,
            shape=(ranks.fused[path], -1) if path in ranks.fused else None,
        )
        for path in sorted(ranks.columns | ranks.rows)
    ]
    with quiet_deepspeed():
        auto_tp = rules.AutoTP(
            module=model,
            all_reduce_linears=(),
            prefix="",
            state_dict=None,
            linear_layer_setting=None,
            orig_layer_impl=None,
            partition_config=config.AutoTPConfig(tp_size=ranks.num_ranks, layer_specs=specs, use_default_specs=False),
        )
    auto_tp.set_tensor_parallel_config(ranks.num_ranks, group.handle)
    auto_tp.tp_meta = shard.AutoTPMeta(num_kv_heads=ranks.num_ranks)
    return auto_tp


def plain_linear(model: nn.Module, path: str, ranks: RankPlan, group: RankGroup) -> str:
    """Put a plain linear layer in the place of AutoTP's filled one, for whoever swaps plain ones; gives its name."""
    if path not in ranks.columns | ranks.rows:
        return path
    parent_name, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_name)
    layer: Any = parent.get_submodule(name)
    if path in ranks.columns:
        setattr(parent, name, _linear(layer.weight, layer.bias))
        return path
    setattr(parent, name, SummedLinear(layer.weight, layer.bias, group))
    return f"{path}.inner"


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def join_ranks(model: nn.Module, ranks: RankPlan, group: RankGroup) -> None:
    """Let a filled part of a stage meet the others' where the layers themselves don't: norms, embedding and head."""
    modules = dict(model.named_modules())
    for norm in ranks.joint_norms:
        if norm.module in modules:
            hook_joint_norm(modules[norm.module], norm, ranks.rank, ranks.num_ranks, gather=group.join_last)
    start = sum(ranks.vocabulary[: ranks.rank])
    end = start + ranks.vocabulary[ranks.rank]
    if _has_weight(modules[ranks.embedding]):
        _hook_embedding(modules[ranks.embedding], start, end, group)
    if _has_weight(modules[ranks.head]):

        def collect(_: nn.Module, __: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
            whole = group.collect(logits, ranks.vocabulary)
            if whole is None:
                raise StageEnd(logits)  # rank 0 goes on alone
            return whole

        modules[ranks.head].register_forward_hook(collect)


def _has_weight(module: nn.Module) -> bool:
    """Whether this stage holds the module, in whatever form; a stand-in keeps plain meta tensors."""
    return not (isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.is_meta)


def _hook_embedding(module: nn.Module, start: int, end: int, group: RankGroup) -> None:
    """Each rank looks up the tokens whose rows it has; adding zeros to a row leaves it as it is."""
    inside: list[torch.Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        inside.append((ids >= start) & (ids < end))
        return ((ids - start).clamp(0, end - start - 1), *args[1:])

    def after(_: nn.Module, __: tuple[Any, ...], rows: torch.Tensor) -> torch.Tensor:
        return group.sum(rows.masked_fill(~inside.pop()[..., None], 0.0))

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str, list[int]]]:
    """Names, dtypes and shapes, for ranks that will take them by `RankGroup.share`."""
    return [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors.items()]


def receive_tensors(described: list[tuple[str, str, list[int]]], group: RankGroup) -> dict[str, torch.Tensor]:
    """Rank 0's tensors, in the order in which it shares them."""
    return {
        name: group.share(torch.empty(shape, dtype=getattr(torch, dtype), device=group.device))
        for name, dtype, shape in described
    }
