"""Shows on standard error how a session's start gets on: bars in a terminal, a line for each turn elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.spinner import Spinner
from rich.text import Text

from shardwright.config import MIB

if TYPE_CHECKING:
    from shardwright.runtime.session import StageRow


class StartProgress:
    """A `SessionListener` that draws; as a context manager, so that the bars are gone when the answer starts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_terminal = console.is_terminal
        self._told: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._spinner = Spinner("dots")
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,  # the live display draws it
        )
        self._live = Live(Group(self._spinner, self._progress), console=console, transient=True)

    def __enter__(self) -> Self:
        """Start to draw."""
        if self._is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bars away."""
        self.stop()

    def stop(self) -> None:
        """Take the bars away; safe to call twice."""
        if self._is_terminal:
            self._live.stop()

    def doing(self, what: str) -> None:
        """Say what is waited for now."""
        if self._is_terminal:
            self._spinner.update(text=Text(what))
        else:
            self._console.print(what, markup=False, soft_wrap=True)

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
        if not self._is_terminal:
            count = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
            self._console.print(f"ready: {count}", markup=False)

    def _show(self, name: str, phase: str, done: int, total: int) -> None:
        with self._lock:  # a session reports from helper threads too
            if self._is_terminal:
                self._draw(name, phase, done, total)
            elif (name, phase) not in self._told:
                self._told.add((name, phase))
                self._console.print(f"{name}: {phase} ({total / MIB:.1f} MiB)", markup=False, soft_wrap=True)

    def _draw(self, name: str, phase: str, done: int, total: int) -> None:
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(f"{name}  {phase}", total=total)
        self._progress.update(self._bars[name], description=f"{name}  {phase}", completed=done, total=total)
