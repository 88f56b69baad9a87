"""Where the weights of offloaded layers lie: a file on disk that nobody else sees, or the host's pinned memory.

The file has no name, so that it is gone whatever happens to the process. It is written and read past the page cache
(`O_DIRECT`), or, on a file system that can't do that, dropped from it at once: what is offloaded takes no memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from shardwright.errors import OffloadError
from shardwright.model.raw_tensors import as_bytes

ALIGNMENT = 4096
"""Of offsets, lengths and memory that go past the page cache."""

SUFFIX = ".weights"

_PIECE_BYTES = 4 * 1024 * 1024
_NUM_READERS = 4  # pieces read at once: disks are faster with several requests to work on
_KEPT_FREE_BYTES = 1 << 30  # of the disk: the machine has other uses for it


class LayerStore(Protocol):
    """Keeps layers' bytes beside the device's memory."""

    def write(self, layer: int, data: torch.Tensor) -> None:
        """Keep a layer's bytes (uint8, aligned, a whole number of `ALIGNMENT`). Raises `OffloadError`."""
        ...

    def read(self, layer: int, into: torch.Tensor) -> None:
        """Fill the beginning of a CPU buffer (uint8, aligned) with them. Raises `OffloadError`."""
        ...

    def close(self) -> None:
        """Give the room back."""
        ...


def aligned_buffer(num_bytes: int, *, pinned: bool = False) -> torch.Tensor:
    """Memory that can be read into past the page cache: uint8, at a whole number of `ALIGNMENT`."""
    whole = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + num_bytes]


def rounded_up(num_bytes: int, unit: int = ALIGNMENT) -> int:
    """The next whole number of units."""
    return -(-num_bytes // unit) * unit


def free_disk_bytes(folder: Path) -> int:
    """Room for offloaded weights in a folder, which is made if need be. Raises `OffloadError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return max(shutil.disk_usage(folder).free - _KEPT_FREE_BYTES, 0)
    except OSError as exc:
        raise OffloadError(
            f"{folder}: weights can't be offloaded there: {exc.strerror}; choose another --cache-dir"
        ) from exc


class DiskStore:
    """A file without a name in a folder. Written first, read then; reads may come from any thread, one at a time."""

    def __init__(self, folder: Path, *, num_bytes: int) -> None:
        """`num_bytes` will be about what is kept. Raises `OffloadError` where the disk has no room or can't be used."""
        room = free_disk_bytes(folder)
        if num_bytes > room:
            raise OffloadError(
                f"{folder}: {num_bytes / 2**20:.0f} MiB of weights are to be offloaded, but its disk has only "
                f"{room / 2**20:.0f} MiB to spare ({_KEPT_FREE_BYTES / 2**20:.0f} MiB stay free); make room or choose "
                "a --cache-dir on another disk"
            )
        self._folder = folder
        self._places: dict[int, tuple[int, int]] = {}  # layer -> offset, length
        self._end = 0
        self._file, self.is_direct = self._open()
        self._readers = ThreadPoolExecutor(max_workers=_NUM_READERS, thread_name_prefix="offload-read")

    def fileno(self) -> int:
        """The file, to those that want to know where its pages are."""
        return self._file

    def _open(self) -> tuple[int, bool]:
        """Make the file, open it and take its name away; past the page cache where the file system can."""
        for left_over in self._folder.glob(f"*{SUFFIX}"):  # of a process that was killed between two lines below
            with contextlib.suppress(OSError):
                left_over.unlink()
        path = self._folder / f"{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        try:
            for direct in (getattr(os, "O_DIRECT", 0), 0):
                try:
                    return os.open(path, flags | direct, 0o600), direct != 0
                except OSError as exc:
                    if not direct or exc.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                        raise
        except OSError as exc:
            raise self._trouble("no file can be made", exc) from exc
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        raise AssertionError("the last try returned or raised")

    def write(self, layer: int, data: torch.Tensor) -> None:
        """Append a layer."""
        view = as_bytes(data).data
        assert len(view) % ALIGNMENT == 0 == data.data_ptr() % ALIGNMENT, "direct I/O takes aligned memory"
        try:
            done = 0
            while done < len(view):
                done += os.pwrite(self._file, view[done : done + _PIECE_BYTES], self._end + done)
            if not self.is_direct:
                os.fsync(self._file)
            self._forget(self._end, len(view))
        except OSError as exc:
            raise self._trouble(f"layer {layer} can't be written", exc) from exc
        self._places[layer] = (self._end, len(view))
        self._end += len(view)

    def read(self, layer: int, into: torch.Tensor) -> None:
        """Read a layer, several pieces at once."""
        offset, length = self._places[layer]
        view = as_bytes(into).data

        def piece(start: int) -> None:
            end = min(start + _PIECE_BYTES, length)
            while start < end:
                count = os.preadv(self._file, [view[start:end]], offset + start)
                if count == 0:
                    raise OSError(errno.EIO, "the file ends too early")
                start += count

        try:
            list(self._readers.map(piece, range(0, length, _PIECE_BYTES)))
            self._forget(offset, length)
        except OSError as exc:
            raise self._trouble(f"layer {layer} can't be read back", exc) from exc

    def _forget(self, offset: int, length: int) -> None:
        """Drop what was read or written from the page cache; some file systems use it for direct reads all the same."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, offset, length, os.POSIX_FADV_DONTNEED)

    def _trouble(self, what: str, exc: OSError) -> OffloadError:
        advice = "; the disk is full: make room or choose a --cache-dir on another" if exc.errno == errno.ENOSPC else ""
        return OffloadError(f"{self._folder}: weights that were offloaded: {what}: {exc.strerror}{advice}")

    def close(self) -> None:
        """Close the file, which gives its room back."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class HostStore:
    """The host's memory, pinned so that a GPU copies from it at full speed."""

    def __init__(self, *, pinned: bool = True) -> None:
        self._pinned = pinned
        self._layers: dict[int, torch.Tensor] = {}

    def write(self, layer: int, data: torch.Tensor) -> None:
        """Keep a copy."""
        try:
            kept = torch.empty(len(data), dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as exc:
            raise OffloadError(
                f"layer {layer} can't be offloaded: the host has no {len(data) / 2**20:.0f} MiB of memory to pin"
            ) from exc
        self._layers[layer] = kept.copy_(data)

    def read(self, layer: int, into: torch.Tensor) -> None:
        """Copy; into a GPU's buffer too."""
        kept = self._layers[layer]
        into[: len(kept)].copy_(kept, non_blocking=True)

    def close(self) -> None:
        """Free it."""
        self._layers.clear()
