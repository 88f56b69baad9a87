import io

import pytest
from rich.console import Console

from shardwright.cli.answers import Answer
from shardwright.cli.progress import StartProgress
from shardwright.cli.prompts import Prompt
from shardwright.cli.summary import busy_percent, print_summary, rates
from shardwright.types import FinishReason

from .conftest import FakeStage, report, snapshot


def answer(prompt_tokens, new_tokens, *, submitted, first, last, cached=0):
    return Answer(
        prompt=Prompt(text="x"), prompt_ids=(1,) * prompt_tokens, token_ids=[2] * new_tokens, submitted_s=submitted,
        first_token_s=first, last_token_s=last, num_cached_tokens=cached,
    )  # fmt: skip


def test_rates_of_one_answer():
    """100 prompt tokens in 0.5 s; 20 of the 21 new tokens come in the 2 s after the first."""
    line = rates([answer(100, 21, submitted=1.0, first=1.5, last=3.5)])
    assert line == "prompt 100 tokens at 200.0 tokens/s; decode 20 tokens at 10.0 tokens/s; first token after 0.50 s"


def test_rates_of_a_batch_are_over_all_answers_together():
    line = rates(
        [
            answer(100, 11, submitted=1.0, first=1.5, last=3.5),
            answer(300, 31, submitted=1.0, first=3.0, last=5.5, cached=64),
        ]
    )
    assert line == (
        "prompt 400 tokens at 200.0 tokens/s; decode 40 tokens at 10.0 tokens/s; "
        "first token after 0.50 s to 2.00 s; 64 prompt tokens reused"
    )


def test_answers_that_met_their_limit_are_counted():
    answers = [answer(5, 9, submitted=1.0, first=1.5, last=2.5) for _ in range(3)]
    assert "cut off" not in rates(answers)
    answers[1].finish_reason = FinishReason.LENGTH
    assert rates(answers).endswith("; 1 of 3 answers were cut off at the token limit")
    assert rates(answers[1:2]).endswith("; the answer was cut off at the token limit")


def test_no_rate_is_invented_where_nothing_was_measured():
    assert "decode 0 tokens at - tokens/s" in rates([answer(5, 1, submitted=1.0, first=1.5, last=1.5)])
    assert rates([Answer(prompt=Prompt(text="x"))]) == "no token came"


@pytest.mark.parametrize(
    ("before", "after", "percent"),
    [
        (None, None, None),
        (report(1.0, 4.0), None, None),
        (None, report(1.0, 4.0), 25.0),
        (report(1.0, 4.0), report(4.0, 8.0), 75.0),
        (report(1.0, 4.0), report(1.0, 4.0), 25.0),  # no newer report: since the load
        (report(9.0, 9.0, epoch=1), report(1.0, 10.0, epoch=2), 10.0),  # another stage: its own counters
        (None, report(0.0, 0.0), None),
        (report(1.0, 4.0), report(6.0, 8.0), 100.0),  # two clocks, never over all of the time
    ],
)
def test_busy_is_the_share_of_the_time_between_two_reports(before, after, percent):
    assert busy_percent(before, after) == percent


def test_the_table_has_a_row_a_stage():
    out = io.StringIO()
    print_summary(
        Console(file=out, width=120),
        stages=[FakeStage(0, "worker0", 0, 18), FakeStage(1, "worker1", 18, 30)],
        answers=[answer(100, 21, submitted=1.0, first=1.5, last=3.5)],
        before=snapshot(None, None),
        after=snapshot(report(1.0, 4.0), None),
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if "│" in line]
    assert rows == [["0", "worker0", "0-17", "3.0", "40", "25"], ["1", "worker1", "18-29", "3.0", "40", "-"]]
    header = next(line for line in out.getvalue().splitlines() if "stage" in line)
    for name in ("stage", "worker", "layers", "weights MiB", "KV blocks", "busy %"):
        assert name in header


def test_progress_outside_a_terminal_is_a_line_for_each_turn():
    out = io.StringIO()
    with StartProgress(Console(file=out, width=80)) as progress:
        for done in (0, 1, 2):
            progress.downloading("model.gguf", done * 2**20, 2 * 2**20)
        for phase in ("receive", "build"):
            for done in (0, 1):
                progress.loading("worker0", done, 2**20, phase)
        progress.hashing(1, 2**20)
        progress.doing("loading the stages")
        progress.ready([FakeStage(0, "worker0", 0, 1)])
    assert out.getvalue().splitlines() == [
        "model.gguf: download (2.0 MiB)",
        "worker0: receive (1.0 MiB)",
        "worker0: build (1.0 MiB)",
        "model: hash (1.0 MiB)",
        "loading the stages",
        "ready: 1 stage",
    ]


def test_progress_in_a_terminal_has_a_bar_for_each_worker_and_leaves_nothing_behind():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with StartProgress(console) as progress:
        progress.loading("worker0", 5, 10, "receive")
        progress.loading("worker1", 1, 10, "receive")
        progress.loading("worker0", 10, 10, "build")
        assert [task.description for task in progress._progress.tasks] == ["worker0  build", "worker1  receive"]
        assert [task.completed for task in progress._progress.tasks] == [10, 1]
        progress.doing("loading the stages")
        assert progress._live.is_started
        progress.ready([])
        assert not progress._live.is_started
    assert "loading the stages" in out.getvalue()
