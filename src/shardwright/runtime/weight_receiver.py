"""Finds a stage's tensors for a worker: in files of its own, in its tensor cache, else at the master.

What is found is known by content alone. A file that the master's hint points at is hashed once and remembered
(`tensor_hashes`); a cached tensor is hashed again at each load, because disks rot and a machine that crashes loses
writes: it costs 0.7 s for each GB and thread, and a damaged one is simply asked for again. Tensors then stay on the
disk and are read one at a time while the stage is built.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shardwright.errors import CheckpointError, LinkLostError, ModelError, ProtocolError
from shardwright.runtime.tensor_cache import (
    EMPTY_SHA256,
    CachePin,
    PartialTensor,
    TensorCache,
    check_sha256,
    read_chunks,
)
from shardwright.runtime.tensor_hashes import MAX_THREADS, FileIdentity, TensorFiles, hash_tensors
from shardwright.types import WEIGHT_SOURCES, FileHint, StageLoad, TensorSpec
from shardwright.wire.messages import (
    LoadBegin,
    LoadMessage,
    LoadProgress,
    LoadReply,
    WeightChunk,
    WeightRequest,
    WeightsNeeded,
)

PROGRESS_INTERVAL_S = 0.2
MAX_OPEN_TENSORS = 16  # partly received at once; our master sends one after the other
MAX_RESUMED_TENSORS = 64  # each is an open file


class MatchHint(Protocol):
    """Looks into one file; blocks."""

    def __call__(
        self, hint: FileHint, progress: Callable[[int, int], None], stop: threading.Event
    ) -> dict[str, _Range]:
        """Where the file has which tensors, by hash."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """Where a tensor's bytes lie on this worker's disk."""

    path: Path
    offset: int
    identity: FileIdentity | None  # None in the cache, where another worker may put the same content in its place


class ReceivedTensors:
    """A stage's tensors on the worker's disk, verified; `read` brings one at a time into memory.

    Satisfies `model.weights.RawTensors`. Good until the receiver that gave it begins another load or is closed.
    """

    def __init__(self, *, specs: Mapping[str, TensorSpec], ranges: Mapping[str, _Range]) -> None:
        self._specs = specs
        self._ranges = ranges

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The stage's tensors by name."""
        return self._specs

    def without(self, name: str) -> ReceivedTensors:
        """All tensors but this one, from the same places."""
        return ReceivedTensors(
            specs={other: spec for other, spec in self._specs.items() if other != name}, ranges=self._ranges
        )

    def as_fields(self) -> dict[str, Any]:
        """Where the tensors lie, as JSON can hold it; for other processes of this machine."""
        ranges = {
            sha256: {
                "path": str(place.path),
                "offset": place.offset,
                "identity": None if place.identity is None else dataclasses.asdict(place.identity),
            }
            for sha256, place in self._ranges.items()
        }
        return {"specs": [dataclasses.asdict(spec) for spec in self._specs.values()], "ranges": ranges}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ReceivedTensors:
        """What `as_fields` gave, in another process."""
        specs = [TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in fields["specs"]]
        ranges = {
            sha256: _Range(
                path=Path(place["path"]),
                offset=place["offset"],
                identity=None if place["identity"] is None else FileIdentity(**place["identity"]),
            )
            for sha256, place in fields["ranges"].items()
        }
        return cls(specs={spec.name: spec for spec in specs}, ranges=ranges)

    def read(self, name: str) -> memoryview:
        """A tensor's raw bytes in memory of their own, writable. Blocks on the disk; any thread may call it.

        Raises `CheckpointError` when the file was changed since it was verified.
        """
        view = memoryview(bytearray(self._specs[name].num_bytes))
        self.read_into(name, 0, view)
        return view

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fill `view` with the tensor's raw bytes from `offset` on; otherwise as `read`."""
        spec = self._specs[name]
        assert 0 <= offset <= offset + len(view) <= spec.num_bytes, f"{name}: {len(view)} bytes at {offset}"
        if len(view) == 0:
            return
        source = self._ranges[spec.sha256]
        path = source.path
        if source.identity is not None and FileIdentity.of(path) != source.identity:
            raise CheckpointError(f"{path} was changed after tensor {name} in it was verified; load the model again")
        try:
            with path.open("rb", buffering=0) as stream:
                stream.seek(source.offset + offset)
                count = 0
                while count < len(view):
                    size = stream.readinto(view[count:])
                    if not size:
                        raise CheckpointError(f"{path}: the file ends within tensor {name}; load the model again")
                    count += size
        except OSError as exc:
            raise CheckpointError(f"{path}: tensor {name} can't be read: {exc.strerror}; load the model again") from exc


