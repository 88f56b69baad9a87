"""The picture of `bench serve --plot`; needs matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwright.cli.bench_report import Sample
from shardwright.errors import ConfigError


def check_plot(path: Path) -> None:
    """Raises `ConfigError` when no picture could be written there; to be asked before a long measurement."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot is {path}; the picture is a PNG, so name a file that ends in .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot is {path}; there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed; pip install 'shardwright[plot]' brings it")


def plot(path: Path, samples: Sequence[Sample], *, title: str) -> None:
    """Draw latencies and throughput of the requests that succeeded. Raises `ConfigError` if it can't be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [sample for sample in samples if not sample.error_kind]
    start = min(sample.sent_s for sample in samples)
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title.replace("$", r"\$"))
    (first, gaps), (over_time, rate) = figure.subplots(2, 2)
    ttft = [sample.piece_s[0] - sample.sent_s for sample in good]
    _shares(first, {"to the first token": ttft, "end to end": [s.end_s - s.sent_s for s in good]}, unit_s=1.0)
    first.set(title="Latency of requests", xlabel="seconds", ylabel="share of requests")
    between = [b - a for s in good for a, b in zip(s.piece_s, s.piece_s[1:], strict=False)]
    _shares(gaps, {"between tokens": between}, unit_s=0.001)
    gaps.set(title="Inter-token latency", xlabel="milliseconds", ylabel="share of gaps")
    over_time.plot([sample.sent_s - start for sample in good], ttft, ".", label="to the first token")
    failed = [sample.sent_s - start for sample in samples if sample.error_kind]
    over_time.plot(failed, [0.0] * len(failed), "rx", label="failed")
    over_time.set(title="Time to first token over the run", xlabel="sent, seconds from the start", ylabel="seconds")
    over_time.legend()
    seconds, counts = tokens_by_second(good, start)
    rate.step(seconds, counts, where="post")
    rate.set(title="Pieces of answers", xlabel="seconds from the start", ylabel="per second", ylim=(0, None))
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as exc:
        raise ConfigError(f"{path}: can't be written: {exc.strerror}") from exc


def tokens_by_second(samples: Sequence[Sample], start_s: float) -> tuple[list[int], list[int]]:
    """Each second from the start, and how many pieces of answers came in it."""
    times = [math.floor(piece_s - start_s) for sample in samples for piece_s in sample.piece_s]
    counts = [0] * (max(times, default=0) + 2)  # a last empty one, so that the line comes down
    for second in times:
        counts[second] += 1
    return list(range(len(counts))), counts


def _shares(axes: Any, series: dict[str, list[float]], *, unit_s: float) -> None:
    for label, values in series.items():
        ordered = [value / unit_s for value in sorted(values)]
        axes.plot(ordered, [(index + 1) / len(ordered) for index in range(len(ordered))], label=label)
    axes.set_ylim(0, 1.02)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
