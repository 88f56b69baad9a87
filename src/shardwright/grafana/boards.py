"""The dashboards, as data. Metric names are those of the master's `/metrics`, which docs/monitoring.md explains.

Rates are taken over Grafana's `$__rate_interval`, four scrapes at least.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from grafana_foundation_sdk.models import units

from shardwright.grafana.panels import Board, Column, Kind, Panel, Rows, Section

TOKENS: Final = "suffix: tokens/s"
STEPS: Final = "suffix: steps/s"


def _rate(counter: str, labels: str = "") -> str:
    return f"rate(shardwright_{counter}{{{labels}}}[$__rate_interval])"


def _sum_rate(counter: str, by: str = "", labels: str = "") -> str:
    return f"sum by ({by}) ({_rate(counter, labels)})" if by else f"sum({_rate(counter, labels)})"


def _quantile(part: float, histogram: str, by: str = "", labels: str = "") -> str:
    return f"histogram_quantile({part}, {_sum_rate(f'{histogram}_bucket', f'le, {by}' if by else 'le', labels)})"


def _quantiles(histogram: str) -> dict[str, str]:
    return {f"p{part * 100:.0f}": _quantile(part, histogram) for part in (0.5, 0.95, 0.99)}


def _buckets(histogram: str, labels: str = "") -> dict[str, str]:
    return {"{{le}}": f"sum by (le) (increase(shardwright_{histogram}_bucket{{{labels}}}[$__rate_interval]))"}


def _mean(histogram: str, by: str, labels: str = "") -> str:
    return f"{_sum_rate(f'{histogram}_sum', by, labels)} / ({_sum_rate(f'{histogram}_count', by, labels)} > 0)"


def _newest(metric: str, by: str = "worker", labels: str = "") -> str:
    return f"max by ({by}) (shardwright_{metric}{{{labels}}})"


_number = partial(Panel, kind=Kind.NUMBER, width=4, height=5)
_heatmap = partial(Panel, kind=Kind.BUCKETS, unit=units.Seconds)
_seconds = partial(Panel, unit=units.Seconds)
_bytes = partial(Panel, unit=units.BytesIEC)
_ratio = partial(Panel, unit=units.PercentUnit, top=1)

CHOSEN: Final = 'worker=~"$worker"'
BUSY: Final = _sum_rate("stage_busy_seconds_total", "worker")
OUTPUT: Final = _sum_rate("output_tokens_total")
TTFT: Final = "time_to_first_token_seconds"
GAP: Final = "inter_token_latency_seconds"
MEMORY: Final = "sum by (worker) (shardwright_memory_used_bytes{}) / sum by (worker) (shardwright_memory_total_bytes{})"
GPU: Final = _newest("gpu_utilization_ratio", "worker, device")
GPU_MEMORY: Final = (
    "sum by (worker, device) (shardwright_gpu_memory_used_bytes{})"
    " / sum by (worker, device) (shardwright_gpu_memory_total_bytes{})"
)

OVERVIEW: Final = Board(
    "overview",
    "Shardwright: overview",
    "Whether the model answers, how fast, and which worker holds it up.",
    Section(
        "Now",
        _number(
            "Pipeline",
            "Whether a real token went through all stages lately.",
            {"": "min(shardwright_ready{})"},
            steps=(1,),
            is_low_bad=True,
            names={"0": "not ready", "1": "ready"},
        ),
        _number(
            "Workers lost",
            "Workers that failed and have not come back.",
            {"": "sum(1 - shardwright_worker_up{})"},
            steps=(1,),
        ),
        _number("Generated", "Tokens of all answers.", {"": OUTPUT}, TOKENS),
        _number(
            "First token, p95",
            "From a request's arrival to the first token of its answer: 95 of 100 are faster.",
            {"": _quantile(0.95, TTFT)},
            units.Seconds,
        ),
        _number(
            "KV blocks in use",
            "Part of the key and value blocks that running requests hold. Near 100 % new requests wait.",
            {"": "sum(shardwright_kv_blocks_used{}) / (sum(shardwright_kv_blocks{}) > 0)"},
            units.PercentUnit,
            steps=(0.8, 0.95),
        ),
        _number(
            "Busiest stage",
            "Part of its time that the busiest stage computes: the pipeline is no faster than this one.",
            {"": f"max({BUSY})"},
            units.PercentUnit,
            steps=(0.85, 0.95),
        ),
    ),
    Section(
        "Work",
        Panel(
            "Tokens",
            "Generated tokens, and prompt tokens that had to be computed (those of a cached prefix had not).",
            {
                "generated": OUTPUT,
                "prompt": f"sum({_rate('prompt_tokens_total')} - {_rate('cached_prompt_tokens_total')})",
            },
            TOKENS,
        ),
        Panel(
            "Requests",
            "Running requests hold KV blocks; waiting ones have none yet.",
            {"running": "sum(shardwright_sequences_running{})", "waiting": "sum(shardwright_sequences_waiting{})"},
        ),
        _seconds(
            "Latency, p95",
            "95 of 100 requests have their first token sooner, 95 of 100 tokens come after a shorter gap.",
            {"first token": _quantile(0.95, TTFT), "between tokens": _quantile(0.95, GAP)},
        ),
        _ratio(
            "Busy stages",
            "Part of its time that each worker computes. The highest line bounds the throughput.",
            {"{{worker}}": BUSY},
            steps=(0.95,),
        ),
        Panel(
            "Answers by outcome",
            "Requests over HTTP that ended, by how they ended.",
            {"{{outcome}}": _sum_rate("http_requests_total", "outcome")},
            units.RequestsPerSecond,
            is_stacked=True,
        ),
        Panel(
            "Errors by kind",
            "Errors of the master and of all workers. None is the healthy state.",
            {"{{kind}}": _sum_rate("errors_total", "kind")},
            units.CountsPerSecond,
            is_stacked=True,
        ),
    ),
    Section(
        "Workers",
        _ratio(
            "GPU",
            "Part of the time that each GPU was busy; empty without NVIDIA GPUs.",
            {"{{worker}} {{device}}": GPU},
        ),
        _ratio(
            "Memory in use",
            "Of each GPU and of each machine, by all processes.",
            {"{{worker}} {{device}}": GPU_MEMORY, "{{worker}} RAM": MEMORY},
            steps=(0.95,),
        ),
        Panel(
            "Workers side by side",
            "What each worker does now. GPU columns stay empty where there is none.",
            {
                "Up": _newest("worker_up"),
                "Layers": _newest("stage_layers"),
                "Busy": BUSY,
                "GPU": _newest("gpu_utilization_ratio"),
                "GPU memory": _newest("gpu_memory_used_bytes"),
                "CPU": _newest("cpu_utilization_ratio"),
                "RAM": MEMORY,
                "Round trip": _newest("master_round_trip_seconds"),
            },
            kind=Kind.TABLE,
            width=24,
            column_units={
                "Busy": units.PercentUnit,
                "GPU": units.PercentUnit,
                "GPU memory": units.BytesIEC,
                "CPU": units.PercentUnit,
                "RAM": units.PercentUnit,
                "Round trip": units.Seconds,
            },
        ),
    ),
)

WORKER: Final = Board(
    "worker",
    "Shardwright: per worker",
    "What a worker does with its time and memory, and how its links are.",
    Section(
        "Time",
        _ratio(
            "Busy",
            "Part of its time that the worker's stage computes.",
            {"{{worker}}": _sum_rate("stage_busy_seconds_total", "worker", CHOSEN)},
            steps=(0.95,),
        ),
        Panel(
            "Steps",
            "Steps that the worker's stage finished.",
            {"{{worker}}": _sum_rate("stage_steps_total", "worker", CHOSEN)},
            STEPS,
        ),
        _seconds(
            "A step's time by phase",
            "Mean time of a step on the wire to the worker, queued before its compute thread, computing, "
            "making bytes of the result, sending, and waiting.",
            {"{{worker}} {{phase}}": _mean("stage_phase_seconds", "worker, phase", CHOSEN)},
            is_stacked=True,
        ),
        _heatmap(
            "Compute time of a step",
            "How many steps took how long to compute. Prompts and large batches make the upper bands.",
            _buckets("stage_phase_seconds", f'phase="compute", {CHOSEN}'),
        ),
        Panel(
            "Queue",
            "Steps that wait for the worker's compute thread. If there are always some, it is the bottleneck.",
            {"{{worker}}": f"shardwright_stage_queue_depth{{{CHOSEN}}}"},
        ),
        Panel(
            "Errors by kind",
            "Errors that the worker met. None is the healthy state.",
            {"{{worker}} {{kind}}": _sum_rate("worker_errors_total", "worker, kind", CHOSEN)},
            units.CountsPerSecond,
            is_stacked=True,
        ),
    ),
    Section(
        "Machine",
        _ratio(
            "GPU",
            "Part of the time that the GPU was busy, as NVIDIA's driver tells; empty without one.",
            {"{{worker}} {{device}}": f"shardwright_gpu_utilization_ratio{{{CHOSEN}}}"},
        ),
        _bytes(
            "GPU memory",
            "Of all processes on the GPU, and what it has; empty without an NVIDIA GPU.",
            {
                "{{worker}} {{device}} used": f"shardwright_gpu_memory_used_bytes{{{CHOSEN}}}",
                "{{worker}} {{device}} total": f"shardwright_gpu_memory_total_bytes{{{CHOSEN}}}",
            },
        ),
        Panel(
            "GPU temperature and power",
            "A GPU that is too hot or at its power limit computes slower. Power is on the right.",
            {
                "{{worker}} {{device}} temperature": f"shardwright_gpu_temperature_celsius{{{CHOSEN}}}",
                "{{worker}} {{device}} power": f"shardwright_gpu_power_watts{{{CHOSEN}}}",
            },
            units.Celsius,
            right=units.Watt,
        ),
        _ratio(
            "CPU",
            "Of all the machine's cores, by all processes.",
            {"{{worker}}": f"shardwright_cpu_utilization_ratio{{{CHOSEN}}}"},
        ),
        _bytes(
            "RAM",
            "Of the machine (or container) and of the worker's own process.",
            {
                "{{worker}} machine": f"shardwright_memory_used_bytes{{{CHOSEN}}}",
                "{{worker}} machine's total": f"shardwright_memory_total_bytes{{{CHOSEN}}}",
                "{{worker}} process": f"shardwright_process_memory_bytes{{{CHOSEN}}}",
            },
        ),
        _bytes(
            "Stage's memory",
            "Weights and key and value blocks of the layers that the worker holds.",
            {
                "{{worker}} weights": f"shardwright_stage_weight_bytes{{{CHOSEN}}}",
                "{{worker}} KV blocks": f"shardwright_stage_kv_bytes{{{CHOSEN}}}",
            },
            is_stacked=True,
        ),
    ),
    Section(
        "Ranks",
        Panel(
            "Ranks",
            "Devices of the worker that compute each layer together (--tensor-parallel).",
            {"{{worker}}": f"shardwright_worker_ranks{{{CHOSEN}}}"},
            width=8,
        ),
        _ratio(
            "GPU of each rank",
            "Ranks wait for each other in every layer: the slowest holds all of them up. Empty on CPUs.",
            {"{{worker}} rank {{rank}} ({{device}})": f"shardwright_rank_gpu_utilization_ratio{{{CHOSEN}}}"},
            width=8,
        ),
        _bytes(
            "Memory of each rank",
            "RAM of its process, and what is used of its GPU's memory by all processes; empty without several ranks.",
            {
                "{{worker}} rank {{rank}} process": f"shardwright_rank_process_memory_bytes{{{CHOSEN}}}",
                "{{worker}} rank {{rank}} GPU": f"shardwright_rank_gpu_memory_used_bytes{{{CHOSEN}}}",
                "{{worker}} rank {{rank}} GPU's total": f"shardwright_rank_gpu_memory_total_bytes{{{CHOSEN}}}",
            },
            width=8,
        ),
    ),
    Section(
        "Links",
        Panel(
            "Sent",
            "Bytes of activations that the worker sends, by who gets them.",
            {"{{worker}} to {{peer}}": _rate("link_sent_bytes_total", CHOSEN)},
            units.BytesPerSecondSI,
        ),
        _bytes(
            "Bytes of a step",
            "Mean size of what the worker sends for one step.",
            {
                "{{worker}} to {{peer}}": f"{_rate('link_sent_bytes_total', CHOSEN)}"
                f" / ({_rate('link_steps_total', CHOSEN)} > 0)"
            },
        ),
        _seconds(
            "Round trips",
            "From the worker to the next one and back, and from the master to the worker and back.",
            {
                "{{worker}} to {{peer}}": f"shardwright_link_round_trip_seconds{{{CHOSEN}}}",
                "master to {{worker}}": f"shardwright_master_round_trip_seconds{{{CHOSEN}}}",
            },
        ),
        _bytes(
            "Weights loaded by source",
            "From the worker's own disk, from its cache, or over the network from the master.",
            {"{{worker}} from {{source}}": f"shardwright_weights_loaded_bytes_total{{{CHOSEN}}}"},
            is_stacked=True,
        ),
        Panel(
            "What the workers are",
            "Machine and device, how many layers each holds, and of which pipeline (the epoch).",
            {
                "Known": _newest("worker_info", "worker, host, device, device_name", CHOSEN),
                "Up": _newest("worker_up", labels=CHOSEN),
                "Layers": _newest("stage_layers", labels=CHOSEN),
                "Epoch": _newest("stage_epoch", labels=CHOSEN),
            },
            kind=Kind.TABLE,
            width=24,
        ),
    ),
    has_worker_choice=True,
)

LATENCY: Final = Board(
    "latency",
    "Shardwright: latency of requests",
    "How long requests wait for their first token, between tokens and in all; and at which stage the time goes.",
    Section(
        "Requests",
        _seconds("First token", "From a request's arrival to the first token of its answer.", _quantiles(TTFT)),
        _heatmap("First tokens", "How many requests waited how long for their first token.", _buckets(TTFT)),
        _seconds("Between tokens", "Time between two tokens of one answer.", _quantiles(GAP)),
        _heatmap("Gaps between tokens", "How many tokens came after how long a gap.", _buckets(GAP)),
        _seconds(
            "Duration of requests, p95",
            "From a request's arrival to the end of its answer; long answers take long.",
            {"{{endpoint}}": _quantile(0.95, "request_duration_seconds", "endpoint")},
        ),
        Panel(
            "Queue",
            "Requests that wait for KV blocks, those that run, and how often one gave its blocks up (right).",
            {
                "waiting": "sum(shardwright_sequences_waiting{})",
                "running": "sum(shardwright_sequences_running{})",
                "preemptions (right)": _sum_rate("preemptions_total"),
            },
            right=units.CountsPerSecond,
        ),
    ),
    Section(
        "Where a step's time goes",
        _seconds(
            "Phases by stage",
            "Mean time of a step at each worker. On the wire and in a queue nothing is computed for it.",
            {"{{worker}} {{phase}}": _mean("stage_phase_seconds", "worker, phase")},
            is_stacked=True,
            width=24,
        ),
        *(
            _seconds(title, text, {"{{worker}}": _quantile(0.95, "stage_phase_seconds", "worker", labels)}, width=8)
            for title, text, labels in (
                ("Compute, p95", "95 of 100 steps are computed faster.", 'phase="compute"'),
                ("Wire, p95", "From the sender to the worker, as far as the machines' clocks tell.", 'phase="wire"'),
                ("Queue at a stage, p95", "From a step's arrival to the start of its computation.", 'phase="queue"'),
            )
        ),
    ),
)

CAPACITY: Final = Board(
    "capacity",
    "Shardwright: capacity",
    "What is left: time of the busiest stage, blocks, memory, links.",
    Section(
        "Throughput",
        Panel(
            "Tokens against the busiest stage",
            "While the busiest stage (right) is below 100 %, more requests at once bring more tokens.",
            {"generated": OUTPUT, "busiest stage (right)": f"max({BUSY})"},
            TOKENS,
            right=units.PercentUnit,
        ),
        Panel(
            "Tokens if the busiest stage never rested",
            "What steps like the present ones would bring if it computed all the time. Larger batches bring more.",
            {"possible": f"{OUTPUT} / (max({BUSY}) > 0.01)", "achieved": OUTPUT},
            TOKENS,
        ),
        Panel(
            "Steps under way",
            "Steps in the pipeline, and the most that the scheduler lets be under way.",
            {
                "under way": "sum(shardwright_steps_in_flight{})",
                "limit": "sum(shardwright_steps_in_flight_limit{})",
            },
        ),
        Panel(
            "Tokens of a step",
            "Generated tokens for each step: how full the batches are.",
            {"generated": f"{OUTPUT} / (max({_sum_rate('stage_steps_total', 'worker')}) > 0)"},
        ),
    ),
    Section(
        "KV blocks and cache",
        Panel(
            "KV blocks",
            "Blocks that requests hold, free ones that still hold a prefix, and all.",
            {
                "in use": "sum(shardwright_kv_blocks_used{})",
                "cached": "sum(shardwright_kv_blocks_cached{})",
                "all": "sum(shardwright_kv_blocks{})",
            },
        ),
        _ratio(
            "Prompt tokens that the prefix cache saved",
            "Part of the prompts' tokens that were not computed because a cached prefix had them.",
            {
                "now": f"{_sum_rate('cached_prompt_tokens_total')} / ({_sum_rate('prompt_tokens_total')} > 0)",
                "since the start": "max(shardwright_prefix_cache_hit_ratio{})",
            },
        ),
        Panel(
            "Preemptions",
            "Requests that gave their blocks up and are computed again. Often means too few blocks.",
            {"preemptions": _sum_rate("preemptions_total")},
            units.CountsPerSecond,
        ),
        Panel(
            "Waiting requests and their limit",
            "At the limit further requests are refused with 429; a limit of 0 is none.",
            {
                "waiting": "sum(shardwright_sequences_waiting{})",
                "limit": "sum(shardwright_sequences_waiting_limit{})",
            },
        ),
    ),
    Section(
        "Memory and GPUs",
        _bytes(
            "Weights and KV blocks",
            "What each stage keeps in its device's memory.",
            {
                "{{worker}} weights": _newest("stage_weight_bytes"),
                "{{worker}} KV blocks": _newest("stage_kv_bytes"),
            },
            is_stacked=True,
        ),
        _ratio("RAM in use", "Of each worker's machine, by all processes.", {"{{worker}}": MEMORY}, steps=(0.95,)),
        _ratio(
            "GPU",
            "Part of the time that each GPU was busy; empty without NVIDIA GPUs.",
            {"{{worker}} {{device}}": GPU},
        ),
        _ratio(
            "GPU memory in use",
            "By all processes; empty without NVIDIA GPUs.",
            {"{{worker}} {{device}}": GPU_MEMORY},
            steps=(0.95,),
        ),
    ),
    Section(
        "Links",
        Panel(
            "Carried",
            "Bytes of activations on each link.",
            {"{{worker}} to {{peer}}": _sum_rate("link_sent_bytes_total", "worker, peer")},
            units.BytesPerSecondSI,
        ),
        _seconds(
            "Round trips",
            "Every step passes each link once: with few requests this is what bounds the speed.",
            {
                "{{worker}} to {{peer}}": _newest("link_round_trip_seconds", "worker, peer"),
                "master to {{worker}}": _newest("master_round_trip_seconds"),
            },
        ),
    ),
)


def _history(field: str, title: str, text: str, unit: str, top: float | None = None) -> Panel:
    return Panel(title, text, Rows((Column(field, title),)), unit, top=top)


METRICS_JSON: Final = Board(
    "metrics-json",
    "Shardwright: machines, from metrics.json",
    "GPU utilisation and memory of all workers without Prometheus: the last hour, from the master's /metrics.json.",
    Section(
        "Now",
        Panel(
            "Workers",
            "The newest figures of each worker. GPU columns stay empty where there is no NVIDIA GPU.",
            Rows(
                (
                    Column("status", "Status", "string"),
                    Column("device_name", "Device", "string"),
                    Column("gpu_utilization", "GPU"),
                    Column("gpu_memory_used_bytes", "GPU memory"),
                    Column("gpu_memory_total_bytes", "GPU memory, all"),
                    Column("cpu_utilization", "CPU"),
                    Column("memory_used_bytes", "RAM"),
                    Column("memory_total_bytes", "RAM, all"),
                ),
                only_latest=True,
            ),
            kind=Kind.TABLE,
            width=24,
            column_units={
                "GPU": units.Percent,
                "GPU memory": units.BytesIEC,
                "GPU memory, all": units.BytesIEC,
                "CPU": units.Percent,
                "RAM": units.BytesIEC,
                "RAM, all": units.BytesIEC,
            },
        ),
    ),
    Section(
        "The last hour",
        _history("gpu_utilization", "GPU", "Percent of the time that the GPU was busy.", units.Percent, 100),
        _history("gpu_memory_used_bytes", "GPU memory", "Of all processes on the GPU.", units.BytesIEC),
        _history(
            "memory_utilization",
            "Memory in use",
            "Percent of the GPU's memory; of the machine's without an NVIDIA GPU.",
            units.Percent,
            100,
        ),
        _history("cpu_utilization", "CPU", "Percent of all the machine's cores.", units.Percent, 100),
        _history("memory_used_bytes", "RAM", "Of the machine, or of the container.", units.BytesIEC),
        _history("process_memory_bytes", "Process", "RAM of the worker's own process.", units.BytesIEC),
    ),
)

BOARDS: Final = (OVERVIEW, WORKER, LATENCY, CAPACITY, METRICS_JSON)