class WeightReceiver:
    """One worker's receiving end. One load at a time: a new one takes the place of one that is still going on."""

    def __init__(
        self,
        cache: TensorCache,
        *,
        cache_dir: Path,
        open_file: Callable[[Path], TensorFiles] | None = None,
        num_threads: int = 0,
    ) -> None:
        """`open_file` reads a weight file's header; `num_threads` hash (0: up to four, one for each core)."""
        self._cache = cache
        self._cache_dir = cache_dir
        self._open_file = open_file or _open_weight_file
        self._num_threads = num_threads or min(MAX_THREADS, os.cpu_count() or 1)
        self._current: asyncio.Task[ReceivedTensors] | None = None
        self._loaded_bytes = dict.fromkeys(WEIGHT_SOURCES, 0)
        self._switch = asyncio.Lock()
        self._pin: CachePin | None = None  # of the present stage, or of a load that failed and may be tried again

    @property
    def loaded_bytes(self) -> tuple[tuple[str, int], ...]:
        """Bytes of weights found in own files and in the cache, and received, since this receiver was made.

        May be read from any thread.
        """
        return tuple(self._loaded_bytes.items())

    async def receive(
        self,
        load: StageLoad,
        incoming: AsyncIterator[LoadMessage],
        send: Callable[[LoadReply], Awaitable[None]],
    ) -> ReceivedTensors:
        """Get every tensor of `load` onto the disk, asking the master for those that are not there.

        `incoming` is the call after its `LoadBegin`. Sends `WeightsNeeded` once, and `LoadProgress` before and after.
        Raises `ProtocolError` for a chunk that was not asked for, `CheckpointError` for one with wrong bytes,
        `StageLoadError` when the disk is full, and `LinkLostError` when `incoming` ends too early or when another
        `receive` begins; what came until then is kept for the next try.
        """
        async with self._switch:
            if self._current is not None and not self._current.done():
                self._current.cancel()
                await asyncio.wait([self._current])
            self._current = task = asyncio.create_task(self._receive(load, incoming, send), name="receive weights")
        try:
            return await task
        except asyncio.CancelledError as exc:
            this = asyncio.current_task()
            if this is not None and this.cancelling():
                raise
            raise LinkLostError("the master began the load anew over another connection") from exc

    async def close(self) -> None:
        """Let the cache drop the present stage's tensors when it needs room. Safe to call twice."""
        if self._pin is not None:
            pin, self._pin = self._pin, None
            await asyncio.to_thread(pin.close)

    async def _receive(
        self,
        load: StageLoad,
        incoming: AsyncIterator[LoadMessage],
        send: Callable[[LoadReply], Awaitable[None]],
    ) -> ReceivedTensors:
        loading = _Loading(self._cache, _check_specs(load.tensors), send, self._num_threads, self._loaded_bytes)
        try:
            await loading.search_files(load.file_hints, functools.partial(self._match_hint, load))
            await self._pin_only(loading.missing)
            await loading.search_cache()
            await loading.ask()
            await loading.take(incoming)
        finally:
            await loading.close()
        return ReceivedTensors(specs={spec.name: spec for spec in load.tensors}, ranges=loading.found)

    async def _pin_only(self, sha256s: frozenset[str]) -> None:
        """Pin these in the place of what was pinned before; what is in both never is without a pin."""
        pin = await asyncio.to_thread(self._cache.pin, sha256s) if sha256s else None
        await self.close()
        self._pin = pin

    def _match_hint(
        self, load: StageLoad, hint: FileHint, progress: Callable[[int, int], None], stop: threading.Event
    ) -> dict[str, _Range]:
        """The stage's tensors that a file of this worker holds, by hash. A file that is no use gives none."""
        wanted = {spec.name: spec for spec in load.tensors}
        for path in _candidates(hint):
            with contextlib.suppress(ModelError, OSError):  # unreadable or not a checkpoint: the next source has it
                if path.stat().st_size != hint.num_bytes:
                    continue
                identity = FileIdentity.of(path)
                file = self._open_file(path)
                names = [
                    name
                    for name, stored in file.tensors.items()
                    if name in wanted and stored.num_bytes == wanted[name].num_bytes
                ]
                hashed = hash_tensors(
                    file,
                    names,
                    cache_dir=self._cache_dir,
                    progress=progress,
                    stop=stop,
                    num_threads=self._num_threads,
                )
                found = {
                    spec.sha256: _Range(path=path, offset=file.tensors[spec.name].offset, identity=identity)
                    for spec in hashed
                    if spec.sha256 == wanted[spec.name].sha256
                }
                if found:
                    return found
        return {}


