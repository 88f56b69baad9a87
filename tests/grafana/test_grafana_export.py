"""The exported files: YAML that is read as it was meant, one rule in two forms, and what deploy/monitoring holds."""

import json
import re
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.models.alerting import Query
from hypothesis import given
from hypothesis import strategies as st
from sdk_models import complaints

from shardwright.grafana.alerts import alerts
from shardwright.grafana.export import Places, files
from shardwright.grafana.yaml_text import to_yaml

DEPLOY = Path(__file__).parents[2] / "deploy" / "monitoring"
DEFAULTS = Places(
    prometheus_url="http://127.0.0.1:9090",
    master="127.0.0.1:8000",
    master_scheme="http",
    dashboards_path="/etc/grafana/dashboards",
    ttft_objective_s=2.0,
)
MADE = files(DEFAULTS)


def read(path, made=MADE):
    return yaml.safe_load(made[path])


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
keys = st.from_regex(r"[A-Za-z_][A-Za-z_-]{0,9}", fullmatch=True).filter(
    lambda key: yaml.safe_load(key) == key  # not one of YAML's words for true, false and null
)
scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | texts
values = st.recursive(scalars, lambda part: st.lists(part, max_size=4) | st.dictionaries(keys, part, max_size=4))


@given(st.dictionaries(keys, values, min_size=1, max_size=4))
def test_yaml_is_read_as_what_was_written(value):
    assert yaml.safe_load(to_yaml(value)) == value


def test_yaml_is_laid_out_for_people():
    text = to_yaml({"a": 1, "b": [{"c": "x: {y}", "d": ["e", []]}], "f": {}, "g": {"h": None}})
    assert text == 'a: 1\nb:\n  - c: "x: {y}"\n    d:\n      - "e"\n      - []\nf: {}\ng:\n  h: null\n'


