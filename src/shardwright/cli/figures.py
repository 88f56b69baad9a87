"""Figures as people read them: short, with a unit, and a dash for what is not known."""

from __future__ import annotations

from collections.abc import Callable

UNKNOWN = "-"
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def ratio(value: float | None) -> str:
    """A part of one, in percent."""
    return UNKNOWN if value is None else f"{100 * value:.0f}%"


def seconds(value: float | None) -> str:
    """A short time: 0.4 ms, 120 ms, 1.5 s."""
    if value is None:
        return UNKNOWN
    if value < 0.0095:
        return f"{1000 * value:.1f} ms"
    return f"{1000 * value:.0f} ms" if value < 0.9995 else f"{value:.1f} s"


def duration(value: float) -> str:
    """A long time, in its two largest units: 3 d 4 h, 2 min 5 s."""
    left, parts = max(round(value), 0), list[str]()
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
        elif parts:
            break
    return " ".join(parts[:2])


def size(value: float | None) -> str:
    """Bytes: 512 B, 1.5 GiB."""
    if value is None:
        return UNKNOWN
    index = 0
    while value >= 1023.95 and index < len(_BINARY) - 1:
        value, index = value / 1024, index + 1
    return f"{value:.0f} {_BINARY[index]}" if index == 0 or value >= 99.95 else f"{value:.1f} {_BINARY[index]}"


def part_of(used: float | None, total: float | None) -> str:
    """Bytes of all bytes, the unit once: 1.0/2.0 GiB."""
    if used is None or total is None:
        return UNKNOWN
    index = 0
    while max(used, total) >= 1023.95 and index < len(_BINARY) - 1:
        used, total, index = used / 1024, total / 1024, index + 1
    return f"{used:.1f}/{total:.1f} {_BINARY[index]}"


def rate(value: float | None) -> str:
    """Bytes in a second."""
    return UNKNOWN if value is None else f"{size(value)}/s"


def pair(low: float | None, high: float | None, shown: Callable[[float | None], str] = seconds) -> str:
    """A median and a 95th percentile."""
    return UNKNOWN if low is None and high is None else f"{shown(low)}, p95 {shown(high)}"


def with_ranks(name: str, num_ranks: int) -> str:
    """A worker or device as a table shows it: how many devices compute together, where it is more than one."""
    return name if num_ranks == 1 else f"{name} x {num_ranks}"
