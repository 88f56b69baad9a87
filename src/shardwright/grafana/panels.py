"""What a dashboard is made of, as data, and how Grafana's SDK turns it into JSON.

Queries are written without the label that picks a cluster: where one says `metric{}` or `metric{phase="compute"}`, the
dashboard's variable `cluster` (the address that Prometheus scrapes the master at) is put in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common, units
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TAG: Final = "shardwright"
PROMETHEUS: Final = "prometheus"
INFINITY: Final = "yesoreyeram-infinity-datasource"
_REFS: Final = "ABCDEFGHIJKLMNOP"  # how Grafana calls a panel's queries


class Kind(Enum):
    """How a panel shows its values."""

    LINES = auto()
    NUMBER = auto()
    BUCKETS = auto()  # of a histogram, over time
    TABLE = auto()  # the newest values: a row for each worker, a column for each query


@dataclass(frozen=True, slots=True)
class Column:
    """A field of the rows of `GET /metrics.json`. Its type is one of Infinity's: number, string, timestamp."""

    field: str
    title: str
    type: str = "number"


@dataclass(frozen=True, slots=True)
class Rows:
    """A look into `GET /metrics.json`: these fields of each worker's rows."""

    columns: tuple[Column, ...]
    only_latest: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. It shows PromQL queries by their legend (in a table: by the column's title), or rows."""

    title: str
    help: str
    shows: Mapping[str, str] | Rows
    unit: str = units.Short
    kind: Kind = Kind.LINES
    width: int = 12  # of 24 columns
    height: int = 8
    top: float | None = None  # of the axis
    steps: tuple[float, ...] = ()  # values that turn it red; or yellow, then red
    is_low_bad: bool = False  # below the steps it is red instead
    is_stacked: bool = False
    names: Mapping[str, str] = field(default_factory=dict)  # words shown for values
    right: str = ""  # unit of the last query, on an axis of its own
    column_units: Mapping[str, str] = field(default_factory=dict)  # of a table, by title


class Section:
    """Panels under a heading."""

    def __init__(self, title: str, *panels: Panel) -> None:
        self.title = title
        self.panels = panels


class Board:
    """A dashboard; `name` is that of its file and in its address."""

    def __init__(self, name: str, title: str, text: str, *sections: Section, has_worker_choice: bool = False) -> None:
        self.name = name
        self.title = title
        self.help = text
        self.sections = sections
        self.has_worker_choice = has_worker_choice

    @property
    def panels(self) -> Iterator[Panel]:
        """All of them, in their order."""
        for section in self.sections:
            yield from section.panels

    @property
    def plugin(self) -> str:
        """The kind of data source that it asks."""
        return INFINITY if any(isinstance(panel.shows, Rows) for panel in self.panels) else PROMETHEUS


def of_cluster(expr: str) -> str:
    """The query for the cluster that the dashboard shows."""
    return expr.replace("{", '{instance="$cluster",').replace(",}", "}")


def to_json(board: Board) -> str:
    """The dashboard as Grafana imports it: data sources are variables, so that it works with any."""
    variable = "DS_PROMETHEUS" if board.plugin == PROMETHEUS else "DS_INFINITY"
    source = models.DataSourceRef(type_val=board.plugin, uid=f"${{{variable}}}")
    made = (
        builders.Dashboard(board.title)
        .uid(f"shardwright-{board.name}")
        .description(board.help)
        .tags([TAG])
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .link(
            builders.DashboardLink("Shardwright")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(as_dropdown=True)
            .keep_time(keep_time=True)
            .include_vars(include_vars=True)
        )
        .with_variable(builders.DatasourceVariable(variable).label("Data source").type(board.plugin))
    )
    if board.plugin == PROMETHEUS:
        made.with_variable(_choice("cluster", "label_values(shardwright_ready, instance)", source))
    if board.has_worker_choice:
        workers = _choice("worker", of_cluster("label_values(shardwright_worker_up{}, worker)"), source)
        made.with_variable(workers.multi(multi=True).include_all(include_all=True).all_value(".*"))
    number = 0
    for section in board.sections:
        number += 1
        made.with_row(builders.Row(section.title).id(number))
        for panel in section.panels:
            number += 1
            made.with_panel(_panel(panel, source).id(number))
    return json.dumps(made.build(), cls=JSONEncoder, indent=2) + "\n"


def _choice(name: str, query: str, source: models.DataSourceRef) -> builders.QueryVariable:
    return (
        builders.QueryVariable(name)
        .label(name.capitalize())
        .query({"query": query, "refId": name})
        .datasource(source)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )


def _panel(panel: Panel, source: models.DataSourceRef) -> Any:
    """The SDK has no class above its panels' builders, only the same methods in each."""
    made = _of_kind(panel)
    made.title(panel.title).description(panel.help).datasource(source).span(panel.width).height(panel.height)
    made.unit(panel.unit).thresholds(_thresholds(panel)).no_value("no data")
    if panel.kind in {Kind.LINES, Kind.NUMBER}:
        made.min(0)
    if panel.top is not None:
        made.max(panel.top)
    if panel.names:
        words = {value: models.ValueMappingResult(text=word) for value, word in panel.names.items()}
        made.mappings([models.ValueMap(options=words)])
    if isinstance(panel.shows, Rows):
        made.with_target(_InfinityQuery(panel.shows))
    else:
        refs = _REFS[: len(panel.shows)]
        for ref, (legend, expr) in zip(refs, panel.shows.items(), strict=True):
            made.with_target(_query(expr, legend, panel.kind).ref_id(ref))
        if panel.right:
            axis = models.DynamicConfigValue("custom.axisPlacement", "right")
            made.override_by_query(refs[-1], [models.DynamicConfigValue("unit", panel.right), axis])
    for title, unit in panel.column_units.items():
        made.override_by_name(title, [models.DynamicConfigValue("unit", unit)])
    return made


def _of_kind(panel: Panel) -> Any:
    match panel.kind:
        case Kind.LINES:
            return _lines(panel)
        case Kind.NUMBER:
            return (
                stat.Panel()
                .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
                .color_mode(common.BigValueColorMode.VALUE if panel.steps else common.BigValueColorMode.NONE)
                .graph_mode(common.BigValueGraphMode.NONE if panel.names else common.BigValueGraphMode.AREA)
            )
        case Kind.BUCKETS:
            return (
                heatmap.Panel()
                .calculate(calculate=False)
                .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(32))
                .cell_values(heatmap.CellValues().unit(units.Short))
                .y_axis(heatmap.YAxisConfig().unit(panel.unit))
                .scale_distribution(common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LINEAR))
                .show_legend()
                .show_tooltip()
            )
        case Kind.TABLE:
            return _table(panel)


