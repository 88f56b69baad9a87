"""Shows on standard error how a session's start gets on: bars in a terminal, a line for each turn elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from shardwright.config import MIB

if TYPE_CHECKING:
    from shardwright.runtime.session import StageRow


class StartProgress:
    """A `SessionListener` that draws; as a context manager, so that the bars are gone when the answer starts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._told: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Self:
        """Start to draw."""
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bars away."""
        self.stop()

    def stop(self) -> None:
        """Take the bars away; safe to call twice."""
        if self._progress is not None:
            self._progress.stop()

    def downloading(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Model files come."""
        self._show(what, "download", done_bytes, total_bytes)

    def hashing(self, done_bytes: int, total_bytes: int) -> None:
        """The model's tensors get their content hashes."""
        self._show("model", "hash", done_bytes, total_bytes)

    def loading(self, worker: str, done_bytes: int, total_bytes: int, phase: str) -> None:
        """A worker takes or builds its stage."""
        self._show(worker, phase, done_bytes, total_bytes)

    def ready(self, stages: Sequence[StageRow]) -> None:
        """The pipeline takes prompts: no more bars."""
        self.stop()
        if self._progress is None:
            self._console.print(f"ready: {len(stages)} stages", markup=False)

    def _show(self, name: str, phase: str, done: int, total: int) -> None:
        with self._lock:  # a session reports from helper threads too
            if self._progress is not None:
                self._draw(self._progress, name, phase, done, total)
            elif (name, phase) not in self._told:
                self._told.add((name, phase))
                self._console.print(f"{name}: {phase} ({total / MIB:.1f} MiB)", markup=False, soft_wrap=True)

    def _draw(self, progress: Progress, name: str, phase: str, done: int, total: int) -> None:
        if name not in self._bars:
            self._bars[name] = progress.add_task(f"{name}  {phase}", total=total)
        progress.update(self._bars[name], description=f"{name}  {phase}", completed=done, total=total)
