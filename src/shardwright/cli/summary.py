"""The table after an answer: who computed what, how busy each stage was, and how fast it all went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from shardwright.cli.answers import Answer
from shardwright.config import MIB
from shardwright.types import ClusterSnapshot, FinishReason, HeartbeatReport, WorkerId

if TYPE_CHECKING:
    from shardwright.runtime.session import StageRow


def print_summary(
    console: Console,
    *,
    stages: Sequence[StageRow],
    answers: Sequence[Answer],
    before: ClusterSnapshot,
    after: ClusterSnapshot,
) -> None:
    """Print stages and rates. `before` and `after` are snapshots from around the answers."""
    console.print()
    console.print(_stage_table(stages, before, after))
    console.print(rates(answers), soft_wrap=True)


def _stage_table(stages: Sequence[StageRow], before: ClusterSnapshot, after: ClusterSnapshot) -> Table:
    table = Table("stage", "worker", "layers", "weights MiB", "KV blocks", "busy %")
    for column in table.columns[2:]:
        column.justify = "right"
    for stage in stages:
        busy = busy_percent(_report(before, stage.worker), _report(after, stage.worker))
        table.add_row(
            str(stage.stage),
            stage.worker,
            f"{stage.start}-{stage.end - 1}",
            f"{stage.weights_bytes / MIB:.1f}",
            str(stage.kv_blocks),
            "-" if busy is None else f"{busy:.0f}",
        )
    return table


def rates(answers: Sequence[Answer]) -> str:
    """Prompt and decode tokens/s over all prompts together, and the time to first token."""
    served = [answer for answer in answers if answer.first_token_s is not None and answer.last_token_s is not None]
    if not served:
        return "no token came"
    start = min(answer.submitted_s for answer in served)
    first = [answer.first_token_s or 0.0 for answer in served]
    last = max(answer.last_token_s or 0.0 for answer in served)
    prompt_tokens = sum(len(answer.prompt_ids) for answer in served)
    # Each answer's first token comes out of its prompt's computation; decoding makes the others.
    decoded = sum(len(answer.token_ids) - 1 for answer in served)
    parts = [f"prompt {prompt_tokens} tokens at {_rate(prompt_tokens, max(first) - start)}"]
    parts.append(f"decode {decoded} tokens at {_rate(decoded, last - min(first))}")
    waits = sorted(answer.prefill_s for answer in served)
    to_first = f"first token after {waits[0]:.2f} s"
    parts.append(to_first if len(waits) == 1 else f"{to_first} to {waits[-1]:.2f} s")
    cached = sum(answer.num_cached_tokens for answer in served)
    if cached:
        parts.append(f"{cached} prompt tokens reused")
    cut = sum(answer.finish_reason is FinishReason.LENGTH for answer in served)
    if cut:
        which = "the answer was" if len(served) == 1 else f"{cut} of {len(served)} answers were"
        parts.append(f"{which} cut off at the token limit")
    return "; ".join(parts)


def busy_percent(before: HeartbeatReport | None, after: HeartbeatReport | None) -> float | None:
    """How much of the time between two reports a stage computed; since its load where there is only one report."""
    if after is None:
        return None
    busy_s, elapsed_s = after.busy_s, after.uptime_s
    if before is not None and before.epoch == after.epoch and after.uptime_s > before.uptime_s:
        busy_s, elapsed_s = after.busy_s - before.busy_s, after.uptime_s - before.uptime_s
    if elapsed_s <= 0:
        return None
    return min(100.0, 100.0 * busy_s / elapsed_s)


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.1f} tokens/s" if count and seconds > 0 else "- tokens/s"


def _report(snapshot: ClusterSnapshot, worker: WorkerId) -> HeartbeatReport | None:
    return next((known.report for known in snapshot.workers if known.worker_id == worker), None)
