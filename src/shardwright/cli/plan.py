"""The commands that look at a model without answering with it: `plan` what goes where, `verify` that it is exact."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from shardwright.cli import aio, figures, options
from shardwright.cli.cluster import grpc_transport
from shardwright.cli.console import one_sentence, stderr_console, stdout_console, warn
from shardwright.cli.progress import StartProgress
from shardwright.cli.start import model_and_workers
from shardwright.config import MIB, MasterConfig
from shardwright.errors import MismatchError, WorkerUnreachableError

if TYPE_CHECKING:
    from shardwright.core.placement import Placement
    from shardwright.runtime.session import OpenModel
    from shardwright.runtime.verify import Verdict
    from shardwright.types import WorkerId


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands under the application."""
    app.command("plan")(plan)
    app.command("verify")(verify)


@options.expand
def plan(*, flags: options.ModelFlags, as_json: options.AsJson = False, debug: options.Debug = False) -> None:
    """Show which worker would hold which layers, and why. Loads no weights.

    The workers are asked what memory and speed they measured of themselves; the model's files are looked for (and
    downloaded from the hub if need be), but only their headers are read.

    [cyan]shardwright plan --model google/gemma-2b[/cyan]

    [cyan]shardwright plan --model smollm2-135m --local-workers 3[/cyan]
    """
    settings, worker_options = flags.master_config(), flags.worker_options()
    opened, ranks, placement = aio.run(
        _plan(settings, local_workers=flags.local_workers, worker_options=worker_options)
    )
    if as_json:
        print(json.dumps(plan_as_json(opened, ranks, placement), indent=2))
        return
    _print_plan(opened, ranks, placement)


async def _plan(
    config: MasterConfig, *, local_workers: int, worker_options: Sequence[str]
) -> tuple[OpenModel, dict[WorkerId, int], Placement]:
    async with contextlib.AsyncExitStack() as stack:
        progress = stack.enter_context(StartProgress(stderr_console()))
        model, entries = await model_and_workers(
            stack, config, progress, local_workers=local_workers, options=worker_options, with_tokenizer=False
        )
        progress.doing("asking the workers what they measured")
        from shardwright.core.placement import place
        from shardwright.runtime.session import check_versions, fit_ranks, meet_workers, placement_settings

        known, silent = await meet_workers(grpc_transport(config), entries, timeout_s=config.connect_timeout_s)
        for worker in known:
            stack.push_async_callback(worker.client.close)
        if not known:
            raise WorkerUnreachableError("; ".join(one_sentence(error) for _, error in silent))
        for entry, error in silent:
            warn(f"planned without {entry.username}: {one_sentence(error)}")
        check_versions(known)
        model = fit_ranks(model, known)
        capacities = tuple(worker.capacity for worker in known)
        ranks = {worker.worker_id: worker.description.num_ranks for worker in known}
        return model, ranks, place(model.costs, capacities, placement_settings(config, model.costs))


def plan_as_json(model: OpenModel, ranks: Mapping[WorkerId, int], placement: Placement) -> dict[str, object]:
    """For `plan --json`: bytes and seconds; `end` is exclusive. `ranks` are the devices of each worker."""
    return {
        "model": model.costs.name,
        "dtype": model.dtype,
        "num_layers": model.costs.num_layers,
        "stages": [
            {
                "worker": stage.worker_id,
                "ranks": ranks.get(stage.worker_id, 1),
                "start": stage.layers.start,
                "end": stage.layers.end,
                "weight_bytes": stage.weight_bytes,
                "offloaded_bytes": stage.offloaded_bytes,
                "offloaded_layers": list(stage.offloaded_layers),
                "kv_bytes": stage.kv_bytes,
                "step_s": stage.step_s,
                "reason": stage.reason,
            }
            for stage in placement.stages
        ],
        "num_blocks": placement.num_blocks,
        "latency_s": placement.latency_s,
        "left_out": [{"worker": each.worker_id, "reason": each.reason} for each in placement.left_out],
    }


