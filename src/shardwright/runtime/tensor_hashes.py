"""Names the tensors of a checkpoint by the SHA-256 of their raw bytes, hashing each file once.

    <cache_dir>/hashes/<SHA-256 of the file's path>.json

remembers what one file's tensors hash to, for as long as the file keeps its size, modification time and inode.
These files are only ever replaced whole. One that can't be read or makes no sense is ignored and written anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shardwright.errors import CheckpointError, ModelNotFoundError
from shardwright.types import TensorSpec

CHUNK_BYTES = 1024 * 1024
MAX_THREADS = 4  # hashing runs at 1 to 2 GB/s a thread: with four, the disk is what waits
INDEX_VERSION = 1


class StoredTensor(Protocol):
    """Where one tensor's raw bytes lie; `model.checkpoint` has these."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def offset(self) -> int: ...  # noqa: D102
    @property
    def num_bytes(self) -> int: ...  # noqa: D102


class TensorFiles(Protocol):
    """A checkpoint as seen from here: headers in memory, tensors on the disk. `read` is called from any thread."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...  # noqa: D102
    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes `offset` to `offset + length` of a tensor."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What tells one content of a file from another without reading it."""

    path: str
    num_bytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """The file as it is now. Raises `ModelNotFoundError` when it is gone."""
        try:
            status = path.stat()
        except OSError as exc:
            raise ModelNotFoundError(f"{path}: can't be read: {exc.strerror}") from exc
        return cls(
            path=os.fspath(path.absolute()),
            num_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
        )


def hash_tensors(
    checkpoint: TensorFiles,
    names: Iterable[str],
    *,
    cache_dir: Path,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    stop: threading.Event | None = None,
    num_threads: int = 0,
) -> tuple[TensorSpec, ...]:
    """The named tensors with their hashes, in the order of `names`. Blocks: call it off the event loop.

    `progress(done_bytes, total_bytes)` counts only what has to be hashed, and is called by one thread at a time.
    Setting `stop` ends it early with an `InterruptedError`; what was hashed until then is remembered.
    Raises `CheckpointError` when a file is changed meanwhile or ends too early.
    """
    wanted = [checkpoint.tensors[name] for name in names]
    identities = {path: FileIdentity.of(path) for path in dict.fromkeys(tensor.path for tensor in wanted)}
    known = {path: _read_index(cache_dir, identity) for path, identity in identities.items()}
    todo = [tensor for tensor in wanted if _key(tensor) not in known[tensor.path]]
    if todo:
        hashing = _Hashing(checkpoint, sum(tensor.num_bytes for tensor in todo), progress, stop or threading.Event())
        try:
            hashing.run(todo, num_threads or min(MAX_THREADS, os.cpu_count() or 1))
        finally:
            for path, identity in identities.items():
                if FileIdentity.of(path) != identity:
                    raise CheckpointError(f"{path} was changed while it was read; load the model again")
                fresh = (tensor for tensor in todo if tensor.path == path and tensor.name in hashing.digests)
                known[path] |= {_key(tensor): hashing.digests[tensor.name] for tensor in fresh}
                with contextlib.suppress(OSError):  # no room or no right to write: hash again next time
                    _write_index(cache_dir, identity, known[path])
    return tuple(
        TensorSpec(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            num_bytes=tensor.num_bytes,
            sha256=known[tensor.path][_key(tensor)],
        )
        for tensor in wanted
    )


class _Hashing:
    """One pass over some tensors with several threads (hashlib and pread let the others run)."""

    def __init__(
        self, checkpoint: TensorFiles, total_bytes: int, progress: Callable[[int, int], None], stop: threading.Event
    ) -> None:
        self.digests: dict[str, str] = {}
        self._checkpoint = checkpoint
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress
        self._stop = stop
        self._lock = threading.Lock()

    def run(self, tensors: list[StoredTensor], num_threads: int) -> None:
        """Hash them all, the largest first, so that no thread is left alone with a large one at the end."""
        ordered = sorted(tensors, key=lambda tensor: (-tensor.num_bytes, tensor.name))
        with ThreadPoolExecutor(num_threads, thread_name_prefix="hash") as pool:
            futures = [pool.submit(self._hash_one, tensor) for tensor in ordered]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._stop.set()
                raise

    def _hash_one(self, tensor: StoredTensor) -> None:
        digest = hashlib.sha256()
        for offset in range(0, tensor.num_bytes, CHUNK_BYTES):
            if self._stop.is_set():
                raise InterruptedError(f"hashing was stopped at tensor {tensor.name}")
            length = min(CHUNK_BYTES, tensor.num_bytes - offset)
            chunk = self._checkpoint.read(tensor.name, offset, length)
            if len(chunk) != length:
                raise CheckpointError(f"{tensor.path}: the file ends within tensor {tensor.name}")
            digest.update(chunk)
            with self._lock:
                self._done_bytes += length
                self._progress(self._done_bytes, self._total_bytes)
        with self._lock:
            self.digests[tensor.name] = digest.hexdigest()


def _key(tensor: StoredTensor) -> str:
    return f"{tensor.offset}+{tensor.num_bytes}"


def _index_path(cache_dir: Path, identity: FileIdentity) -> Path:
    return cache_dir / "hashes" / f"{hashlib.sha256(identity.path.encode()).hexdigest()}.json"


def _read_index(cache_dir: Path, identity: FileIdentity) -> dict[str, str]:
    """The remembered hashes by byte range; none if the file is another now, or the index is damaged."""
    try:
        content = json.loads(_index_path(cache_dir, identity).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or {key: content.get(key) for key in _header(identity)} != _header(identity):
        return {}
    hashes = content.get("sha256")
    if not isinstance(hashes, dict) or not all(isinstance(h, str) and len(h) == 64 for h in hashes.values()):
        return {}
    return hashes


def _write_index(cache_dir: Path, identity: FileIdentity, hashes: dict[str, str]) -> None:
    """Replace a file's index whole. Others may have added ranges since we read it: those are kept."""
    path = _index_path(cache_dir, identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{secrets.token_hex(8)}.tmp")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        content = _header(identity) | {"sha256": _read_index(cache_dir, identity) | hashes}
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        temporary.replace(path)
    finally:
        os.close(folder)
        temporary.unlink(missing_ok=True)


def _header(identity: FileIdentity) -> dict[str, object]:
    return {
        "version": INDEX_VERSION,
        "path": identity.path,
        "num_bytes": identity.num_bytes,
        "mtime_ns": identity.mtime_ns,
        "inode": identity.inode,
    }
