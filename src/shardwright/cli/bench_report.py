"""What `bench serve` makes of its measurements: latencies with percentiles, throughput, errors by kind.

Pure. Times are seconds on one clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from shardwright.cli.console import harmless
from shardwright.cli.openai_http import Usage

LATE_S = 0.05  # requests that were sent so much later than planned make the rate a wish


@dataclass(slots=True, kw_only=True)
class Sample:
    """One request as it went."""

    due_s: float
    asked_tokens: int
    sent_s: float = 0.0
    piece_s: list[float] = field(default_factory=list)  # when each piece of the answer came
    end_s: float = 0.0
    usage: Usage | None = None
    error_kind: str = ""
    error: str = ""

    @property
    def num_output(self) -> int:
        """Tokens of the answer: the server's count, else one for each piece."""
        return self.usage.num_output if self.usage is not None else len(self.piece_s)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which so many percent of an ascending sequence lie, interpolated between neighbours."""
    assert ordered, "nothing has no percentiles"
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How a number of times lie; all in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """None when there are no values."""
        if not values:
            return None
        ordered = sorted(values)
        p50, p90, p95, p99 = (percentile(ordered, percent) for percent in (50, 90, 95, 99))
        mean = math.fsum(ordered) / len(ordered)
        return cls(count=len(ordered), mean=mean, p50=p50, p90=p90, p95=p95, p99=p99, max=ordered[-1])

    def as_json(self) -> dict[str, float]:
        """Seconds, to the microsecond."""
        return {each.name: round(getattr(self, each.name), 6) for each in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCount:
    """How often one kind of error came, and what one of them said."""

    count: int
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run's figures. Latencies are those of the requests that succeeded."""

    duration_s: float
    num_requests: int
    num_ok: int
    errors: dict[str, ErrorCount]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_short: int  # answers with fewer tokens than were asked for
    counted_by_server: bool  # else an answer's tokens are its pieces, and its prompt's are unknown
    late_s: float  # 99 % of the requests were sent at most so long after their planned time
    ttft: Distribution | None  # from the sending to the first piece of the answer
    inter_token: Distribution | None  # between neighbouring pieces of one answer, over all answers
    per_token: Distribution | None  # of each answer: from the first piece to the last, by its tokens but the first
    end_to_end: Distribution | None

    @property
    def requests_per_s(self) -> float:
        """Requests that succeeded, over the whole run."""
        return self.num_ok / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens of answers that succeeded, over the whole run."""
        return self.num_output_tokens / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def total_tokens_per_s(self) -> float:
        """Prompts and answers together, cached tokens included."""
        total = self.num_prompt_tokens + self.num_output_tokens
        return total / self.duration_s if self.duration_s > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        """For machines; latencies that nothing was measured for are null."""
        return {
            "duration_s": round(self.duration_s, 6),
            "requests": {"sent": self.num_requests, "ok": self.num_ok, "failed": self.num_requests - self.num_ok},
            "errors": {kind: {"count": e.count, "example": e.example} for kind, e in self.errors.items()},
            "tokens": {
                "prompt": self.num_prompt_tokens,
                "cached": self.num_cached_tokens,
                "output": self.num_output_tokens,
                "counted_by": "server" if self.counted_by_server else "pieces",
                "short_answers": self.num_short,
            },
            "throughput": {
                "requests_per_s": round(self.requests_per_s, 6),
                "output_tokens_per_s": round(self.output_tokens_per_s, 6),
                "total_tokens_per_s": round(self.total_tokens_per_s, 6),
            },
            "late_p99_s": round(self.late_s, 6),
            **{
                name: distribution and distribution.as_json()
                for name, distribution in (
                    ("ttft_s", self.ttft),
                    ("inter_token_s", self.inter_token),
                    ("time_per_output_token_s", self.per_token),
                    ("end_to_end_s", self.end_to_end),
                )
            },
        }


def summarize(samples: Sequence[Sample]) -> Report:
    """All figures of a run; there must be samples."""
    good = [sample for sample in samples if not sample.error_kind]
    errors: dict[str, ErrorCount] = {}
    for sample in samples:
        if sample.error_kind:
            known = errors.get(sample.error_kind, ErrorCount(count=0, example=sample.error))
            errors[sample.error_kind] = ErrorCount(count=known.count + 1, example=known.example)
    usages = [sample.usage for sample in good if sample.usage is not None]
    return Report(
        duration_s=max(sample.end_s for sample in samples) - min(sample.sent_s for sample in samples),
        num_requests=len(samples),
        num_ok=len(good),
        errors=dict(sorted(errors.items(), key=lambda item: -item[1].count)),
        num_prompt_tokens=sum(usage.num_prompt for usage in usages),
        num_cached_tokens=sum(usage.num_cached for usage in usages),
        num_output_tokens=sum(sample.num_output for sample in good),
        num_short=sum(sample.num_output < sample.asked_tokens for sample in good),
        counted_by_server=len(usages) == len(good) > 0,
        late_s=percentile(sorted(max(0.0, sample.sent_s - sample.due_s) for sample in samples), 99),
        ttft=Distribution.of([sample.piece_s[0] - sample.sent_s for sample in good]),
        inter_token=Distribution.of([b - a for sample in good for a, b in pairwise(sample.piece_s)]),
        per_token=Distribution.of(
            [
                (sample.piece_s[-1] - sample.piece_s[0]) / (sample.num_output - 1)
                for sample in good
                if sample.num_output > 1
            ]
        ),
        end_to_end=Distribution.of([sample.end_s - sample.sent_s for sample in good]),
    )


def print_report(console: Console, report: Report, *, has_rate: bool) -> None:
    """The figures for people: two tables, and remarks on what to know when reading them."""
    latency = Table(title="Latency, milliseconds", title_justify="left")
    latency.add_column("")
    for name in ("mean", "p50", "p90", "p95", "p99", "max"):
        latency.add_column(name, justify="right")
    for title, distribution in (
        ("time to first token", report.ttft),
        ("inter-token", report.inter_token),
        ("time per output token", report.per_token),
        ("end to end", report.end_to_end),
    ):
        if distribution is not None:
            figures = (getattr(distribution, name) for name in ("mean", "p50", "p90", "p95", "p99", "max"))
            latency.add_row(title, *(f"{figure * 1000:.2f}" for figure in figures))
    throughput = Table(title="Throughput", title_justify="left", show_header=False)
    throughput.add_column()
    throughput.add_column(justify="right")
    rows = [
        ("requests that succeeded", f"{report.num_ok} of {report.num_requests}"),
        ("duration", f"{report.duration_s:.2f} s"),
        ("requests", f"{report.requests_per_s:.2f} /s"),
        ("output tokens", f"{report.output_tokens_per_s:.2f} /s"),
    ]
    if report.counted_by_server:
        rows += [
            ("prompt and output tokens", f"{report.total_tokens_per_s:.2f} /s"),
            ("prompt tokens", f"{report.num_prompt_tokens}, of these cached {report.num_cached_tokens}"),
        ]
    rows.append(("output tokens in all", str(report.num_output_tokens)))
    for row in rows:
        throughput.add_row(*row)
    console.print(throughput)
    if report.num_ok:
        console.print(latency)
    for kind, error in report.errors.items():
        console.print(
            f"failed, {kind}: {error.count}; such as: {harmless(error.example)}", markup=False, soft_wrap=True
        )
    for remark in remarks(report, has_rate=has_rate):
        console.print(remark, markup=False, soft_wrap=True)


def remarks(report: Report, *, has_rate: bool) -> list[str]:
    """What a reader must know so as not to take the figures for more than they are."""
    said = []
    if report.num_ok and not report.counted_by_server:
        said.append("The server counts no tokens: a piece of an answer stands for one token.")
    if report.num_short:
        what = "1 answer has" if report.num_short == 1 else f"{report.num_short} answers have"
        said.append(f"{what} fewer tokens than were asked for.")
    if has_rate and report.late_s > LATE_S:
        said.append(
            f"Requests were sent up to {report.late_s * 1000:.0f} ms late (p99): this machine can't keep the rate up."
        )
    return said
