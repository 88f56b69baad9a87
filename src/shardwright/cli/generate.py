"""The command `generate`: prompts in, answers out, as text for people or as JSON for programs."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from shardwright.cli import aio, options
from shardwright.cli.answers import Answer, JsonPrinter, Printer, TextPrinter, Wish, answer_all
from shardwright.cli.console import stderr_console, warn
from shardwright.cli.prompts import Prompt, Split, read_prompts
from shardwright.cli.start import session_for
from shardwright.cli.summary import print_summary
from shardwright.config import MasterConfig
from shardwright.errors import ConfigError
from shardwright.types import SamplingParams

DEFAULT_MAX_NEW_TOKENS = 256


def add_commands(app: typer.Typer) -> None:
    """Put this module's command under the application."""
    app.command("generate")(generate)


@options.expand
def generate(
    *,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="What to answer or to continue; - reads standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read prompts from a file.", dir_okay=False)
    ] = None,
    split: Annotated[
        Split,
        typer.Option(
            help="What ends a prompt in a file or on standard input: each line, a blank line, or nothing at all."
        ),
    ] = Split.LINE,
    prompt_ids: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt-ids",
            metavar="IDS",
            help="A prompt as token ids, such as 5,17,3; may be repeated, needs no tokenizer.",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Apply the model's chat template, or don't. Default: --chat if it has one.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Most tokens of an answer. Default: {DEFAULT_MAX_NEW_TOKENS}."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of prompt and answer together.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 always takes the likeliest token; 1 samples as the model says.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="P", help="Sample from the likeliest tokens that sum up to P.")] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Sample from the K likeliest tokens; 0: no limit.")] = 0,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="S", help="The same seed gives the same answer, however the model is cut. Default: drawn."
        ),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on past the model's end token, up to the limit.")] = False,
    as_json: options.AsJson = False,
    summary: Annotated[
        bool | None,
        typer.Option(
            "--summary/--no-summary",
            help="Print stages and rates on standard error at the end. Default: in a terminal.",
            show_default=False,
        ),
    ] = None,
    flags: options.ModelFlags,
    token_budget: options.TokenBudget = None,
    steps_in_flight: options.StepsInFlight = None,
    recover: options.Recover = None,
    heartbeat_timeout: options.HeartbeatTimeout = None,
    debug: options.Debug = False,
) -> None:
    """Answer prompts with a model cut over several workers.

    Prompts come from the argument, from a file, or from standard input, one a line; several run together as one
    batch and are answered in their order. Answers go to standard output and nothing else does.

    [cyan]shardwright generate --model smollm2-135m --local-workers 2 "Why is the sky blue?"[/cyan]

    [cyan]shardwright generate --file prompts.txt --max-new-tokens 64 --json > answers.jsonl[/cyan]

    [cyan]shardwright generate --split none < letter.txt[/cyan]

    With --json each line is one prompt's object: prompt_ids, token_ids, text, finish_reason (stop, length, abort or
    error), stages (worker, start, end; end is exclusive), prefill_s and decode_s; after an error also error.
    """
    settings = flags.master_config(
        token_budget=token_budget,
        steps_in_flight=steps_in_flight,
        recover=recover,
        heartbeat_timeout_s=heartbeat_timeout,
    )
    wish = make_wish(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        ignore_eos=ignore_eos,
        chat=chat,
    )
    worker_options = flags.worker_options()
    prompts = read_prompts(argument=prompt, file=file, ids=prompt_ids or (), split=split)
    show = Show(as_json=as_json, summary=summary if summary is not None else sys.stderr.isatty() and not as_json)
    code = aio.run(
        answer_prompts(settings, prompts, wish, show, local_workers=flags.local_workers, options=worker_options)
    )
    raise typer.Exit(code)


def make_wish(
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    max_new_tokens: int | None,
    max_length: int | None,
    ignore_eos: bool = False,
    chat: bool | None = None,
) -> Wish:
    """Check the parameters of an answer. Raises `InvalidRequestError` or `ConfigError`."""
    if max_new_tokens is not None and max_length is not None:
        raise ConfigError("--max-new-tokens and --max-length were given; the first counts the answer alone, choose one")
    for name, value in (("--max-new-tokens", max_new_tokens), ("--max-length", max_length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if temperature == 0 and (top_p < 1.0 or top_k > 0):
        warn("--top-p and --top-k have no effect at temperature 0; add for example --temperature 0.7")
    # A seed that was drawn is as good as one that was given: only nobody knows it beforehand.
    drawn = secrets.randbits(32) if seed is None and temperature > 0 else 0
    return Wish(
        sampling=SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, seed=drawn if seed is None else seed
        ),
        max_new_tokens=DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        max_length=max_length,
        ignore_eos=ignore_eos,
        chat=chat,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Show:
    """What a command prints beside and instead of the text."""

    as_json: bool
    summary: bool


async def answer_prompts(
    config: MasterConfig,
    prompts: Sequence[Prompt],
    wish: Wish,
    show: Show,
    *,
    local_workers: int,
    options: Sequence[str],
) -> int:
    """Open a session, answer all prompts, print; gives the exit code: that of the first prompt that failed, or 0."""
    config = replace(config, max_waiting=0)  # all prompts are one user's, however many
    async with session_for(config, local_workers=local_workers, options=options) as session:
        answers = [Answer(prompt=prompt) for prompt in prompts]
        printer: Printer = (
            JsonPrinter(answers, session.stages, sys.stdout) if show.as_json else TextPrinter(answers, sys.stdout)
        )
        if show.summary:
            await session.refresh()
        before = session.engine.snapshot()
        await answer_all(session, answers, wish, printer)
        if show.summary:
            await session.refresh()
            after = session.engine.snapshot()
            print_summary(stderr_console(), stages=session.stages, answers=answers, before=before, after=after)
            if wish.sampling.temperature > 0:
                stderr_console().print(f"seed {wish.sampling.seed}")
    return next((answer.exit_code for answer in answers if answer.exit_code), 0)
