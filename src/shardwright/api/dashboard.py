"""Serves the dashboard: a page, its scripts and its style, all from this package, and nothing from elsewhere.

The page asks the API for everything that it shows, as any client would, with the user's key where keys are needed. What
is served here is the same for everybody and holds nothing of the model's work.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import shardwright
from shardwright.api.service import Service

_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    # No string ever becomes markup or code: the browser itself refuses `innerHTML` and its kin.
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
CONTENT_SECURITY_POLICY = "; ".join(_POLICY)
"""What the browser lets the page do: load and ask its own server, nothing else."""

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept by the browser, but asked for again by its ETag: an upgrade shows at once
}

PAGE = "index.html"
FACTS = "server.json"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def add_dashboard(app: FastAPI, service: Service) -> None:
    """Put the page at `/` and its files under `/dashboard/`; none of them needs an API key."""
    files = {**_package_files(), FACTS: _file(FACTS, _facts(service))}

    async def page(request: Request) -> Response:
        """The dashboard."""
        return _answer(request, files[PAGE])

    async def part(request: Request, name: str) -> Response:
        """A file of the dashboard."""
        if name not in files or name == PAGE:
            raise HTTPException(404, f"the dashboard has no file {name[:200]!r}")
        return _answer(request, files[name])

    methods = ["GET", "HEAD"]
    app.add_api_route("/", page, methods=methods, include_in_schema=False)
    app.add_api_route("/dashboard/{name}", part, methods=methods, include_in_schema=False)


def _facts(service: Service) -> bytes:
    """What the page must know before it has a key: whether it needs one, and how to talk to the model."""
    model = service.engine.model
    facts = {
        "version": shardwright.__version__,
        "needs_key": not service.keys.is_open,
        "has_chat_template": model.has_chat_template,
        "has_tokenizer": model.has_tokenizer,
    }
    return json.dumps(facts).encode()


def _package_files() -> dict[str, _File]:
    """The files of the folder `dashboard`, by name. They are few and small, and are held in memory."""
    folder = resources.files("shardwright.api") / "dashboard"
    return {each.name: _file(each.name, each.read_bytes()) for each in folder.iterdir() if each.is_file()}


def _file(name: str, content: bytes) -> _File:
    media_type = _MEDIA_TYPES[name[name.rindex(".") :]]
    return _File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _answer(request: Request, file: _File) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    known = request.headers.get("if-none-match", "")
    if known == "*" or file.etag in {each.strip().removeprefix("W/") for each in known.split(",")}:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