def test_the_files_of_deploy_monitoring_are_those_that_are_exported():
    """After a change: `shardwright grafana export deploy/monitoring --force`."""
    there = {path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*") if path.is_file()}
    assert there == {"compose.yaml", *MADE}
    assert [path for path, text in MADE.items() if (DEPLOY / path).read_text(encoding="utf-8") != text] == []


def test_nothing_in_the_files_is_of_the_machine_that_exports():
    assert files(DEFAULTS) == MADE
    assert not any(str(Path.home()) in text for text in MADE.values() if str(Path.home()) != "/")


@pytest.mark.parametrize("rule", alerts(2.0), ids=lambda rule: rule.name)
def test_grafanas_rule_is_that_of_prometheus(rule):
    [group] = read("provisioning/alerting/shardwright.yaml")["groups"]
    [grafana] = [each for each in group["rules"] if each["title"] == rule.name]
    [group] = read("prometheus/alerts.yaml")["groups"]
    [prometheus] = [each for each in group["rules"] if each["alert"] == rule.name]
    asked, compared = grafana["data"]
    [condition] = compared["model"]["conditions"]
    sign = {"gt": ">", "lt": "<"}[condition["evaluator"]["type"]]
    assert prometheus["expr"] == f"{asked['model']['expr']} {sign} {condition['evaluator']['params'][0]:g}"
    assert (asked["model"]["instant"], compared["model"]["expression"]) == (True, asked["refId"])
    assert grafana["condition"] == compared["refId"]
    for field in ("for", "labels", "annotations"):
        assert grafana[field] == prometheus[field]
    assert {"summary", "runbook"} == grafana["annotations"].keys()
    assert grafana["annotations"]["runbook"].endswith(".")


def test_grafanas_rules_are_what_its_schema_says_and_ask_a_data_source_that_is_there():
    [group] = read("provisioning/alerting/shardwright.yaml")["groups"]
    sources = {each["uid"]: each for each in read("provisioning/datasources/shardwright.yaml")["datasources"]}
    assert len({rule["uid"] for rule in group["rules"]}) == len(group["rules"]) == 6
    for rule in group["rules"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", rule["uid"])
        for query in rule["data"]:
            assert complaints(query, Query) == []
        assert [query["datasourceUid"] in sources for query in rule["data"]] == [True, False]
        assert rule["data"][1]["datasourceUid"] == "__expr__"


def test_the_objective_of_the_first_token_stands_in_both_rules():
    made = files(Places(**{field: getattr(DEFAULTS, field) for field in Places.__slots__} | {"ttft_objective_s": 0.75}))
    for path in ("prometheus/alerts.yaml", "provisioning/alerting/shardwright.yaml"):
        assert "0.75" in made[path]
        assert "wait more than 0.75 s" in made[path]


def test_prometheus_scrapes_the_master_and_the_workers_that_it_names():
    made = files(
        Places(
            prometheus_url="http://prom:9090/base",
            master="rack:8443",
            master_scheme="https",
            dashboards_path="/d",
            ttft_objective_s=1,
        )
    )
    config = read("prometheus/prometheus.yml", made)
    assert config["rule_files"] == ["alerts.yaml"]
    master, workers = config["scrape_configs"]
    assert (master["scheme"], master["static_configs"]) == ("https", [{"targets": ["rack:8443"]}])
    assert workers["http_sd_configs"][0]["url"] == "https://rack:8443/prometheus/targets"
    prometheus, infinity = read("provisioning/datasources/shardwright.yaml", made)["datasources"]
    assert (prometheus["url"], infinity["url"]) == ("http://prom:9090/base", "https://rack:8443")
    assert prometheus["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    [provider] = read("provisioning/dashboards/shardwright.yaml", made)["providers"]
    assert provider["options"]["path"] == "/d"


def test_the_rule_of_a_master_that_is_down_names_the_job_that_scrapes_it():
    down = alerts(2.0)[0]
    job = read("prometheus/prometheus.yml")["scrape_configs"][0]["job_name"]
    assert down.expr.count(f'job="{job}"') == 2


COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]


def test_compose_pins_what_it_starts_and_gives_it_nothing_to_change():
    for service in SERVICES.values():
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["cap_drop"] == ["ALL"]
        for mount in service["volumes"]:
            source, target, *mode = mount.split(":")
            if source.startswith("./"):
                assert mode == ["ro"]
                assert (DEPLOY / source).is_dir()
            else:
                assert source in COMPOSE["volumes"]
                assert target.startswith("/")


def test_compose_has_no_password_and_says_so_when_none_is_given():
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?set GRAFANA_ADMIN_PASSWORD")
    assert [name for name in environment if "PASSWORD" in name or "SECRET" in name] == ["GF_SECURITY_ADMIN_PASSWORD"]


def test_compose_puts_the_exported_files_where_they_say_they_are():
    environment = SERVICES["grafana"]["environment"]
    assert f"./dashboards:{DEFAULTS.dashboards_path}:ro" in SERVICES["grafana"]["volumes"]
    assert environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{DEFAULTS.dashboards_path}/overview.json"
    assert "./provisioning:/etc/grafana/provisioning:ro" in SERVICES["grafana"]["volumes"]
    assert "./prometheus:/etc/prometheus:ro" in SERVICES["prometheus"]["volumes"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    listen = [each for each in SERVICES["prometheus"]["command"] if each.startswith("--web.listen-address")]
    assert listen == [f"--web.listen-address={DEFAULTS.prometheus_url.removeprefix('http://')}"]


def test_compose_installs_the_plugin_that_a_dashboard_asks_for_in_one_version():
    plugin, version = SERVICES["grafana"]["environment"]["GF_PLUGINS_PREINSTALL_SYNC"].split("@")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    asked = json.loads(MADE["dashboards/metrics-json.json"])["templating"]["list"][0]["query"]
    provisioned = read("provisioning/datasources/shardwright.yaml")["datasources"][1]["type"]
    assert plugin == asked == provisioned
