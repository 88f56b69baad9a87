"""The rows of the last hour on disk: `metrics.jsonl`, one JSON object a line, oldest first.

Rows are appended; what is too old is cut off now and then by writing the rest into a new file that takes the old one's
place. So a reader always sees whole rows but for, at most, the last line; and a master that starts again goes on where
another stopped, whatever stopped it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

_CUT_PART: Final = 4
"""What is too old is cut off when it is a quarter of what is kept: the file is rarely rewritten, and stays small."""


class MetricsLog:
    """One file of rows. Everything here blocks on the disk: call it off the event loop, from one thread at a time.

    A disk that takes no rows is worth one warning; the next comes after it worked again. Rows that could not be
    written are not tried again.
    """

    def __init__(self, path: Path, *, kept_s: float) -> None:
        self._path = path
        self._kept_s = kept_s
        self._oldest: float | None = None  # timestamp of the first row in the file; None: not known, or no row
        self._is_whole = False  # the file is known to end with a whole line
        self._is_failing = False

    def read(self, *, now: float) -> list[dict[str, Any]]:
        """The rows that are not too old; an empty list where there is no file, or one that can't be read."""
        try:
            return [row for _, row in _rows(self._path) if row["timestamp"] >= now - self._kept_s]
        except OSError as exc:
            if not isinstance(exc, FileNotFoundError):
                self._warn(exc)
            return []

    def append(self, rows: Iterable[Mapping[str, object]], *, now: float) -> None:
        """Add rows, oldest first; their fields are plain JSON values. `now` is in seconds since 1970."""
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        try:
            if not self._is_whole:
                self._mend()
            if lines:
                self._add(lines.encode())
            if self._oldest is None and (lines or self._path.exists()):
                self._oldest = next((row["timestamp"] for _, row in _rows(self._path)), None)
            if self._oldest is not None and self._oldest < now - self._kept_s * (1 + 1 / _CUT_PART):
                self._cut(now)
        except OSError as exc:
            self._warn(exc)
            return
        self._is_failing = False

    def _add(self, data: bytes) -> None:
        """All of it or nothing, unless the disk does not even let the file be cut back."""
        with self._path.open("ab", buffering=0) as stream:  # a buffer would be written once more when it is closed
            end = stream.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[stream.write(data) :]
            except OSError:
                self._is_whole = False
                with contextlib.suppress(OSError):
                    os.ftruncate(stream.fileno(), end)
                raise

    def _mend(self) -> None:
        """Cut off the part of a line that a master left which was stopped while it wrote."""
        with contextlib.suppress(FileNotFoundError), self._path.open("r+b") as stream:
            end = stream.seek(0, os.SEEK_END)
            start = end
            tail = b""
            while start > 0 and b"\n" not in tail:
                start = max(start - 4096, 0)
                stream.seek(start)
                tail = stream.read(end - start)
            whole = start + tail.rfind(b"\n") + 1
            if whole < end:
                stream.truncate(whole)
        self._is_whole = True

    def _cut(self, now: float) -> None:
        kept = [(line, row) for line, row in _rows(self._path) if row["timestamp"] >= now - self._kept_s]
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(b"".join(line for line, _ in kept))
            temporary.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._oldest = kept[0][1]["timestamp"] if kept else None

    def _warn(self, exc: OSError) -> None:
        if not self._is_failing:
            log.warning("%s can't be kept (%s); the cluster goes on without it", self._path, exc.strerror or exc)
        self._is_failing = True


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The file's rows with their lines; what is no row is passed over. Raises `OSError`."""
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("timestamp"), (int, float)):
                yield line, row
