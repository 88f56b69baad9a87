"""A real Prometheus for tests, on a free port of this machine and with its data in the test's folder.

Debian's package is used where it is installed, else fetched once into the user's cache, without being installed. Where
neither can be done a test is skipped with the reason; under CI it fails instead.

    with prometheus_in(tmp_path, scrape=[...], rules=[...]) as prometheus:
        prometheus.wait_for('up{job="shardwright"} == 1')
        rows = prometheus.query("sum by (worker) (rate(shardwright_stage_busy_seconds_total[30s]))")
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

START_TIMEOUT_S = 30.0
FETCH_TIMEOUT_S = 120.0
SCRAPE_INTERVAL_S = 1


# --- the program -----------------------------------------------------------------------------------


def prometheus_program() -> Path:
    """Where the server is."""
    return _program("prometheus")


def promtool() -> Path:
    """Where Prometheus' tool for checking files is."""
    return _program("promtool")


def _program(name: str) -> Path:
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    folder = _fetched()
    if isinstance(folder, Path):
        return folder / "usr" / "bin" / name
    reason = f"Prometheus is not installed and can't be fetched ({folder}); on Debian: apt install prometheus"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; under CI that is an error", pytrace=False)
    pytest.skip(reason)


@functools.cache
def _fetched() -> Path | str:
    """The unpacked package, fetched if need be; or why there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwright-tests"
    folder = cache / "prometheus"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "prometheus.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes want it too
            if not (folder / "usr" / "bin" / "prometheus").exists():
                _fetch(cache, folder)
    except (OSError, subprocess.SubprocessError) as exc:
        said = getattr(exc, "stderr", None) or str(exc)
        return " ".join(str(said).split())[-300:]
    return folder


def _fetch(cache: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache) as name:
        work = Path(name)
        _run(work, "apt-get", "download", "prometheus")
        [package] = work.glob("prometheus_*.deb")
        _run(work, "dpkg", "-x", package.name, "unpacked")
        shutil.rmtree(folder, ignore_errors=True)
        (work / "unpacked").rename(folder)


def _run(folder: Path, *argv: str) -> None:
    subprocess.run(argv, cwd=folder, check=True, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)


# --- the server ------------------------------------------------------------------------------------


@dataclass
class PrometheusServer:
    """A running server."""

    url: str
    http: httpx.Client

    def _get(self, path: str, **parameters: str) -> Any:
        answer = self.http.get(self.url + path, params=parameters)
        content = answer.json()
        assert content["status"] == "success", f"{parameters}: {content.get('error')}"
        return content["data"]

    def query(self, promql: str) -> list[dict[str, Any]]:
        """The instant vector that an expression gives now: `metric` (labels) and `value` (time, text) of each row.

        Of a scalar it is one row without labels. An expression that Prometheus refuses fails the test.
        """
        data = self._get("/api/v1/query", query=promql)
        if data["resultType"] in ("scalar", "string"):
            return [{"metric": {}, "value": data["result"]}]
        return data["result"]

    def query_range(self, promql: str, *, seconds: float = 60, step_s: float = 1) -> list[dict[str, Any]]:
        """What an expression gave over the last time: `metric` and `values` of each row, as panels ask for it."""
        now = time.time()  # noqa: TID251  Prometheus asks for the time of day
        data = self._get("/api/v1/query_range", query=promql, start=str(now - seconds), end=str(now), step=str(step_s))
        return data["result"]

    def values(self, promql: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The same as `query` gives, numbers by these labels."""
        return {
            tuple(row["metric"].get(label, "") for label in labels): float(row["value"][1])
            for row in self.query(promql)
        }

    def wait_for(
        self,
        promql: str,
        holds: Callable[[list[dict[str, Any]]], bool] = bool,
        *,
        timeout_s: float = 20.0,
    ) -> list[dict[str, Any]]:
        """Ask until the rows are as they should be (default: there are any); fails with the last ones."""
        deadline = time.monotonic() + timeout_s
        while not holds(rows := self.query(promql)):
            assert time.monotonic() < deadline, f"{promql} did not become so in {timeout_s} s: {rows}"
            time.sleep(0.2)
        return rows

    def targets(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What is scraped, by job and instance."""
        active = self._get("/api/v1/targets")["activeTargets"]
        return {(each["labels"]["job"], each["labels"]["instance"]): each for each in active}

    def rules(self) -> list[dict[str, Any]]:
        """All rules with their health, of all groups."""
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]


@contextlib.contextmanager
def prometheus_in(
    folder: Path, *, scrape: Sequence[dict[str, Any]], rules: Sequence[Path] = ()
) -> Iterator[PrometheusServer]:
    """A server for as long as the block lasts. `scrape` are Prometheus' `scrape_configs`, `rules` its rule files."""
    program = prometheus_program()
    interval = f"{SCRAPE_INTERVAL_S}s"
    config = folder / "prometheus.json"  # JSON is YAML
    config.write_text(
        json.dumps(
            {
                "global": {
                    "scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval,
                },
                "rule_files": [str(path) for path in rules],
                "scrape_configs": list(scrape),
            }
        )
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "prometheus.log").open("w+"))
        http = stack.enter_context(httpx.Client(timeout=10, trust_env=False))
        for _ in range(3):  # another process may take the port in between
            port = free_port()
            process = subprocess.Popen(
                [
                    program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'prometheus-data'}",
                    f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", "--query.lookback-delta=10s",
                    f"--web.console.templates={folder}", f"--web.console.libraries={folder}",
                ],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "GOMAXPROCS": "1"},
            )  # fmt: skip
            stack.callback(_end, process)
            if _is_ready(f"http://127.0.0.1:{port}", process, http):
                yield PrometheusServer(f"http://127.0.0.1:{port}", http)
                return
        log.seek(0)
        pytest.fail(f"Prometheus did not start:\n{log.read()[-3000:]}", pytrace=False)


def _is_ready(url: str, process: subprocess.Popen[bytes], http: httpx.Client) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if http.get(f"{url}/-/ready").status_code == 200:
                return True
        time.sleep(0.1)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def free_port() -> int:
    """A port of this machine's loopback that nothing listens on now."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return closed.getsockname()[1]


def scrape_of(url: str) -> list[dict[str, Any]]:
    """The jobs that docs/monitoring.md shows: a server, and the workers that it knows."""
    return [
        {"job_name": "shardwright", "static_configs": [{"targets": [url.removeprefix("http://")]}]},
        {
            "job_name": "shardwright-workers",
            "http_sd_configs": [{"url": f"{url}/prometheus/targets", "refresh_interval": "1s"}],
        },
    ]