def _print_plan(model: OpenModel, ranks: Mapping[WorkerId, int], placement: Placement) -> None:
    console = stdout_console()
    console.print(
        f"{model.costs.name}, {model.dtype}, {model.costs.num_layers} layers, {placement.num_blocks} KV blocks",
        markup=False,
    )
    offloads = any(stage.offloaded_bytes for stage in placement.stages)
    table = Table(
        "stage", "worker", "layers", "weights MiB", *(["offloaded MiB"] if offloads else []), "KV MiB", "step ms"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for index, stage in enumerate(placement.stages):
        table.add_row(
            str(index),
            figures.with_ranks(stage.worker_id, ranks.get(stage.worker_id, 1)),
            str(stage.layers),
            f"{stage.weight_bytes / MIB:.1f}",
            *([f"{stage.offloaded_bytes / MIB:.1f}"] if offloads else []),
            f"{stage.kv_bytes / MIB:.1f}",
            f"{stage.step_s * 1000:.2f}",
        )
    console.print(table)
    for index, stage in enumerate(placement.stages):
        console.print(f"stage {index}: {stage.reason}", markup=False, soft_wrap=True)
    for left_out in placement.left_out:
        console.print(f"not used: {left_out.worker_id}: {left_out.reason}", markup=False, soft_wrap=True)
    console.print(
        f"Predicted from what the workers measured: {placement.latency_s * 1000:.2f} ms for a step of one sequence.",
        markup=False,
        soft_wrap=True,
    )


def verify(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts to compare on. Default: a few built in.")
    ] = None,
    model: options.Model = None,
    stages: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="Cut the model into N stages.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to compare for each prompt.")] = 32,
    tensor_parallel: options.TensorParallel = None,
    dtype: options.Dtype = None,
    token_budget: options.TokenBudget = None,
    block_size: options.BlockSize = None,
    cache_dir: options.CacheDir = None,
    config: options.ConfigFile = None,
    debug: options.Debug = False,
) -> None:
    """Run the split against the whole model in one process; say identical, or where they first differ.

    Needs memory for the model twice. In bfloat16 and float16 the whole model's two best tokens can be nearer to each
    other than a rounding; a difference there is told, but counts as passed. Exit code 5 for any other.

    [cyan]shardwright verify --model smollm2-135m --stages 4 --dtype float32[/cyan]

    [cyan]shardwright verify --model gemma3-270m --stages 2 --tensor-parallel 2 --dtype float32[/cyan]
    """
    settings = options.master_config(
        config, model=model, dtype=dtype, cache_dir=cache_dir, token_budget=token_budget, block_size=block_size
    )
    opened, verdicts = aio.run(
        _verify(
            settings,
            num_stages=stages,
            num_ranks=tensor_parallel or 1,
            max_new_tokens=max_new_tokens,
            prompts=prompts or (),
        )
    )
    cut = f"{min(stages, opened.costs.num_layers)} stages"
    if tensor_parallel is not None and tensor_parallel > 1:
        cut += f" of {tensor_parallel} ranks"
    for number, verdict in enumerate(verdicts, start=1):
        print(f"prompt {number}: {describe(verdict)}")
    failed = [str(number) for number, verdict in enumerate(verdicts, start=1) if not verdict.passed]
    if failed:
        raise MismatchError(
            f"{opened.costs.name} in {cut}, {opened.dtype}: differs from the whole model on prompt {', '.join(failed)}"
        )
    exact = all(verdict.difference is None for verdict in verdicts)
    word = "identical to" if exact else "the same within rounding as"
    print(f"{opened.costs.name} in {cut}, {opened.dtype}: {word} the whole model")


async def _verify(
    config: MasterConfig, *, num_stages: int, num_ranks: int, max_new_tokens: int, prompts: Sequence[str]
) -> tuple[OpenModel, list[Verdict]]:
    # The whole model's loader draws bars of its own over ours; tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from shardwright.runtime.verify import verify as compare

    with StartProgress(stderr_console()) as progress:
        progress.doing(f"comparing {config.model} in {num_stages} stages with the whole model")
        return await compare(
            config,
            num_stages=num_stages,
            num_ranks=num_ranks,
            max_new_tokens=max_new_tokens,
            listener=progress,
            prompts=prompts,
        )


def describe(verdict: Verdict) -> str:
    """One prompt's comparison in a sentence."""
    difference = verdict.difference
    if difference is None:
        return f"identical, {len(verdict.split_tokens)} tokens after {len(verdict.prompt)}"
    split, whole = (
        "the end" if token is None else f"token {token}" for token in (difference.split_token, difference.whole_token)
    )
    where = f"first differs at new token {difference.index}: split gives {split}, the whole model {whole}"
    if math.isinf(difference.margin):
        return where
    margin = f"its logits for them are {difference.margin:.4g} apart there"
    if difference.within_rounding:
        return f"{where}; {margin}, within rounding ({difference.rounding:.4g})"
    return f"{where}; {margin}, more than rounding ({difference.rounding:.4g})"
