"""Keeps tensors on a worker's disk by their content hash. Knows files and locks; nothing of models or networks.

    <cache_dir>/tensors/
        <aa>/<sha256>              a whole tensor; its hash was right when it was renamed to this
        <aa>/<sha256>.part         the first bytes of one, kept so that a broken transfer can go on
        <aa>/<sha256>.<id>.part    the same, written while another process writes the first
        pins/<id>                  the hashes that one load needs now; locked by the process that loads
        lock                       held while something is pinned or removed

Any number of processes may share the folder. Whoever writes a partial file or holds a pin has an advisory lock
(flock) on it, which the system drops when the process dies; a file without its lock is a leftover. All functions
here block on the disk: call them off the event loop. A file's modification time is its last use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from shardwright.errors import CheckpointError, ProtocolError, StageLoadError
from shardwright.types import TensorSpec

HASH_CHUNK_BYTES = 1024 * 1024
EMPTY_SHA256 = hashlib.sha256().hexdigest()

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"(?P<sha256>[0-9a-f]{64})(?P<id>\.[0-9a-f]{16})?(?P<part>\.part)?")


def check_sha256(sha256: str) -> str:
    """The hash itself, once it is known to be 64 lower-case hex digits and so safe to use in a path."""
    if _SHA256.fullmatch(sha256) is None:
        raise ProtocolError(f"{sha256[:80]!r} is not a SHA-256; it must be 64 lower-case hex digits")
    return sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """One file of the cache, as `shardwright cache ls` shows it."""

    sha256: str
    num_bytes: int
    last_used_s: float  # seconds since 1970
    is_partial: bool
    path: Path


class PartialTensor:
    """A tensor that is being received: bytes 0 to `offset` are on the disk and hashed. One thread at a time."""

    def __init__(self, *, fd: int, path: Path, target: Path, spec: TensorSpec, offset: int) -> None:
        self.spec = spec
        self.offset = offset
        self._fd = fd
        self._path = path
        self._target = target
        self._hash = hashlib.sha256()
        for chunk in read_chunks(fd, 0, offset):
            self._hash.update(chunk)

    @property
    def is_complete(self) -> bool:
        """Every byte is there; `finish` says whether they are the right ones."""
        return self.offset == self.spec.num_bytes

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Append a chunk. Raises `ProtocolError` when it does not start where the last one ended, or is too long."""
        size = memoryview(data).nbytes
        if offset != self.offset:
            raise ProtocolError(f"tensor {self.spec.name}: a chunk at offset {offset}, expected {self.offset}")
        if offset + size > self.spec.num_bytes:
            raise ProtocolError(
                f"tensor {self.spec.name}: a chunk up to byte {offset + size}, but it has {self.spec.num_bytes}"
            )
        with _disk_errors(self._path, f"tensor {self.spec.name} ({self.spec.num_bytes} bytes)"):
            rest = memoryview(data).cast("B")
            while rest:
                rest = rest[os.pwrite(self._fd, rest, self.offset + size - len(rest)) :]
        self._hash.update(data)
        self.offset += size

    def finish(self) -> Path:
        """Check the hash over all bytes and put the tensor in its place.

        Raises `CheckpointError`, and forgets the bytes, when they are not the ones that the hash names.
        """
        assert self.is_complete, f"{self.spec.name}: {self.offset} of {self.spec.num_bytes} bytes"
        digest = self._hash.hexdigest()
        if digest != self.spec.sha256:
            self.discard()
            raise CheckpointError(
                f"tensor {self.spec.name}: what was received has the SHA-256 {digest}, expected {self.spec.sha256}; "
                "it was thrown away, load the model again"
            )
        with _disk_errors(self._target, f"tensor {self.spec.name}"):
            self._path.replace(self._target)
        self.close()
        return self._target

    def discard(self) -> None:
        """Forget what was received. Safe to call twice."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the file and leave it for a later `resume`. Safe to call twice."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class CachePin:
    """Keeps some hashes from being removed, by any process, until it is closed. A dead process's pin is void."""

    def __init__(self, *, cache: TensorCache, fd: int, path: Path) -> None:
        self._cache = cache
        self._fd = fd
        self._path = path

    def close(self) -> None:
        """Give the files up and bring the cache back under its limit. Safe to call twice."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        self._path.unlink(missing_ok=True)
        os.close(fd)
        self._cache.make_room(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class TensorCache:
    """The tensors kept in `cache_dir`. `limit_bytes` bounds what stays; what a load has pinned may go beyond it."""

    def __init__(self, cache_dir: Path, *, limit_bytes: int) -> None:
        self._root = cache_dir / "tensors"
        self._limit_bytes = limit_bytes

    def path(self, sha256: str) -> Path:
        """Where a tensor lies, if it is there. Raises `ProtocolError` for what is not a hash."""
        return self._root / check_sha256(sha256)[:2] / sha256

    def pin(self, sha256s: Iterable[str]) -> CachePin:
        """Keep these from being removed from now on, whether they are here yet or not."""
        hashes = sorted({check_sha256(sha256) for sha256 in sha256s})
        pins = self._root / "pins"
        with _disk_errors(self._root, "the list of tensors in use"):
            pins.mkdir(parents=True, exist_ok=True)
            with self._locked():
                path = pins / secrets.token_hex(8)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.write_text("\n".join(hashes), encoding="ascii")
        return CachePin(cache=self, fd=fd, path=path)

    def find(self, sha256: str, num_bytes: int) -> Path | None:
        """The whole tensor's file, if one of that size is here; marks it as used now.

        The content is not looked at: disks rot and crashed machines lose writes, so hash it before relying on it.
        """
        path = self.path(sha256)
        try:
            if path.stat().st_size != num_bytes:
                self.drop(sha256)
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def drop(self, sha256: str) -> None:
        """Remove a whole tensor that turned out to be wrong."""
        self.path(sha256).unlink(missing_ok=True)

    def resume(self, spec: TensorSpec) -> PartialTensor | None:
        """Go on with what an earlier transfer left of a tensor; None if nothing, or if another process has it."""
        target = self.path(spec.sha256)
        path = target.with_suffix(".part")
        with _disk_errors(target, f"tensor {spec.name}"):
            fd = _claim(path) if path.exists() else None
            if fd is None:
                return None
            size = os.fstat(fd).st_size
            if not 0 < size <= spec.num_bytes:
                path.unlink(missing_ok=True)
                os.close(fd)
                return None
            return PartialTensor(fd=fd, path=path, target=target, spec=spec, offset=size)

    def begin(self, spec: TensorSpec) -> PartialTensor:
        """Start to receive a tensor from its first byte."""
        target = self.path(spec.sha256)
        with _disk_errors(target, f"tensor {spec.name}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            path = target.with_suffix(".part")
            fd = _claim(path)
            if fd is None:  # another worker on this machine receives it just now; ours goes beside it
                path = target.with_suffix(f".{secrets.token_hex(8)}.part")
                fd = _claim(path)
            assert fd is not None, f"{path} was made just now, with a random name"
            os.ftruncate(fd, 0)
        return PartialTensor(fd=fd, path=path, target=target, spec=spec, offset=0)

    def make_room(self, num_bytes: int) -> None:
        """Remove what was used least recently, until `num_bytes` more fit under the limit and on the disk.

        Never removes what is pinned or being written, so the limit may be exceeded while a stage that is larger
        is loaded. Raises `StageLoadError` when the disk itself is too small.
        """
        if self._root.is_dir():
            with self._locked():
                self._evict(num_bytes)
        parent = next(p for p in (self._root, *self._root.parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if num_bytes > free:
            raise StageLoadError(
                f"{self._root}: {num_bytes} bytes of weights have to be stored, but the disk has {free} free; "
                "free some space or choose another cache folder"
            )

    def entries(self) -> list[CacheEntry]:
        """Every file of the cache, the least recently used first."""
        found: list[CacheEntry] = []
        folders = self._root.iterdir() if self._root.is_dir() else ()
        for folder in folders:
            for path in folder.iterdir() if len(folder.name) == 2 and folder.is_dir() else ():
                match = _ENTRY.fullmatch(path.name)
                if match is None:
                    continue
                with contextlib.suppress(FileNotFoundError):  # another process renamed or removed it just now
                    status = path.stat()
                    found.append(
                        CacheEntry(
                            sha256=match["sha256"],
                            num_bytes=status.st_size,
                            last_used_s=status.st_mtime,
                            is_partial=match["part"] is not None,
                            path=path,
                        )
                    )
        return sorted(found, key=lambda entry: (entry.last_used_s, entry.path.name))

    def clear(self) -> int:
        """Remove all that no process uses now; gives the number of bytes freed."""
        if not self._root.is_dir():
            return 0
        with self._locked():
            pinned = self._pinned()
            return sum(entry.num_bytes for entry in self.entries() if _remove(entry, pinned))

    def _evict(self, num_bytes: int) -> None:
        """Call with the lock held."""
        entries = self.entries()
        over_limit = sum(entry.num_bytes for entry in entries) + num_bytes - self._limit_bytes
        off_disk = num_bytes - shutil.disk_usage(self._root).free
        excess = max(over_limit, off_disk)
        pinned = self._pinned() if excess > 0 else set()
        for entry in entries:
            if excess <= 0:
                return
            if _remove(entry, pinned):
                excess -= entry.num_bytes

    def _pinned(self) -> set[str]:
        """The hashes that living processes hold; removes the pins of dead ones. Call with the lock held."""
        pinned: set[str] = set()
        pins = self._root / "pins"
        for path in pins.iterdir() if pins.is_dir() else ():
            try:
                fd = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # closed just now
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pinned.update(path.read_text(encoding="ascii").split())
            else:
                path.unlink(missing_ok=True)
            finally:
                os.close(fd)
        return pinned

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def read_chunks(fd: int, offset: int, num_bytes: int) -> Iterator[bytes]:
    """The bytes of a file's range, piece by piece.

    Raises `CheckpointError` when the file ends before the range does.
    """
    end = offset + num_bytes
    while offset < end:
        chunk = os.pread(fd, min(HASH_CHUNK_BYTES, end - offset), offset)
        if not chunk:
            raise CheckpointError(f"the file ends at byte {offset}, but {end} were expected")
        yield chunk
        offset += len(chunk)


def _claim(path: Path) -> int | None:
    """Open a partial file, made if need be, with its lock held; None when another holds the lock."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        # Between open and flock its owner may have finished and renamed it: then the lock is on another name's file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        os.close(fd)


def _remove(entry: CacheEntry, pinned: set[str]) -> bool:
    """Remove a file unless it is pinned or being written."""
    can_be_resumed = entry.path.suffixes == [".part"]
    if entry.sha256 in pinned and (can_be_resumed or not entry.is_partial):
        return False
    if not entry.is_partial:
        entry.path.unlink(missing_ok=True)
        return True
    fd = _claim(entry.path)
    if fd is None:
        return False
    entry.path.unlink(missing_ok=True)  # before the lock goes: whoever waits for it sees that the file is another's
    os.close(fd)
    return True


@contextlib.contextmanager
def _disk_errors(path: Path, what: str) -> Iterator[None]:
    """Turn the disk's errors into one that says what could not be stored, and where."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StageLoadError(
                f"{path.parent}: the disk is full, {what} can't be stored; free some space or choose another "
                "cache folder"
            ) from exc
        raise StageLoadError(f"{path.parent}: {what} can't be stored: {exc.strerror}") from exc
