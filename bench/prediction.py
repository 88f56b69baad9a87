"""Compares what the doctor predicts with what is achieved, over links and workers of several kinds.

    python bench/prediction.py                       SmolLM2-135M, all settings
    python bench/prediction.py --model gemma         Gemma-2B's shape (16 GB of memory); also a folder or a hub id
    python bench/prediction.py --setting "20 ms"     those whose name has this in it; may be repeated
    python bench/prediction.py --json out.json       all figures for machines
    python bench/prediction.py --quick               short prompts and answers, one round: only to see that it runs

In each setting and round the workers and links are measured and the stages probed, as `shardwright doctor` does it; the
prediction is made from that alone and printed; then the load runs. The table has medians over the rounds. `1+1`
are two workers with a core and a thread each, `2+1` one with both cores and one with the second of them, `1+2+1` three.
Between the workers stands a relay (tests/support/relay.py) that delays each way and limits the bandwidth; none stands
before the master. The exit code is 1 where the median error is above 15 %. Close other programs first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gemma_shape import make_gemma_2b  # noqa: E402
from orderly import end_in_order  # noqa: E402
from serving import delayed_session, pinned_workers, separate_cores, session_on  # noqa: E402

from shardwright.cli import aio  # noqa: E402
from shardwright.config import MasterConfig, default_cache_dir  # noqa: E402
from shardwright.core.prediction import Figures, Workload, predict  # noqa: E402
from shardwright.runtime.doctor import (  # noqa: E402
    cluster_of,
    measure_links,
    measure_workers,
    present_cut,
    transfer_sizes,
)
from shardwright.runtime.registry import WorkerEntry  # noqa: E402
from shardwright.runtime.session import OpenModel, Session, open_model  # noqa: E402
from shardwright.runtime.short_load import Achieved, run_load  # noqa: E402
from shardwright.runtime.stage_prober import probe_stages  # noqa: E402

MOST_ERROR = 0.15
KV_TOKENS = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Workers on cores, and what is between them."""

    workers: str  # cores of each
    delay_ms: float = 0.0  # one way, each way
    mbit_s: float | None = None

    @property
    def name(self) -> str:
        """For the table."""
        parts = [self.workers]
        if self.delay_ms:
            parts.append(f"{self.delay_ms:g} ms")
        if self.mbit_s is not None:
            parts.append(f"{self.mbit_s:g} Mbit/s")
        return ", ".join(parts)

    @property
    def has_relays(self) -> bool:
        """Whether anything stands between the workers."""
        return self.delay_ms > 0 or self.mbit_s is not None


