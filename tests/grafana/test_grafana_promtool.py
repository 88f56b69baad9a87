"""Prometheus' own tool reads the exported files, and fires each alert when it should and only then."""

import re
import subprocess

import pytest
from prometheus_server import promtool

from shardwright.grafana.alerts import alerts
from shardwright.grafana.export import Places, files
from shardwright.grafana.yaml_text import to_yaml

pytestmark = pytest.mark.slow  # Debian's package of Prometheus is fetched where it is not there

MASTER = 'job="shardwright",instance="rack:8000"'
HEALTHY = {  # values every 15 s, as promtool writes them: first + step each time x times
    f"up{{{MASTER}}}": "1+0x120",
    f"shardwright_ready{{{MASTER}}}": "1+0x120",
    f'shardwright_worker_up{{{MASTER},worker="rack-1"}}': "1+0x120",
    f'shardwright_worker_up{{{MASTER},worker="desk"}}': "1+0x120",
    f'shardwright_stage_busy_seconds_total{{{MASTER},worker="rack-1"}}': "0+7.5x120",
    f'shardwright_stage_busy_seconds_total{{{MASTER},worker="desk"}}': "0+3x120",
    f"shardwright_sequences_waiting{{{MASTER}}}": "0+0x120",
    f"shardwright_kv_blocks{{{MASTER}}}": "100+0x120",
    f"shardwright_kv_blocks_used{{{MASTER}}}": "40+0x120",
    f'shardwright_time_to_first_token_seconds_bucket{{{MASTER},le="0.5"}}': "0+9x120",
    f'shardwright_time_to_first_token_seconds_bucket{{{MASTER},le="2.5"}}': "0+10x120",
    f'shardwright_time_to_first_token_seconds_bucket{{{MASTER},le="+Inf"}}': "0+10x120",
}
BUSY, WAITING, USED = (
    f'shardwright_stage_busy_seconds_total{{{MASTER},worker="rack-1"}}',
    f"shardwright_sequences_waiting{{{MASTER}}}",
    f"shardwright_kv_blocks_used{{{MASTER}}}",
)
SLOW = {
    f'shardwright_time_to_first_token_seconds_bucket{{{MASTER},le="{le}"}}': values
    for le, values in (("0.5", "0+5x120"), ("2.5", "0+6x120"), ("+Inf", "0+10x120"))
}
FIRES = [
    # which alert, what is other than healthy, labels that it has beside those of the master
    ("ShardwrightMasterDown", {f"up{{{MASTER}}}": "1+0x20 0+0x100"}, {}),
    ("ShardwrightMasterDown", {f"up{{{MASTER}}}": None}, {"instance": None}),
    ("ShardwrightNotReady", {f"shardwright_ready{{{MASTER}}}": "1+0x20 0+0x100"}, {}),
    (
        "ShardwrightWorkerLost",
        {f'shardwright_worker_up{{{MASTER},worker="desk"}}': "1+0x20 0+0x100"},
        {"worker": "desk"},
    ),
    ("ShardwrightStageSaturated", {BUSY: "0+14.7x120", WAITING: "0+1x120"}, {"worker": "rack-1"}),
    ("ShardwrightBlocksExhausted", {USED: "98+0x120", WAITING: "3+0x120"}, {}),
    ("ShardwrightSlowFirstToken", SLOW, {}),
]
STAYS_QUIET = {
    "all is well": {},
    "busy, but nobody waits": {BUSY: "0+14.9x120"},
    "busy, and the queue shrinks": {BUSY: "0+14.9x120", WAITING: "300-1x120"},
    "the queue grows, but no stage is busy": {WAITING: "0+1x120"},
    "all blocks are in use, but nobody waits": {USED: "100+0x120"},
    "no pipeline, so no blocks": {USED: "0+0x120", f"shardwright_kv_blocks{{{MASTER}}}": "0+0x120", WAITING: "3+0x120"},
    "no requests": {series: "5+0x120" for series in HEALTHY if "_bucket" in series},
    "a master that has just begun": {series: None for series in HEALTHY if not series.startswith("up")},
    "a scrape that failed": {f"up{{{MASTER}}}": "1+0x70 0 1+0x50"},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The exported files on disk."""
    folder = tmp_path_factory.mktemp("exported")
    places = Places(
        prometheus_url="http://127.0.0.1:9090",
        master="127.0.0.1:8000",
        master_scheme="http",
        dashboards_path="/etc/grafana/dashboards",
        ttft_objective_s=2.0,
    )
    for name, text in files(places).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "prometheus"


def run(*arguments):
    done = subprocess.run([promtool(), *arguments], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_promtool_accepts_the_settings_and_the_rules(exported):
    code, said = run("check", "config", exported / "prometheus.yml")
    assert code == 0, said
    assert "6 rules found" in said
    code, said = run("check", "rules", "--lint-fatal", exported / "alerts.yaml")
    assert code == 0, said


def expected(name, labels):
    """The alert as it fires, for promtool to compare."""
    [rule] = [each for each in alerts(2.0) if each.name == name]
    all_labels = {"job": "shardwright", "instance": "rack:8000", "severity": rule.severity} | labels
    all_labels = {label: value for label, value in all_labels.items() if value is not None}
    notes = {
        note: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: all_labels[found[1]], text)
        for note, text in rule.notes.items()
    }
    return {"exp_labels": all_labels, "exp_annotations": notes}


def check(exported, changes, fired):
    """Let promtool play the series for 25 minutes; only `fired` may fire."""
    series = {name: values for name, values in (HEALTHY | changes).items() if values is not None}
    at = [
        {"eval_time": "20m", "alertname": rule.name, "exp_alerts": [fired[rule.name]] if rule.name in fired else []}
        for rule in alerts(2.0)
    ]
    played = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": at,
    }
    file = exported / "played.yaml"
    file.write_text(to_yaml({"rule_files": ["alerts.yaml"], "evaluation_interval": "15s", "tests": [played]}))
    return run("test", "rules", file)


@pytest.mark.parametrize(("name", "changes", "labels"), FIRES, ids=[each[0] for each in FIRES])
def test_an_alert_fires_when_it_should_and_alone(exported, name, changes, labels):
    code, said = check(exported, changes, {name: expected(name, labels)})
    assert code == 0, said


@pytest.mark.parametrize("changes", STAYS_QUIET.values(), ids=STAYS_QUIET)
def test_no_alert_fires_where_nothing_is_wrong(exported, changes):
    code, said = check(exported, changes, {})
    assert code == 0, said


def test_promtool_finds_an_alert_that_should_not_fire(exported):
    """So that the tests above can fail."""
    code, said = check(exported, {USED: "98+0x120", WAITING: "3+0x120"}, {})
    assert code == 1
    assert "ShardwrightBlocksExhausted" in said


def test_every_alert_is_seen_to_fire():
    assert {name for name, *_ in FIRES} == {rule.name for rule in alerts(2.0)}
