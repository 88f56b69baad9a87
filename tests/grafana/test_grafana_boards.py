"""The dashboards: queries name what is there, JSON is what Grafana's schema says, panels lie beside each other."""

import json
from itertools import combinations

import pytest
from fake_observatory import FakeObservatory, example_view, example_worker
from fake_text_engine import FakeTextEngine
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families
from promql_names import grouped, selected, with_values
from sdk_models import complaints

from shardwright.api.metrics import Metrics
from shardwright.grafana.alerts import alerts
from shardwright.grafana.boards import BOARDS, METRICS_JSON
from shardwright.grafana.panels import INFINITY, of_cluster, to_json
from shardwright.runtime.metrics import ROW_FIELDS

DASHBOARDS = {board.name: json.loads(to_json(board)) for board in BOARDS}
PROMETHEUS_LABELS = {"job", "instance"}  # of every target


def panels(name):
    return [panel for panel in DASHBOARDS[name]["panels"] if panel["type"] != "row"]


QUERIES = {
    f"{name}: {panel['title']} {target['refId']}": target["expr"]
    for name in DASHBOARDS
    for panel in panels(name)
    for target in panel["targets"]
    if "expr" in target
} | {f"alert {alert.name}": alert.promql for alert in alerts(2.0)}


@pytest.fixture(scope="module")
def served():
    """The labels of every metric that a master serves whose cluster has everything, a request answered and refused."""
    cluster = example_view((example_worker("rack-1", 0), example_worker("desk", 1)))
    metrics = Metrics(FakeTextEngine(observatory=FakeObservatory(cluster=cluster)))
    meter = metrics.begin("chat")
    meter.tokens(0, 1)
    meter.tokens(0, 1)
    meter.done("ok")
    found = {"up": set()}  # Prometheus' own
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("expr", QUERIES.values(), ids=QUERIES)
def test_every_query_names_metrics_and_labels_that_the_master_serves(expr, served):
    filled = with_values(expr)
    metrics = selected(filled)
    assert metrics
    labels = set()
    for name, asked in metrics:
        assert name in served
        assert asked <= served[name] | PROMETHEUS_LABELS
        labels |= served[name] | PROMETHEUS_LABELS
    assert grouped(filled) <= labels


@pytest.mark.parametrize("expr", [expr for key, expr in QUERIES.items() if not key.startswith("alert")])
def test_every_metric_of_a_dashboard_is_of_the_chosen_cluster(expr):
    assert all("instance" in asked for _, asked in selected(with_values(expr)))


@pytest.mark.parametrize("expr", ["rate(no-metric[1m])", "sum by (", ""])
def test_what_is_no_promql_is_found(expr):
    with pytest.raises(ValueError, match=r"."):
        selected(expr)


def test_the_cluster_is_put_beside_other_labels():
    assert of_cluster('a{} / b{c=~"$d"}') == 'a{instance="$cluster"} / b{instance="$cluster",c=~"$d"}'


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_legend_names_labels_that_its_query_keeps(name, served):
    for panel in panels(name):
        for target in panel["targets"]:
            if "{{" not in target.get("legendFormat", ""):
                continue
            expr = with_values(target["expr"])
            wanted = {part.split("}}")[0] for part in target["legendFormat"].split("{{")[1:]}
            by = grouped(expr)
            metrics = selected(expr)
            kept = by or set.intersection(*(served[metric] for metric, _ in metrics))
            assert wanted <= kept, panel["title"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_what_grafanas_schema_says(name):
    """The SDK's classes keep only fields that they know, so what comes back the same has no unknown one."""
    dashboard = Dashboard.from_json(DASHBOARDS[name])
    assert json.loads(json.dumps(dashboard, cls=JSONEncoder)) == DASHBOARDS[name]
    assert complaints(dashboard, Dashboard) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda board: board.update(graphTooltip=7), "graph_tooltip"),
        (lambda board: board["panels"][1]["gridPos"].update(w="wide"), "panels[1].grid_pos.w"),
        (lambda board: board["panels"][1]["fieldConfig"]["defaults"].update(unit=3), "field_config.defaults.unit"),
        (lambda board: board["panels"][1]["targets"][0].update(format="tables"), "panels[1].targets[0].format_val"),
        (lambda board: board["panels"][1]["options"].update(colorMode="loud"), "panels[1].options.color_mode"),
        (lambda board: board["templating"]["list"][0].update(refresh="often"), "templating.list_val[0].refresh"),
    ],
)
def test_what_is_not_of_the_schema_is_found(change, where):
    board = json.loads(to_json(BOARDS[0]))
    change(board)
    found = complaints(Dashboard.from_json(board), Dashboard)
    assert any(where in each for each in found), found