SETTINGS = (
    Setting(workers="1+1"),
    Setting(workers="1+1", delay_ms=5),
    Setting(workers="1+1", delay_ms=20),
    Setting(workers="1+1", mbit_s=100),
    Setting(workers="1+1", delay_ms=10, mbit_s=50),
    Setting(workers="2+1"),
    Setting(workers="2+1", delay_ms=10),
    Setting(workers="2+1", delay_ms=2, mbit_s=200),
    Setting(workers="1+2+1", delay_ms=5, mbit_s=500),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of one setting."""

    setting: str
    what: str
    predicted: float  # tokens/s
    achieved: float

    @property
    def error(self) -> float:
        """How far the prediction is off, as a part of what was achieved."""
        return abs(self.predicted / self.achieved - 1)


class _Notes:
    """Prints what goes on, quietly or not."""

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet

    def doing(self, what: str) -> None:
        """One line."""
        if not self._is_quiet:
            print(f"  {what}", file=sys.stderr, flush=True)

    def _hear(self, *_: object) -> None:
        pass

    downloading = hashing = loading = ready = _hear


def groups_of(workers: str) -> list[list[int]]:
    """Cores of each worker: one core each in turn, or both."""
    cores = separate_cores(2)
    turn = 0
    groups = []
    for count in workers.split("+"):
        if count == "2":
            groups.append(cores)
            continue
        groups.append([cores[turn % 2] if workers != "2+1" else cores[1]])
        turn += 1
    return groups


@contextlib.asynccontextmanager
async def session_in(
    setting: Setting, config: MasterConfig, model: OpenModel, entries: Sequence[WorkerEntry]
) -> AsyncIterator[Session]:
    """The model on these workers with what is between them."""
    if not setting.has_relays:
        async with session_on(config, model, entries) as session:
            yield session
        return
    delayed = delayed_session(config, model, entries, delay_s=setting.delay_ms / 1e3, mbit_s=setting.mbit_s)
    async with delayed as (session, _):
        yield session


async def measure(
    setting: Setting,
    config: MasterConfig,
    model: OpenModel,
    workload: Workload,
    entries: Sequence[WorkerEntry],
    *,
    rounds: int,
    notes: _Notes,
) -> list[tuple[Figures, Achieved]]:
    """Predict, then run; so many times over, each prediction from measurements made just before its run."""
    found = []
    async with session_in(setting, config, model, entries) as session:
        cut = present_cut(session)
        sizes = transfer_sizes(model, config, workload)
        for number in range(rounds):
            workers = await measure_workers(session.workers, model.dtype, notes)
            links = await measure_links(session.workers, [stage.worker_id for stage in cut], sizes, notes)
            probes = await probe_stages(session, cluster_of(model, config, workers, links), workload, notes)
            figures = predict(cluster_of(model, config, workers, links, probes), cut, workload)
            layers = " | ".join(f"{stage.worker_id} {stage.start}-{stage.end - 1}" for stage in cut)
            print(
                f"{setting.name}: {layers}; predicted {figures.one.tokens_per_s:.1f}, "
                f"{figures.many.tokens_per_s:.1f} ({figures.many.steps_in_flight} in flight), "
                f"{figures.prompt.tokens_per_s:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
            first_id = (1 + number) << 24
            reached = await run_load(session, workload, notes, rounds=1, first_id=first_id)
            print(
                f"{setting.name}: achieved {reached.one_tokens_per_s:.1f}, {reached.many_tokens_per_s:.1f}, "
                f"{reached.prompt_tokens_per_s:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
            found.append((figures, reached))
    return found


def rows_of(setting: Setting, rounds: Sequence[tuple[Figures, Achieved]]) -> list[Row]:
    """The three figures: medians over the rounds of what was predicted and of what was achieved."""
    count = rounds[0][0].workload.num_sequences
    pairs = (
        ("decode of 1", [(figures.one.tokens_per_s, reached.one_tokens_per_s) for figures, reached in rounds]),
        (
            f"decode of {count}",
            [(figures.many.tokens_per_s, reached.many_tokens_per_s) for figures, reached in rounds],
        ),
        (
            f"prompt of {rounds[0][1].prompt_tokens}",
            [(figures.prompt.tokens_per_s, reached.prompt_tokens_per_s) for figures, reached in rounds],
        ),
    )
    return [
        Row(
            setting=setting.name,
            what=what,
            predicted=statistics.median(predicted for predicted, _ in values),
            achieved=statistics.median(achieved for _, achieved in values),
        )
        for what, values in pairs
    ]


def print_table(rows: Sequence[Row]) -> None:
    """As it stands in docs/performance.md."""
    print("| workers and link | what | predicted tokens/s | achieved | error |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.setting} | {row.what} | {row.predicted:.1f} | {row.achieved:.1f} | {row.error:.0%} |")
    print(f"\nmedian error {statistics.median(row.error for row in rows):.1%} of {len(rows)} predictions", flush=True)


async def run(arguments: argparse.Namespace) -> list[Row]:
    """All settings."""
    path = arguments.model
    if path == "gemma":
        path = str(make_gemma_2b(default_cache_dir() / "bench" / "gemma-2b-shape"))
    name = {"smollm2": "smollm2-135m"}.get(path, path)
    # Steps by hand write into blocks that an earlier round's prompts have left: nothing of them may be used again.
    config = MasterConfig(model=name, dtype="bfloat16", kv_tokens=KV_TOKENS, prefix_cache=False)
    notes = _Notes(is_quiet=not arguments.verbose)
    model = await open_model(config, notes)
    workload = Workload(num_sequences=8, prompt_tokens=512, new_tokens=96, context=112)
    if arguments.quick:
        workload = Workload(num_sequences=8, prompt_tokens=128, new_tokens=24, context=76)
    chosen = [
        setting
        for setting in SETTINGS
        if not arguments.setting or any(word in setting.name for word in arguments.setting)
    ]
    rows: list[Row] = []
    for kind in dict.fromkeys(setting.workers for setting in chosen):
        async with pinned_workers(*groups_of(kind)) as entries:
            for setting in [each for each in chosen if each.workers == kind]:
                rounds = 1 if arguments.quick else arguments.rounds
                pairs = await measure(setting, config, model, workload, entries, rounds=rounds, notes=notes)
                rows += rows_of(setting, pairs)
                if arguments.json is not None:
                    content = [{**asdict(row), "error": row.error} for row in rows]
                    arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return rows


def main() -> int:
    """Read the command line and measure."""
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", metavar="MODEL")
    parser.add_argument("--setting", action="append", default=[], metavar="TEXT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--verbose", action="store_true", help="say what is measured at the moment")
    arguments = parser.parse_args()
    rows = aio.run(run(arguments))
    if not rows:
        parser.error(f"no setting has {' or '.join(arguments.setting)} in its name")
    print_table(rows)
    return 1 if statistics.median(row.error for row in rows) > MOST_ERROR else 0


if __name__ == "__main__":
    sys.exit(main())
