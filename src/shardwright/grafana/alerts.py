"""What deserves to wake someone: rules as data, written for Prometheus and for Grafana."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Literal

from grafana_foundation_sdk.builders import alerting, expr, prometheus
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.alerting import RelativeTimeRange
from grafana_foundation_sdk.models.dashboard import DataSourceRef

PROMETHEUS_UID: Final = "shardwright-prometheus"
MASTER_JOB: Final = "shardwright"
GROUP: Final = "shardwright"
_SIGNS: Final = {"gt": ">", "lt": "<"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Fires for each series of `expr` that was above (gt) or below (lt) `bound` for `after`."""

    name: str
    expr: str
    compare: Literal["gt", "lt"]
    bound: float
    after: str
    severity: Literal["critical", "warning"]
    summary: str
    runbook: str

    @property
    def promql(self) -> str:
        """The whole condition: empty while all is well."""
        return f"{self.expr} {_SIGNS[self.compare]} {self.bound:g}"

    @property
    def notes(self) -> dict[str, str]:
        """Annotations; both systems fill `{{ $labels.worker }}` in."""
        return {"summary": self.summary, "runbook": self.runbook}


def alerts(ttft_objective_s: float) -> tuple[Alert, ...]:
    """All rules. `ttft_objective_s`: 95 of 100 first tokens shall come within so many seconds."""
    same_master = "and on (job, instance)"
    ttft_buckets = "sum by (job, instance, le) (rate(shardwright_time_to_first_token_seconds_bucket[5m]))"
    return (
        Alert(
            name="ShardwrightMasterDown",
            expr=f'(up{{job="{MASTER_JOB}"}} or 0 * absent(up{{job="{MASTER_JOB}"}}))',
            compare="lt",
            bound=1,
            after="1m",
            severity="critical",
            summary="Prometheus gets no metrics from the master",
            runbook="Look whether `shardwright serve` runs and whether prometheus.yml names its address; "
            "if it asks for API keys, start it with --open-metrics or give Prometheus a key.",
        ),
        Alert(
            name="ShardwrightNotReady",
            expr="shardwright_ready",
            compare="lt",
            bound=1,
            after="1m",
            severity="critical",
            summary="The model at {{ $labels.instance }} answers no requests",
            runbook="GET /health tells the reason; if a worker was lost, start it again, "
            "and if the model still loads, wait for it.",
        ),
        Alert(
            name="ShardwrightWorkerLost",
            expr="shardwright_worker_up",
            compare="lt",
            bound=1,
            after="30s",
            severity="critical",
            summary="Worker {{ $labels.worker }} of {{ $labels.instance }} is lost",
            runbook="See on its machine whether `shardwright worker` runs and what it printed last, "
            "check the network with `shardwright workers`, and start it again.",
        ),
        Alert(
            name="ShardwrightStageSaturated",
            expr="(sum by (job, instance, worker) (rate(shardwright_stage_busy_seconds_total[2m])) "
            f"{same_master} deriv(shardwright_sequences_waiting[5m]) > 0)",
            compare="gt",
            bound=0.95,
            after="5m",
            severity="warning",
            summary="Worker {{ $labels.worker }} computes without a pause, and the queue of requests grows",
            runbook="Give the stage of this worker fewer layers or a faster machine (`shardwright plan` shows the "
            "placement), or add a worker; until then fewer requests at once keep the waiting short.",
        ),
        Alert(
            name="ShardwrightBlocksExhausted",
            expr="(shardwright_kv_blocks_used / (shardwright_kv_blocks > 0) "
            f"{same_master} shardwright_sequences_waiting > 0)",
            compare="gt",
            bound=0.95,
            after="2m",
            severity="warning",
            summary="The KV blocks of {{ $labels.instance }} are used up, and requests wait for some",
            runbook="Give the workers more memory or add one, raise --kv-tokens if it limits the blocks, "
            "or allow shorter answers.",
        ),
        Alert(
            name="ShardwrightSlowFirstToken",
            expr=f"histogram_quantile(0.95, {ttft_buckets})",
            compare="gt",
            bound=ttft_objective_s,
            after="5m",
            severity="warning",
            summary=f"5 of 100 requests to {{{{ $labels.instance }}}} wait more than {ttft_objective_s:g} s "
            "for their first token",
            runbook="The dashboard 'latency of requests' shows whether they wait for blocks (see waiting requests), "
            "for a busy stage, or for a link.",
        ),
    )


def prometheus_rules(rules: tuple[Alert, ...]) -> dict[str, object]:
    """A rule file of Prometheus."""
    made = [
        {
            "alert": rule.name,
            "expr": rule.promql,
            "for": rule.after,
            "labels": {"severity": rule.severity},
            "annotations": rule.notes,
        }
        for rule in rules
    ]
    return {"groups": [{"name": GROUP, "rules": made}]}


def grafana_rules(rules: tuple[Alert, ...]) -> dict[str, object]:
    """A file of Grafana's alerting provisioning. The rules ask the data source `PROMETHEUS_UID`."""
    made = [
        {
            "uid": f"shardwright-{rule.name.removeprefix('Shardwright').lower()}",
            "title": rule.name,
            "condition": "C",
            "data": _queries(rule),
            "for": rule.after,
            "noDataState": "OK",  # no series is the healthy state of most; a master that is gone has a rule of its own
            "execErrState": "Error",
            "labels": {"severity": rule.severity},
            "annotations": rule.notes,
        }
        for rule in rules
    ]
    return {
        "apiVersion": 1,
        "groups": [{"orgId": 1, "name": GROUP, "folder": "Shardwright", "interval": "15s", "rules": made}],
    }


def _queries(rule: Alert) -> object:
    """Ask for the newest value of each series, then compare it."""
    evaluator = expr.ExprTypeThresholdConditionsEvaluator().params([rule.bound]).type(rule.compare)
    ask = prometheus.Dataquery().expr(rule.expr).instant().ref_id("A")
    compare = (
        expr.TypeThreshold()
        .expression("A")
        .conditions([expr.ExprTypeThresholdConditions().evaluator(evaluator)])
        .datasource(DataSourceRef(type_val="__expr__", uid="__expr__"))
        .ref_id("C")
    )
    queries = (
        alerting.Query("A").datasource_uid(PROMETHEUS_UID).model(ask),
        alerting.Query("C").datasource_uid("__expr__").model(compare),
    )
    period = RelativeTimeRange(from_val=600, to=0)  # seconds; an instant query looks at its end alone
    built = [query.relative_time_range(period).build() for query in queries]
    plain: object = json.loads(json.dumps(built, cls=JSONEncoder))
    return plain
