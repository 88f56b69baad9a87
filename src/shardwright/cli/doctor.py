"""The command `doctor`: what bounds a cluster, what it could give, and what would help."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from shardwright.cli import aio, options
from shardwright.cli.cluster import grpc_transport
from shardwright.cli.console import one_sentence, stderr_console, stdout_console, warn
from shardwright.cli.progress import StartProgress
from shardwright.cli.start import model_and_workers
from shardwright.config import MasterConfig
from shardwright.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from shardwright.runtime.doctor import Examination, Wish
    from shardwright.runtime.session import StageRow

DEFAULT_SEQUENCES = 8
DEFAULT_PROMPT_TOKENS = 512
DEFAULT_NEW_TOKENS = 96
QUICK_PROMPT_TOKENS = 128
QUICK_NEW_TOKENS = 32
DECODE_PROMPT_TOKENS = 64


def add_commands(app: typer.Typer) -> None:
    """Put this module's command under the application."""
    app.command("doctor")(doctor)


@options.expand
def doctor(
    *,
    flags: options.ModelFlags,
    token_budget: options.TokenBudget = None,
    steps_in_flight: options.StepsInFlight = None,
    sequences: Annotated[
        int, typer.Option(metavar="N", min=1, max=256, help="Requests at once in what is predicted and run.")
    ] = DEFAULT_SEQUENCES,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help=f"Length of the long prompt. Default: {DEFAULT_PROMPT_TOKENS}, with --quick {QUICK_PROMPT_TOKENS}.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help=f"Tokens of each answer. Default: {DEFAULT_NEW_TOKENS}, with --quick {QUICK_NEW_TOKENS}.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter prompts and answers, and one round of them.")] = False,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Load nothing: predict from the machines and links alone.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Look at a running server instead; nothing is loaded or measured there."),
    ] = None,
    api_key: options.ApiKey = None,
    timeout: options.RequestTimeout = 10.0,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Measure workers and links, say what bounds decode and prefill, and what would help most.

    Each worker measures its memory, its matrix products and its disk, and each link is timed with messages of decode's
    and of prefill's size. Then the model is loaded, each stage computes a few steps by hand, and a short load shows
    what is achieved beside what was predicted. The proposals are predicted by the same model.

    [cyan]shardwright doctor --model smollm2-135m --local-workers 2[/cyan]

    [cyan]shardwright doctor --model google/gemma-2b --no-run[/cyan]

    [cyan]shardwright doctor --url http://127.0.0.1:8000[/cyan]

    With --url the phases of the last steps that the server watched tell what bounds it now; send it requests meanwhile.
    """
    if url is not None:
        _refuse_beside_url(flags, no_run=no_run, quick=quick)
        look_at_server(url, api_key=api_key, timeout_s=timeout, as_json=as_json)
        return
    settings = flags.master_config(token_budget=token_budget, steps_in_flight=steps_in_flight)
    worker_options = flags.worker_options()
    if sequences > settings.max_running:
        raise ConfigError(f"--sequences is {sequences}, but at most {settings.max_running} run at once (max_running)")
    from shardwright.core.prediction import Workload
    from shardwright.runtime.doctor import Wish

    answer = new_tokens or (QUICK_NEW_TOKENS if quick else DEFAULT_NEW_TOKENS)
    workload = Workload(
        num_sequences=sequences,
        prompt_tokens=prompt_tokens or (QUICK_PROMPT_TOKENS if quick else DEFAULT_PROMPT_TOKENS),
        new_tokens=answer,
        context=DECODE_PROMPT_TOKENS + answer // 2,
    )
    wish = Wish(workload=workload, is_quick=quick, loads_model=not no_run)
    found = aio.run(_examine(settings, wish, local_workers=flags.local_workers, worker_options=worker_options))
    from shardwright.cli.doctor_report import as_json_object, print_report

    for entry, error in found.silent:
        warn(f"examined without {entry.username}: {one_sentence(error)}")
    if as_json:
        print(json.dumps(as_json_object(found), indent=2))
        return
    print_report(stdout_console(), found)


async def _examine(
    config: MasterConfig, wish: Wish, *, local_workers: int, worker_options: Sequence[str]
) -> Examination:
    async with contextlib.AsyncExitStack() as stack:
        progress = stack.enter_context(_LastingProgress(stderr_console()))
        model, entries = await model_and_workers(
            stack, config, progress, local_workers=local_workers, options=worker_options
        )
        from shardwright.runtime.doctor import examine

        return await examine(config, entries, wish, transport=grpc_transport(config), model=model, listener=progress)


class _LastingProgress(StartProgress):
    """Goes on when the stages are loaded: what comes then takes time too."""

    def ready(self, stages: Sequence[StageRow]) -> None:
        """The pipeline takes prompts."""
        count = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
        self.doing(f"ready: {count}")


# --- a running server --------------------------------------------------------------------------------


def _refuse_beside_url(flags: options.ModelFlags, *, no_run: bool, quick: bool) -> None:
    """Raises `ConfigError` for options that a look at a running server has no use for."""
    given = {"--no-run": no_run, "--quick": quick, "--model": flags.model, "--local-workers": flags.local_workers}
    for name, value in given.items():
        if value:
            raise ConfigError(f"{name} says what to measure, but --url only looks at a server that runs; leave one out")


def look_at_server(url: str, *, api_key: str | None, timeout_s: float, as_json: bool) -> None:
    """Say from the server's last steps what bounds it. Raises `ClusterError` where there were none."""
    from shardwright.cli.doctor_report import print_summary, summary_as_json
    from shardwright.cli.server_watch import ServerWatch
    from shardwright.runtime.measured_steps import summarise

    with ServerWatch(url, api_key=api_key, timeout_s=timeout_s) as server:
        view = server.look().view
        steps = server.steps()
    found = {
        "Decode": summarise(steps, is_decode=True),
        "Prefill": summarise(steps, is_decode=False),
    }
    if as_json:
        print(json.dumps(summary_as_json(view, found), indent=2))
        return
    if not any(found.values()):
        raise ClusterError(f"{server.url} has no steps to judge by; send it requests, then look again")
    print_summary(stdout_console(), view, found)