def _lines(panel: Panel) -> timeseries.Panel:
    legend = common_builders.VizLegendOptions().display_mode(common.LegendDisplayMode.TABLE)
    legend.placement(common.LegendPlacement.BOTTOM).show_legend(show_legend=True).calcs(["mean", "max", "lastNotNull"])
    made = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(50 if panel.is_stacked else 8)
        .show_points(common.VisibilityMode.AUTO)
        .legend(legend)
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    )
    if panel.is_stacked:
        made.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if panel.steps:
        made.thresholds_style(common_builders.GraphThresholdsStyleConfig().mode(common.GraphTresholdsStyleMode.DASHED))
    if isinstance(panel.shows, Rows):  # Infinity gives one table of all workers; each becomes a line
        made.with_transformation(models.DataTransformerConfig(id_val="prepareTimeSeries", options={"format": "multi"}))
        made.display_name("${__field.labels.worker}")
    return made


def _table(panel: Panel) -> table.Panel:
    made = table.Panel().show_header(show_header=True)
    if isinstance(panel.shows, Rows):
        return made
    titles = {f"Value #{ref}": title for ref, title in zip(_REFS, panel.shows, strict=False)}
    arrange = {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": {"worker": "Worker", **titles}}
    return made.with_transformation(models.DataTransformerConfig(id_val="merge", options={})).with_transformation(
        models.DataTransformerConfig(id_val="organize", options=arrange)
    )


def _thresholds(panel: Panel) -> builders.ThresholdsConfig:
    colors = ("green", "yellow", "red")[:: 1 if len(panel.steps) == 2 else 2][: len(panel.steps) + 1]
    if panel.is_low_bad:
        colors = colors[::-1]
    steps = [models.Threshold(at, color) for at, color in zip((None, *panel.steps), colors, strict=True)]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _query(expr: str, legend: str, kind: Kind) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(of_cluster(expr)).legend_format(legend or "__auto")
    match kind:
        case Kind.TABLE:
            return query.instant().format(PromQueryFormat.TABLE)
        case Kind.BUCKETS:
            return query.range().format(PromQueryFormat.HEATMAP)
        case Kind.LINES | Kind.NUMBER:
            return query.range().format(PromQueryFormat.TIME_SERIES)


class _InfinityQuery(Builder[Dataquery], Dataquery):
    """A query of the plugin Infinity, which the SDK does not know; the data source has the master's address."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def build(self) -> Dataquery:
        return self

    def to_json(self) -> dict[str, object]:
        columns = (Column("time", "Time", "timestamp"), Column("worker", "worker", "string"), *self._rows.columns)
        part = ("latest", "true") if self._rows.only_latest else ("since", "${__from:date:seconds}")
        return {
            "refId": "A",
            "type": "json",
            "source": "url",
            "url": "/metrics.json",
            "url_options": {"method": "GET", "params": [dict(zip(("key", "value"), part, strict=True))]},
            "parser": "backend",
            "root_selector": "",
            "format": "table",
            "columns": [{"selector": each.field, "text": each.title, "type": each.type} for each in columns],
            "filters": [],
        }
