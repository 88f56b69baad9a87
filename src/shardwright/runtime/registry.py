"""Knows which workers a master may use: the file workers.json. Knows nothing of whether they are alive."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import ipaddress
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwright.errors import RegistryError

LOCK_TIMEOUT_S = 10.0
FIELDS = ("username", "ip", "port")
MAX_USERNAME_LENGTH = 64

_HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_ONLY_DIGITS_AND_DOTS = re.compile(r"[0-9.]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEntry:
    """One worker that a master may use. `ip` may also be a host name; raises `RegistryError` on a bad value."""

    username: str
    ip: str
    port: int

    def __post_init__(self) -> None:
        _check_username(self.username)
        _check_host(self.ip)
        _check_port(self.port)

    @property
    def address(self) -> str:
        """host:port, with an IPv6 address in brackets."""
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"

    def as_json(self) -> dict[str, str | int]:
        """The entry as it stands in the file."""
        return {"username": self.username, "ip": self.ip, "port": self.port}


class Change(enum.Enum):
    """What adding an entry did to the registry."""

    ADDED = "added"
    RENAMED = "renamed"  # the address was there under another username
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Registry:
    """The list of workers in a JSON file: read whole, written whole, by rename, under a lock."""

    path: Path

    def load(self) -> tuple[WorkerEntry, ...]:
        """All registered workers in the order of the file; none if there is no file.

        Raises `RegistryError`, naming the line or the entry, for a file that is not what `add` writes.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ()
        except UnicodeDecodeError as exc:
            raise RegistryError(f"{self.path}: not text in UTF-8; {_REPAIR}") from exc
        except OSError as exc:
            raise RegistryError(f"{self.path}: can't be read: {exc.strerror}") from exc
        return _parse(text, self.path)

    def add(self, entry: WorkerEntry) -> Change:
        """Put a worker into the file. An address stands there once: a second `add` only changes its username.

        Safe against other processes that add at the same time. Raises `RegistryError` and leaves the file as it
        was when it can't be read, locked or written.
        """
        with _locked(self.path):
            entries = self.load()
            same = [known for known in entries if known.address == entry.address]
            if same == [entry]:
                return Change.UNCHANGED
            if same:
                _write(self.path, [entry if known.address == entry.address else known for known in entries])
                return Change.RENAMED
            _write(self.path, [*entries, entry])
            return Change.ADDED


_REPAIR = "repair it, or move it away and register the workers again"


def _parse(text: str, path: Path) -> tuple[WorkerEntry, ...]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as exc:
        raise RegistryError(f"{path}: line {exc.lineno}, column {exc.colno}: not JSON ({exc.msg}); {_REPAIR}") from exc
    if not isinstance(content, list):
        raise RegistryError(f"{path}: must hold a list of workers, but holds a {_kind(content)}; {_REPAIR}")
    entries: dict[str, tuple[int, WorkerEntry]] = {}
    for number, item in enumerate(content, start=1):
        entry = _parse_entry(item, f"{path}: entry {number}")
        if entry.address in entries:
            first, _ = entries[entry.address]
            raise RegistryError(f"{path}: entries {first} and {number} are both {entry.address}; remove one of them")
        entries[entry.address] = (number, entry)
    return tuple(entry for _, entry in entries.values())


def _parse_entry(item: object, where: str) -> WorkerEntry:
    if not isinstance(item, dict):
        raise RegistryError(f"{where}: must be an object with {', '.join(FIELDS)}, but is a {_kind(item)}; {_REPAIR}")
    missing = [name for name in FIELDS if name not in item]
    unknown = [name for name in item if name not in FIELDS]
    if missing or unknown:
        fault = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise RegistryError(f"{where}: {fault}; an entry has {', '.join(FIELDS)}")
    try:
        return WorkerEntry(**item)
    except RegistryError as exc:
        raise RegistryError(f"{where}: {exc}") from exc


def _kind(value: object) -> str:
    names = {dict: "JSON object", list: "JSON list", str: "JSON string", type(None): "JSON null", bool: "JSON boolean"}
    return names.get(type(value), "JSON number")


def _check_username(username: object) -> None:
    if not isinstance(username, str) or not username.strip():
        raise RegistryError(f"username is {username!r}; it must be a name, such as worker1")
    if len(username) > MAX_USERNAME_LENGTH or not username.isprintable():
        raise RegistryError(
            f"username is {username!r}; it may have at most {MAX_USERNAME_LENGTH} printable characters on one line"
        )


def _check_host(host: object) -> None:
    hint = "give an address such as 192.168.1.101 or a host name"
    if not isinstance(host, str) or not host:
        raise RegistryError(f"ip is {host!r}; {hint}")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.removesuffix(".").split(".")
        is_name = all(_HOST_LABEL.fullmatch(label) for label in labels) and len(host) <= 253
        if not is_name or _ONLY_DIGITS_AND_DOTS.fullmatch(host):
            raise RegistryError(f"ip is {host!r}, neither an IP address nor a host name; {hint}") from None
        return
    if address.is_unspecified:
        raise RegistryError(f"ip is {host}, which means every address of a machine; give one that it is reached at")


def _check_port(port: object) -> None:
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        raise RegistryError(f"port is {port!r}; it must be a whole number between 1 and 65535")


def _write(path: Path, entries: Sequence[WorkerEntry]) -> None:
    """Replace the file by rename, so that a reader sees the old list or the new one and never half of one."""
    target = path.resolve()  # through a symbolic link: the link stays
    text = json.dumps([entry.as_json() for entry in entries], indent=2, ensure_ascii=False) + "\n"
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(mode)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise RegistryError(f"{path}: can't be written: {exc.strerror}; it was left as it was") from exc


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the registry's lock file. It is removed before it is let go, so a waiter checks that its file is the one."""
    target = path.resolve()
    lock = target.with_name(f".{target.name}.lock")
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    try:
        while (descriptor := _try_lock(lock)) is None:
            if time.monotonic() > deadline:
                raise RegistryError(f"{path}: another process has kept it locked for {LOCK_TIMEOUT_S:.0f} s; try again")
            time.sleep(0.02)
    except OSError as exc:
        raise RegistryError(f"{path}: can't be locked for writing: {exc.strerror}; check the folder") from exc
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(lock: Path) -> int | None:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.fstat(descriptor)
        current = lock.stat()
        if (held.st_dev, held.st_ino) == (current.st_dev, current.st_ino):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
