"""The compiled kernels in a worker's cache: where they lie, how large they are, and how to remove them.

    <cache_dir>/kernels/
        lock                       held by who compiles here, or removes
        product-<key>.so           the kernel of linear layers (`model/product.py`)
        build-<id>/                what a compiler that was killed left behind
        deepspeed/lock             the same for the folders beside it
        deepspeed/<key>/           DeepSpeed's all-reduce (`model/deepspeed_kernel.py`)

Knows files and locks; nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardwright.model.kernel_build import LOCK, locked_if_free


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEntry:
    """One kernel, as `shardwright cache ls` shows it."""

    name: str  # its path below `kernels`
    num_bytes: int
    last_used_s: float  # seconds since 1970
    path: Path


class KernelCache:
    """The kernels kept in `cache_dir`. A process that has loaded one keeps it, whatever becomes of the file."""

    def __init__(self, cache_dir: Path) -> None:
        self.folder = cache_dir / "kernels"
        self.deepspeed_folder = self.folder / "deepspeed"

    def entries(self) -> list[KernelEntry]:
        """Every kernel and every leftover of one, the least recently used first."""
        found = [entry for folder in self._folders() for entry in self._entries(folder)]
        return sorted(found, key=lambda entry: (entry.last_used_s, entry.name))

    def clear(self) -> tuple[int, list[Path]]:
        """Remove all but what somebody compiles now.

        Gives the number of bytes freed and the folders in which a process compiles, whose kernels stay.
        """
        freed, busy = 0, []
        for folder in self._folders():
            with locked_if_free(folder) as is_free:
                if not is_free:
                    busy.append(folder)
                    continue
                for entry in list(self._entries(folder)):
                    if entry.path.is_dir():
                        shutil.rmtree(entry.path)
                    else:
                        entry.path.unlink()
                    freed += entry.num_bytes
        return freed, busy

    def _folders(self) -> list[Path]:
        return [folder for folder in (self.folder, self.deepspeed_folder) if folder.is_dir()]

    def _entries(self, folder: Path) -> Iterator[KernelEntry]:
        for path in folder.iterdir():
            if path.name == LOCK or path == self.deepspeed_folder:
                continue
            with contextlib.suppress(FileNotFoundError):  # another process renamed or removed it just now
                files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
                yield KernelEntry(
                    name=str(path.relative_to(self.folder)),
                    num_bytes=sum(each.stat().st_size for each in files),
                    last_used_s=max((each.stat().st_mtime for each in files), default=path.stat().st_mtime),
                    path=path,
                )
