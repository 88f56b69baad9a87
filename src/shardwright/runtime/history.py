"""The last hour in points: what happened between two looks at a running cluster, and a row for each worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

from shardwright.observation import ClusterView, HistoryPoint
from shardwright.runtime.metrics import ROW_FIELDS

_TIMESTAMP: Final = tuple(ROW_FIELDS).index("timestamp")


class History:
    """Points and rows not older than `kept_s`. Times are seconds since 1970."""

    def __init__(self, *, kept_s: float) -> None:
        self._kept_s = kept_s
        self._points: deque[HistoryPoint] = deque()
        self._rows: deque[tuple[object, ...]] = deque()  # the fields in order: an hour of many workers stays small
        self._before: tuple[float, ClusterView, int] | None = None

    def look(self, view: ClusterView, *, now: float, prompt_tokens: int, rows: Iterable[Mapping[str, object]]) -> None:
        """Note what happened since the last look, which the first one has no point for.

        `now` is on a clock that never goes back; `prompt_tokens` were computed so far.
        """
        before, self._before = self._before, (now, view, prompt_tokens)
        self._rows.extend(tuple(row[name] for name in ROW_FIELDS) for row in rows)
        if before is not None and now > before[0]:
            self._points.append(_point(before[1], view, now - before[0], prompt_tokens - before[2]))
        oldest = view.at - self._kept_s
        while self._points and self._points[0].at < oldest:
            self._points.popleft()
        while self._rows and _timestamp(self._rows[0]) < oldest:
            self._rows.popleft()

    def points(self) -> tuple[HistoryPoint, ...]:
        """Oldest first."""
        return tuple(self._points)

    def rows(self, since: float) -> list[dict[str, object]]:
        """Those with a timestamp above `since`, oldest first."""
        return [dict(zip(ROW_FIELDS, row, strict=True)) for row in self._rows if _timestamp(row) > since]

    def remember(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Take rows over that an earlier master noted, oldest first, before the first look."""
        self._rows.extendleft(
            tuple(row.get(name) for name in ROW_FIELDS) for row in reversed([r for r in rows if _is_row(r)])
        )


def _is_row(row: Mapping[str, object]) -> bool:
    timestamp = row.get("timestamp")
    return (
        isinstance(timestamp, (int, float)) and not isinstance(timestamp, bool) and isinstance(row.get("worker"), str)
    )


def _timestamp(row: tuple[object, ...]) -> float:
    value = row[_TIMESTAMP]
    assert isinstance(value, (int, float)), "rows have their time"
    return value


def _point(before: ClusterView, view: ClusterView, interval_s: float, prompt_tokens: int) -> HistoryPoint:
    then, now = before.snapshot, view.snapshot
    first_tokens = view.time_to_first_token.since(before.time_to_first_token)
    gaps = view.inter_token_latency.since(before.inter_token_latency)
    looked_up = now.total_prompt_tokens - then.total_prompt_tokens
    return HistoryPoint(
        at=view.at,
        interval_s=interval_s,
        output_tokens_per_s=(now.total_output_tokens - then.total_output_tokens) / interval_s,
        prompt_tokens_per_s=prompt_tokens / interval_s,
        ttft_p50_s=first_tokens.quantile(0.5),
        ttft_p95_s=first_tokens.quantile(0.95),
        inter_token_p50_s=gaps.quantile(0.5),
        inter_token_p95_s=gaps.quantile(0.95),
        kv_used_ratio=1.0 - now.num_free_blocks / now.num_blocks if now.num_blocks else 0.0,
        prefix_hit_ratio=(now.total_cached_tokens - then.total_cached_tokens) / looked_up if looked_up > 0 else None,
        num_running=now.num_running,
        num_waiting=now.num_waiting,
        num_workers_lost=sum(worker.status == "lost" for worker in view.workers),
        is_ready=view.is_ready,
    )