class _Loading:
    """The state of one load: what was found where, and what is on its way."""

    def __init__(
        self,
        cache: TensorCache,
        specs: Mapping[str, TensorSpec],
        send: Callable[[LoadReply], Awaitable[None]],
        num_threads: int,
        loaded_bytes: dict[str, int],
    ) -> None:
        self.found: dict[str, _Range] = {}
        self.stop = threading.Event()
        self._cache = cache
        self._specs = specs  # by hash
        self._missing = {sha256: spec for sha256, spec in specs.items() if spec.num_bytes > 0}
        self._total_bytes = sum(spec.num_bytes for spec in self._missing.values())
        self._done_bytes = 0
        self._loaded_bytes = loaded_bytes  # by source; the receiver's
        self._from_disk = 0
        self._from_cache = 0
        self._partials: dict[str, PartialTensor] = {}
        self._send = send
        self._hashed_bytes = 0  # of the file that is looked through now
        self._reported_s = -math.inf
        self._reported_bytes = -1
        # One thread for all that is written: a write that a cancelled load left behind ends before its file is closed.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._hashers = ThreadPoolExecutor(num_threads, thread_name_prefix="verify")

    @property
    def missing(self) -> frozenset[str]:
        """The hashes that no source had so far."""
        return frozenset(self._missing)

    async def search_files(self, hints: tuple[FileHint, ...], match_hint: MatchHint) -> None:
        """Look through the worker's own files."""
        for hint in hints:
            if not self._missing:
                return
            ranges = await self._look_into(hint, match_hint)
            self._hashed_bytes = 0
            for sha256 in ranges.keys() & self._missing.keys():
                size = self._take_from(sha256, ranges[sha256])
                self._from_disk += size
                self._loaded_bytes["disk"] += size
            await self._report()

    async def search_cache(self) -> None:
        """Look through the cache."""
        loop = asyncio.get_running_loop()
        checks = [loop.run_in_executor(self._hashers, self._check_cached, s) for s in list(self._missing.values())]
        for check in asyncio.as_completed(checks):
            sha256, place = await check
            if place is not None:
                size = self._take_from(sha256, place)
                self._from_cache += size
                self._loaded_bytes["cache"] += size
                await self._report()

    async def ask(self) -> None:
        """Tell the master what is missing, and from where on."""
        await self._in_writer(self._prepare)
        requests = tuple(
            WeightRequest(sha256=sha256, offset=self._partials[sha256].offset if sha256 in self._partials else 0)
            for sha256 in self._missing
        )
        self._done_bytes += sum(request.offset for request in requests)
        await self._send(
            WeightsNeeded(requests=requests, bytes_from_disk=self._from_disk, bytes_from_cache=self._from_cache)
        )

    async def take(self, incoming: AsyncIterator[LoadMessage]) -> None:
        """Store what the master sends, until nothing is missing. One chunk is written while the next one comes."""
        expected = self._total_bytes - self._done_bytes
        writing: asyncio.Future[None] | None = None
        try:
            while expected > 0 and (message := await anext(incoming, None)) is not None:
                if isinstance(message, LoadBegin):
                    raise ProtocolError("a second LoadBegin in one call")
                if writing is not None:
                    await writing
                expected -= memoryview(message.data).nbytes
                writing = asyncio.get_running_loop().run_in_executor(self._writer, self._store, message)
                await self._report()
        finally:
            if writing is not None:
                await writing
        if self._missing:
            raise LinkLostError(
                f"the master stopped sending weights: {self._done_bytes} of {self._total_bytes} bytes are here"
            )
        await self._report(last=True)

    async def close(self) -> None:
        """Close every file; partly received tensors are left for the next try."""
        self.stop.set()
        await self._in_writer(self._close_partials)
        self._writer.shutdown(wait=False)
        self._hashers.shutdown(wait=False, cancel_futures=True)

    def _take_from(self, sha256: str, place: _Range) -> int:
        self.found[sha256] = place
        size = self._missing.pop(sha256).num_bytes
        self._done_bytes += size
        return size

    def _check_cached(self, spec: TensorSpec) -> tuple[str, _Range | None]:
        """A cached tensor whose content is right; a wrong one is dropped. Runs in a thread."""
        path = self._cache.find(spec.sha256, spec.num_bytes)
        if path is None or self.stop.is_set():
            return spec.sha256, None
        digest = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as stream:
                for chunk in read_chunks(stream.fileno(), 0, spec.num_bytes):
                    digest.update(chunk)
                    if self.stop.is_set():
                        return spec.sha256, None
        except (OSError, ModelError):  # an unreadable file is as good as none
            return spec.sha256, None
        if digest.hexdigest() != spec.sha256:
            self._cache.drop(spec.sha256)
            return spec.sha256, None
        return spec.sha256, _Range(path=path, offset=0, identity=None)

    def _prepare(self) -> None:
        """Take up what earlier transfers left, and make room for the rest."""
        for sha256, spec in list(self._missing.items()):
            if len(self._partials) == MAX_RESUMED_TENSORS:
                break
            partial = self._cache.resume(spec)
            if partial is None:
                continue
            self._partials[sha256] = partial
            if partial.is_complete:
                with contextlib.suppress(CheckpointError):  # it was thrown away: ask for it from the start
                    self._finish(partial)
                self._partials.pop(sha256, None)
        here = sum(partial.offset for partial in self._partials.values())
        self._cache.make_room(sum(spec.num_bytes for spec in self._missing.values()) - here)

    def _store(self, chunk: WeightChunk) -> None:
        spec = self._missing.get(chunk.sha256)
        if spec is None:
            reason = "more of it than it has" if chunk.sha256 in self._specs else "it was never asked for"
            raise ProtocolError(f"a chunk at offset {chunk.offset} of tensor {chunk.sha256[:80]!r}: {reason}")
        partial = self._partials.get(chunk.sha256)
        if partial is None:
            if len(self._partials) >= MAX_OPEN_TENSORS + MAX_RESUMED_TENSORS:
                raise ProtocolError(f"tensor {spec.name}: {len(self._partials)} others were begun and not finished")
            if chunk.offset != 0:
                raise ProtocolError(f"tensor {spec.name}: a chunk at offset {chunk.offset}, expected 0")
            partial = self._partials[chunk.sha256] = self._cache.begin(spec)
        partial.write(chunk.offset, chunk.data)
        size = memoryview(chunk.data).nbytes
        self._done_bytes += size
        self._loaded_bytes["network"] += size
        if partial.is_complete:
            self._finish(partial)

    def _finish(self, partial: PartialTensor) -> None:
        sha256 = partial.spec.sha256
        path = partial.finish()
        del self._partials[sha256]
        del self._missing[sha256]
        self.found[sha256] = _Range(path=path, offset=0, identity=None)

    def _close_partials(self) -> None:
        while self._partials:
            self._partials.popitem()[1].close()

    async def _in_writer(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, work)

    async def _look_into(self, hint: FileHint, match_hint: MatchHint) -> dict[str, _Range]:
        """Look into one file in a thread, and tell the master how it goes."""
        future = asyncio.get_running_loop().run_in_executor(None, match_hint, hint, self._note_hashed, self.stop)
        while not (await asyncio.wait([future], timeout=PROGRESS_INTERVAL_S))[0]:
            await self._report()
        return future.result()

    def _note_hashed(self, done_bytes: int, _total_bytes: int) -> None:
        self._hashed_bytes = done_bytes

    async def _report(self, *, last: bool = False) -> None:
        """Tell the master about progress, if there was any. It takes silence for a sign that we hang."""
        now = time.monotonic()
        done_bytes = min(self._done_bytes + self._hashed_bytes, self._total_bytes)
        if last or (now - self._reported_s >= PROGRESS_INTERVAL_S and done_bytes != self._reported_bytes):
            self._reported_s, self._reported_bytes = now, done_bytes
            await self._send(LoadProgress(phase="receive", done_bytes=done_bytes, total_bytes=self._total_bytes))


