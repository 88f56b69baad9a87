"""The files that make Prometheus and Grafana show a cluster, as text by path. Who calls writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shardwright.grafana.alerts import MASTER_JOB, PROMETHEUS_UID, alerts, grafana_rules, prometheus_rules
from shardwright.grafana.boards import BOARDS
from shardwright.grafana.panels import INFINITY, to_json
from shardwright.grafana.yaml_text import to_yaml

SCRAPE_INTERVAL: Final = "5s"  # Grafana is told the same: its rates need four scrapes
HEADER: Final = "# Made by `shardwright grafana export`; change it there, or export with --force over your changes.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Who is reached where, as Prometheus and Grafana see it."""

    prometheus_url: str
    master: str  # host:port
    master_scheme: str  # http or https
    dashboards_path: str  # where Grafana finds the exported folder `dashboards`
    ttft_objective_s: float

    @property
    def master_url(self) -> str:
        """What the paths of the master's API are put behind."""
        return f"{self.master_scheme}://{self.master}"


def files(places: Places) -> dict[str, str]:
    """Every file's text by its path, folders separated by slashes."""
    rules = alerts(places.ttft_objective_s)
    settings: dict[str, Mapping[str, object]] = {
        "provisioning/datasources/shardwright.yaml": _datasources(places),
        "provisioning/dashboards/shardwright.yaml": _dashboards(places),
        "provisioning/alerting/shardwright.yaml": grafana_rules(rules),
        "prometheus/prometheus.yml": _scrapes(places),
        "prometheus/alerts.yaml": prometheus_rules(rules),
    }
    made = {path: HEADER + to_yaml(content) for path, content in settings.items()}
    return made | {f"dashboards/{board.name}.json": to_json(board) for board in BOARDS}


def _datasources(places: Places) -> dict[str, object]:
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Shardwright Prometheus",
                "uid": PROMETHEUS_UID,
                "type": "prometheus",
                "access": "proxy",
                "url": places.prometheus_url,
                "isDefault": True,
                "jsonData": {"timeInterval": SCRAPE_INTERVAL, "httpMethod": "POST"},
            },
            {
                "name": "Shardwright metrics.json",
                "uid": "shardwright-metrics-json",
                "type": INFINITY,
                "access": "proxy",
                "url": places.master_url,
                "jsonData": {"allowedHosts": [places.master_url]},
            },
        ],
    }


def _dashboards(places: Places) -> dict[str, object]:
    provider = {
        "name": "shardwright",
        "folder": "Shardwright",
        "type": "file",
        "allowUiUpdates": False,
        "options": {"path": places.dashboards_path},
    }
    return {"apiVersion": 1, "providers": [provider]}


def _scrapes(places: Places) -> dict[str, object]:
    """The master tells of all workers; they are scraped themselves too, for when the master is what fails."""
    return {
        "global": {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": "15s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [
            {
                "job_name": MASTER_JOB,
                "scheme": places.master_scheme,
                "static_configs": [{"targets": [places.master]}],
            },
            {
                "job_name": "shardwright-workers",
                "http_sd_configs": [{"url": f"{places.master_url}/prometheus/targets", "refresh_interval": "15s"}],
            },
        ],
    }
