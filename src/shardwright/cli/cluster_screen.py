"""One frame of `top`: the pipeline as a table, totals, and what went wrong, for terminals of any width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardwright.cli import figures
from shardwright.cli.console import harmless
from shardwright.cli.server_watch import Seen
from shardwright.observation import ClusterView, HistoryPoint, LinkView, WorkerView
from shardwright.types import HeartbeatReport, RankLoad

_BAR_WIDTH = 10
_BUSY, _LATE_S = 0.95, 5.0
_MAX_ERRORS = 6  # kinds of errors on one line
_RANKS_FROM_WIDTH = 70  # of the terminal


@dataclass(frozen=True, slots=True)
class Frame:
    """Draws what was seen; `problem` is why there is nothing newer, with `age_s`, the time since it was seen."""

    url: str
    seen: Seen
    problem: str = ""
    age_s: float = 0.0

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Lines that fit the terminal."""
        if self.problem:
            said = f"no answer for {figures.duration(self.age_s)}: {harmless(self.problem)}; trying again"
            yield Text(said, style="bold white on red")
        view, width = self.seen.view, options.max_width
        yield Group(headline(view, self.url), Text(), pipeline(view, width), Text(), totals(self.seen), *troubles(view))


def headline(view: ClusterView, url: str) -> Text:
    """The model and whether it answers."""
    line = Text(harmless(view.model_name), style="bold")
    line.append("  ready" if view.is_ready else "  not ready", style="green" if view.is_ready else "bold red")
    line.append(
        f"  epoch {view.snapshot.epoch}  {view.num_layers} layers on {counted(len(view.snapshot.stages), 'worker')}  "
        f"up {figures.duration(view.at - view.started_at)}  {harmless(url)}",
        style="not bold",
    )
    return line


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    from_width: int  # of the terminal
    cell: Callable[[WorkerView, LinkView | None], RenderableType]
    justify: str = "left"
    rank: Callable[[RankLoad], Text] | None = None  # what it has to say of a rank; None: nothing


def pipeline(view: ClusterView, width: int) -> Table:
    """A row for each worker, in the pipeline's order; how many columns depends on the terminal's width.

    Under a worker of several ranks stands a row for each of them, where there is room for what they hold.
    """
    columns = [column for column in _COLUMNS if width >= column.from_width]
    table = Table(box=None, pad_edge=False, expand=False, header_style="dim")
    for column in columns:
        table.add_column(
            column.title, justify="right" if column.justify == "right" else "left", no_wrap=True, overflow="ellipsis"
        )
    incoming = {link.receiver: link for link in view.links if link.receiver}
    for worker in view.workers:
        cells = (column.cell(worker, incoming.get(worker.worker_id)) for column in columns)
        style = "dim" if worker.status == "lost" else ""  # its figures are the last ones known
        table.add_row(*cells, style=style)
        for load in worker.ranks if width >= _RANKS_FROM_WIDTH else ():
            table.add_row(*(Text() if c.rank is None else c.rank(load) for c in columns), style=style or "dim")
    return table


def _name(worker: WorkerView, _: LinkView | None) -> Text:
    name = figures.with_ranks(harmless(worker.worker_id), worker.num_ranks)
    return Text(name, style="red" if worker.status == "lost" else "")


def _status(worker: WorkerView, _: LinkView | None) -> Text:
    styles = {"ready": "green", "lost": "bold red"}
    is_late = worker.status == "ready" and (worker.report_age_s or 0.0) > _LATE_S
    if is_late:
        return Text(f"silent {figures.duration(worker.report_age_s or 0.0)}", style="yellow")
    return Text(harmless(worker.status), style=styles.get(worker.status, "yellow"))


def _layers(worker: WorkerView, _: LinkView | None) -> Text:
    if worker.first_layer is None or worker.end_layer is None:
        return Text(figures.UNKNOWN)
    return Text(f"{worker.first_layer}-{worker.end_layer - 1}")


def _device(worker: WorkerView, _: LinkView | None) -> Text:
    return Text(harmless(worker.device))


def _device_name(worker: WorkerView, _: LinkView | None) -> Text:
    return Text(harmless(worker.device_name))


def _memory(worker: WorkerView, _: LinkView | None) -> Text:
    return Text(figures.part_of(worker.weight_bytes + worker.kv_bytes, worker.memory_limit_bytes))


def _bar(worker: WorkerView, _: LinkView | None) -> RenderableType:
    if worker.busy_ratio is None:
        return Text()
    style = "red" if worker.busy_ratio > _BUSY else "green"
    done = min(max(worker.busy_ratio, 0.0), 1.0)
    return ProgressBar(total=1.0, completed=done, width=_BAR_WIDTH, complete_style=style, finished_style="red")


def _busy(worker: WorkerView, _: LinkView | None) -> Text:
    return Text(figures.ratio(worker.busy_ratio))


def _queue(worker: WorkerView, _: LinkView | None) -> Text:
    return Text(figures.UNKNOWN if worker.report is None else str(worker.report.queue_depth))


def _gpu(worker: WorkerView, _: LinkView | None) -> Text:
    return _gpu_of(worker.report)