def _check_specs(tensors: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
    """The tensors by hash (two names may have the same content). Raises `ProtocolError` for a list that can't be."""
    by_hash: dict[str, TensorSpec] = {}
    names: set[str] = set()
    for spec in tensors:
        if spec.name in names:
            raise ProtocolError(f"tensor {spec.name} is listed twice")
        names.add(spec.name)
        if spec.num_bytes < 0 or (spec.num_bytes == 0) != (check_sha256(spec.sha256) == EMPTY_SHA256):
            raise ProtocolError(f"tensor {spec.name}: {spec.num_bytes} bytes can't have the SHA-256 {spec.sha256}")
        other = by_hash.setdefault(spec.sha256, spec)
        if other.num_bytes != spec.num_bytes:
            raise ProtocolError(
                f"tensors {other.name} and {spec.name} have one SHA-256, but {other.num_bytes} and "
                f"{spec.num_bytes} bytes"
            )
    return by_hash


def _candidates(hint: FileHint) -> list[Path]:
    """Files of this worker that may be the one that the master means."""
    paths = [Path(hint.path)] if hint.path else []
    if hint.hub_repo:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with contextlib.suppress(HFValidationError):
            cached = try_to_load_from_cache(hint.hub_repo, hint.hub_filename, revision=hint.hub_revision or None)
            if isinstance(cached, str):
                paths.append(Path(cached))
    return [path for path in paths if path.is_absolute() and path.is_file()]


def _open_weight_file(path: Path) -> TensorFiles:
    from shardwright.model.checkpoint import open_weight_file

    return open_weight_file(path)
