"""API keys: a file with their hashes, the check, and each key's limits. Knows nothing of requests' content."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardwright.api.errors import AUTHENTICATION, RATE_LIMIT, ApiError, invalid
from shardwright.errors import ConfigError

KEY_PREFIX = "sw-"
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("name", "sha256", "max_concurrent", "tokens_per_minute")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEntry:
    """One key as it stands in the file: never the key itself. 0 means no limit."""

    name: str
    sha256: str  # lower-case hex of the key's UTF-8
    max_concurrent: int = 0
    tokens_per_minute: int = 0

    def to_toml(self) -> str:
        """The lines to add to the file."""
        lines = ["[[key]]", f"name = {json.dumps(self.name)}", f'sha256 = "{self.sha256}"']
        if self.max_concurrent:
            lines.append(f"max_concurrent = {self.max_concurrent}")
        if self.tokens_per_minute:
            lines.append(f"tokens_per_minute = {self.tokens_per_minute}")
        return "\n".join(lines) + "\n"


def new_key(name: str, *, max_concurrent: int = 0, tokens_per_minute: int = 0) -> tuple[str, KeyEntry]:
    """A new random key, to be shown once, and its entry for the file.

    Raises `ConfigError` for a name or a limit that the file could not hold.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    fields = {
        "name": name,
        "sha256": _digest(key),
        "max_concurrent": max_concurrent,
        "tokens_per_minute": tokens_per_minute,
    }
    return key, _entry(fields, "the new key")


def read_key_file(path: Path) -> tuple[KeyEntry, ...]:
    """The entries of a key file: TOML, one table `[[key]]` for each key.

    Raises `ConfigError` for a file that can't be read, has no key, names one twice or holds anything unknown.
    """
    try:
        with path.open("rb") as stream:
            content = tomllib.load(stream)
    except OSError as exc:
        raise ConfigError(f"{path}: can't be read: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}") from exc
    if unknown := sorted(set(content) - {"key"}):
        raise ConfigError(f"{path}: has no setting {unknown[0]!r}; keys stand in tables [[key]]")
    tables = content.get("key", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: key must be a list of tables, each beginning with [[key]]")
    if not tables:
        raise ConfigError(f"{path}: has no key; make one with `shardwright api-key new`")
    entries = tuple(_entry(table, f"{path}: key {number}") for number, table in enumerate(tables, start=1))
    for field in ("name", "sha256"):
        values = [getattr(entry, field) for entry in entries]
        if twice := [value for value in values if values.count(value) > 1]:
            raise ConfigError(f"{path}: {field} {twice[0]!r} stands there twice")
    return entries


def _entry(fields: dict[str, object], where: str) -> KeyEntry:
    if unknown := sorted(set(fields) - set(_FIELDS)):
        raise ConfigError(f"{where}: has no setting {unknown[0]!r}; known: {', '.join(_FIELDS)}")
    name, sha256 = fields.get("name"), fields.get("sha256")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: name is {name!r}; it must be 1 to 64 letters, digits, or any of _ . @ -")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ConfigError(f"{where} ({name}): sha256 must be 64 lower-case hex digits")
    limits = {}
    for field in ("max_concurrent", "tokens_per_minute"):
        value = fields.get(field, 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 10**12:
            raise ConfigError(f"{where} ({name}): {field} is {value!r}; it must be a whole number, 0 for no limit")
        limits[field] = value
    return KeyEntry(name=name, sha256=sha256, **limits)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


# --- the check -------------------------------------------------------------------------------------


class Client:
    """One key in use: counts its running requests and its tokens.

    The tokens are a bucket that holds a minute's worth and fills steadily. A request is let in when the bucket holds
    its prompt; what it generates is taken as it comes and may leave a debt, which the next request waits for.
    """

    def __init__(self, entry: KeyEntry, clock: Callable[[], float]) -> None:
        self.entry = entry
        self._clock = clock
        self._running = 0
        self._level = float(entry.tokens_per_minute)
        self._filled_at = clock()

    @property
    def name(self) -> str:
        """For logs."""
        return self.entry.name

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the key's places for running requests. Raises `ApiError` 429 when all are taken."""
        limit = self.entry.max_concurrent
        if limit and self._running >= limit:
            raise ApiError(
                429,
                f"this API key runs {limit} requests at once already; wait until one is done",
                kind=RATE_LIMIT,
                code="concurrency_limit_exceeded",
                retry_after_s=1,
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def take_prompt(self, num_tokens: int, param: str) -> None:
        """Take a prompt's tokens. Raises `ApiError`: 429 when they are not there yet, 400 if they never can be."""
        limit = self.entry.tokens_per_minute
        if not limit:
            return
        if num_tokens > limit:
            raise invalid(
                f"the prompt has {num_tokens} tokens; this API key may use {limit} a minute", param, "tokens_exceeded"
            )
        self._fill()
        missing = max(num_tokens, 1) - self._level
        if missing > 0:
            raise ApiError(
                429,
                f"this API key may use {limit} tokens a minute and has used them",
                kind=RATE_LIMIT,
                code="tokens_per_minute_exceeded",
                retry_after_s=missing * 60 / limit,
            )
        self._level -= num_tokens

    def take_output(self, num_tokens: int) -> None:
        """Take generated tokens, whether the bucket holds them or not."""
        if self.entry.tokens_per_minute:
            self._fill()
            self._level -= num_tokens

    def give_back(self, num_tokens: int) -> None:
        """Put a prompt's tokens back: the engine refused it."""
        self.take_output(-num_tokens)

    def _fill(self) -> None:
        now, limit = self._clock(), self.entry.tokens_per_minute
        self._level = min(float(limit), self._level + (now - self._filled_at) * limit / 60)
        self._filled_at = now


class Keyring:
    """All keys that the server knows."""

    def __init__(self, entries: tuple[KeyEntry, ...], clock: Callable[[], float] = time.monotonic) -> None:
        self._clients = [(entry.sha256, Client(entry, clock)) for entry in entries]
        self._anybody = Client(KeyEntry(name="-", sha256=""), clock)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._clients

    def check(self, authorization: str | None) -> Client:
        """Whose request it is, by its `Authorization` header. Raises `ApiError` 401.

        The time that it takes tells nothing of the keys: hashes are compared, and with all of them.
        """
        if self.is_open:
            return self._anybody
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401,
                "no API key; send the header `Authorization: Bearer <key>`",
                kind=AUTHENTICATION,
                code="missing_api_key",
            )
        digest = _digest(key.strip())
        found: Client | None = None
        for sha256, client in self._clients:
            if hmac.compare_digest(sha256, digest):
                found = client
        if found is None:
            raise ApiError(401, "this API key is not known", kind=AUTHENTICATION, code="invalid_api_key")
        return found