def test_a_field_that_the_schema_does_not_have_is_lost_on_the_way_through_the_sdk():
    board = json.loads(to_json(BOARDS[0]))
    board["panels"][1]["options"]["sparkle"] = True
    assert json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder)) != board


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_lie_inside_the_grid_and_on_no_other(name):
    places = [panel["gridPos"] for panel in DASHBOARDS[name]["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_have_a_title_a_sentence_a_unit_thresholds_and_a_number_of_their_own(name):
    ids = [panel["id"] for panel in DASHBOARDS[name]["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in panels(name)]
    assert len(set(titles)) == len(titles)
    for panel in panels(name):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None


def test_dashboards_find_each_other_and_are_told_apart():
    assert len({board["uid"] for board in DASHBOARDS.values()}) == len(BOARDS) == 5
    for board in DASHBOARDS.values():
        assert board["links"][0]["tags"] == board["tags"] == ["shardwright"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_asks_only_the_data_source_that_is_chosen_at_its_top(name):
    first, *others = DASHBOARDS[name]["templating"]["list"]
    kind, uid = first["query"], f"${{{first['name']}}}"
    assert first["type"] == "datasource"
    sources = [panel["datasource"] for panel in panels(name)] + [variable["datasource"] for variable in others]
    assert sources == [{"type": kind, "uid": uid}] * len(sources)
    assert kind == (INFINITY if name == "metrics-json" else "prometheus")


def test_variables_ask_for_labels_that_are_there(served):
    (cluster, worker) = DASHBOARDS["worker"]["templating"]["list"][1:]
    assert cluster["query"]["query"] == "label_values(shardwright_ready, instance)"
    assert worker["query"]["query"] == 'label_values(shardwright_worker_up{instance="$cluster"}, worker)'
    assert {"shardwright_ready", "shardwright_worker_up"} <= served.keys()
    assert "worker" in served["shardwright_worker_up"]
    for name in DASHBOARDS:
        uses = any("$worker" in target.get("expr", "") for panel in panels(name) for target in panel["targets"])
        assert uses == any(variable["name"] == "worker" for variable in DASHBOARDS[name]["templating"]["list"])


def test_rows_of_metrics_json_have_every_column_that_is_shown():
    shown = {column["selector"] for panel in panels("metrics-json") for column in panel["targets"][0]["columns"]}
    assert shown <= set(ROW_FIELDS)
    assert {"time", "worker", "gpu_utilization", "gpu_memory_used_bytes", "gpu_memory_total_bytes"} <= shown


def test_lines_of_metrics_json_are_one_for_each_worker():
    for panel in panels("metrics-json"):
        if panel["type"] == "timeseries":
            types = [column["type"] for column in panel["targets"][0]["columns"]]
            assert types == ["timestamp", "string", "number"]
            assert [change["id"] for change in panel["transformations"]] == ["prepareTimeSeries"]
            assert panel["fieldConfig"]["defaults"]["displayName"] == "${__field.labels.worker}"
    assert METRICS_JSON.plugin == INFINITY


def test_columns_of_tables_are_titled_as_their_units_say():
    for board in BOARDS:
        for panel in board.panels:
            titles = list(panel.shows) if isinstance(panel.shows, dict) else [c.title for c in panel.shows.columns]
            assert set(panel.column_units) <= set(titles), panel.title