def _gpu_of(report: HeartbeatReport | RankLoad | None) -> Text:
    if report is None or report.gpu_utilization is None:
        return Text(figures.UNKNOWN)
    parts = [f"{report.gpu_utilization:.0f}%"]
    if report.gpu_memory_total_bytes is not None:
        parts.append(figures.part_of(report.gpu_memory_used_bytes, report.gpu_memory_total_bytes))
    if report.gpu_temperature_c is not None:
        parts.append(f"{report.gpu_temperature_c:.0f} °C")
    if report.gpu_power_w is not None:
        parts.append(f"{report.gpu_power_w:.0f} W")
    return Text(" ".join(parts))


def _round_trip(_: WorkerView, link: LinkView | None) -> Text:
    return Text(figures.UNKNOWN if link is None else figures.seconds(link.round_trip_s))


def _rate(_: WorkerView, link: LinkView | None) -> Text:
    return Text(figures.UNKNOWN if link is None else figures.rate(link.bytes_per_s))


def _rank_memory(load: RankLoad) -> Text:
    """Of its device, by all processes; where that is not known, what its process holds."""
    if load.gpu_memory_used_bytes is None or load.gpu_memory_total_bytes is None:
        return Text(figures.size(load.process_memory_bytes))
    return Text(figures.part_of(load.gpu_memory_used_bytes, load.gpu_memory_total_bytes))


_COLUMNS: Sequence[_Column] = (
    _Column("worker", 0, _name, rank=lambda load: Text(f"  rank {load.rank}")),
    _Column("layers", 0, _layers),
    _Column("state", 60, _status),
    _Column("device", 90, _device, rank=lambda load: Text(harmless(load.device))),
    _Column("", 150, _device_name, rank=lambda load: Text(harmless(load.device_name))),
    _Column("memory", _RANKS_FROM_WIDTH, _memory, rank=_rank_memory),
    _Column("busy", 0, _busy, "right"),
    _Column("", 40, _bar),
    _Column("queue", 40, _queue, "right"),
    _Column("GPU", 130, _gpu, rank=_gpu_of),
    _Column("link in", 80, _round_trip, "right"),
    _Column("", 100, _rate, "right"),
)


def totals(seen: Seen) -> Columns:
    """What comes out, how fast, and how full it is; each figure with its name, as many beside each other as fit."""
    snapshot = seen.view.snapshot
    last = seen.points[-1] if seen.points else None
    used = snapshot.num_blocks - snapshot.num_free_blocks
    hits = snapshot.total_cached_tokens / snapshot.total_prompt_tokens if snapshot.total_prompt_tokens else None
    bound = f" of {snapshot.max_waiting}" if snapshot.max_waiting else ""
    items = [
        ("tokens/s", figures.UNKNOWN if last is None else f"{last.output_tokens_per_s:.1f}"),
        ("prompt tokens/s", figures.UNKNOWN if last is None else f"{last.prompt_tokens_per_s:.1f}"),
        ("first token", figures.pair(*_latest(seen.points, "ttft_p50_s", "ttft_p95_s"))),
        ("between tokens", figures.pair(*_latest(seen.points, "inter_token_p50_s", "inter_token_p95_s"))),
        ("KV blocks", f"{used} of {snapshot.num_blocks} ({figures.ratio(_part(used, snapshot.num_blocks))})"),
        ("prefix hits", figures.ratio(hits)),
        ("running", str(snapshot.num_running)),
        ("waiting", f"{snapshot.num_waiting}{bound}"),
        ("steps in flight", f"{snapshot.num_steps_in_flight} of {snapshot.max_steps_in_flight}"),
    ]
    figure = [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in items]
    return Columns(figure, padding=(0, 3))


def _part(used: int, total: int) -> float | None:
    return used / total if total else None


def _latest(points: Sequence[HistoryPoint], low: str, high: str) -> tuple[float | None, float | None]:
    """The newest percentiles: a point without a request has none."""
    for point in reversed(points):
        if getattr(point, low) is not None:
            return getattr(point, low), getattr(point, high)
    return None, None


def troubles(view: ClusterView) -> list[Text]:
    """What is being recovered from, why nothing can be answered, who was lost and why, and which errors there were."""
    lines = []
    if view.snapshot.recovering_from:
        lines.append(Text(recovery(view), style="bold yellow"))
    if view.failure:
        lines.append(Text(f"no pipeline: {harmless(view.failure)}", style="bold red"))
    lines += [
        Text(f"{harmless(worker.worker_id)} is lost: {harmless(worker.reason) or 'no reason known'}", style="red")
        for worker in view.workers
        if worker.status == "lost"
    ]
    if view.num_errors:
        shown = [f"{harmless(kind)} {count}" for kind, count in view.num_errors[-_MAX_ERRORS:]]
        lines.append(Text(f"errors so far: {', '.join(shown)}", style="yellow"))
    return [Text(), *lines] if lines else []


def recovery(view: ClusterView) -> str:
    """What the model is placed anew for, and how many requests that concerns; call while that goes on."""
    open_requests = view.snapshot.num_waiting + view.snapshot.num_running
    waits = "waits" if open_requests == 1 else "wait"
    return f"recovering: {harmless(view.snapshot.recovering_from)}; {counted(open_requests, 'request')} {waits}"


def counted(number: int, name: str) -> str:
    """A number with what it counts."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
