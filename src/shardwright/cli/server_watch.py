"""What `top`, `status` and `doctor` know of a running server: where it tells its state, and how that is checked."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import TypeAdapter, ValidationError

from shardwright.cli.openai_http import check_url, client_settings, link_error, refusal
from shardwright.errors import HttpServerError
from shardwright.observation import ClusterView, HistoryPoint, StepPassage

RECENT_S = 60.0  # older points say nothing of now
_MAX_ANSWER_BYTES = 64 * 1024 * 1024
_STATE = TypeAdapter(ClusterView)
_HISTORY = TypeAdapter(dict[str, tuple[HistoryPoint, ...]])
_STEPS = TypeAdapter(dict[str, tuple[StepPassage, ...]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A server's cluster at one moment."""

    view: ClusterView
    points: tuple[HistoryPoint, ...]  # of the last minute, oldest first
    state_json: bytes  # the view as the server wrote it


class ServerWatch:
    """The server, as a context manager. Its methods block; all raise `HttpServerError`."""

    def __init__(self, url: str, *, api_key: str | None, timeout_s: float) -> None:
        """`timeout_s` is how long the server may send nothing. Raises `ConfigError` for a bad URL or key."""
        self.url = check_url(url).removesuffix("/v1")
        self._timeout_s = timeout_s
        self._client = httpx.Client(**client_settings(self.url, api_key=api_key, timeout_s=timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def look(self) -> Seen:
        """Ask for the state and the last minute."""
        state = self._get("/api/state")
        view: ClusterView = self._read(_STATE, state, "/api/state")
        path = f"/api/history?since={max(view.at - RECENT_S, 0.0):.3f}"
        history: dict[str, tuple[HistoryPoint, ...]] = self._read(_HISTORY, self._get(path), "/api/history")
        return Seen(view=view, points=history.get("history", ()), state_json=state)

    def steps(self) -> tuple[StepPassage, ...]:
        """The last steps that the server watched, oldest first."""
        answer: dict[str, tuple[StepPassage, ...]] = self._read(_STEPS, self._get("/api/steps"), "/api/steps")
        return answer.get("steps", ())

    def _get(self, path: str) -> bytes:
        try:
            with self._client.stream("GET", self.url + path) as response:
                content = b""
                for part in response.iter_bytes():
                    content += part
                    if len(content) > _MAX_ANSWER_BYTES:
                        raise HttpServerError(f"{self.url}{path} sent more than {_MAX_ANSWER_BYTES} bytes")
        except httpx.HTTPError as exc:
            raise link_error(exc, url=self.url, timeout_s=self._timeout_s) from exc
        if response.status_code == httpx.codes.NOT_FOUND:
            raise HttpServerError(
                f"{self.url} has no {path.partition('?')[0]}; is it the address of shardwright serve, and of this "
                "version?",
                kind="HTTP 404",
            )
        if response.status_code != httpx.codes.OK:
            raise refusal(response.status_code, response.headers, content, url=self.url)
        return content

    def _read(self, kind: TypeAdapter[Any], content: bytes, path: str) -> Any:
        try:
            return kind.validate_json(content)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "all of it"
            raise HttpServerError(
                f"{self.url}{path} is not what this version understands ({where}: {first['msg']}); is it shardwright "
                "serve of the same version?",
                kind="bad answer",
            ) from None
