"""The figures of `bench serve`, from measurements that are known."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shardwright.cli.bench_plot import tokens_by_second
from shardwright.cli.bench_report import Distribution, Sample, percentile, print_report, remarks, summarize
from shardwright.cli.openai_http import Usage


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values, percent):
    ordered = sorted(values)
    assert percentile(ordered, percent) == pytest.approx(np.percentile(ordered, percent))


def test_percentiles_lie_between_neighbours():
    assert [percentile([1.0, 2.0, 4.0], p) for p in (0, 25, 50, 75, 100)] == [1.0, 1.5, 2.0, 3.0, 4.0]
    assert percentile([7.0], 99) == 7.0


def sample(sent, pieces, end, *, due=None, asked=None, tokens=None, error="", cached=0):
    usage = None if tokens is None else Usage(num_prompt=10, num_output=tokens, num_cached=cached)
    return Sample(
        due_s=sent if due is None else due, asked_tokens=asked or len(pieces), sent_s=sent, piece_s=pieces, end_s=end,
        usage=usage, error_kind=error, error=error and f"{error} happened",
    )  # fmt: skip


RUN = [
    sample(100.0, [101.0, 101.5, 102.5], 102.6, tokens=3, cached=4),
    sample(101.0, [103.0, 104.0], 104.1, tokens=3, asked=8),
    sample(102.0, [], 102.1, error="HTTP 429"),
    sample(102.5, [103.0], 103.5, error="broken off"),
    sample(102.5, [], 110.0, error="HTTP 429"),
]


def test_figures_of_a_run():
    report = summarize(RUN)
    assert (report.num_requests, report.num_ok, report.duration_s) == (5, 2, 10.0)
    assert (report.num_prompt_tokens, report.num_cached_tokens, report.num_output_tokens) == (20, 4, 6)
    assert (report.requests_per_s, report.output_tokens_per_s, report.total_tokens_per_s) == (0.2, 0.6, 2.6)
    assert report.num_short == 1
    assert {kind: (e.count, e.example) for kind, e in report.errors.items()} == {
        "HTTP 429": (2, "HTTP 429 happened"),
        "broken off": (1, "broken off happened"),
    }
    assert (report.ttft.count, report.ttft.mean, report.ttft.p50) == (2, 1.5, 1.5)
    assert (report.inter_token.count, report.inter_token.max) == (3, 1.0)
    assert report.per_token.mean == pytest.approx((1.5 / 2 + 1.0 / 2) / 2)
    assert report.end_to_end.mean == pytest.approx((2.6 + 3.1) / 2)


def test_a_run_without_success_has_no_latencies_but_its_errors():
    report = summarize(RUN[2:3])
    document = report.as_json()
    assert document["requests"] == {"sent": 1, "ok": 0, "failed": 1}
    assert document["ttft_s"] is document["end_to_end_s"] is None
    assert document["throughput"]["output_tokens_per_s"] == 0.0
    assert document["errors"] == {"HTTP 429": {"count": 1, "example": "HTTP 429 happened"}}


def test_the_json_has_all_percentiles_in_seconds():
    document = summarize(RUN).as_json()
    for name in ("ttft_s", "inter_token_s", "time_per_output_token_s", "end_to_end_s"):
        assert list(document[name]) == ["count", "mean", "p50", "p90", "p95", "p99", "max"]
    assert document["tokens"] == {"prompt": 20, "cached": 4, "output": 6, "counted_by": "server", "short_answers": 1}


def test_without_the_servers_count_a_piece_is_a_token_and_that_is_said():
    report = summarize([sample(0.0, [1.0, 2.0], 2.0)])
    assert (report.num_output_tokens, report.counted_by_server) == (2, False)
    assert report.as_json()["tokens"]["counted_by"] == "pieces"
    assert remarks(report, has_rate=False) == [
        "The server counts no tokens: a piece of an answer stands for one token."
    ]


def test_a_rate_that_this_machine_can_not_keep_up_is_said():
    report = summarize([sample(10.3, [11.0], 12.0, due=10.0, tokens=1)])
    assert remarks(report, has_rate=True) == [
        "Requests were sent up to 300 ms late (p99): this machine can't keep the rate up."
    ]
    assert remarks(report, has_rate=False) == []


def test_the_tables_have_units():
    out = io.StringIO()
    print_report(Console(file=out, width=120), summarize(RUN), has_rate=False)
    shown = out.getvalue()
    assert "Latency, milliseconds" in shown
    assert "1500.00" in shown
    assert "0.60 /s" in shown
    assert "failed, HTTP 429: 2; such as: HTTP 429 happened" in shown
    assert "1 answer has fewer tokens than were asked for." in shown


def test_no_values_have_no_distribution():
    assert Distribution.of([]) is None


def test_pieces_are_counted_by_the_second_they_came_in():
    assert tokens_by_second(RUN[:2], 100.0) == ([0, 1, 2, 3, 4, 5], [0, 2, 1, 1, 1, 0])
    assert tokens_by_second([], 0.0) == ([0, 1], [0, 0])
